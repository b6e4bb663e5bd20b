"""The tables of docs/planner.md: `memory` (planned against measured bytes), `checks` (planned against published times),
`judge` (what the judge costs, where it sits, by which lever less), `sensitivity` (each assumption 20 % up and down),
`assumptions`.

    python benchmarks/planner.py checks
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_fapo.config import Config, read_config
from megatron_fapo.errors import JudgeError
from megatron_fapo.plan.assumptions import Assumptions, card
from megatron_fapo.plan.deployment import Deployment, JudgePlace, Placement, Servers, deployment
from megatron_fapo.plan.estimate import estimate
from megatron_fapo.plan.memory import state
from megatron_fapo.plan.shape import Shape, part
from megatron_fapo.plan.simulate import Simulation, simulate
from megatron_fapo.plan.times import publish, switch
from megatron_fapo.policy.settings import ParallelSettings, PolicySettings

CONFIGS = Path(__file__).parents[1] / "configs"
H100 = card("h100")
ASSUMED = Assumptions()
TINY = {
    "vocab_size": 4003,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 352,
    "tie_word_embeddings": False,
}


class Table:
    """A Markdown table, each row shown as soon as it is known."""

    def __init__(self, *heading: object) -> None:
        self.add(*heading)
        self.add(*["---"] * len(heading))

    def add(self, *cells: object) -> None:
        """One row more."""
        sys.stdout.write(f"| {' | '.join(str(cell) for cell in cells)} |\n")
        sys.stdout.flush()


def memory(steps: int) -> None:
    """Bytes that ranks of a small model free when they offload, against `plan.memory.state`."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megatron_fapo.policy.local import LocalRanks

    table = Table("layout", "dtype", "owner", "planned, bytes", "measured, bytes", "error")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**TINY)).save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text("{}")
        shape = Shape.of({**TINY, "model_type": "qwen3"})
        for axes in ({}, {"tensor": 2}, {"data": 2}):
            for dtype in ("float32", "bfloat16"):
                parallel = ParallelSettings(**axes)
                settings = PolicySettings(model=Path(folder), parallel=parallel, dtype=dtype, timeout=120)
                planned = state(settings, part(shape, parallel, 0))
                with LocalRanks(settings, seed=1) as ranks:
                    ranks.call("update", *_one_update(ranks.layout))
                    freed = ranks.call("offload", ("parameters", "gradients", "optimizer"))[0]
                for owner, measured in freed.items():
                    expected = getattr(planned, owner)
                    layout = ", ".join(f"{axis} {size}" for axis, size in axes.items()) or "one rank"
                    table.add(layout, dtype, owner, expected, measured, f"{expected / measured - 1:+.2%}")


def _one_update(layout: Any) -> tuple[Any, Any]:
    """A step of two small groups, so that Adam has its moments."""
    import numpy as np

    from megatron_fapo.algorithm.settings import LossSettings
    from megatron_fapo.batch.pack import make_batch
    from megatron_fapo.batch.settings import BatchSettings
    from megatron_fapo.records import Group, Judged, NotJudged, Outcome, Prompt, Rollout, floats, ints

    outcome = Outcome(right=True, score=1.0, answer=None, why="equal")
    groups = []
    for number in range(2):
        name = f"p{number}"
        prompt = Prompt(id=name, task="t", question="", messages=(), token_ids=ints([1, 2]), reference_answer="")
        rollouts = [
            Rollout(
                id=f"s0-{name}-r{index}",
                prompt_id=name,
                token_ids=ints([3, 4, 5]),
                logprobs=floats([-8.0] * 3),
                versions=(),
                temperature=1.0,
                seed=0,
                text="",
                finish_reason="stop",
            )
            for index in range(2)
        ]
        judged = tuple(
            Judged(rollout=r, outcome=outcome, verdict=NotJudged(reason="off"), oracle=None) for r in rollouts
        )
        groups.append(Group(step=0, prompt=prompt, judged=judged))
    advantages = [[floats(np.ones(3)), floats(-np.ones(3))] for _ in groups]
    return make_batch(groups, advantages, layout, BatchSettings(), 1), LossSettings()


QWEN3_32B = {
    "model_type": "qwen3",
    "num_hidden_layers": 64,
    "hidden_size": 5120,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 25600,
    "vocab_size": 151936,
}


def _nemo(shape: Shape, parallel: dict[str, Any], tensor: int) -> tuple[Config, Deployment]:
    """NeMo-RL's performance recipes: 64 x 32 samples of at most 4096 tokens on 32 H100, plain GRPO."""
    config = read_config(
        CONFIGS / "qwen2.5-32b.yaml",
        [
            "rollout={prompts_per_step: 64, group_size: 32, max_new_tokens: 4096}",
            "batch={updates: 4, tokens_per_microbatch: 4096, skip_zero_advantage: false}",
            "policy.recompute=none",
            "judge.enabled=false",
        ],
    )
    policy = Servers(
        shape=shape, count=32 // tensor, tensor=tensor, memory_fraction=0.6, max_running=256, context_length=4608
    )
    made = Deployment(
        card=H100,
        shape=shape,
        parallel=ParallelSettings(**parallel),
        policy=policy,
        judge=None,
        placement="colocated",
        judge_place="slice",
    )
    return config, made


def checks(steps: int) -> None:
    """Times and shares that others published, none of which is among the assumptions."""
    import json

    table = Table("what", "published", "planned", "error")

    def row(what: str, published: float, planned: float, unit: str) -> None:
        table.add(what, f"{published:g} {unit}", f"{planned:.3g} {unit}", f"{planned / published - 1:+.0%}")

    moe = Shape.of(json.loads((CONFIGS / "models" / "qwen3-30b-a3b.json").read_text()))
    dense = Shape.of(QWEN3_32B)
    # tokens a second and GPU, times GPUs and seconds, are the tokens of 2048 samples
    for name, shape, layout, tensor, seconds, rate in (
        ("Qwen3-32B", dense, {"tensor": 4, "sequence": True, "pipeline": 4, "data": 2}, 4, 376, 571),
        ("Qwen3-30B-A3B", moe, {"expert": 8, "data": 32}, 2, 192, 1102),
    ):
        mean = rate * 32 * seconds / 2048 - ASSUMED.prompt_tokens
        plan = estimate(*_nemo(shape, layout, tensor), ASSUMED, mean)
        row(f"NeMo-RL, {name}, 32 H100, GRPO: a step", seconds, plan.seconds, "s")
    for name, published in (("32B", 14.2), ("30B-A3B", 32.2)):
        model = {"32B": dense, "30B-A3B": moe}[name]
        split = replace(_nemo(model, {"data": 32, "expert": 1}, 2)[1], placement="split")
        row(f"verl, weights over NCCL, {name}", published, publish(split, ASSUMED), "s")
    small = Shape.of(json.loads((CONFIGS / "models" / "qwen3-4b.json").read_text()))
    config, made = _nemo(small, {"data": 4}, 1)
    row(
        "Relax#170, 4B on 4 GPUs: both changes of phase and weights",
        13.3,
        switch(made, config.policy, ASSUMED) + publish(made, ASSUMED),
        "s",
    )
    for name, mean, shares in (("qwen2.5-math-7b", 1100, (42, 18, 33)), ("qwen2.5-32b", 2300, (60, 14, 20))):
        run = read_config(
            CONFIGS / f"{name}.yaml",
            ["judge.skip=false", "judge.step_deadline=null", "batch.skip_zero_advantage=false"],
        )
        found = simulate(run, deployment(run, H100), ASSUMED, steps=steps, mean=mean)
        whole = found.mean("seconds")
        landed = found.mean("rollouts_landed")
        for part_, published, planned in (
            ("rollouts", shares[0], landed),
            ("judge", shares[1], found.mean("generate") - landed),
            ("update", shares[2], found.mean("update")),
        ):
            row(f"FAPO, {name}: share of {part_}", published, 100 * planned / whole, "%")


def judge(steps: int, run: str | None = None) -> None:
    """The judge's overhead at 7B, 32B and 70B: where it sits, and levers."""
    sizes = (("qwen2.5-32b", 64, 2300), ("llama-3.3-70b", 128, 2300), ("qwen2.5-math-7b", 32, 1100))
    cascade, soon, brief = "judge.cascade.clean_below=0.05", "judge.step_deadline=15", {"verdict_tokens": 1000.0}
    cases: list[tuple[str, Placement, JudgePlace, list[str], dict[str, Any]]] = [
        ("after the last rollout, on all GPUs", "colocated", "after", [], {}),
        ("beside every policy server", "colocated", "shared", [], {}),
        ("on a slice", "colocated", "slice", [], {}),
        ("on a slice; 15 s", "colocated", "slice", [soon], {}),
        ("on a slice; cascade, 15 s", "colocated", "slice", [cascade, soon], {}),
        ("on a slice; 1000 tokens", "colocated", "slice", [], brief),
        ("on a slice; 1000 tokens, 15 s", "colocated", "slice", [soon], brief),
        ("on a slice; ranks apart, twice the GPUs", "split", "slice", [], {}),
    ]
    table = Table("run", "GPUs", "judge", "judge", "learning", "publish", "switch", "overhead", "failed")
    for name, gpus, mean in sizes:
        if run not in (None, name):
            continue
        for words, placement, place, overrides, changes in cases:
            config = read_config(CONFIGS / f"{name}.yaml", ["judge.step_deadline=null", *overrides])
            on = 2 * gpus if placement == "split" else gpus
            made = deployment(config, H100, gpus=on, placement=placement, judge_place=place)
            try:
                found = simulate(config, made, replace(ASSUMED, **changes), steps=steps, mean=mean)
            except JudgeError as error:
                table.add(name, on, words, "the run stops:", str(error).partition(",")[0], "", "", "", "")
            else:
                table.add(name, on, words, *_costs(found))


def _costs(found: Simulation) -> tuple[str, ...]:
    shares = (found.judge_overhead, found.learning_share, found.publish_share, found.switch_share, found.overhead)
    return (*(f"{share:.1%}" for share in shares), f"{found.mean('failed') / max(found.mean('judged'), 1):.1%}")


def sensitivity(steps: int) -> None:
    """Seconds of a step and overhead of the 32B run, not simulated, when one assumption is 20 % less or more.

    Overhead is then what is left of it if verdicts hide behind generation as long as that takes.
    """
    config = read_config(CONFIGS / "qwen2.5-32b.yaml")
    made = deployment(config, H100)

    def found(assume: Assumptions) -> tuple[float, float]:
        step = estimate(config, made, assume)
        plain = estimate(config, made.without_judge(), assume)
        return step.seconds, step.seconds / (plain.generate.seconds + plain.update.seconds) - 1

    seconds, overhead = found(ASSUMED)
    table = Table("assumption", "value", "step at -20 %", "at +20 %", "overhead at -20 %", "at +20 %")
    table.add("as they are", "", *[f"{seconds:.0f} s"] * 2, *[f"{overhead:.1%}"] * 2)
    for name in Assumptions.names():
        if name in ("communicators", "communicators_moe", "context"):
            continue  # bytes, which take no time
        low, high = found(ASSUMED.scaled(name, 0.8)), found(ASSUMED.scaled(name, 1.2))
        table.add(
            f"`{name}`",
            f"{getattr(ASSUMED, name):g}",
            *(f"{one[0] / seconds - 1:+.1%}" for one in (low, high)),
            *(f"{one[1]:.1%}" for one in (low, high)),
        )


def assumptions(steps: int) -> None:
    """All of them, with their sources."""
    table = Table("name", "value", "unit", "what", "source")
    for name in Assumptions.names():
        about = Assumptions.about(name)
        table.add(f"`{name}`", f"{getattr(ASSUMED, name):g}", about["unit"], about["about"], about["source"])


TABLES: dict[str, Callable[[int], None]] = {
    one.__name__: one for one in (memory, checks, judge, sensitivity, assumptions)
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--steps", type=int, default=2, help="steps of each simulation")
    parser.add_argument("--run", help="for judge: this run alone, such as llama-3.3-70b")
    arguments = parser.parse_args()
    if arguments.table == "judge":
        judge(arguments.steps, arguments.run)
    else:
        TABLES[arguments.table](arguments.steps)
