"""Our update step against a bare megatron-core loop on the same microbatches, and the memory of each phase.

    python benchmarks/train_step.py [--quick] [--json]

Both sides are in one process, with the same megatron-core, layers, flags, patches, microbatches and weights; the bare
loop (benchmarks/bare_megatron.py) is written as Megatron's quickstart is. Packing and the leaving out of sequences
without a gradient are the same in both, made before the clock starts. Sides alternate, each pair starts with the other
one, and `ratio` is the median over pairs of our seconds by the bare loop's, for the workload where it is largest.
Before the first pair both take three steps and must agree in loss and gradient norm.

Memory is the peak resident size of a fresh process in each phase above its size before the model, next to what the
configuration predicts.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from megatron_fapo.algorithm.settings import LossSettings
from megatron_fapo.batch.pack import make_batch
from megatron_fapo.batch.settings import BatchSettings
from megatron_fapo.policy.rank import PolicyRank
from megatron_fapo.policy.settings import OptimizerSettings, PolicySettings
from megatron_fapo.records import (
    Floats,
    Group,
    Judged,
    NotJudged,
    Outcome,
    Prompt,
    Rollout,
    StepBatch,
    VersionSpan,
    floats,
    ints,
)

OURS, BARE, SILENT = "ours", "bare megatron-core", "ours, entropy off"
LOSS = LossSettings()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A Qwen3 and a mini-batch for it."""

    vocabulary: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    prompts: int
    median: int
    """Tokens of a response; lengths are log-normal."""
    budget: int
    """Tokens of a microbatch."""

    def hf_config(self) -> Any:
        """The model in Hugging Face's terms."""
        from transformers import Qwen3Config

        return Qwen3Config(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.mlp, head_dim=32,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads // 2,
            max_position_embeddings=1024, tie_word_embeddings=True,
        )  # fmt: skip

    def groups(self) -> list[Group]:
        """Groups of 8; every fourth agrees in its reward, so that its advantages are zero."""
        rng = np.random.default_rng(0)
        return [self._group(number, rng) for number in range(self.prompts)]

    def _group(self, number: int, rng: np.random.Generator) -> Group:
        judged = []
        for place in range(8):
            length = int(np.clip(rng.lognormal(np.log(self.median), 0.6), 4, 8 * self.median))
            rollout = Rollout(
                id=f"s0-p{number}-r{place}", prompt_id=f"p{number}", seed=0, text="", finish_reason="stop",
                token_ids=ints(rng.integers(1, self.vocabulary, length)), temperature=1.0,
                logprobs=floats(-np.log(self.vocabulary) + 0.3 * rng.normal(size=length)),
                versions=(VersionSpan(start=0, version=0),),
            )  # fmt: skip
            outcome = Outcome(right=True, score=1.0, answer=None, why="equal")
            judged.append(Judged(rollout=rollout, outcome=outcome, verdict=NotJudged(reason="off"), oracle=None))
        prompt = ints(rng.integers(1, self.vocabulary, 10))
        whole = Prompt(id=f"p{number}", task="t", question="", messages=(), token_ids=prompt, reference_answer="")
        return Group(step=0, prompt=whole, judged=tuple(judged))


WORKLOADS = {
    "clock world": Workload(vocabulary=30, hidden=128, mlp=384, layers=2, heads=4, prompts=8, median=27, budget=1600),
    "5 M parameters": Workload(
        vocabulary=8192, hidden=256, mlp=768, layers=4, heads=8, prompts=4, median=64, budget=2048
    ),
}


def make_step(work: Workload, rank: PolicyRank) -> StepBatch:
    """One mini-batch."""
    rng, groups = np.random.default_rng(1), work.groups()
    advantages: list[list[Floats]] = [
        [floats(np.full(len(j.rollout.token_ids), (n % 4 > 0) * rng.normal())) for j in group]
        for n, group in enumerate(groups)
    ]
    return make_batch(groups, advantages, rank._layout, BatchSettings(tokens_per_microbatch=work.budget), seed=0)


def set_up(folder: Path, work: Workload, **changes: Any) -> PolicyRank:
    """Our rank, alone in this process, with a random model."""
    import torch
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    if not (folder / "config.json").exists():
        Qwen3ForCausalLM(work.hf_config()).save_pretrained(folder)
    # no decay: Megatron excludes vectors from it by a scheduler that neither side has
    optimizer = OptimizerSettings(learning_rate=1e-4, warmup_steps=0, weight_decay=0.0)
    rank = PolicyRank()
    rank.shutdown()
    settings = PolicySettings(model=folder, optimizer=optimizer, threads=1, **changes)
    rank.setup(0, 1, *rank.address(), settings, 0)
    return rank


def bare(rank: PolicyRank, work: Workload) -> Any:
    """The other side, from the weights of ours."""
    import torch
    from bare_megatron import BareLoop
    from megatron.core.optimizer import OptimizerConfig

    from megatron_fapo.compat.modules import local_block_spec

    chosen = rank.settings.optimizer
    optimizer = OptimizerConfig(
        optimizer="adam", lr=chosen.learning_rate, weight_decay=chosen.weight_decay, adam_beta1=chosen.beta1,
        adam_beta2=chosen.beta2, adam_eps=chosen.epsilon, clip_grad=chosen.clip_grad, use_distributed_optimizer=True,
        params_dtype=torch.float32,
    )  # fmt: skip
    with rank.device.active():
        weights = rank.model.chunks[0].state_dict()
        return BareLoop(work.hf_config(), local_block_spec, dict(rank.device.transformer_flags), optimizer, weights)


def compare(work: Workload, pairs: int) -> dict[str, list[float]]:
    """Seconds of each side, pair by pair."""
    with tempfile.TemporaryDirectory() as folder:
        rank = set_up(Path(folder), work)
        batch = make_step(work, rank)
        (mini,) = batch.minibatches
        micros, loop = [row[0] for row in mini.microbatches], bare(rank, work)
        spoken = rank.model.projection

        def ours(entropy: bool) -> tuple[float, float]:
            rank._model = dataclasses.replace(rank.model, projection=dataclasses.replace(spoken, entropy=entropy))
            report = rank.update(batch, LOSS).updates[0]
            return report.loss, report.grad_norm

        def theirs() -> tuple[float, float]:
            with rank.device.active():
                return loop.step(micros, mini.num_loss_tokens)

        for _ in range(3):
            one, other = ours(entropy=True), theirs()
            if not np.allclose(one, other, rtol=1e-4, atol=1e-7):
                sys.exit(f"the sides disagree: ours has loss and gradient norm {one}, the bare loop {other}")
        sides = {OURS: lambda: ours(entropy=True), BARE: theirs, SILENT: lambda: ours(entropy=False)}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for pair in range(pairs):
            for name in sides if pair % 2 else reversed(sides):
                start = time.perf_counter()
                sides[name]()
                seconds[name].append(time.perf_counter() - start)
        rank.shutdown()
        return seconds


def ratios(seconds: dict[str, list[float]], name: str = OURS) -> list[float]:
    """A side's seconds over the bare loop's, quartiles over pairs."""
    pairs = [own / other for own, other in zip(seconds[name], seconds[BARE], strict=True)]
    return statistics.quantiles(pairs, n=4, method="inclusive")


# --- memory -----------------------------------------------------------------------------------------------------------

LARGE = Workload(vocabulary=32000, hidden=384, mlp=1152, layers=6, heads=12, prompts=2, median=140, budget=1024)
VARIANTS: dict[str, dict[str, Any]] = {
    "all logits at once": {},
    "16 MB of logits at a time": {"logits_megabytes": 16},
    "the same, MLP recomputed": {"logits_megabytes": 16, "recompute": "selective", "recompute_modules": ["mlp"]},
    "the same, layers recomputed": {"logits_megabytes": 16, "recompute": "full"},
}
MEASURED = ("model", "passes", "optimizer", "between", "offloaded")


def predict(work: Workload, settings: PolicySettings, positions: int, chosen: int) -> dict[str, int]:
    """Bytes of each phase in float32: `positions` and `chosen` are those of the largest microbatch.

    A parameter costs 4 bytes, its gradient 4, its two moments 8. A layer keeps, for each position, the inputs of its
    four matrices, both norms (of width h, and of each head), queries, keys, values and the output of attention, and of
    the gated MLP both halves and the activated one: 4 h + (q + k) + 2 q + (q + 2 k) + 4 m numbers. The output layer has
    a chunk of logits three times over and its weight's gradient twice. After the optimizer, gloo gathers parameters
    through a copy of their buffer.
    """
    h, m, q, k = work.hidden, work.mlp, work.heads * 32, work.heads * 16
    parameters = work.vocabulary * h + h + work.layers * (2 * h * (q + k) + 3 * h * m + 2 * h + 64)
    layer = 4 * h + (q + k) + 2 * q + (q + 2 * k) + 4 * m
    kept = {"none": layer * work.layers, "selective": (layer - 3 * m) * work.layers + 3 * m}
    kept["full"] = h * work.layers + layer
    chunk = min(chosen, settings.logits_megabytes * 2**20 // (4 * work.vocabulary))
    output = 3 * chunk * work.vocabulary + 2 * work.vocabulary * h
    static = 8 * parameters
    passes = 4 * max(positions * kept[settings.recompute], positions * h * work.layers + output)
    if settings.recompute != "full":
        passes = 4 * (positions * kept[settings.recompute] + output)
    return {
        "model": static,
        "passes": 2 * static + passes,
        "optimizer": 2 * static + 4 * parameters,
        "between": 2 * static,
        "offloaded": 0,
    }


class Peak:
    """The largest resident size of this process since `reset`, as Linux counts it."""

    def __init__(self) -> None:
        self._before = psutil.Process().memory_info().rss

    def reset(self) -> None:
        """Begin anew from the present size."""
        Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        """Bytes above the size at the start."""
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 - self._before

    def now(self) -> int:
        """The present size, above that of the start."""
        return psutil.Process().memory_info().rss - self._before


def measure_memory(changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{measured, predicted: {phase: bytes}} and what offloading frees; for a process that has done nothing else."""
    import torch
    from megatron.core.tensor_parallel import random as _loaded  # noqa: F401 - before the first reading

    work = LARGE
    with tempfile.TemporaryDirectory() as folder:
        set_up(Path(folder), dataclasses.replace(work, vocabulary=64, layers=1)).shutdown()  # what importing costs
        (Path(folder) / "config.json").unlink()
        peak = Peak()
        rank = set_up(Path(folder), work, **changes)
        rank.offload([])  # gives back what loading left
        seen = {"model": peak.now()}
        batch = make_step(work, rank)
        step, between = rank.model.optimizer.step, {}

        def measured_step() -> Any:
            between["passes"] = peak.read()
            rank.offload([])
            peak.reset()
            result = step()
            between["optimizer"] = peak.read()
            return result

        rank.model.optimizer.step = measured_step
        for _ in range(2):  # the first one makes the moments
            rank.offload([])
            peak.reset()
            rank.update(batch, LOSS)
        rank.offload([])
        seen |= {**between, "between": peak.now()}
        start = time.perf_counter()
        freed = sum(rank.offload().values())
        seconds = [time.perf_counter() - start]
        seen["offloaded"], start = peak.now(), time.perf_counter()
        rank.onload()
        seconds.append(time.perf_counter() - start)
        columns = rank._column(batch.minibatches[0])
        largest = max(columns, key=lambda padded: padded.tokens.numel())
        expected = predict(work, rank.settings, largest.tokens.numel(), len(largest.chosen))
        rank.shutdown()
        del torch
    return {"measured": seen, "predicted": expected, "offload": {"bytes": freed, "seconds": seconds}}


def memory() -> dict[str, dict[str, dict[str, Any]]]:
    """Of each variant, in a process of its own."""
    found = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, "--memory-of", name]
        # what is freed leaves the process at once, and its size is that of what lives
        malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        environment = {**os.environ, **malloc, "PYTHONPATH": str(Path(__file__).parents[1])}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if result.returncode:
            sys.exit(f"measuring memory ({name}) failed:\n{result.stderr[-3000:]}")
        found[name] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="9 pairs instead of 41")
    parser.add_argument("--json", action="store_true", help="a last line of JSON")
    parser.add_argument("--memory-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        sys.stdout.write(json.dumps(measure_memory(VARIANTS[arguments.memory_of])) + "\n")
        return
    pairs = 9 if arguments.quick else 41
    timed = {name: compare(work, pairs) for name, work in WORKLOADS.items()}
    table = Table(title=f"one optimizer step, {pairs} pairs, 1 thread")
    for column in ("workload", *(f"{side}, ms" for side in (OURS, BARE)), "ratio", "quartiles", "entropy off"):
        table.add_column(column, justify="left" if column == "workload" else "right")
    for name, seconds in timed.items():
        low, middle, high = ratios(seconds)
        cells = [f"{1000 * statistics.median(seconds[side]):.1f}" for side in (OURS, BARE)]
        table.add_row(name, *cells, f"{middle:.3f}", f"{low:.3f} - {high:.3f}", f"{ratios(seconds, SILENT)[1]:.3f}")
    console = Console(width=120)
    console.print(table)
    sizes = memory()
    table = Table(title="peak resident MB above the empty process, measured (predicted)")
    for column in ("", *MEASURED):
        table.add_column(column, justify="right" if column else "left")
    for name, both in sizes.items():
        cells = [f"{both['measured'][p] / 2**20:.0f} ({both['predicted'][p] / 2**20:.0f})" for p in MEASURED]
        table.add_row(name, *cells)
    console.print(table)
    away = next(iter(sizes.values()))["offload"]
    out, back = away["seconds"]
    console.print(f"offloading frees {away['bytes'] / 2**20:.0f} MB in {out:.2f} s, {back:.2f} s back", highlight=False)
    if arguments.json:
        by_workload = {name: dict(zip(("low", "median", "high"), ratios(s), strict=True)) for name, s in timed.items()}
        worst = max(row["median"] for row in by_workload.values())
        sys.stdout.write(json.dumps({"ratio": worst, "ratios": by_workload, "memory": sizes}) + "\n")


if __name__ == "__main__":
    main()
