"""Another process on the same GPU: loads buckets as SGLang's processes do, and says what it then holds.

    python -m tests.gpu.reader

Reads a `records.Bucket` as JSON from each line, and answers each with a line: {tensor: sum of its words}, and what its
device has free. Like SGLang's, its copies are asynchronous.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from megatron_fapo.compat.word_sum import WordSum
from megatron_fapo.serving.sglang.command import INSIDE, LOADER


class Model:
    """Parameters under the names under which they arrive."""

    def __init__(self) -> None:
        self.held: dict[str, torch.Tensor] = {}

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            if name not in self.held:
                self.held[name] = torch.empty_like(tensor, device="cuda")
            self.held[name].copy_(tensor, non_blocking=True)


def loader() -> Any:
    """`load` of the module that runs inside SGLang."""
    module_name, function = LOADER.rsplit(".", 1)
    spec = importlib.util.spec_from_file_location(module_name, INSIDE / f"{module_name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def main() -> None:
    model, load = Model(), loader()
    for line in sys.stdin:
        load(model, [(line, torch.Tensor())])
        sums = {}
        for spec in json.loads(line)["tensors"]:
            total = WordSum(torch.device("cuda"))
            total.update(model.held[spec["name"]].view(-1).view(torch.uint8))
            sums[spec["name"]] = total.hexdigest()
        sys.stdout.write(json.dumps({"sums": sums, "free": torch.cuda.mem_get_info()[0]}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
