"""Peak memory and time of log-probs and their gradient: logits of all tokens, as Megatron makes them, against chunks.

    python benchmarks/logprob_memory.py [--json]

4096 tokens, half of them in the loss, hidden size 512, vocabulary 32000, float32, one thread. Every way runs in a fresh
process, three times; shown are the peak resident size above what inputs and weight take, and the fastest pass.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
from rich.console import Console
from rich.table import Table

from megatron_fapo.policy.logprobs import Projection, token_logprobs

TOKENS, HIDDEN, VOCABULARY = 4096, 512, 32000
WAYS = {"logits of all tokens": None, "chosen tokens, one chunk": 10**6, "64 MB of logits": 64, "8 MB of logits": 8}
"""Megabytes of float32 logits at a time; None: logits first, then their log-softmax."""


def one_pass(megabytes: int | None, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    """Forward and backward of the sum of log-probs over the second half of the tokens."""
    chosen = torch.arange(TOKENS // 2, TOKENS)
    if megabytes is None:
        logits = (hidden @ weight.t()).index_select(0, chosen)
        logprobs = -torch.nn.functional.cross_entropy(logits, targets[chosen], reduction="none")
    else:
        chunk = max(megabytes * 2**20 // (4 * VOCABULARY), 1)
        projection = Projection(vocabulary=VOCABULARY, chunk=chunk)
        logprobs, _ = token_logprobs(hidden.index_select(0, chosen), weight, targets[chosen], projection)
    logprobs.sum().backward()
    hidden.grad = weight.grad = None


def measure(megabytes: int | None) -> dict[str, float]:
    """Peak bytes above the inputs, and seconds."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.randn(VOCABULARY, HIDDEN)
    weight.mul_(HIDDEN**-0.5).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,))
    before, seconds = psutil.Process().memory_info().rss, []
    for _ in range(3):
        start = time.perf_counter()
        one_pass(megabytes, hidden, weight, targets)
        seconds.append(time.perf_counter() - start)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"bytes": int(line.split()[1]) * 1024 - before, "seconds": min(seconds)}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="a last line of JSON")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        torch.set_num_threads(1)
        sys.stdout.write(json.dumps(measure(WAYS[arguments.way])) + "\n")
        return
    found = {}
    # what is freed leaves the process at once, and its size is that of what lives
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    table = Table(title="log-probs and their gradient")
    for column in ("", "peak MB", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for name in WAYS:
        command = [sys.executable, __file__, "--way", name]
        found[name] = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
        table.add_row(name, f"{found[name]['bytes'] / 2**20:.0f}", f"{found[name]['seconds']:.2f}")
    Console(width=120).print(table)
    if arguments.json:
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
