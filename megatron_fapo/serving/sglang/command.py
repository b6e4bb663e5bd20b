"""How SGLang is started: its command line and environment, from settings. Light: no torch, no SGLang.

The flags for CUDA are those that co-located training needs; each with its reason.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from shutil import which

from megatron_fapo.serving.settings import ServerSettings

INSIDE = Path(__file__).parent / "inside"
"""What runs in SGLang's processes; the folder is put on their path."""
LOADER = "fapo_weights.load"
"""Our loader in there, as SGLang names it."""


def command(settings: ServerSettings, port: int, key_file: Path | None) -> list[str]:
    """The command line of one server. `key_file` is a YAML file with the API key, out of sight of `ps`."""
    sglang = settings.sglang
    return [
        os.path.abspath(which(sglang.python) or sglang.python),  # not resolved: a venv's Python is a link
        "-m",
        "sglang.launch_server",
        *("--model-path", settings.model),
        *("--host", settings.host),
        *("--port", str(port)),
        *("--dtype", settings.dtype),
        *("--tp-size", str(sglang.tensor_parallel)),
        *("--mem-fraction-static", str(sglang.memory_fraction)),
        *("--max-running-requests", str(settings.max_running)),
        *("--context-length", str(settings.context_length)),
        *("--custom-weight-loader", LOADER),
        # Its warm-up sends a text, which a model without a tokenizer cannot answer.
        "--skip-server-warmup",
        *(("--config", str(key_file)) if key_file else ()),
        *_chosen(settings),
        *sglang.arguments,
    ]


def _chosen(settings: ServerSettings) -> Iterator[str]:
    """Flags that depend on the device and on what was asked for."""
    sglang = settings.sglang
    if sglang.on_cpu:
        yield from ("--device", "cpu")
        yield from ("--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--disable-cuda-graph")
        # Without it the scheduler burns a core while nothing is asked.
        yield "--sleep-on-idle"
    elif sglang.first_gpu is not None:
        yield from ("--base-gpu-id", str(sglang.first_gpu))
    if sglang.max_total_tokens is not None:
        yield from ("--max-total-tokens", str(sglang.max_total_tokens))
    if sglang.memory_saver:
        yield "--enable-memory-saver"
        # Graph memory can only be paused with the decode graphs; the prefill graphs' default backend refuses.
        yield from ("--cuda-graph-backend-prefill", "disabled")
    if settings.priorities:
        yield "--enable-priority-scheduling"
    if settings.weights_cpu_backup:
        yield "--enable-weights-cpu-backup"
    if settings.deterministic and not sglang.on_cpu:
        yield "--enable-deterministic-inference"


def environment(settings: ServerSettings, given: Mapping[str, str]) -> dict[str, str]:
    """The environment of one server, from that of this process."""
    sglang, threads = settings.sglang, str(settings.threads)
    result = {
        **given,
        "PYTHONPATH": str(INSIDE),  # and nothing of ours: the server has packages of its own
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # /health says whether the server lives, also while it is paused; it would draw a token, and fail then.
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
        # It closes connections that were idle for five seconds, as all are between two steps, just when they are used.
        "SGLANG_TIMEOUT_KEEP_ALIVE": "3600",
    }
    # Expandable segments can neither be paused by the memory saver nor be exported to another process.
    result.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    result.pop("PYTORCH_ALLOC_CONF", None)
    if sglang.on_cpu:
        result["SGLANG_USE_CPU_ENGINE"] = "1"
        if sglang.tensor_parallel > 1:  # unless told, SGLang wants a NUMA node for each rank
            result.setdefault("SGLANG_CPU_OMP_THREADS_BIND", _cores(sglang.tensor_parallel))
    else:
        result["NCCL_CUMEM_ENABLE"] = "0"
        result["NCCL_GRAPH_REGISTER"] = "0"  # NCCL in CUDA graphs hangs after a resume otherwise
    if sglang.memory_saver:
        result["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] = "1"
    return result


def _cores(ranks: int) -> str:
    """Cores for each of the ranks of a server, in SGLang's form: they share those that this process may use."""
    mine = sorted(os.sched_getaffinity(0))
    each = max(1, len(mine) // ranks)
    starts = [rank * each % len(mine) for rank in range(ranks)]
    return "|".join(",".join(str(core) for core in mine[start : start + each]) for start in starts)
