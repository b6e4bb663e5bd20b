"""Bugs of megatron-core that every device meets, mended once per process by `install()`.

| | patch | without it |
|---|---|---|
| P8 | `te_general_gemm` is bound to None where Transformer Engine is absent | NameError in the router of experts |
| P11, P13, P14 | those of `compat.checkpoint_files` | a save forks, and mixes optimizer states up |
"""

from collections.abc import Callable, Collection, Mapping

_installed = False


def install(leave_out: Collection[str] = ()) -> None:
    """Install the patches. Does nothing a second time. `leave_out` names patches that a test wants to miss."""
    global _installed
    if _installed:
        return
    for name, patch in PATCHES.items():
        if name not in leave_out:
            patch()
    _installed = True


def _bind_general_gemm() -> None:
    """P8: the router asks whether `te_general_gemm is None`, a name that a failed import leaves unbound."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _checkpoint_files() -> None:
    from megatron_fapo.compat import checkpoint_files  # it loads Megatron, which asks for the CPU's patches

    checkpoint_files.install()


PATCHES: Mapping[str, Callable[[], None]] = {
    "P8": _bind_general_gemm,
    "P11": _checkpoint_files,
}
"""By their number in this module's table."""
