"""A server as the end that receives weights: one class for each protocol, chosen by what the server says of itself.

| | embedded | SGLang |
|---|---|---|
| nothing is generated meanwhile | by the open update; what runs waits in place | by a pause; what runs is retracted |
| session (begin, end) | yes | where the server has the routes (0.5.22 and later) |
| bytes | a segment, read by the engine | a segment, read by our loader inside SGLang |
| proof | digests of its parameters | its own checker's digests of its fused, sharded parameters |
"""

import base64
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megatron_fapo.errors import RequestRejected
from megatron_fapo.fp8 import kept_by
from megatron_fapo.held import HeldLayout
from megatron_fapo.records import Bucket
from megatron_fapo.serving.sglang.command import LOADER
from megatron_fapo.serving.sglang.wire import table_of_contents

Json = dict[str, Any]
Command = Callable[[str, Json], Awaitable[Json]]
"""POST a body to a path of the server; its answer."""


class Receiver(Protocol):
    """One server's way to take weights."""

    layout: HeldLayout

    async def begin(self) -> None:
        """Generate nothing, and open an update."""

    async def load(self, bucket: Bucket) -> None:
        """Copy a bucket into the model."""

    async def held(self) -> dict[str, str]:
        """Digests of what the server's model holds."""

    async def end(self, version: int) -> None:
        """Close the update under a version and continue."""


def receiver(command: Command, info: Mapping[str, Any], routes: Mapping[str, Any]) -> Receiver:
    """The way of a server, from its /get_server_info and, for SGLang, the paths of its /openapi.json."""
    if info.get("engine") == "embedded":
        return Embedded(command)
    config = _config(info.get("model_path"))
    layout = HeldLayout(
        engine="sglang",
        tensor_parallel=int(info.get("tp_size") or 1),
        kv_heads=int(config.get("num_key_value_heads") or 1),
        kept_in_bf16=kept_by(config),
    )
    loads = LOADER in (info.get("custom_weight_loader") or ())
    return SGLang(command, layout, session="/begin_weight_update" in routes, loads=loads)


def _config(model: object) -> Json:
    """config.json of the model that a server serves; empty where its folder is not on this machine."""
    with suppress(OSError, ValueError):
        return dict(json.loads((Path(str(model)) / "config.json").read_text()))
    return {}


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
        body = {"load_format": "shared_memory", "bucket": asdict(bucket)}
        await self._command("/update_weights_from_tensor", body)

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
        if not self._loads:
            raise RequestRejected(
                f"this SGLang server cannot read segments: start it with --custom-weight-loader {LOADER}"
            )
        await self._command("/pause_generation", {"mode": "retract"})
        if self._session and not self._open:  # one that broke off elsewhere is still open here
            await self._command("/begin_weight_update", {})
            self._open = True

    async def load(self, bucket: Bucket) -> None:
        """Each rank loads its part. A flush waits for the end."""
        payload = base64.b64encode(table_of_contents(json.dumps(asdict(bucket)))).decode()
        body = {
            "serialized_named_tensors": [payload] * self.layout.tensor_parallel,
            "load_format": LOADER,
            "flush_cache": False,
        }
        await self._command("/update_weights_from_tensor", body)

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
