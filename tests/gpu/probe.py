"""One rank in a process of its own, on the device that it finds: what it computes and what that costs.

Needs torch, megatron-core, mbridge and what the policy imports (transformers, pydantic, safetensors, numpy, xxhash,
psutil, einops); neither Ray nor a server. Prints JSON; logits go to a file.

    python -m tests.gpu.probe SETTINGS.json logits.npz
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from megatron_fapo.batch.layout import Layout
from megatron_fapo.policy.settings import PolicySettings
from megatron_fapo.records import MicroBatch, MiniBatch, StepBatch, floats, ints

ROOT = Path(__file__).parents[2]


class Work(BaseModel):
    """What a probe is asked to do."""

    settings: PolicySettings
    lengths: list[int]
    """Of the sequences in each microbatch."""
    microbatches: int = 2
    steps: int = 3
    vocabulary: int
    logits: bool = True


def run(work: Work, folder: Path, **environment: str) -> dict[str, Any]:
    """Do the work in a fresh process; its report, with `logits` [tokens, vocabulary] where they were asked for."""
    ask, arrays = folder / "work.json", folder / "logits.npz"
    ask.write_text(work.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.probe", str(ask), str(arrays)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if work.logits:
        with np.load(arrays) as found:
            report["logits"] = found["logits"]
    return report


def step_batch(step: int, work: Work) -> StepBatch:
    """A step of distinct random sequences, the same on every device."""
    rng = np.random.default_rng([11, step])
    micros = []
    for number in range(work.microbatches):
        total = sum(work.lengths)
        bounds = np.concatenate([[0], np.cumsum(work.lengths)])
        mask = np.ones(total)
        mask[bounds[:-1]] = 0  # the first token of each sequence is its prompt
        micros.append(
            MicroBatch(
                ids=tuple(f"s{step}-m{number}-r{place}" for place in range(len(work.lengths))),
                token_ids=ints(rng.integers(1, work.vocabulary, total)),
                bounds=ints(bounds),
                loss_mask=floats(mask),
                advantages=floats(rng.normal(size=total) * mask),
                logprobs=floats((rng.normal(size=total) * 0.1 - np.log(work.vocabulary)) * mask),
                temperature=1.0,
                versions=ints([step] * len(work.lengths)),
            )
        )
    minibatch = MiniBatch(
        microbatches=tuple((micro,) for micro in micros),
        num_loss_tokens=sum(int(micro.loss_mask.sum()) for micro in micros),
        num_sequences=work.microbatches * len(work.lengths),
    )
    return StepBatch(step=step, minibatches=(minibatch,))


def main(work: Work, arrays: Path) -> dict[str, Any]:
    """The probe itself."""
    from megatron_fapo.policy.rank import PolicyRank

    import torch  # isort: skip
    from tests.policy.lives import LOSS

    cuda = torch.cuda.is_available()
    rank = PolicyRank()
    layout = rank.setup(0, 1, *rank.address(), work.settings, 5)
    report: dict[str, Any] = {
        "device": rank.device.name,
        "layers": rank.device.spec,
        "card": torch.cuda.get_device_name() if cuda else "CPU",
        "parameters": sum(param.numel() for part in rank.model.parallel for param in part.parameters()),
        "memory": {},
    }

    def note(phase: str) -> None:
        if cuda:
            torch.cuda.synchronize()
            report["memory"][phase] = {
                "held": torch.cuda.memory_allocated(),
                "peak": torch.cuda.max_memory_allocated(),
            }
            torch.cuda.reset_peak_memory_stats()

    note("built")
    if work.logits:
        np.savez(arrays, logits=logits_of(rank, step_batch(0, work), layout))
    updates, seconds = [], []
    for step in range(work.steps):
        start = time.perf_counter()
        updates.append(dataclasses.asdict(rank.update(step_batch(step, work), LOSS).updates[0]))
        seconds.append(time.perf_counter() - start)
        note(f"update {step}")
    report |= {"updates": updates, "seconds": seconds, "freed": rank.offload()}
    note("away")
    rank.onload()
    note("back")
    again = rank.update(step_batch(work.steps, work), LOSS).updates[0]
    report["after coming back"] = dataclasses.asdict(again)
    rank.shutdown()
    return report


def logits_of(rank: Any, batch: StepBatch, layout: Layout) -> np.ndarray[Any, Any]:
    """[tokens, vocabulary] of the first microbatch, before any update."""
    import torch

    from megatron_fapo.policy.forward import pad

    (part,) = rank.model.parallel
    padded = pad(batch.minibatches[0].microbatches[0][0], rank.device.torch_device(), every_token=True, layout=layout)
    with rank.device.active(), torch.no_grad():
        found = part(padded.tokens, padded.positions, None)
    rows = found.reshape(-1, found.shape[-1])[padded.chosen]
    return np.asarray(rows.float().cpu().numpy())


if __name__ == "__main__":
    said = main(Work.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    sys.stdout.write(json.dumps(said) + "\n")
