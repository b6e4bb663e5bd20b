"""A Hugging Face tokenizer without `transformers` (which would load torch): ids of a chat, text of ids.

The chat template is rendered in the sandbox, with the globals and filters, that transformers gives it; tests compare
the two.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import numpy as np
import numpy.typing as npt
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from megatron_fapo.errors import DataError
from megatron_fapo.records import Ints, Message, ints


class ChatTokenizer:
    """The tokenizer of a model directory: tokenizer.json, tokenizer_config.json, generation_config.json."""

    def __init__(self, tokenizer: Tokenizer, template: str, special: dict[str, str], eos_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._special = special
        self.eos_ids = eos_ids
        """Tokens that end a response."""

    @classmethod
    def load(cls, folder: Path) -> "ChatTokenizer":
        """Read a model directory. Raises DataError naming the file that is missing or unusable."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"{path}: no such file; a model directory holds its tokenizer there")
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        config = _json(folder / "tokenizer_config.json")
        special = {
            key: text
            for key, value in config.items()
            if key.endswith("_token") and (text := _content(value)) is not None
        }
        generation = folder / "generation_config.json"
        named = _json(generation).get("eos_token_id") if generation.is_file() else None
        eos = [named] if isinstance(named, int) else list(named or [])
        if "eos_token" in special:
            eos.insert(0, tokenizer.token_to_id(special["eos_token"]))
        if not eos or None in eos:
            raise DataError(f"{folder}: no end-of-sequence token in tokenizer_config.json or generation_config.json")
        return cls(tokenizer, _chat_template(folder, config), special, tuple(dict.fromkeys(eos)))

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size())

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """The chat as text."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._compiled.render(
                messages=turns,
                tools=None,
                documents=None,
                add_generation_prompt=generation_prompt,
                **self._special,
            )
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refused a chat of {len(turns)} messages: {error}") from None

    def encode_chat(self, messages: Sequence[Message]) -> Ints:
        """[T] ids of the chat, ending where the model's turn begins."""
        return self.encode(self.render(messages))

    def encode(self, text: str) -> Ints:
        """[T] ids of text as it stands; nothing is put before or after it."""
        return ints(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: npt.ArrayLike, *, skip_special: bool = True) -> str:
        """Text of ids [T]."""
        ids = np.asarray(token_ids).tolist()
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special))

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return _environment().from_string(self._template)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: must be a mapping, found {type(values).__name__}")
    return values


def _content(value: Any) -> str | None:
    """A special token is written as a string or as a mapping with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str):
        raise DataError(f"{folder}: no chat template, neither chat_template.jinja nor in tokenizer_config.json")
    return template


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the model's own words for training masks; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which chat templates do not want."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
