"""OpenAI's chat completions over the engine: a body becomes one of /generate, an answer a completion."""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_fapo.errors import RequestRejected
from megatron_fapo.records import Message
from megatron_fapo.serving.engine.protocol import Json, Limits
from megatron_fapo.serving.engine.text import Text

_KNOWN = {
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop", "seed", "stream",
    "stream_options", "logprobs", "user", "rid", "priority", "ignore_eos", "stop_token_ids",
}  # fmt: skip
_ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A chat completion that is being made."""

    generate: Json
    """The body of /generate that draws it."""
    model: str
    stream: bool
    usage: bool
    """Whether a stream ends with the tokens used."""
    logprobs: bool
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, results: Sequence[Json], text: Text) -> Json:
        """The answer, from those of /generate."""
        choices = [self._choice(index, result, text) for index, result in enumerate(results)]
        return {**self._head("chat.completion"), "choices": choices, "usage": _usage(results)}

    def chunks(self, index: int, result: Json, sent: int) -> tuple[list[Json], int]:
        """What is new in a choice of which `sent` characters have been told, and how many have been told now.

        A letter of several tokens is held back until it is whole.
        """
        words, reason = result["text"], result["meta_info"]["finish_reason"]
        told = len(words) if reason else len(words.rstrip("\N{REPLACEMENT CHARACTER}"))
        delta = {"role": "assistant", "content": words[sent:told]} if sent == 0 else {"content": words[sent:told]}
        choice = {"index": index, "delta": delta, "finish_reason": reason and reason["type"]}
        if told <= sent and not reason:
            return [], sent
        return [{**self._head("chat.completion.chunk"), "choices": [choice]}], max(told, sent)

    def last_chunk(self, results: Sequence[Json]) -> Json:
        """The tokens used, after all choices."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(results)}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, result: Json, text: Text) -> Json:
        reason = result["meta_info"]["finish_reason"]
        return {
            "index": index,
            "message": {"role": "assistant", "content": result["text"]},
            "logprobs": {"content": list(_logprobs(result, text))} if self.logprobs else None,
            "finish_reason": reason["type"],
            "matched_stop": reason.get("matched"),
        }


def parse_chat(body: Json, model: str, limits: Limits, text: Text) -> Chat:
    """Understand a /v1/chat/completions body. Raises RequestRejected saying which field is wrong and why."""
    unknown = sorted(key for key, value in body.items() if key not in _KNOWN and not _does_nothing(key, value))
    if unknown:
        raise RequestRejected(f"field {unknown[0]!r} is not supported; known are {', '.join(sorted(_KNOWN))}")
    prompt = text.encode_chat(list(_messages(body.get("messages"))))
    room = limits.context_length - len(prompt)
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    name = str(body.get("rid") or f"chatcmpl-{secrets.token_hex(12)}")
    n = body.get("n") or 1
    sampling: Json = {
        "max_new_tokens": max(room, 1) if limit is None else limit,
        "n": n,
        "sampling_seed": body.get("seed"),
        **{key: body[key] for key in ("temperature", "top_p", "stop", "stop_token_ids", "ignore_eos") if key in body},
    }
    stream = bool(body.get("stream", False))
    generate: Json = {
        "input_ids": prompt,
        "sampling_params": {key: value for key, value in sampling.items() if value is not None},
        "rid": name,
        "stream": stream,
        "return_logprob": bool(body.get("logprobs")),
        "priority": body.get("priority"),
    }
    return Chat(
        generate=generate,
        model=str(body.get("model") or model),
        stream=stream,
        usage=bool((body.get("stream_options") or {}).get("include_usage")),
        logprobs=bool(body.get("logprobs")),
        id=name,
    )


def _does_nothing(key: str, value: Any) -> bool:
    """Fields that clients send at the value that changes nothing."""
    same = {"top_logprobs": 0, "response_format": {"type": "text"}, "tool_choice": "none", "store": False}
    return value in (None, False, 0, 0.0, [], {}) or (key in same and value == same[key])


def _messages(given: Any) -> Iterator[Message]:
    if not isinstance(given, list) or not given:
        raise RequestRejected("messages: must be a list of at least one message")
    for turn in given:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in _ROLES:
            raise RequestRejected(f"messages: role must be one of {', '.join(_ROLES)}, found {role!r:.60}")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                raise RequestRejected("messages: content may have parts of type text only")
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise RequestRejected(f"messages: content must be a text, found {content!r:.60}")
        yield Message(role="system" if role == "developer" else role, content=content)


def _logprobs(result: Json, text: Text) -> Iterator[Json]:
    for logprob, token, _ in result["meta_info"]["output_token_logprobs"]:
        word = text.decode([token], skip_special=False)
        yield {"token": word, "logprob": logprob, "bytes": list(word.encode()), "top_logprobs": []}


def _usage(results: Sequence[Json]) -> Json:
    prompt = results[0]["meta_info"]["prompt_tokens"]
    drawn = sum(result["meta_info"]["completion_tokens"] for result in results)
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}
