"""What the judge costs: seconds of a training step with it over without, as at a 32B policy and a 4B judge.

    python benchmarks/judge_overhead.py [--quick] [--json]

A random policy of 8 times the judge's parameters, groups of 8, answers that end by chance, 60 % of them right (by a
hash, prompts of unlike difficulty), verdicts of 1.4 times the answers' tokens. Real parts: two policy servers and a
judge server over HTTP, sampler and judge scheduling, a Megatron rank for the update; weights are not published. All
rounds have the same rows. Each arm with a judge has one without beside it, in the same round, which trains on the *same
rewards*: its verdicts are read from a file that the warm-up round recorded. Every arm may use the whole machine.

`ratio`: with the savings on (verdicts that cannot change an advantage left out, cascade that ends three of four cases
by a prefill: its thresholds are set on the warm-up's scores for that, because a random judge knows nothing).
`ratio_plain`: every right answer gets its long verdict. `share_hidden`: of the seconds in which a verdict was being
waited for, those before the last answer landed. `flop_ratio`: the floor, from parameters and the tokens that went
through the models (2 a parameter and token to generate or read, 6 to train). Text is made up by a codec, since random
models write none; its tokens are real.

`clock`: the same arms on the demo's own models and sizes (configs/clock/fapo.yaml): the warm-start policy and a judge
of the same size, whose verdicts are read and believed, with its own floor. No cascade there, as in the run.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_fapo.algorithm.advantages import step_advantages
from megatron_fapo.algorithm.rewards import rewards
from megatron_fapo.algorithm.settings import AlgorithmSettings
from megatron_fapo.batch.pack import make_batch
from megatron_fapo.batch.settings import BatchSettings
from megatron_fapo.config import read_config
from megatron_fapo.critique.paragraphs import split
from megatron_fapo.critique.prompt import judge_prompt
from megatron_fapo.judge.answerer import ChatCodec, Served
from megatron_fapo.judge.ask import Asker
from megatron_fapo.judge.judge import Judge, Rules
from megatron_fapo.judge.settings import CascadeSettings, JudgeSettings
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import OptimizerSettings, PolicySettings
from megatron_fapo.records import Group, Ints, Message, NotJudged, Outcome, Prompt, Verdict, ints
from megatron_fapo.rollout.sampler import Sampler
from megatron_fapo.rollout.settings import RolloutSettings
from megatron_fapo.serving.group import ServerGroup
from megatron_fapo.serving.launcher import launch
from megatron_fapo.serving.settings import ServerSettings
from megatron_fapo.tasks.clock import ClockTask
from megatron_fapo.tasks.interface import Task
from megatron_fapo.tasks.settings import ClockSettings
from megatron_fapo.tasks.tokenizer import ChatTokenizer
from megatron_fapo.trace import SystemClock

CLOCK = Path("configs/clock/fapo.yaml")
PROMPTS, GROUP, PROMPT_TOKENS = 8, 8, 24
POLICY = {"hidden": 256, "layers": 4, "vocabulary": 64, "limit": 160}
JUDGE = {"hidden": 128, "layers": 2, "vocabulary": 68, "limit": 700}
"""Twice the width and twice the layers are eight times the parameters. Random models end an answer with a chance of
about one in the vocabulary at each token, which sets the lengths."""
END, TEMPLATE = 1, 20
RIGHT, FLAWED, SHORT = 0.6, 0.3, 0.75
ALGORITHM = AlgorithmSettings()


def make_model(folder: Path, sizes: dict[str, int]) -> None:
    """A random Qwen3."""
    torch.manual_seed(0)
    hidden = sizes["hidden"]
    config = Qwen3Config(
        vocab_size=sizes["vocabulary"],
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=END,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def parameters(folder: Path) -> int:
    """Of the model in a folder, without the embeddings."""
    with safe_open(folder / "model.safetensors", "np") as weights:
        names = [name for name in weights.keys() if "embed" not in name]  # noqa: SIM118 - no dictionary
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)


def share(words: str) -> float:
    """A number in [0, 1) that depends on the words alone."""
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") / 2**64


class PolicyCodec:
    """Token t is the word "t"; every eighth word begins a paragraph."""

    eos_ids = (END,)

    def encode_chat(self, messages: Sequence[Message]) -> Ints:
        """Not used: prompts come with their tokens."""
        raise NotImplementedError

    def encode(self, text: str) -> Ints:
        """The words' tokens."""
        return ints([int(word) for word in text.split()])

    def decode(self, token_ids: Ints) -> str:
        """Paragraphs of eight words."""
        words = [str(token) for token in np.asarray(token_ids).tolist()]
        return "\n\n".join(" ".join(words[start : start + 8]) for start in range(0, len(words), 8))


class JudgeCodec:
    """Reads a chat as one token a word, as many as the policy's text has; whatever was generated is a verdict."""

    eos_ids = (END,)

    def encode_chat(self, messages: Sequence[Message]) -> Ints:
        """The template's tokens and the solution's."""
        words = [word for word in messages[-1].content.split() if word.isdigit()]
        return ints([2 + int(word) % (JUDGE["vocabulary"] - 2) for word in ["7"] * TEMPLATE + words])

    def encode(self, text: str) -> Ints:
        """One token a character."""
        return ints([2 + ord(letter) % (JUDGE["vocabulary"] - 2) for letter in text])

    def decode(self, token_ids: Ints) -> str:
        """Flawed or clean by a hash of the tokens."""
        return "\\boxed{0}" if share(str(np.asarray(token_ids).tolist())) < FLAWED else "\\boxed{-1}"


class Questions:
    """Prompts of random tokens; whether an answer is right depends on its text and the prompt's difficulty."""

    name = "benchmark"

    def prompt(self, index: int) -> Prompt:
        """Prompt `index`."""
        tokens = np.random.default_rng(index).integers(2, POLICY["vocabulary"], PROMPT_TOKENS)
        words = " ".join(map(str, tokens))
        return Prompt(
            id=f"p{index}", task=self.name, question=words, messages=(), token_ids=ints(tokens), reference_answer="7"
        )

    async def check(self, prompt: Prompt, text: str) -> Outcome:
        """60 % right on average, from 10 % to all by prompt."""
        easy = RIGHT + (int(prompt.id[1:]) / (PROMPTS - 1) - 0.5)
        right = share(prompt.id + text) < easy
        return Outcome(right=right, score=1.0 if right else -1.0, answer="", why="")

    def oracle(self, prompt: Prompt, text: str) -> int | None:
        """None."""
        return None

    def held_out(self, count: int) -> list[Prompt]:
        """None."""
        return []

    async def close(self) -> None:
        """Nothing is held."""


@dataclass(slots=True, kw_only=True)
class Round:
    """What one step took and did."""

    seconds: float
    generate: float
    groups: list[Group]
    judging: list[tuple[float, float]]
    landed: float
    """When the last answer was there."""

    @property
    def hidden(self) -> float:
        """Share of the judge's seconds before the last answer landed."""
        whole = covered(self.judging)
        return covered([(start, min(end, self.landed)) for start, end in self.judging]) / whole if whole else 1.0


def covered(spans: list[tuple[float, float]]) -> float:
    """Seconds in which at least one of the spans is open."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is asked, and how: the benchmark's made-up questions, or the clock world."""

    task: Task
    policy_codec: ChatCodec
    judge_codec: ChatCodec
    rollout: RolloutSettings
    judge: JudgeSettings
    batch: BatchSettings


@dataclass(slots=True, kw_only=True)
class Bench:
    """The processes, and a step of each arm."""

    work: Work
    policy: ServerGroup
    judge: ServerGroup
    ranks: LocalRanks
    recorded: Path
    models: tuple[str, str]
    """Folders of policy and judge."""
    cascade: CascadeSettings | None = None
    scores: list[float] = field(default_factory=list)

    async def step(self, savings: bool, judged: bool) -> Round:
        """Generate, judge (or read the recorded verdicts), update."""
        work = self.work
        cascade = self.cascade if savings else None
        settings = work.judge.changed(skip=savings, probe_share=0.0, cascade=cascade and cascade.model_dump())
        judging: list[tuple[float, float]] = []
        landed = [0.0]
        clock = SystemClock()
        asker = None
        if judged:
            served = Served(self.judge, work.judge_codec)
            asker = Asker(served, settings, clock, 1, lambda start, end: judging.append((start, end)))
        limit = work.rollout.max_new_tokens
        rules = Rules(judge=settings, algorithm=ALGORITHM, group_size=work.rollout.group_size, max_tokens=limit)
        sampler = Sampler(
            task=work.task,
            servers=self.policy,
            judge=Judge(asker, rules),
            tokenizer=work.policy_codec,
            settings=work.rollout,
            algorithm=ALGORITHM,
            seed=1,
            progress=lambda rollouts: landed.__setitem__(0, clock.now()),
        )
        start = clock.now()
        groups = await sampler.collect(0, 0)
        generate = clock.now() - start
        file = self.recorded / f"{'savings' if savings else 'plain'}.json"
        if not judged:
            groups = with_verdicts(groups, json.loads(file.read_text()))
        given = [rewards(group, ALGORITHM, max_tokens=limit) for group in groups]
        advantages = step_advantages(groups, given, ALGORITHM, max_tokens=limit)
        batch = make_batch(groups, advantages, self.ranks.layout, work.batch, seed=1)
        await asyncio.to_thread(self.ranks.call, "update", batch, ALGORITHM.loss)
        seconds = clock.now() - start
        if judged and not file.exists():
            file.write_text(json.dumps(flags(groups)))
        return Round(seconds=seconds, generate=generate, groups=groups, judging=judging, landed=landed[0])

    async def calibrate(self, groups: list[Group]) -> None:
        """Thresholds that end `SHORT` of the cases, half of them on either side."""
        served = Served(self.judge, self.work.judge_codec)
        for group in groups:
            for one in group:
                if one.outcome.right:
                    text = one.rollout.text
                    messages = judge_prompt(group.prompt.question, group.prompt.reference_answer, text)
                    self.scores.append((await served.flaw_probability("score", messages, len(split(text))))[0])
        low, high = np.quantile(self.scores, [SHORT * (1 - FLAWED), 1 - SHORT * FLAWED])
        self.cascade = CascadeSettings(clean_below=float(low), flawed_above=float(high))


def flags(groups: list[Group]) -> dict[str, int]:
    """{rollout id: first wrong paragraph} of the rollouts with a verdict."""
    found = ((one.rollout.id, one.verdict) for group in groups for one in group)
    return {name: verdict.first_wrong for name, verdict in found if isinstance(verdict, Verdict)}


def with_verdicts(groups: list[Group], recorded: dict[str, int]) -> list[Group]:
    """The groups as if they had been judged."""

    def judged(name: str) -> Verdict | NotJudged:
        if name not in recorded:
            return NotJudged(reason="skipped")
        wrong = recorded[name]
        return Verdict(first_wrong=wrong, p_flawed=float(wrong != -1), votes=1, tokens=0, text="")

    return [
        dataclasses.replace(
            group,
            judged=tuple(
                dataclasses.replace(one, verdict=judged(one.rollout.id)) if one.outcome.right else one for one in group
            ),
        )
        for group in groups
    ]


@contextlib.asynccontextmanager
async def processes(
    work: Work, policy: ServerSettings, judge: ServerSettings, ranks: PolicySettings, folder: Path
) -> AsyncIterator[Bench]:
    """Servers and a rank, whose weights hardly move."""
    settings = ranks.changed(threads=os.cpu_count() or 1, optimizer=OptimizerSettings(learning_rate=1e-9).model_dump())
    async with launch(policy, "policy", folder) as drawing, launch(judge, "judge", folder) as judging:
        started = await asyncio.to_thread(LocalRanks, settings, 1)
        try:
            models = (policy.model, judge.model)
            yield Bench(work=work, policy=drawing, judge=judging, ranks=started, recorded=folder, models=models)
        finally:
            await asyncio.to_thread(started.close)


@contextlib.asynccontextmanager
async def as_at_32b(folder: Path) -> AsyncIterator[Bench]:
    """The benchmark's own workload."""
    for name, sizes in (("policy", POLICY), ("judge", JUDGE)):
        make_model(folder / name, sizes)
    common = {"context_length": 1024, "max_running": 256}
    (folder / "policy" / "tokenizer.json").write_text("{}")
    work = Work(
        task=Questions(),
        policy_codec=PolicyCodec(),
        judge_codec=JudgeCodec(),
        rollout=RolloutSettings(prompts_per_step=PROMPTS, group_size=GROUP, max_new_tokens=POLICY["limit"]),
        judge=JudgeSettings(temperature=1.0, max_new_tokens=JUDGE["limit"]),
        batch=BatchSettings(tokens_per_microbatch=2048),
    )
    policy = ServerSettings(model=str(folder / "policy"), count=2, **common)
    judge = ServerSettings(model=str(folder / "judge"), **common)
    async with processes(work, policy, judge, PolicySettings(model=folder / "policy"), folder) as bench:
        yield bench


@contextlib.asynccontextmanager
async def as_on_the_clock(folder: Path) -> AsyncIterator[Bench]:
    """The clock run's."""
    config = read_config(CLOCK)
    tokenizers = [ChatTokenizer.load(CLOCK.parent / "warm-start" / role) for role in ("policy", "judge")]
    work = Work(
        task=ClockTask(ClockSettings(), tokenizers[0], seed=1),
        policy_codec=tokenizers[0],
        judge_codec=tokenizers[1],
        rollout=config.rollout,
        judge=config.judge,
        batch=config.batching,
    )
    servers = [config.server(role) for role in ("policy", "judge")]
    async with processes(work, servers[0], servers[1], config.policy, folder) as bench:
        yield bench


def flop_ratio(one: Round, bench: Bench) -> float:
    """Operations of the step with this judge over the step without."""
    policy, judge = (parameters(Path(model)) for model in bench.models)
    answers = sum(len(j.rollout.token_ids) for group in one.groups for j in group)
    read = sum(len(group.prompt.token_ids) for group in one.groups)  # a group's prompt is read once
    trained = answers + sum(len(group.prompt.token_ids) * len(group.judged) for group in one.groups)
    judged = {id(j.verdict): (g.prompt, j) for g in one.groups for j in g if isinstance(j.verdict, Verdict)}.values()
    reading = sum(
        len(bench.work.judge_codec.encode_chat(judge_prompt(prompt.question, prompt.reference_answer, j.rollout.text)))
        for prompt, j in judged
    )
    writing = sum(verdict.tokens for verdict in asked(one))
    return 1 + 2 * judge * (reading + writing) / (2 * policy * (answers + read) + 6 * policy * trained)


ARMS = [(savings, judged) for savings in (False, True) for judged in (True, False)]
"""(savings on, with a judge)."""
Seen = dict[tuple[bool, bool], list[Round]]


async def rounds_of(bench: Bench, rounds: int) -> Seen:
    """All arms in turn, round after round; the verdicts are recorded already."""
    seen: Seen = {arm: [] for arm in ARMS}
    for turn in range(rounds):
        for arm in ARMS if turn % 2 == 0 else ARMS[::-1]:
            seen[arm].append(await bench.step(*arm))
    return seen


async def run(rounds: int) -> dict[str, object]:
    """Warm up and record, then the rounds; the clock's after the benchmark's own."""
    with tempfile.TemporaryDirectory(prefix="fapo-overhead-") as name:
        async with as_at_32b(Path(name)) as bench:
            first = await bench.step(savings=False, judged=True)
            await bench.calibrate(first.groups)
            await bench.step(savings=True, judged=True)
            found = summary(await rounds_of(bench, rounds), bench)
    with tempfile.TemporaryDirectory(prefix="fapo-overhead-") as name:
        async with as_on_the_clock(Path(name)) as bench:
            for savings in (False, True):
                await bench.step(savings=savings, judged=True)
            found["clock"] = ratios(await rounds_of(bench, rounds), bench)
    return found


def ratios(seen: Seen, bench: Bench) -> dict[str, object]:
    """Medians over rounds, ratios taken within a round; and the floor."""

    def ratio(savings: bool) -> float:
        pairs = zip(seen[savings, True], seen[savings, False], strict=True)
        return statistics.median(one.seconds / other.seconds for one, other in pairs)

    return {
        "ratio": ratio(True),
        "ratio_plain": ratio(False),
        "share_hidden": statistics.median(one.hidden for one in seen[True, True]),
        "share_hidden_plain": statistics.median(one.hidden for one in seen[False, True]),
        "flop_ratio": flop_ratio(seen[True, True][0], bench),
        "flop_ratio_plain": flop_ratio(seen[False, True][0], bench),
        "step_seconds": {
            f"{'savings' if savings else 'plain'}, {'with' if judged else 'without'} judge": statistics.median(
                one.seconds for one in found
            )
            for (savings, judged), found in seen.items()
        },
        "verdicts": {
            "plain": len(asked(seen[False, True][0])),
            "savings": len(asked(seen[True, True][0])),
            "of them short": sum(verdict.short for verdict in asked(seen[True, True][0])),
        },
    }


def asked(one: Round) -> list[Verdict]:
    """The verdicts of a step; one that several rollouts share counts once."""
    shared = {id(j.verdict): j.verdict for g in one.groups for j in g if isinstance(j.verdict, Verdict)}
    return list(shared.values())


def summary(seen: Seen, bench: Bench) -> dict[str, object]:
    """The numbers of the benchmark's own workload."""
    plain = seen[False, True][0]
    policy, judge = (parameters(Path(model)) for model in bench.models)
    rollouts = [judged for group in plain.groups for judged in group]
    answers = statistics.mean(len(judged.rollout.token_ids) for judged in rollouts)
    return {
        **ratios(seen, bench),
        "parameters": policy / judge,
        "verdict_over_answer_tokens": statistics.mean(verdict.tokens for verdict in asked(plain)) / answers,
        "right_share": sum(judged.outcome.right for judged in rollouts) / len(rollouts),
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 21")
    parser.add_argument("--json", action="store_true", help="a last line of JSON")
    arguments = parser.parse_args()
    start = time.perf_counter()
    found = asyncio.run(run(5 if arguments.quick else 21))
    table = Table("", "", title="seconds of a step with the judge over without")
    for name, value in found.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console(width=120).print(table, f"{time.perf_counter() - start:.0f} s in all")
    if arguments.json:
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
