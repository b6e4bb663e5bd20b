"""megatron-core, unmodified (the versions of `compat.versions`), on a machine without CUDA.

Megatron asks torch for CUDA devices, tensors and streams by name. These patches answer such questions with the
CPU. They hook torch rather than lines of Megatron wherever that is possible, are installed once per process by
`install()`, and are absent where CUDA exists. Numbers are those of the tests in `tests/compat`, each of which
fails once upstream no longer needs the patch.

| | patch | asked for by |
|---|---|---|
| P1 | `torch.cuda.current_device` answers the CPU | buffers, norms, everything |
| P2 | `torch.cuda.synchronize` does nothing | pipeline p2p, saving checkpoints |
| P3 | device="cuda" in torch calls means the CPU; `.cuda()` is the identity; `.type()` says torch.cuda.* | everything |
| P4 | the named random streams live in the CPU generator | `model_parallel_cuda_manual_seed` |
| P5 | torch.compile off (`TORCHDYNAMO_DISABLE`) | nothing: it saves 40 MB and start-up time a rank |
| P6 | `pin_memory=True` is dropped | context parallel's rope |
| P7 | streams that are always idle | dispatcher of tokens to experts |
| P9 | sizes of all-to-all splits become numpy arrays for CPU tensors too | dispatcher with expert parallelism |
| P10 | `step` of torch's Adam: created before a checkpoint is loaded, one per parameter | DistributedOptimizer |
| P12 | activations and gradients between stages are told apart, and their shapes too | two interleaved stages |

P8, P11, P13 and P14 are in `compat.upstream`: they mend what every device meets.
"""

import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # P5: read when torch is imported

import torch
from torch.overrides import TorchFunctionMode

from megatron_fapo.compat import upstream

# Megatron and mbridge say at import that Transformer Engine and Apex are missing; here that is as it should be. The
# "full scope" of CUDA graphs, which Megatron calls deprecated, is its own default.
for _message in (".*Apex.*", ".*ShardedTensor.*", ".*torch.distributed is disabled.*", "full scope is deprecated.*"):
    warnings.filterwarnings("ignore", message=_message)

CPU = torch.device("cpu")


class CudaMeansCpu(TorchFunctionMode):
    """P3 and P6: while active, a request for a CUDA or pinned tensor through the torch API gets a CPU tensor."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Rewrite the device of one torch call."""
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers compare with "torch.cuda.FloatTensor"
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": CPU}
        if kwargs.get("pin_memory"):  # P6
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


_installed = False


def install(leave_out: Collection[str] = ()) -> None:
    """Install the patches of the whole process (all but P3). Does nothing a second time, or where CUDA exists.

    `leave_out` names patches that a test wants to miss.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return
    for name, patch in PATCHES.items():
        if name not in leave_out:
            patch()
    upstream.install(leave_out)
    _installed = True


def active() -> AbstractContextManager[Any]:
    """P3 for the body of a `with` block, in this thread: every call into Megatron runs inside one."""
    return CudaMeansCpu()


def _current_device() -> None:
    """P1: the current device is the CPU."""
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]


def _synchronize() -> None:
    """P2: CPU work is done when the call returns."""
    torch.cuda.synchronize = lambda device=None: None


class IdleStream:
    """A CUDA stream, and an event of one, whose work is always done: CPU work ends before its call returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, other: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Any = None) -> "IdleStream":
        """The stream is its own event."""
        return self


def _idle_streams() -> None:
    """P7: one stream that is always idle, for everybody."""
    idle = IdleStream()
    torch.cuda.Stream = lambda *args, **kwargs: idle  # type: ignore[assignment,misc]
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: idle  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda stream: nullcontext()  # type: ignore[assignment,return-value]


def _split_sizes() -> None:
    """P9: upstream turns split sizes into numpy only on their way from a GPU; all-to-all wants them so anywhere."""
    from megatron.core.transformer.moe import token_dispatcher

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu


def _cpu_random_streams() -> None:
    """P4: Megatron's named random streams, kept as states of the CPU generator."""
    from megatron.core.tensor_parallel import random as streams

    class CpuStreams(streams.CudaRNGStatesTracker):  # type: ignore[misc]
        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random stream {name!r} with seed {seed} exists already")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextmanager
        def fork(self, name: str = streams._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    streams._CUDA_RNG_STATE_TRACKER = CpuStreams()
    streams._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    # asked for by activation recompute only, which saves and restores the CPU state beside them
    streams._get_cuda_rng_state = lambda *args, **kwargs: None
    streams._set_cuda_rng_state = lambda *args, **kwargs: None


def _separate_adam_steps() -> None:
    """P10: on loading, every parameter keeps a `step` of its own.

    Without Transformer Engine and Apex the optimizer is torch's, whose state has a `step` that Megatron neither
    saves per parameter nor knows here: `load_state_dict` hands one tensor to all, and the first update then
    counts once per parameter. Seen in 0.16.1 to 0.19.2.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._set_main_param_and_optimizer_states

    @torch.no_grad()
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        original(self, model_param, tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def initialize_adam(optimizer: Any) -> None:
    """P10: give torch's Adam the state of its first step where it has none: Megatron expects it in checkpoints."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups if part.optimizer is not None else ():
            for param in group["params"]:
                if not part.optimizer.state[param]:
                    part.optimizer.state[param] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }


ACTIVATION, GRADIENT = 1, 2
"""Tags of messages between pipeline stages."""


def _tell_directions_apart() -> None:
    """P12: what travels forwards never takes the place of what travels backwards.

    Where a stage's previous and next one are the same rank (two stages in a circle, as the interleaved schedule has
    them) upstream pairs messages by the order in which they are posted, which differs between the two ranks: shapes,
    and tensors in batched mode, are mixed up. Gloo pairs by tag as well. Nobody waits until a shape that he sent has
    arrived: with as many microbatches as stages, the receiver may first wait for a tensor of his.
    """
    import torch.distributed as dist
    from megatron.core.pipeline_parallel import p2p_communication

    def exchange(
        *,
        tensor_send_prev: torch.Tensor | None,
        tensor_recv_prev: torch.Tensor | None,
        tensor_send_next: torch.Tensor | None,
        tensor_recv_next: torch.Tensor | None,
        group: Any,
        prev_pipeline_rank: int,
        next_pipeline_rank: int,
    ) -> dict[str, Any]:
        planned = {
            "recv_prev": (dist.irecv, tensor_recv_prev, prev_pipeline_rank, ACTIVATION),
            "recv_next": (dist.irecv, tensor_recv_next, next_pipeline_rank, GRADIENT),
            "send_next": (dist.isend, tensor_send_next, next_pipeline_rank, ACTIVATION),
            "send_prev": (dist.isend, tensor_send_prev, prev_pipeline_rank, GRADIENT),
        }
        return {
            name: start(tensor, peer, group=group, tag=tag)
            for name, (start, tensor, peer, tag) in planned.items()
            if tensor is not None
        }

    def exchange_shapes(
        self: Any, to_next: torch.Tensor | None, to_previous: torch.Tensor | None, from_previous: bool, from_next: bool
    ) -> tuple[list[int], list[int]]:
        heard = torch.zeros(2, 3, dtype=torch.int64)
        said = [None if tensor is None else torch.tensor(tensor.shape) for tensor in (to_previous, to_next)]
        requests = exchange(
            tensor_send_prev=said[0],
            tensor_recv_prev=heard[0] if from_previous else None,
            tensor_send_next=said[1],
            tensor_recv_next=heard[1] if from_next else None,
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )
        for name, request in requests.items():
            if name.startswith("recv"):
                request.wait()
        # sent shapes are kept until the next exchange, when the tensors after them have arrived
        self.shapes_on_their_way = (said, requests)
        return heard[0].tolist(), heard[1].tolist()

    p2p_communication._p2p_ops = exchange
    p2p_communication.P2PCommunicator._communicate_shapes = exchange_shapes


PATCHES: Mapping[str, Callable[[], None]] = {
    "P1": _current_device,
    "P2": _synchronize,
    "P4": _cpu_random_streams,
    "P7": _idle_streams,
    "P9": _split_sizes,
    "P10": _separate_adam_steps,
    "P12": _tell_directions_apart,
}
"""By their number in this module's table."""
