"""What the loop waits for a checkpoint: written before it goes on, or while the next step generates.

    python benchmarks/checkpoint.py [--quick] [--json] [--ranks 2]

A random Qwen3 of 48 M parameters in float32 with Adam's state, on data-parallel ranks of this machine. One update comes
between two checkpoints, so that nothing is written twice. "Generation" is a pause: ranks have nothing to do then. The
two ways take turns; medians, and quartiles in brackets. The update with a save beside it begins at once, which in the
loop it never does: it shows the worst that the writer's thread can cost.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_fapo.batch.pack import SupervisedExample, make_supervised_batch
from megatron_fapo.batch.settings import BatchSettings
from megatron_fapo.policy.local import LocalRanks
from megatron_fapo.policy.settings import OptimizerSettings, ParallelSettings, PolicySettings
from megatron_fapo.records import MiniBatch, ints

LOOK = 0.05
"""Seconds between two looks at whether the ranks have written."""


def save_model(folder: Path) -> int:
    """A random model; returns its number of parameters."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=32000,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=2048,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return sum(param.numel() for param in model.parameters())


def seconds(work: Callable[[], object]) -> float:
    """How long something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(ranks: LocalRanks, folder: Path, rounds: int) -> tuple[dict[str, list[float]], int]:
    """{what: seconds of each round} and the bytes of a checkpoint."""
    example = SupervisedExample(id="e", prompt_ids=ints(range(1, 9)), response_ids=ints(range(9, 41)))
    batch: MiniBatch = make_supervised_batch([example] * 4, ranks.layout, BatchSettings())
    seen: dict[str, list[float]] = {}
    nbytes = 0

    def note(what: str, value: float) -> None:
        seen.setdefault(what, []).append(value)

    def until_written() -> None:
        while not all(ranks.call("save_written")):
            time.sleep(LOOK)

    ranks.call("supervised_update", batch)
    for turn in range(rounds + 1):
        here = folder / str(turn)
        waits = {
            "update": seconds(lambda: ranks.call("supervised_update", batch)),
            "saved before going on: the loop waits": seconds(lambda: ranks.call("save", str(here))),  # noqa: B023
        }
        nbytes = sum(file.stat().st_size for file in here.iterdir())
        shutil.rmtree(here)
        ranks.call("supervised_update", batch)
        waits["saved while generating: the loop waits"] = seconds(lambda: ranks.call("begin_save", str(here)))  # noqa: B023
        waits["then, beside generation, until written"] = seconds(until_written)
        waits["and until complete"] = seconds(lambda: ranks.call("end_save"))
        shutil.rmtree(here)
        ranks.call("begin_save", str(here))
        waits["update with a save beside it"] = seconds(lambda: ranks.call("supervised_update", batch))
        ranks.call("end_save")
        shutil.rmtree(here)
        if turn:  # the first warms up
            for what, value in waits.items():
                note(what, value)
    return seen, nbytes


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 15")
    parser.add_argument("--json", action="store_true", help="a last line of JSON")
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks")
    arguments = parser.parse_args()
    rounds = 5 if arguments.quick else 15
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters = save_model(folder / "model")
        settings = PolicySettings(
            model=folder / "model",
            parallel=ParallelSettings(data=arguments.ranks),
            optimizer=OptimizerSettings(warmup_steps=0),
        )
        with LocalRanks(settings) as ranks:
            seen, nbytes = measure(ranks, folder, rounds)
    title = f"{parameters / 1e6:.0f} M parameters, {nbytes / 1e6:.0f} MB, {arguments.ranks} rank(s), {rounds} rounds"
    table = Table(title=title)
    table.add_column("")
    table.add_column("seconds", justify="right")
    for what, values in seen.items():
        low, middle, high = statistics.quantiles(values, n=4)
        table.add_row(what, f"{middle:.3f} ({low:.3f}-{high:.3f})")
    Console(width=120).print(table)
    if arguments.json:
        middles = {what: round(statistics.median(values), 4) for what, values in seen.items()}
        before, during = (middles[f"saved {way}: the loop waits"] for way in ("before going on", "while generating"))
        sys.stdout.write(
            json.dumps({"ratio": round(during / before, 3), "megabytes": nbytes // 10**6, **middles}) + "\n"
        )


if __name__ == "__main__":
    main()
