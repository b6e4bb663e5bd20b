"""What the engine is asked for and what it answers, one sample at a time."""

import asyncio
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_fapo.records import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How one sample is drawn."""

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    max_new_tokens: int = 128
    stop_token_ids: tuple[int, ...] = ()
    """End-of-sequence tokens included, unless they are ignored."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer."""


@dataclass(slots=True, eq=False, kw_only=True)
class Sample:
    """One answer to a prompt, from its arrival to its end."""

    id: str
    index: int
    """Its place in the request."""
    prompt: npt.NDArray[np.int64]
    """[P]"""
    options: Options
    seed: int
    stream: bool
    """Whether every token is reported as it is drawn."""
    inbox: "asyncio.Queue[Answer]"
    """Where answers go; belongs to the server's event loop."""
    watched: tuple[int, ...] = ()
    """Tokens whose log-probs after the prompt are asked for, whichever is drawn there."""
    watched_logprobs: list[float] = field(default_factory=list)
    """These, once the prompt is computed."""
    priority: int = 0
    """Of those that wait, the highest are admitted first, equals in their order."""
    drawn: int = 0
    """Tokens of the answer that the prompt ends with: another server drew them, and drawing goes on after them."""
    aborted: bool = False
    tokens: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Drawn before the sample was retracted, with `logprobs` and `versions`; drawing goes on from there."""
    logprobs: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    versions: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def context(self) -> npt.NDArray[np.int64]:
        """What a prefill reads: the prompt and what was drawn before a retraction."""
        return np.concatenate([self.prompt, self.tokens]) if len(self.tokens) else self.prompt


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Answer:
    """A sample as far as it has come."""

    sample: Sample
    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int32]
    """[T] index into the engine's list of weight versions."""
    reason: FinishReason | None
    """None while it runs."""
    matched: int | str | None = None
    """The token or text that stopped it."""
    cached: int = 0
    """Prompt tokens whose keys and values came from another sample's prefill."""
