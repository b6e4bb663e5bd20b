"""Text in and out, for models whose folder has a tokenizer.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fapo.errors import RequestRejected
from megatron_fapo.records import Message
from megatron_fapo.serving.engine.folder import eos_ids
from megatron_fapo.serving.engine.sample import Answer


class Text:
    """A model folder's tokenizer, loaded when first needed, and its end-of-sequence ids."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "tokenizer.json"
        self._tokenizer: Any = None
        self._chat: Any = None
        self.available = self._path.exists()
        self.eos_ids = eos_ids(folder)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self._load().encode(text).ids)

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        return str(self._load().decode(list(tokens), skip_special_tokens=skip_special))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat under the folder's template, ending where the model's turn begins."""
        if self._chat is None:
            from megatron_fapo.tasks.tokenizer import ChatTokenizer

            self._load()
            self._chat = ChatTokenizer.load(self._path.parent)
        return [int(token) for token in self._chat.encode_chat(messages)]

    def find_stop(self, answer: Answer) -> str | None:
        """Which of the sample's stop texts its answer contains."""
        text = self.decode(answer.tokens.tolist(), skip_special=False)
        return next((stop for stop in answer.sample.options.stop if stop in text), None)

    def _load(self) -> Any:
        if not self.available:
            raise RequestRejected(f"{self._path.parent.name} has no tokenizer.json: send input_ids, and no stop texts")
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(self._path))
        return self._tokenizer
