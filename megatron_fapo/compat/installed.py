"""What a Python environment has of the GPU stack, as one line of JSON: run by `fapo doctor`, in each environment.

A script of its own, because the environment that is asked need not have this package: SGLang's has not. It asks the
libraries that are loaded rather than their metadata, which two NCCLs in one environment do not agree on.
"""

import ctypes
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

ASKED = (
    "torch",
    "megatron-core",
    "sglang",
    "sglang-kernel",
    "flashinfer-python",
    "transformers",
    "transformer-engine",
    "torch-memory-saver",
    "flash-attn",
    "apex",
    "nvidia-modelopt",
)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _nccl() -> str | None:
    """Of the library that torch has loaded, or would load."""
    try:
        library, number = ctypes.CDLL("libnccl.so.2"), ctypes.c_int()
        library.ncclGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return f"{number.value // 10000}.{number.value // 100 % 100}.{number.value % 100}"


def main() -> None:
    """Print what there is."""
    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in ASKED},
        "apex_kernels": find_spec("amp_C") is not None,
        "torch": None,
        "cuda": None,
        "gpus": [],
    }
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a broken torch raises anything, and that is what is asked for
        found["torch_error"] = f"{type(error).__name__}: {error}"
    else:
        found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            capability = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            found["gpus"].append({"name": name, "free": free, "total": total, "capability": capability})
    found["nccl"] = _nccl()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
