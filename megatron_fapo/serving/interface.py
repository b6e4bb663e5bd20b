"""What rollout, judge and publish need of a generation server. Light: no torch, no HTTP library.

`serving.client.ServerClient` talks to a real server; the virtual-time tests and the simulator bring their own.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from megatron_fapo.delta import Change
from megatron_fapo.held import HeldLayout
from megatron_fapo.records import Bucket, Generation, GenerationRequest, Ints, TensorSpec
from megatron_fapo.serving.receiver import Group


class Generator(Protocol):
    """Something that generates. Its errors are `ServerError`s."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[Generation]:
        """Yield the samples of a request, each as soon as it is finished, in any order, each exactly once."""


class Scorer(Generator, Protocol):
    """A generator that also says how likely it finds given tokens."""

    async def choices(self, rid: str, token_ids: Ints, choices: Sequence[int]) -> list[float]:
        """The log-prob of each of the tokens `choices` right after `token_ids`, at temperature 1: a prefill alone."""


class WeightReceiver(Protocol):
    """A server whose weights can be replaced. While an update is open it generates nothing."""

    async def layout(self) -> HeldLayout:
        """How it holds a model, which decides what `held` must say."""

    async def begin_update(self) -> None:
        """Pause generation (running requests wait) and open an update."""

    async def load_bucket(self, bucket: Bucket) -> None:
        """Copy a bucket into the model. The segment may be reused when this returns."""

    async def load_folder(self, folder: str) -> None:
        """Read all weights from safetensors files in a folder that the server sees."""

    async def load_changes(self, changes: Sequence[tuple[TensorSpec, Change]]) -> bool:
        """Overwrite what changed since the last version; False when the server needs the tensors in full.

        Raises BaseDiffers when it holds something else than the changes were made from.
        """

    async def join_group(self, group: Group) -> None:
        """Become a member of a process group in which weights are sent; waits for the other members."""

    async def load_sent(self, bucket: Bucket, group: str) -> None:
        """Take a bucket's tensors as the group's rank 0 sends them."""

    async def leave_group(self, group: str) -> None:
        """Leave a process group."""

    async def held(self) -> dict[str, str]:
        """{parameter: digest} of what it holds now, computed from its own memory; update open or not."""

    async def end_update(self, version: int) -> None:
        """Close the update, name what is held `version`, and continue generation."""
