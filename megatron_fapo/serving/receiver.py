"""A server as the end that receives weights: one class for each protocol, chosen by what the server says of itself.

| | embedded | SGLang |
|---|---|---|
| nothing is generated meanwhile | by the open update; what runs waits in place | by a pause; what runs is retracted |
| session (begin, end) | yes | where the server has the routes (0.5.22 and later) |
| bytes | a segment, read by the engine | a segment or memory of a GPU, read by our loader inside SGLang |
| proof | digests of its parameters | its own checker's digests of its fused, sharded parameters |
"""

import base64
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_fapo.delta import Change
from megatron_fapo.errors import RequestRejected
from megatron_fapo.fp8 import kept_by
from megatron_fapo.held import HeldLayout
from megatron_fapo.records import Bucket, TensorSpec
from megatron_fapo.serving.sglang.command import LOADER
from megatron_fapo.serving.sglang.wire import table_of_contents

_EXPERTS_IN_ORDER: dict[str, tuple[Any, ...]] = {
    "moe_dp_size": (None, 1),
    "enable_dp_attention": (None, False),
    "enable_eplb": (None, False),
    "ep_num_redundant_experts": (None, 0),
    "init_expert_location": (None, "trivial"),
    "moe_a2a_backend": (None, "none"),
}
"""Settings of SGLang with which a rank holds experts in their order, each once; with others they lie elsewhere."""

Json = dict[str, Any]
Command = Callable[[str, Json], Awaitable[Json]]
"""POST a body to a path of the server; its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A process group in which weights are sent, and a server's place in it."""

    name: str
    host: str
    port: int
    """Where rank 0, the sender, keeps the group's store."""
    rank: int
    """Of the server's first tensor-parallel rank; the others follow."""
    world: int
    backend: str = "gloo"
    seconds: float = 120.0
    """For the members to meet, and for one broadcast."""

    def body(self) -> Json:
        """As SGLang's /init_weights_update_group takes it."""
        return {
            "master_address": self.host,
            "master_port": self.port,
            "rank_offset": self.rank,
            "world_size": self.world,
            "group_name": self.name,
            "backend": self.backend,
        }


class Receiver(Protocol):
    """One server's way to take weights."""

    layout: HeldLayout

    async def begin(self) -> None:
        """Generate nothing, and open an update."""

    async def load(self, bucket: Bucket) -> None:
        """Copy a bucket into the model."""

    async def load_folder(self, folder: str) -> None:
        """Read all weights from safetensors files in a folder that the server sees."""

    async def join(self, group: Group) -> None:
        """Become a member of a group; returns when all members have met."""

    async def load_sent(self, bucket: Bucket, group: str) -> None:
        """Take the bucket's tensors as rank 0 of a group sends them, in their order."""

    async def leave(self, group: str) -> None:
        """Leave a group."""

    async def held(self) -> dict[str, str]:
        """Digests of what the server's model holds."""

    async def end(self, version: int) -> None:
        """Close the update under a version and continue."""


def _sent(bucket: Bucket, group: str) -> Json:
    return {
        "names": [spec.name for spec in bucket.tensors],
        "dtypes": [spec.dtype for spec in bucket.tensors],
        "shapes": [list(spec.shape) for spec in bucket.tensors],
        "group_name": group,
    }


def receiver(command: Command, info: Mapping[str, Any], routes: Mapping[str, Any]) -> Receiver:
    """The way of a server, from its /get_server_info and, for SGLang, the paths of its /openapi.json."""
    if info.get("engine") == "embedded":
        return Embedded(command)
    config = _config(info.get("model_path"))
    layout = HeldLayout(
        engine="sglang",
        tensor_parallel=int(info.get("tp_size") or 1),
        kv_heads=int(config.get("num_key_value_heads") or 1),
        experts=0 if any(info.get(key) not in usual for key, usual in _EXPERTS_IN_ORDER.items()) else _experts(config),
        expert_parallel=int(info.get("ep_size") or 1),
        kept_in_bf16=kept_by(config),
        digest="sha256" if info.get("device") == "cpu" else "words",
    )
    loads = LOADER in (info.get("custom_weight_loader") or ())
    return SGLang(command, layout, session="/begin_weight_update" in routes, loads=loads)


def _config(model: object) -> Json:
    """config.json of the model that a server serves; empty where its folder is not on this machine."""
    with suppress(OSError, ValueError):
        return dict(json.loads((Path(str(model)) / "config.json").read_text()))
    return {}


def _experts(config: Json) -> int:
    """Experts of a layer, by the names that model families give the number."""
    return int(config.get("num_experts") or config.get("n_routed_experts") or config.get("num_local_experts") or 0)


class Embedded:
    """The embedded engine."""

    layout = HeldLayout()

    def __init__(self, command: Command) -> None:
        self._command = command

    async def begin(self) -> None:
        """Running samples wait in place."""
        await self._command("/begin_weight_update", {})

    async def load(self, bucket: Bucket) -> None:
        """The engine verifies each tensor's digest."""
        body = {"load_format": "shared_memory", "bucket": bucket.to_json()}
        await self._command("/update_weights_from_tensor", body)

    async def load_folder(self, folder: str) -> None:
        """Into the open update."""
        await self._command("/update_weights_from_disk", {"model_path": folder})

    async def load_changes(self, changes: Sequence[tuple[TensorSpec, Change]]) -> None:
        """Overwrite what changed. Raises BaseDiffers before a byte changes when the server holds another base."""
        body = {
            "load_format": "delta",
            "changes": [{**spec.to_json(), "change": change.to_json()} for spec, change in changes],
        }
        await self._command("/update_weights_from_tensor", body)

    async def join(self, group: Group) -> None:
        """As one member, which waits for a broadcast as long as the sender does."""
        await self._command("/init_weights_update_group", group.body() | {"timeout": group.seconds})

    async def load_sent(self, bucket: Bucket, group: str) -> None:
        """The engine verifies each tensor's digest."""
        body = _sent(bucket, group) | {"digests": [spec.digest for spec in bucket.tensors]}
        await self._command("/update_weights_from_distributed", body)

    async def leave(self, group: str) -> None:
        """Leave."""
        await self._command("/destroy_weights_update_group", {"group_name": group})

    async def held(self) -> dict[str, str]:
        """xxh3 of each parameter."""
        return dict((await self._command("/weights_checker", {"action": "checksum"}))["checksums"])

    async def end(self, version: int) -> None:
        """Refused while a parameter is missing."""
        await self._command("/end_weight_update", {"weight_version": str(version)})


class SGLang:
    """SGLang, with sessions or without."""

    def __init__(self, command: Command, layout: HeldLayout, *, session: bool, loads: bool) -> None:
        self.layout = layout
        self._command, self._session, self._loads = command, session, loads
        self._open = False

    async def begin(self) -> None:
        """Running samples are retracted, to be prefilled again with the new weights.

        Paused in place they would keep the cache from being flushed, and later requests would find prefixes that old
        weights computed.
        """
        await self._command("/pause_generation", {"mode": "retract"})
        if self._session and not self._open:  # one that broke off elsewhere is still open here
            await self._command("/begin_weight_update", {})
            self._open = True

    async def load(self, bucket: Bucket) -> None:
        """Each rank loads its part. A flush waits for the end."""
        if not self._loads:
            raise RequestRejected(
                f"this SGLang server cannot read segments: start it with --custom-weight-loader {LOADER}"
            )
        payload = base64.b64encode(table_of_contents(json.dumps(bucket.to_json()))).decode()
        body = {
            "serialized_named_tensors": [payload] * self.layout.tensor_parallel,
            "load_format": LOADER,
            "flush_cache": False,
        }
        await self._command("/update_weights_from_tensor", body)

    async def load_folder(self, folder: str) -> None:
        """SGLang's own loader; a flush waits for the end."""
        await self._command("/update_weights_from_disk", {"model_path": folder, "flush_cache": False})

    async def join(self, group: Group) -> None:
        """As one member for each tensor-parallel rank."""
        await self._command("/init_weights_update_group", group.body())

    async def load_sent(self, bucket: Bucket, group: str) -> None:
        """Each rank receives all tensors and loads its part."""
        await self._command("/update_weights_from_distributed", _sent(bucket, group) | {"flush_cache": False})

    async def leave(self, group: str) -> None:
        """Leave."""
        await self._command("/destroy_weights_update_group", {"group_name": group})

    async def held(self) -> dict[str, str]:
        """The checker's sum of each parameter of each rank."""
        found: dict[str, str] = {}
        for rank in (await self._command("/weights_checker", {"action": "checksum"}))["ranks"]:
            place = rank["parallelism_info"]
            place = place[0] if isinstance(place, list) else place
            on = f"@{place['tp_rank']}" if self.layout.tensor_parallel > 1 else ""
            found |= {f"{name}{on}": value for name, value in rank["checksums"].items()}
        return found

    async def end(self, version: int) -> None:
        """Close the session, forget cached prefixes, name the version, go on."""
        if self._session:
            await self._command("/end_weight_update", {})
            self._open = False
        await self._command("/flush_cache", {})
        await self._command("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        await self._command("/continue_generation", {})
