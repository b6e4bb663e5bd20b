"""Bodies of SGLang's HTTP API, to and from the engine's samples. Everything refused is refused by name."""

import asyncio
import base64
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_fapo.errors import RequestRejected
from megatron_fapo.serving.engine.sample import Answer, Options, Sample
from megatron_fapo.serving.engine.text import Text

Json = dict[str, Any]

_SAMPLING = {
    "max_new_tokens", "temperature", "top_p", "n", "stop_token_ids", "stop", "ignore_eos", "sampling_seed",
    "top_k", "skip_special_tokens", "no_stop_trim",
}  # fmt: skip
_BODY = {
    "input_ids", "text", "sampling_params", "rid", "stream", "return_logprob", "group_stream", "logprob_start_len",
    "token_ids_logprob", "log_metrics", "priority", "drawn",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may ask for."""

    context_length: int
    vocabulary: int
    deterministic: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A /generate body, understood."""

    samples: list[Sample]
    inbox: "asyncio.Queue[Answer]"
    many: bool
    """Whether the answer is a list."""
    stream: bool
    group_stream: bool
    with_logprobs: bool
    with_text: bool
    skip_special: bool


def parse_generate(body: Json, limits: Limits, text: Text) -> Parsed:
    """Understand a /generate body. Raises RequestRejected saying which field is wrong and why."""
    _refuse_unknown(body, _BODY, "field")
    prompts, batched = _prompts(body, limits, text)
    parameters = _per_prompt(body.get("sampling_params") or {}, len(prompts))
    counts = [_number(p, "n", 1, 1, 4096, int) for p in parameters]
    ids = _ids(body.get("rid"), len(prompts), counts)
    stream = bool(body.get("stream", False))
    watched = _watched(body, limits)
    inbox: asyncio.Queue[Answer] = asyncio.Queue()
    samples: list[Sample] = []
    for prompt, parameter, n in zip(prompts, parameters, counts, strict=True):
        _refuse_unknown(parameter, _SAMPLING, "sampling parameter")
        options = _options(parameter, limits, text)
        _check_length(len(prompt), options.max_new_tokens, limits)
        array, drawn = np.array(prompt, np.int64), _integer(body, "drawn")
        if not 0 <= drawn < len(prompt):
            raise RequestRejected(f"drawn: must be from 0 to the prompt's {len(prompt)} tokens less one, found {drawn}")
        for seed in _seeds(parameter, n, limits):
            index = len(samples)
            samples.append(
                Sample(
                    id=ids[index],
                    index=index,
                    prompt=array,
                    options=options,
                    seed=seed,
                    stream=stream,
                    inbox=inbox,
                    watched=watched,
                    priority=_integer(body, "priority"),
                    drawn=drawn,
                )
            )
            if watched and options.max_new_tokens != 1:
                raise RequestRejected("token_ids_logprob: only the first token's are kept, so max_new_tokens must be 1")
    return Parsed(
        samples=samples,
        inbox=inbox,
        many=batched or len(samples) > 1,
        stream=stream,
        group_stream=bool(body.get("group_stream", False)),
        with_logprobs=bool(body.get("return_logprob", False)),
        with_text=text.available and not body.get("group_stream", False),
        skip_special=bool(parameters[0].get("skip_special_tokens", True)),
    )


def _watched(body: Json, limits: Limits) -> tuple[int, ...]:
    given = body.get("token_ids_logprob")
    if given is None:
        return ()
    if not isinstance(given, list) or not all(type(token) is int and 0 <= token < limits.vocabulary for token in given):
        raise RequestRejected(
            f"token_ids_logprob: must be a list of tokens below {limits.vocabulary}, found {given!r:.60}"
        )
    return tuple(given)


def _integer(body: Json, name: str) -> int:
    given = body.get(name)
    if given is not None and type(given) is not int:
        raise RequestRejected(f"{name}: must be an integer, found {given!r:.60}")
    return given or 0


def _refuse_unknown(given: Mapping[str, Any], known: set[str], what: str) -> None:
    unknown = sorted(key for key, value in given.items() if key not in known and value not in (None, False))
    if unknown:
        raise RequestRejected(f"{what} {unknown[0]!r} is not supported; known are {', '.join(sorted(known))}")


def _prompts(body: Json, limits: Limits, text: Text) -> tuple[list[list[int]], bool]:
    given = body.get("input_ids")
    if given is None and body.get("text") is not None:
        words = body["text"]
        if not all(isinstance(word, str) for word in (words if isinstance(words, list) else [words])):
            raise RequestRejected(f"text: must be a text or a list of texts, found {words!r:.60}")
        given = [text.encode(t) for t in words] if isinstance(words, list) else text.encode(words)
    if not isinstance(given, list) or not given:
        raise RequestRejected("input_ids: must be a list of token ids, or a list of such lists (or send text)")
    batched = isinstance(given[0], list)
    prompts = given if batched else [given]
    for prompt in prompts:
        if not isinstance(prompt, list) or not prompt or not all(type(token) is int for token in prompt):
            raise RequestRejected("input_ids: every prompt must be a list of at least one integer")
        if min(prompt) < 0 or max(prompt) >= limits.vocabulary:
            raise RequestRejected(
                f"input_ids: token {max(prompt) if min(prompt) >= 0 else min(prompt)} is outside the vocabulary "
                f"of {limits.vocabulary}"
            )
    return prompts, batched


def _per_prompt(parameters: Any, prompts: int) -> list[Json]:
    given = parameters if isinstance(parameters, list) else [parameters] * prompts
    if len(given) != prompts or not all(isinstance(p, dict) for p in given):
        raise RequestRejected(f"sampling_params: must be one object, or one for each of the {prompts} prompts")
    return given


def _ids(given: Any, prompts: int, counts: list[int]) -> list[str]:
    """One id a sample: as given, `rid-0`... where one id stands for several samples, random where none is given."""
    total = sum(counts)
    if given is None:
        given = [secrets.token_hex(8) for _ in range(prompts)]
    if not all(isinstance(rid, str) for rid in (given if isinstance(given, list) else [given])):
        raise RequestRejected(f"rid: must be a string, or a list of strings, found {given!r:.60}")
    given = given if isinstance(given, list) else [given] if prompts == 1 else [f"{given}_{i}" for i in range(prompts)]
    if len(given) == total:
        return list(given)
    if len(given) != prompts:
        raise RequestRejected(f"rid: {len(given)} ids for {prompts} prompts and {total} samples")
    return [f"{rid}-{i}" for rid, n in zip(given, counts, strict=True) for i in range(n)]


def _options(parameters: Json, limits: Limits, text: Text) -> Options:
    if parameters.get("top_k") not in (None, -1, 0):
        raise RequestRejected("sampling parameter 'top_k' is not supported: leave it out or -1")
    stop = parameters.get("stop") or ()
    stop = [stop] if isinstance(stop, str) else stop
    if stop and not (isinstance(stop, list) and all(isinstance(word, str) and word for word in stop)):
        raise RequestRejected(f"sampling parameter 'stop': must be a text or a list of texts, found {stop!r:.60}")
    if stop and not text.available:
        raise RequestRejected("sampling parameter 'stop' needs the model's tokenizer.json; use stop_token_ids")
    stops = parameters.get("stop_token_ids") or ()
    if not isinstance(stops, list | tuple) or not all(type(token) is int for token in stops):
        raise RequestRejected("sampling parameter 'stop_token_ids': must be a list of integers")
    for token in stops:
        if not 0 <= token < limits.vocabulary:
            raise RequestRejected(
                f"sampling parameter 'stop_token_ids': {token} is outside the vocabulary of {limits.vocabulary}"
            )
    eos = () if parameters.get("ignore_eos", False) else text.eos_ids
    return Options(
        temperature=_number(parameters, "temperature", 1.0, 0.0, 100.0, float),
        top_p=_number(parameters, "top_p", 1.0, 1e-6, 1.0, float),
        max_new_tokens=_number(parameters, "max_new_tokens", 128, 1, 2**31, int),
        stop_token_ids=tuple(dict.fromkeys((*stops, *eos))),
        stop=tuple(stop),
    )


def _number(given: Json, name: str, default: Any, low: float, high: float, kind: type) -> Any:
    value = given.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and not isinstance(value, int)):
        raise RequestRejected(f"sampling parameter {name!r}: must be a number, found {value!r:.60}")
    if not low <= value <= high:
        raise RequestRejected(f"sampling parameter {name!r}: must be from {low} to {high}, found {value}")
    return kind(value)


def _seeds(parameters: Json, n: int, limits: Limits) -> list[int]:
    """One seed a sample. Deterministic engines draw unseeded samples with SGLang's default, 42, and its successors."""
    given = parameters.get("sampling_seed")
    if given is None:
        return [42 + i for i in range(n)] if limits.deterministic else [secrets.randbits(62) for _ in range(n)]
    seeds = given if isinstance(given, list) else [given + i for i in range(n)] if type(given) is int else None
    if seeds is None or len(seeds) != n or not all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds):
        raise RequestRejected(f"sampling parameter 'sampling_seed': must be an integer from 0, or a list of {n}")
    return seeds


def _check_length(prompt: int, new: int, limits: Limits) -> None:
    if prompt + new > limits.context_length:
        raise RequestRejected(
            f"{prompt} prompt tokens and max_new_tokens {new} are {prompt + new} together; "
            f"the context length is {limits.context_length}"
        )


def finish_reason(answer: Answer) -> Json | None:
    """SGLang's `finish_reason`."""
    match answer.reason:
        case None:
            return None
        case "length":
            return {"type": "length", "length": len(answer.tokens)}
        case "abort":
            return {"type": "abort", "message": str(answer.matched)}
        case _:
            return {"type": "stop", "matched": answer.matched}


def version_spans(answer: Answer, versions: list[str]) -> list[Json]:
    """Where the weight version changes: `[{"start": 0, "version": "3"}, ...]`."""
    starts = [0, *(np.flatnonzero(np.diff(answer.versions)) + 1).tolist()] if len(answer.versions) else []
    return [{"start": start, "version": versions[answer.versions[start]]} for start in starts]


def render(answer: Answer, request: Parsed, versions: list[str], text: Text) -> Json:
    """One sample as SGLang answers it."""
    sample, tokens = answer.sample, answer.tokens.tolist()
    meta: Json = {
        "id": sample.id,
        "finish_reason": finish_reason(answer),
        "prompt_tokens": len(sample.prompt),
        "completion_tokens": len(tokens),
        "cached_tokens": answer.cached,
        "weight_version": versions[-1],
        "weight_versions": version_spans(answer, versions),
    }
    if request.with_logprobs:
        logprobs = answer.logprobs.tolist()
        meta["output_token_logprobs"] = [[lp, token, None] for lp, token in zip(logprobs, tokens, strict=True)]
    if sample.watched:
        pairs = zip(sample.watched_logprobs, sample.watched, strict=True)
        meta["output_token_ids_logprobs"] = [[[logprob, token, None] for logprob, token in pairs]]
    result: Json = {"output_ids": tokens, "meta_info": meta}
    if request.with_text:
        shown = tokens[:-1] if answer.reason == "stop" and isinstance(answer.matched, int) else tokens
        words = text.decode(shown, request.skip_special)
        result["text"] = words.split(answer.matched)[0] if isinstance(answer.matched, str) else words
    if request.many:
        result["index"] = sample.index
    return result


def render_compact(answer: Answer, versions: list[str]) -> Json:
    """One finished sample of a `group_stream`: arrays as base64 of little-endian int32 and float32."""
    return {
        "id": answer.sample.id,
        "index": answer.sample.index,
        "tokens": base64.b64encode(answer.tokens.astype("<i4").tobytes()).decode(),
        "logprobs": base64.b64encode(answer.logprobs.astype("<f4").tobytes()).decode(),
        "weight_versions": version_spans(answer, versions),
        "finish_reason": answer.reason,
        "message": answer.matched if answer.reason == "abort" else None,
        "cached_tokens": answer.cached,
    }
