"""One asynchronous client for the embedded engine and for SGLang; no torch.

Foreign errors (connection, status, JSON) become `ServerUnreachable`, `RequestRejected` or `ServerError` in one
place, `ServerClient._exchange`, with the URL and the request id.
"""

import asyncio
import base64
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Literal

import aiohttp
import numpy as np

from megatron_fapo.delta import Change
from megatron_fapo.errors import BaseDiffers, RequestRejected, ServerError, ServerUnreachable
from megatron_fapo.held import HeldLayout
from megatron_fapo.records import Bucket, Generation, GenerationRequest, Ints, TensorSpec, VersionSpan, floats, ints
from megatron_fapo.serving.receiver import Embedded, Group, Receiver, receiver
from megatron_fapo.weights import checksum

Json = dict[str, Any]
PauseMode = Literal["in_place", "retract", "abort"]

NO_VERSION = -1
"""Version of tokens drawn with weights that no update named by a number, such as those loaded at the start."""

ROUTING_KEY = "X-SMG-Routing-Key"
"""The header by which a router sends requests of one key to the same server."""


class ServerClient:
    """A generation server at a URL. Implements `Generator` and `WeightReceiver`.

    Every method raises ServerUnreachable when the server does not answer or dies, RequestRejected when it refuses
    (HTTP 4xx) and ServerError for all else that is wrong with its answer. `routed` says that the URL is a router's:
    it passes single requests on, to one server for the requests of a group, and what it answers with 5xx is a server
    that could not be reached.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float = 600.0,
        connect_timeout: float = 10.0,
        routed: bool = False,
    ) -> None:
        self.url = url.rstrip("/")
        self._routed = routed
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout, sock_read=timeout)
        self._session: aiohttp.ClientSession | None = None
        self._group_stream: bool | None = False if routed else None
        self._weights: Receiver | None = None
        self.failing = False
        """Whether its last exchange, of whatever kind, broke off."""

    async def __aenter__(self) -> "ServerClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    # Generating.

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Generation, None]:
        """Yield the samples of a request, each as soon as it is finished, in any order, each exactly once."""
        if self._group_stream is None:
            self._group_stream = bool((await self.info()).get("group_stream", False))
        samples = self._as_group(request) if self._group_stream else self._one_by_one(request)
        try:
            async for sample in samples:
                yield sample
        finally:
            await samples.aclose()

    async def _as_group(self, request: GenerationRequest) -> AsyncGenerator[Generation, None]:
        """One request, one line for each finished sample."""
        body = {
            "rid": list(request.ids),
            "input_ids": request.token_ids.tolist(),
            "sampling_params": _sampling(request, n=len(request.ids), seed=list(request.seeds)),
            "return_logprob": True,
            "group_stream": True,
            "priority": request.priority,
            "drawn": request.drawn,
        }
        waiting = set(request.ids)
        async with self._exchange("POST", "/generate", body, request.ids[0]) as response:
            async for line in _lines(response):
                sample = _from_line(_parsed(line, self.url), self.url)
                waiting.discard(sample.id)
                yield sample
            if waiting:
                raise ServerUnreachable(f"{self.url} stopped before {len(waiting)} samples", request=min(waiting))

    async def _one_by_one(self, request: GenerationRequest) -> AsyncGenerator[Generation, None]:
        """A request a sample, as SGLang understands it. Where one breaks off, the others are waited for first."""
        tasks = [
            asyncio.ensure_future(self._one(request, rid, seed))
            for rid, seed in zip(request.ids, request.seeds, strict=True)
        ]
        broken: ServerUnreachable | None = None
        try:
            for task in asyncio.as_completed(tasks):
                try:
                    sample = await task
                except ServerUnreachable as error:
                    broken = error
                else:
                    yield sample
            if broken is not None:
                raise broken
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, request: GenerationRequest, rid: str, seed: int) -> Generation:
        body = {
            "rid": rid,
            "input_ids": request.token_ids.tolist(),
            "sampling_params": _sampling(request, n=1, seed=seed),
            "return_logprob": True,
            "priority": request.priority,  # SGLang takes a request without one for the least urgent
        }
        return _from_sglang(rid, await self._json("POST", "/generate", body, rid), self.url)

    async def choices(self, rid: str, token_ids: Ints, choices: Sequence[int]) -> list[float]:
        """The log-prob of each of the tokens `choices` right after `token_ids`, at temperature 1: a prefill alone."""
        body = {
            "rid": rid,
            "input_ids": token_ids.tolist(),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "token_ids_logprob": list(choices),
            "priority": 0,
        }
        answer = await self._json("POST", "/generate", body, rid)
        if _at(answer, "meta_info", "finish_reason", "type") == "abort":
            raise ServerUnreachable(f"{self.url} ended what it was asked", request=rid)
        try:
            found = {
                int(token): float(logprob) for logprob, token, _ in answer["meta_info"]["output_token_ids_logprobs"][0]
            }
            return [found[token] for token in choices]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServerError(f"{self.url}: no log-probs of the tokens asked for: {error!r}", request=rid) from None

    # Weights.

    async def layout(self) -> HeldLayout:
        """How the server holds a model."""
        return (await self._receiver()).layout

    async def begin_update(self) -> None:
        """Pause generation (running requests wait) and open an update."""
        await (await self._receiver()).begin()

    async def load_bucket(self, bucket: Bucket) -> None:
        """Copy a bucket into the model. The segment may be reused when this returns."""
        await (await self._receiver()).load(bucket)

    async def load_folder(self, folder: str) -> None:
        """Read all weights from safetensors files in a folder that the server sees, into the open update."""
        await (await self._receiver()).load_folder(folder)

    async def load_changes(self, changes: Sequence[tuple[TensorSpec, Change]]) -> bool:
        """Overwrite what changed; False when the server cannot, and needs the tensors in full.

        Raises BaseDiffers when a tensor that it holds is not the one that its change was made from.
        """
        to = await self._receiver()
        if not isinstance(to, Embedded):
            return False
        await to.load_changes(changes)
        return True

    async def join_group(self, group: Group) -> None:
        """Become a member of a process group in which weights are sent; waits for the other members."""
        await (await self._receiver()).join(group)

    async def load_sent(self, bucket: Bucket, group: str) -> None:
        """Take the bucket's tensors as the group's rank 0 sends them."""
        await (await self._receiver()).load_sent(bucket, group)

    async def leave_group(self, group: str) -> None:
        """Leave a process group."""
        await (await self._receiver()).leave(group)

    async def held(self) -> dict[str, str]:
        """{parameter: digest} of what the server's model holds now, by its `layout`; also while an update is open."""
        return await (await self._receiver()).held()

    async def checksum(self) -> str:
        """One checksum over `held`."""
        return checksum(await self.held())

    async def end_update(self, version: int) -> None:
        """Close the update, name what is held `version`, and continue generation."""
        await (await self._receiver()).end(version)

    async def _receiver(self) -> Receiver:
        """Which protocol the server speaks; asked once."""
        if self._weights is None:
            info = await self.info()
            paths = {} if info.get("engine") == "embedded" else await self._json("GET", "/openapi.json", None)
            self._weights = receiver(self.command, info, paths.get("paths", {}))
        return self._weights

    async def load_from_disk(self, folder: str, version: int) -> None:
        """Replace the weights by those of a Hugging Face folder on the server's machine."""
        body = {"model_path": folder, "weight_version": str(version)}
        await self.command("/update_weights_from_disk", body)

    # Control.

    async def health(self, seconds: float | None = None) -> bool:
        """Whether the server answers, within so many seconds, and says that it is well."""
        try:
            async with asyncio.timeout(seconds), self._exchange("GET", "/health", None, None):
                return True
        except (ServerError, TimeoutError):
            return False

    async def info(self) -> Json:
        """What the server says about itself."""
        return await self._json("GET", "/get_server_info", None)

    async def busy(self) -> bool:
        """Whether the server generates samples, or keeps some waiting, whoever asked for them."""
        info = await self.info()
        if info.get("engine") == "embedded":
            return int(info["running"]) + int(info["waiting"]) > 0
        loads = (await self._json("GET", "/v1/loads?include=core", None))["loads"]
        if any(int(load["num_running_reqs"]) + int(load["num_waiting_reqs"]) for load in loads):
            return True
        # These are as of its last pass: what came since then keeps a flush from being accepted.
        try:
            await self.flush_cache()
        except RequestRejected:
            return True
        return False

    async def weight_version(self) -> str:
        """The name of the weights that it generates with now; "default" before the first update."""
        return str((await self._json("GET", "/get_model_info", None))["weight_version"])

    async def pause(self, mode: PauseMode = "in_place") -> None:
        """Stop generating: keep running samples in place, retract them to be prefilled again, or abort them."""
        await self.command("/pause_generation", {"mode": mode})

    async def resume_generation(self) -> None:
        """Generate again after `pause`."""
        await self.command("/continue_generation", {})

    async def abort(self, rid: str | None = None) -> None:
        """End the request of this id, or all; they return what they have. The embedded engine takes prefixes too."""
        await self.command("/abort_request", {"abort_all": True} if rid is None else {"rid": rid})

    async def flush_cache(self) -> None:
        """Forget cached prompts."""
        await self.command("/flush_cache", {})

    async def release_memory(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """Give memory back."""
        await self.command("/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """Take memory again; weights need an update before the server generates, unless it kept a backup."""
        await self.command("/resume_memory_occupation", {"tags": list(tags)})

    # The border.

    async def command(self, path: str, body: Json) -> Json:
        """POST; the JSON object of the answer, empty when that is a text or null."""
        async with self._exchange("POST", path, body, None) as response:
            data = await response.read()
            if response.content_type != "application/json" or data == b"null":
                return {}
        answer = _parsed(data, self.url)
        if answer.get("success") is False:
            raise ServerError(f"{self.url}{path} failed: {answer.get('message')}")
        return answer

    async def request(self, method: str, path: str, body: Json | None) -> Json:
        """The JSON object that a route answers with."""
        return await self._json(method, path, body)

    async def _json(self, method: str, path: str, body: Json | None, rid: str | None = None) -> Json:
        async with self._exchange(method, path, body, rid) as response:
            answer = _parsed(await response.read(), self.url)
        if answer.get("success") is False:
            raise ServerError(f"{self.url}{path} failed: {answer.get('message')}", **_where(rid))
        return answer

    @asynccontextmanager
    async def _exchange(
        self, method: str, path: str, body: Json | None, rid: str | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A good response, or one of our errors; also for what goes wrong while its body is read."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=self._timeout)
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data else {}
        if self._routed and rid is not None:
            headers[ROUTING_KEY] = group_of(rid)
        try:
            async with self._session.request(method, self.url + path, data=data, headers=headers) as response:
                if response.status >= 400:
                    _raise_status(response.status, await response.read(), self.url + path, rid, self._routed)
                yield response
            self.failing = False
        except ServerUnreachable:
            self.failing = True
            raise
        except (TimeoutError, aiohttp.ClientError) as error:
            self.failing = True
            raise ServerUnreachable(f"{self.url}{path}: {type(error).__name__}: {error}", **_where(rid)) from None


def group_of(rid: str) -> str:
    """What requests that begin alike have in common: the id of a rollout, or of its verdict, up to the prompt's."""
    found = re.match(r"(.+)-r\d+", rid)
    return found[1] if found else rid


def _sampling(request: GenerationRequest, n: int, seed: int | list[int]) -> Json:
    sampling = request.sampling
    return {
        "n": n,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stop_token_ids": list(sampling.stop_token_ids),
        "sampling_seed": seed,
    }


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The lines of a body as they arrive, however they were cut into packets."""
    rest = b""
    async for piece in response.content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def _parsed(data: bytes, url: str) -> Json:
    try:
        answer = json.loads(data)
    except ValueError:
        raise ServerError(f"{url} answered something that is not JSON: {data[:80]!r}") from None
    if not isinstance(answer, dict):
        raise ServerError(f"{url} answered {type(answer).__name__}, not an object")
    return answer


def _raise_status(status: int, data: bytes, url: str, rid: str | None, routed: bool) -> None:
    message = _message(data) or data[:200].decode(errors="replace")
    kind: type[ServerError] = ServerUnreachable if routed else ServerError
    if 400 <= status < 500:
        kind = BaseDiffers if status == 409 else RequestRejected
    raise kind(f"{url}: {message}", status=status, **_where(rid))


def _message(data: bytes) -> str:
    """What an error's body says: ours has error.message, SGLang's parts have error, message or detail as well."""
    try:
        answer = json.loads(data)
    except ValueError:
        return ""
    while isinstance(answer, dict):
        answer = next((answer[key] for key in ("error", "message", "detail") if key in answer), "")
    return str(answer)


def _where(rid: str | None) -> dict[str, str]:
    return {} if rid is None else {"request": rid}


def _at(answer: object, *keys: str) -> object:
    """The value at a path of keys, None where there is none."""
    for key in keys:
        answer = answer.get(key) if isinstance(answer, dict) else None
    return answer


def _version(text: object) -> int:
    try:
        return int(str(text))
    except ValueError:
        return NO_VERSION


def _from_line(line: Json, url: str) -> Generation:
    """A line of our `group_stream`."""
    with _complete(url, line.get("id")):
        return Generation(
            id=line["id"],
            token_ids=ints(np.frombuffer(base64.b64decode(line["tokens"]), "<i4")),
            logprobs=floats(np.frombuffer(base64.b64decode(line["logprobs"]), "<f4")),
            versions=tuple(_spans(line)),
            finish_reason=line["finish_reason"],
        )


def _from_sglang(rid: str, answer: Json, url: str) -> Generation:
    """An answer of SGLang's /generate."""
    with _complete(url, rid):
        meta = answer["meta_info"]
        return Generation(
            id=rid,
            token_ids=ints(answer["output_ids"]),
            logprobs=floats([entry[0] for entry in meta["output_token_logprobs"]]),
            versions=tuple(_spans(meta)),
            finish_reason=meta["finish_reason"]["type"],
        )


@contextmanager
def _complete(url: str, rid: str | None) -> Iterator[None]:
    """What is missing in an answer, or malformed, is the server's error."""
    try:
        yield
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ServerError(f"{url} answered without what was asked for: {error!r}", **_where(rid)) from None


def _spans(meta: Json) -> Iterator[VersionSpan]:
    for span in meta.get("weight_versions") or [{"start": 0, "version": meta.get("weight_version")}]:
        yield VersionSpan(start=span["start"], version=_version(span["version"]))
