"""Settings of publishing weights."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_fapo.settings import Settings


class PublishSettings(Settings):
    """How new weights reach the servers."""

    transport: Literal["shared_memory"] = "shared_memory"
    """shared_memory: servers on the trainer's machine read buckets from /dev/shm."""
    bucket_megabytes: Annotated[float, Field(gt=0)] = 512.0
    """Size of one bucket; two exist at a time."""
