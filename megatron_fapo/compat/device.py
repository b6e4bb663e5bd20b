"""What a CPU and a CUDA device differ in: one table, and the only place that asks which of the two is here."""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from megatron_fapo.compat import megatron_cpu, upstream  # before torch: it switches torch.compile off

from megatron_fapo.compat import memory  # isort: skip

import torch  # isort: skip

from megatron_fapo.errors import ConfigError


def _the_only_one(rank: int) -> None:
    """There is one CPU device."""


FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""Collectives remembered by each rank. TORCH_FR_DUMP_TEMP_FILE, to which the rank is added, says where."""


def _claim_gpu(rank: int) -> None:
    """torchrun says which GPU; Ray shows each rank one; plain processes see all and take them in turn.

    NCCL's flight recorder keeps the last collectives and writes them to a file when one times out.
    """
    for name, value in FLIGHT_RECORDER.items():
        os.environ.setdefault(name, value)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())


def _no_fp8(recipe: str) -> None:
    """Plain torch layers compute in the dtype of their weights."""
    raise ConfigError(
        f"policy.fp8 (recipe {recipe!r}) needs a GPU and Transformer Engine's layers, and this process has not both: "
        "install transformer-engine[pytorch,core_cu13] there, or leave policy.fp8 out"
    )


def _prepare_fp8(recipe: str) -> None:
    """Refuse a recipe that this GPU or CUDA cannot compute; choose the scales that Hopper's kernels want."""
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        raise ConfigError(f"policy.fp8 needs compute capability 8.9 or more, this GPU has {capability}")
    if recipe == "blockwise":
        cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
        if cuda < (12, 9):
            raise ConfigError(f"policy.fp8.recipe = blockwise needs CUDA 12.9 or newer, torch was built with {cuda}")
        if capability[0] == 9:  # powers of two as scales are for Blackwell
            os.environ.setdefault("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The facts that the policy needs of the machine it runs on."""

    name: Literal["cpu", "cuda"]
    backend: str
    """Backend of torch.distributed."""
    spec: Literal["local", "transformer_engine"]
    """Layers of our own modules on plain torch, or of Transformer Engine."""
    transformer_flags: Mapping[str, Any] = field(default_factory=dict)
    """TransformerConfig fields that depend on the device: fusions and the place of initialisation."""
    fused_adam: bool
    """Whether torch's AdamW is switched to its fused kernel (on CUDA, Transformer Engine and Apex bring their own)."""
    claim: Callable[[int], None]
    """Make one of the machine's devices this rank's own; before its process group is made."""
    install: Callable[[], None]
    """Patches of the whole process, installed once before anything of Megatron is built."""
    active: Callable[[], AbstractContextManager[Any]]
    """Patches of a stretch of code: every call into Megatron runs inside `with device.active():`."""
    memory: memory.Memory
    """How tensors leave its memory for a while."""
    prepare_fp8: Callable[[str], None]
    """Make the process fit for an FP8 recipe, before its layers are built. Raises ConfigError where it cannot be."""

    def torch_device(self) -> torch.device:
        """Where tensors live; on CUDA, the device that this process was given."""
        return torch.device(self.name, torch.cuda.current_device()) if self.name == "cuda" else torch.device("cpu")


NO_FUSIONS: Mapping[str, Any] = {
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
}
"""Kernels that need Transformer Engine or Apex, switched off."""

FUSIONS: Mapping[str, Any] = {
    **dict.fromkeys(NO_FUSIONS, True),
    "gradient_accumulation_fusion": find_spec("fused_weight_gradient_mlp_cuda") is not None,
}
"""All of them; the gradient's sum inside the matrix product of the output layer is a kernel of Apex."""

CPU = Device(
    name="cpu",
    backend="gloo",
    spec="local",
    transformer_flags={**NO_FUSIONS, "use_cpu_initialization": True},
    fused_adam=True,
    claim=_the_only_one,
    install=megatron_cpu.install,
    active=megatron_cpu.active,
    memory=memory.CPU,
    prepare_fp8=_no_fp8,
)

CUDA_PLAIN = Device(
    name="cuda",
    backend="nccl",
    spec="local",
    transformer_flags=NO_FUSIONS,
    fused_adam=True,
    claim=_claim_gpu,
    install=upstream.install,
    active=nullcontext,
    memory=memory.CUDA,
    prepare_fp8=_no_fp8,
)
"""CUDA without Transformer Engine."""

CUDA = Device(
    name="cuda",
    backend="nccl",
    spec="transformer_engine",
    transformer_flags=FUSIONS,
    fused_adam=False,
    claim=_claim_gpu,
    install=upstream.install,
    active=nullcontext,
    memory=memory.CUDA,
    prepare_fp8=_prepare_fp8,
)
"""CUDA with Transformer Engine: its layers and kernels, Apex's where they are installed, FP8."""


def current() -> Device:
    """The device of this machine."""
    if not torch.cuda.is_available():
        return CPU
    return CUDA if find_spec("transformer_engine") else CUDA_PLAIN


def here() -> torch.device:
    """Where this process's tensors live."""
    return current().torch_device()
