"""Make the clock world's warm start: a small policy and judge, trained on the teacher's examples.

    python tools/warm_start.py                                    configs/clock/warm_start.yaml
    python tools/warm_start.py --config MINE.yaml --out FOLDER policy.steps=500
    python tools/warm_start.py --only judge --out FOLDER judge.steps=500

Each becomes an ordinary Hugging Face folder. Tokenizer and random weights come first, then supervised training by
the same Megatron policy that reinforcement learning uses, on one rank. The same configuration gives the same weights
on the same machine.
"""

import argparse
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_fapo.batch.layout import Layout
from megatron_fapo.batch.pack import SupervisedExample, make_supervised_batch
from megatron_fapo.batch.settings import BatchSettings
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import OptimizerSettings, PolicySettings
from megatron_fapo.policy.supervised import train_supervised
from megatron_fapo.records import MiniBatch, UpdateReport, ints
from megatron_fapo.settings import Settings, load
from megatron_fapo.tasks import clock_tokenizer
from megatron_fapo.tasks.clock import ClockTask
from megatron_fapo.tasks.settings import ClockSettings
from megatron_fapo.tasks.tokenizer import ChatTokenizer

ROOT = Path(__file__).resolve().parents[1]
LOG_EVERY = 100
MODELS = ("policy", "judge")

log = logging.getLogger("warm_start")

Size = Annotated[int, Field(gt=0)]


class ModelSettings(Settings):
    """A small Qwen3 with tied embeddings."""

    hidden: Size
    """Width of the residual stream."""
    layers: Size
    """Transformer layers."""
    heads: Size
    """Attention heads."""
    kv_heads: Size
    """Key and value heads."""
    head_dim: Size
    """Width of a head."""
    mlp: Size
    """Width of the MLP."""
    vocabulary: Size
    """Rows of the embedding; the tokenizer must fit."""
    context: Size
    """Most tokens of a sequence."""


class ScheduleSettings(Settings):
    """Where one model starts, and how long it learns."""

    seed: int
    """Seeds its random weights."""
    steps: Size
    """Optimizer steps."""
    batch: Size
    """Examples a step."""


class WarmStartSettings(Settings):
    """The file configs/clock/warm_start.yaml."""

    seed: int
    """Seeds the examples."""
    task: ClockSettings
    """The world, and how sloppy its teacher is."""
    model: ModelSettings
    """Size of both models."""
    policy: ScheduleSettings
    """Training of the policy."""
    judge: ScheduleSettings
    """Training of the judge."""
    optimizer: OptimizerSettings
    """AdamW for both; the rate falls on a cosine that ends with the last step."""


def main() -> None:
    """Make both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "clock" / "warm_start.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "configs" / "clock" / "warm-start")
    parser.add_argument("--only", choices=MODELS, help="make one of the two [default: both]")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    models = MODELS if arguments.only is None else (arguments.only,)
    make(load(WarmStartSettings, arguments.config, arguments.overrides), arguments.out, models)


def make(settings: WarmStartSettings, out: Path, models: Sequence[str] = MODELS) -> None:
    """Train policy and judge, or one of them, into `out/policy` and `out/judge`, replacing what is there."""
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder)
        clock_tokenizer.save(settings.task, start)
        tokenizer = ChatTokenizer.load(start)
        task = ClockTask(settings.task, tokenizer, settings.seed)

        def policy_example(index: int) -> SupervisedExample:
            prompt, solution = task.teacher(index)
            return example(prompt.id, tokenizer, prompt.token_ids.tolist(), solution)

        def judge_example(index: int) -> SupervisedExample:
            messages, verdict = task.critic_example(index)
            return example(f"c{index}", tokenizer, tokenizer.encode_chat(messages).tolist(), verdict)

        if "policy" in models:
            random_model(settings, settings.policy.seed, tokenizer, start)
            train("policy", settings, settings.policy, start, policy_example, out / "policy")
        if "judge" in models:
            random_model(settings, settings.judge.seed, tokenizer, start)
            train("judge", settings, settings.judge, start, judge_example, out / "judge")


def example(name: str, tokenizer: ChatTokenizer, prompt: list[int], text: str) -> SupervisedExample:
    """A prompt and the answer to learn, with the token that ends it."""
    response = [*tokenizer.encode(text).tolist(), tokenizer.eos_ids[0]]
    return SupervisedExample(id=name, prompt_ids=ints(prompt), response_ids=ints(response))


def random_model(settings: WarmStartSettings, seed: int, tokenizer: ChatTokenizer, folder: Path) -> None:
    """Write a Qwen3 with random weights into `folder`."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = settings.model
    if tokenizer.vocab_size > size.vocabulary:
        raise SystemExit(f"model.vocabulary={size.vocabulary}: the tokenizer has {tokenizer.vocab_size} tokens")
    torch.manual_seed(seed)
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        intermediate_size=size.mlp,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_ids[0],
        pad_token_id=0,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def train(
    name: str,
    settings: WarmStartSettings,
    schedule: ScheduleSettings,
    start: Path,
    make_example: Callable[[int], SupervisedExample],
    out: Path,
) -> None:
    """Supervised training from `start` into `out`."""
    optimizer = settings.optimizer.changed(schedule="cosine", decay_steps=schedule.steps)
    batching = BatchSettings()

    def batch(step: int, layout: Layout) -> MiniBatch:
        indices = range(step * schedule.batch, (step + 1) * schedule.batch)
        return make_supervised_batch(map(make_example, indices), layout, batching)

    def tell(step: int, report: UpdateReport) -> None:
        if step % LOG_EVERY == 0 or step == schedule.steps - 1:
            log.info("%s: step %d of %d, loss %.4f", name, step + 1, schedule.steps, report.loss)

    with LocalRanks(PolicySettings(model=start, optimizer=optimizer), seed=settings.seed) as ranks:
        train_supervised(ranks, (batch(step, ranks.layout) for step in range(schedule.steps)), tell)
        out.parent.mkdir(parents=True, exist_ok=True)
        ranks.call("save_hf", str(out))


if __name__ == "__main__":
    main()
