"""Bodies of the requests that bring new weights. Everything refused is refused by name."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megatron_fapo.delta import Change
from megatron_fapo.errors import RequestRejected
from megatron_fapo.records import Bucket, TensorSpec

if TYPE_CHECKING:  # torch is imported after the port is open
    from megatron_fapo.compat.weight_group import WeightGroup

Json = dict[str, Any]

_SECONDS = 120.0
"""For the members of a group to meet, and for one of its broadcasts, unless its sender says otherwise."""


def parse_bucket(body: Json) -> Bucket:
    """The bucket of an /update_weights_from_tensor body. Raises RequestRejected."""
    with _refused("bucket: not a table of tensors"):
        given = body["bucket"]
        bucket = Bucket(
            segment=str(given["segment"]), nbytes=int(given["nbytes"]), tensors=tuple(_specs(given["tensors"]))
        )
    if bucket.nbytes < 1 or "\0" in bucket.segment:
        raise RequestRejected(f"bucket: {bucket.nbytes} bytes in segment {bucket.segment!r}")
    return bucket


def parse_changes(body: Json) -> list[tuple[TensorSpec, Change]]:
    """The changes of an /update_weights_from_tensor body. Raises RequestRejected."""
    with _refused("changes: not a list of tensors"):
        given = body["changes"]
        return list(zip(_specs(given), (Change.from_json(entry["change"]) for entry in given), strict=True))


def parse_group(body: Json) -> tuple[str, Callable[[], "WeightGroup"]]:
    """Name of the group of an /init_weights_update_group body, and what joins it. Raises RequestRejected."""
    with _refused("group"):
        host, port = str(body["master_address"]), int(body["master_port"])
        rank, world = int(body["rank_offset"]), int(body["world_size"])
        name, backend = str(body["group_name"]), str(body.get("backend", "nccl"))
        seconds = float(body.get("timeout", _SECONDS))
    if backend != "gloo":
        raise RequestRejected(f"backend {backend!r}: the embedded engine computes on the CPU, use gloo")
    if not 0 < rank < world:
        raise RequestRejected(f"rank_offset {rank}: rank 0 of {world} sends, a server has another one")

    def join() -> "WeightGroup":
        from megatron_fapo.compat.weight_group import WeightGroup, meet

        try:
            store = meet(host, port, world, seconds, first=False)
            return WeightGroup(store, rank, world, name, backend, seconds)
        except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
            raise RequestRejected(f"group {name!r} at {host}:{port}: {error}") from None

    return name, join


def parse_sent(body: Json) -> tuple[list[TensorSpec], str]:
    """Tensors of an /update_weights_from_distributed body, and the group. Raises RequestRejected."""
    with _refused("tensors"):
        columns = (body["names"], body["dtypes"], body["shapes"], body["digests"])
        keys = ("name", "dtype", "shape", "digest")
        rows = [dict(zip(keys, row, strict=True), offset=0) for row in zip(*columns, strict=True)]
        return list(_specs(rows)), str(body["group_name"])


def _specs(given: Iterable[Json]) -> Iterator[TensorSpec]:
    for t in given:
        yield TensorSpec(
            name=str(t["name"]),
            dtype=str(t["dtype"]),
            shape=tuple(int(size) for size in t["shape"]),
            offset=int(t["offset"]),
            digest=str(t["digest"]),
        )


@contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise RequestRejected(f"{what}: {error!r}") from None
