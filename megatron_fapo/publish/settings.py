"""Settings of publishing weights."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_fapo.settings import Settings


class PublishSettings(Settings):
    """How new weights reach the servers."""

    transport: Literal["auto", "shared_memory", "cuda_ipc", "disk", "group", "delta"] = "auto"
    """shared_memory: servers on the trainer's machine read buckets from /dev/shm. cuda_ipc: SGLang servers there read
    buckets from the memory of the first rank's GPU. disk: servers read safetensors files
    from `folder`. group: the first rank broadcasts in a process group, also to servers on other machines. delta: only
    the elements that changed since the last version, the rest through shared memory. auto: group where servers are on
    other nodes than the first rank, else shared_memory."""
    bucket_megabytes: Annotated[float, Field(gt=0)] = 512.0
    """Size of one bucket; two exist at a time."""
    folder: Path | None = None
    """disk: a folder that trainer and servers see; delta: where the last version lies. Default: `weights` in the run's
    folder."""
    group_backend: Literal["gloo", "nccl"] = "gloo"
    """group: gloo for servers on the CPU, nccl for those on CUDA devices other than the ranks'."""
    group_address: str | None = None
    """group: the address of the first rank's machine at which servers reach it. Default: the one by which Ray knows
    that node where servers are on other nodes, else 127.0.0.1."""
    group_timeout: Annotated[float, Field(gt=0)] = 120.0
    """group: seconds for the members to meet, and for one broadcast (on SGLang's side torch's default)."""

    def across(self, address: str) -> "PublishSettings":
        """The same for servers on other nodes than the first rank, whose node they reach at `address`."""
        transport = "group" if self.transport == "auto" else self.transport
        return self.changed(transport=transport, group_address=self.group_address or address)
