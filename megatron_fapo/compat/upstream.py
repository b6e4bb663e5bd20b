"""Bugs of megatron-core that every device meets, mended once per process by `install()`.

| | patch | without it |
|---|---|---|
| P8 | `te_general_gemm` is bound to None where Transformer Engine is absent | NameError in the router of experts |
| P11, P13, P14 | those of `compat.checkpoint_files` | a save forks, and mixes optimizer states up |
| P12 | stages tell each other shapes in the order in which they send tensors | two interleaved stages mix shapes up |
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

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


def _ordered_shapes() -> None:
    """P12: shapes travel by the same ordered sends as the tensors that they describe.

    Upstream sends shapes in one batch: to the previous stage, from it, to the next one, from it. Where previous and
    next are the same rank (two stages in a circle, as the interleaved schedule has them) the first message sent meets
    the first receive posted, which waits for the other direction. The tensors themselves go by `_p2p_ops`, where
    even and odd stages take turns.
    """
    from megatron.core.pipeline_parallel import p2p_communication

    def communicate_shapes(
        self: Any, to_next: torch.Tensor | None, to_previous: torch.Tensor | None, from_previous: bool, from_next: bool
    ) -> tuple[list[int], list[int]]:
        device = torch.cuda.current_device()

        def said(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else torch.tensor(tensor.shape, device=device)

        def heard(wanted: bool) -> torch.Tensor | None:
            return torch.empty(3, dtype=torch.int64, device=device) if wanted else None

        previous, following = heard(from_previous), heard(from_next)
        requests = p2p_communication._p2p_ops(
            tensor_send_prev=said(to_previous),
            tensor_recv_prev=previous,
            tensor_send_next=said(to_next),
            tensor_recv_next=following,
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )
        for request in requests.values():
            request.wait()
        none = [0, 0, 0]
        return (
            none if previous is None else previous.tolist(),
            none if following is None else following.tolist(),
        )

    p2p_communication.P2PCommunicator._communicate_shapes = communicate_shapes


def _checkpoint_files() -> None:
    from megatron_fapo.compat import checkpoint_files  # it loads Megatron, which asks for the CPU's patches

    checkpoint_files.install()


PATCHES: Mapping[str, Callable[[], None]] = {
    "P8": _bind_general_gemm,
    "P11": _checkpoint_files,
    "P12": _ordered_shapes,
}
"""By their number in this module's table."""
