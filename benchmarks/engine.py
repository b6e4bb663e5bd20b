"""The embedded engine over HTTP against Hugging Face `generate` as a static batch, on the same prompts.

    python benchmarks/engine.py [--quick] [--json] [--sglang]

One process is the client and runs Hugging Face and the bare loop; the server is a process of its own, each with one
thread. Every round measures all rows in turn, so that a busy machine slows all of them; shown are medians. Answers
end where the model ends them: a static batch computes its finished rows on, an engine does not, and both count only
the tokens up to the end of sequence. `ratio` is ours over Hugging Face's tokens a second, the lowest over the
request numbers, with requests in groups of 8. `--sglang` adds SGLang on the CPU (`make sglang-cpu`), and sglang-router
before the embedded engine.
"""

import argparse
import asyncio
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_fapo.records import GenerationRequest, Sampling, ints
from megatron_fapo.serving.engine.batch import Batch
from megatron_fapo.serving.engine.decoder import Decoder, Shape
from megatron_fapo.serving.engine.folder import read_config
from megatron_fapo.serving.engine.sample import Options, Sample
from megatron_fapo.serving.engine.weights import Weights
from megatron_fapo.serving.group import ServerGroup
from megatron_fapo.serving.launcher import launch
from megatron_fapo.serving.settings import ServerSettings

GROUP, NEW, EOS = 8, 64, 29
Row = Callable[[int], Awaitable[int]]
"""A way to answer n requests: returns the number of tokens, end of sequence included."""


def make_model(folder: Path) -> None:
    """A random model of the clock world's size whose answers end after about 27 tokens."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=30,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Prompts, and how they are answered."""

    prompts: list[np.ndarray]  # type: ignore[type-arg]

    def requests(self, n: int, group: int) -> list[GenerationRequest]:
        """n samples, GROUP of them of each prompt, `group` in a request."""
        sampling = Sampling(max_new_tokens=NEW, temperature=1.0, stop_token_ids=(EOS,))
        return [
            GenerationRequest(
                ids=tuple(f"s0-p{i // GROUP}-r{i % GROUP}" for i in range(start, start + group)),
                token_ids=ints(self.prompts[start // GROUP]),
                seeds=tuple(range(start, start + group)),
                sampling=sampling,
            )
            for start in range(0, n, group)
        ]


def over_http(servers: ServerGroup, work: Work, group: int) -> Row:
    """All requests at once to a server."""

    async def one(request: GenerationRequest) -> int:
        return sum([len(sample.token_ids) async for sample in servers.generate(request)])

    async def row(n: int) -> int:
        return sum(await asyncio.gather(*(one(request) for request in work.requests(n, group))))

    return row


def hugging_face(folder: Path, work: Work) -> Row:
    """One `generate` call, left-padded."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()

    async def row(n: int) -> int:
        prompts = [work.prompts[i // GROUP] for i in range(n)]
        width = max(map(len, prompts))
        ids, mask = torch.zeros(n, width, dtype=torch.long), torch.zeros(n, width, dtype=torch.long)
        for place, prompt in enumerate(prompts):
            ids[place, width - len(prompt) :] = torch.from_numpy(prompt)
            mask[place, width - len(prompt) :] = 1
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=NEW, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                pad_token_id=0, eos_token_id=EOS,
            )[:, width:]  # fmt: skip
        ends = (out == EOS).int()
        lengths = torch.where(ends.any(1), ends.argmax(1) + 1, out.shape[1])
        return int(lengths.sum())

    return row


def bare_loop(folder: Path, work: Work) -> Row:
    """The engine's batch in this process, without thread and HTTP: the floor."""
    model = Decoder(Shape.read(read_config(folder)), torch.float32, 128)
    Weights(model).load(folder)
    batch = Batch(model, 256, 1)

    async def row(n: int) -> int:
        options = Options(max_new_tokens=NEW, stop_token_ids=(EOS,))
        by_length: dict[int, list[Sample]] = {}
        for i in range(n):
            prompt = work.prompts[i // GROUP]
            sample = Sample(
                id=str(i), index=i, prompt=prompt, options=options, seed=i, stream=False, inbox=asyncio.Queue()
            )
            by_length.setdefault(len(prompt), []).append(sample)
        done = [answer for samples in by_length.values() for answer in batch.add(samples, 0)]
        while len(batch):
            done += batch.step(0)
        return sum(len(answer.tokens) for answer in done)

    return row


async def measure(rows: dict[str, Row], sizes: list[int], rounds: int) -> dict[tuple[str, int], float]:
    """Median tokens per second of each row at each size, interleaved."""
    seen: dict[tuple[str, int], list[float]] = {(name, n): [] for name in rows for n in sizes}
    for turn in range(rounds + 1):
        for n in sizes:
            for name, row in rows.items():
                start = time.perf_counter()
                tokens = await row(n)
                if turn:  # the first round warms up
                    seen[name, n].append(tokens / (time.perf_counter() - start))
    return {key: statistics.median(values) for key, values in seen.items()}


def with_sglang(plain: ServerSettings) -> dict[str, ServerSettings]:
    """Servers of the further rows, by the row's name."""
    sglang = {"on_cpu": True, "memory_fraction": 0.3, "max_total_tokens": 65536, "arguments": ["--skip-tokenizer-init"]}
    return {
        "SGLang on the CPU, groups of 8": plain.changed(engine="sglang", sglang=sglang),
        "embedded behind sglang-router": plain.changed(router="sglang"),
    }


async def run(rounds: int, sizes: list[int], model: Path | None, sglang: bool) -> dict[tuple[str, int], float]:
    """Start the servers, measure, stop them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = model or Path(temporary) / "model"
        if model is None:
            make_model(folder)
        rng = np.random.default_rng(0)
        work = Work(prompts=[rng.integers(1, EOS, int(size)) for size in rng.choice([8, 10, 12], max(sizes) // GROUP)])
        plain = ServerSettings(model=str(folder), max_running=256, context_length=128)
        logs = Path(temporary)
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(launch(plain, "plain", logs))
            deterministic = await stack.enter_async_context(
                launch(plain.changed(deterministic=True), "deterministic", logs)
            )
            rows = {
                "Hugging Face generate": hugging_face(folder, work),
                "HTTP, groups of 8": over_http(server, work, GROUP),
                "HTTP, single requests": over_http(server, work, 1),
                "HTTP, groups of 8, deterministic": over_http(deterministic, work, GROUP),
                "bare loop (floor)": bare_loop(folder, work),
            }
            for place, (name, settings) in enumerate(with_sglang(plain).items() if sglang else ()):
                group = await stack.enter_async_context(launch(settings, f"further-{place}", logs))
                rows[name] = over_http(group, work, GROUP)
            return await measure(rows, sizes, rounds)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 21")
    parser.add_argument("--json", action="store_true", help="a last line of JSON")
    parser.add_argument("--sglang", action="store_true", help="rows with SGLang and its router as well")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder instead of a random model")
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    sizes, rounds = [64, 256], 5 if arguments.quick else 21
    speeds = asyncio.run(run(rounds, sizes, arguments.model, arguments.sglang))
    theirs = "Hugging Face generate"
    table = Table(title=f"tokens per second, median of {rounds} interleaved rounds, 1 thread each")
    for column in ("", *(f"{n} requests" for n in sizes), *(f"over Hugging Face, {n}" for n in sizes)):
        table.add_column(column, justify="left" if not column else "right")
    names = list(dict.fromkeys(name for name, _ in speeds))
    ratios = {name: {n: speeds[name, n] / speeds[theirs, n] for n in sizes} for name in names}
    for name in names:
        cells = [f"{speeds[name, n]:,.0f}" for n in sizes] + [f"{ratios[name][n]:.2f}" for n in sizes]
        table.add_row(name, *cells)
    Console(width=120).print(table)
    if arguments.json:
        result = {
            "ratio": min(ratios["HTTP, groups of 8"].values()),
            "ratios": {name: {str(n): round(ratio, 3) for n, ratio in each.items()} for name, each in ratios.items()},
            "tokens_per_second": {name: {str(n): round(speeds[name, n]) for n in sizes} for name in names},
        }
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
