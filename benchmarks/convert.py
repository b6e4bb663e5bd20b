"""Memory and speed of `fapo convert`: Hugging Face to Megatron, back, and into FP8, against a plain copy of the files.

    python benchmarks/convert.py [--quick] [--json]

Each way runs in a process of its own on a synthetic Llama in BF16. Memory is anonymous memory (RssAnon) at its highest
above what the process has once everything is imported; pages of mapped files, which the system takes back at will, are
not counted. It is held against one shard and the largest layer, which is what streaming has to hold.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SHARD = 100 * 10**6
WAYS = ("to Megatron", "to Hugging Face", "to FP8")


def make(folder: Path, layers: int) -> int:
    """A random Llama in shards of 100 MB; returned are the bytes of its largest layer's or other module's weights."""
    import torch
    from transformers import LlamaConfig

    from megatron_fapo.policy.hf_folder import Writer
    from megatron_fapo.policy.shapes import checkpoint_shapes

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    companions = folder.with_name("config")
    config.save_pretrained(companions)
    writer = Writer(folder, SHARD)
    sizes: dict[str, int] = {}
    for name, shape in checkpoint_shapes(config).items():
        tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
        writer.add(name, tensor)
        part = ".".join(name.split(".")[:3])
        sizes[part] = sizes.get(part, 0) + tensor.nbytes
    writer.close(companions)
    return max(sizes.values())


def convert(way: str, folder: Path) -> None:
    """One conversion in this process; prints its memory and time."""
    from megatron_fapo.policy.convert import to_hugging_face, to_megatron

    ways: dict[str, Callable[[], object]] = {
        "to Megatron": lambda: to_megatron(folder / "model", folder / "megatron"),
        "to Hugging Face": lambda: to_hugging_face(folder / "megatron", folder / "back", shard_bytes=SHARD),
        "to FP8": lambda: to_hugging_face(folder / "model", folder / "fp8", shard_bytes=SHARD, scales="blockwise"),
    }
    floor = anonymous()
    start = time.perf_counter()
    with watched() as peak:
        ways[way]()
    seconds = time.perf_counter() - start
    sys.stdout.write(json.dumps({"floor": floor, "peak": max(peak), "seconds": seconds}) + "\n")


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this benchmark needs Linux")


@contextmanager
def watched() -> Iterator[list[int]]:
    """What `anonymous` says every two milliseconds meanwhile."""
    seen, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def main() -> None:
    """Make the model, convert it in every way, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 layers (0.26 GB) instead of 24 (0.92 GB)")
    parser.add_argument("--json", action="store_true", help="one line of JSON at the end")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.way:
        convert(chosen.way, chosen.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layer = make(folder / "model", 4 if chosen.quick else 24)
        files = sorted((folder / "model").glob("*.safetensors"))
        nbytes = sum(file.stat().st_size for file in files)
        start = time.perf_counter()
        for file in files:
            shutil.copyfile(file, folder / "copy")
        copied = nbytes / (time.perf_counter() - start)
        held = SHARD + layer
        rows = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--folder", name]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(run.stdout.splitlines()[-1])
            extra, speed = found["peak"] - found["floor"], nbytes / found["seconds"]
            rows[way] = {"extra_mb": extra / 1e6, "share": extra / held, "gb_per_s": speed / 1e9}
        sys.stdout.write(
            f"{nbytes / 1e9:.2f} GB in {len(files)} shards; a shard and the largest layer are {held / 1e6:.0f} MB; "
            f"plain copy {copied / 1e9:.2f} GB/s\n"
        )
        for way, row in rows.items():
            memory = f"{row['extra_mb']:.0f} MB above the interpreter, {row['share']:.2f} of a shard and a layer"
            sys.stdout.write(f"{way}: {memory}; {row['gb_per_s']:.2f} GB/s\n")
        if chosen.json:
            result = {"gb": nbytes / 1e9, "shard_and_layer_mb": held / 1e6, "copy_gb_per_s": copied / 1e9, "ways": rows}
            sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
