"""The running samples: one row each, packed without holes, advanced one token at a time.

Book-keeping is arrays over rows, so that a token costs a handful of numpy calls whatever the number of rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_fapo.records import FinishReason
from megatron_fapo.serving.engine.model import Model
from megatron_fapo.serving.engine.sample import Answer, Sample
from megatron_fapo.serving.engine.sampling import draw, uniforms

Array = npt.NDArray[Any]

_NO_TOKEN = -1


class Batch:
    """Rows 0..`len(batch)` run. Rows that finish leave, and rows from the end move into the gaps."""

    def __init__(self, model: Model, max_rows: int, granularity: int) -> None:
        self.model = model
        self.granularity = granularity
        """Rows and lengths are computed in multiples of this; 1 unless the engine is deterministic."""
        self.cache = model.new_cache()
        self.samples: list[Sample] = []
        self.sound = True
        """False while rows are being moved, and for good when that failed half-way."""
        rows = self._padded(max_rows)
        self._last = np.zeros(rows, np.int64)
        self._position = np.zeros(rows, np.int64)
        self._count = np.zeros(rows, np.int64)
        self._before = np.zeros(rows, np.int64)
        self._limit = np.zeros(rows, np.int64)
        self._seed = np.zeros(rows, np.uint64)
        self._temperature = np.ones(rows, np.float32)
        self._top_p = np.ones(rows, np.float32)
        self._greedy = np.zeros(rows, np.bool_)
        self._cached = np.zeros(rows, np.int64)
        self._watched = np.zeros(rows, np.bool_)
        self._stops = np.full((rows, 1), _NO_TOKEN, np.int64)
        self._tokens = np.zeros((rows, 64), np.int32)
        self._logprobs = np.zeros((rows, 64), np.float32)
        self._versions = np.zeros((rows, 64), np.int32)

    def __len__(self) -> int:
        return len(self.samples)

    @torch.inference_mode()
    def add(self, samples: Sequence[Sample], version: int) -> list[Answer]:
        """Prefill samples whose contexts have one length, draw their first tokens; equal contexts are computed once.

        Returns the answers of those that are finished already or report every token.
        """
        unique: dict[bytes, int] = {}
        contexts = [sample.context for sample in samples]
        copies = [unique.setdefault(context.tobytes(), len(unique)) for context in contexts]
        first = [copies.index(place) for place in range(len(unique))]
        low, high = len(self), len(self) + len(samples)
        length = len(contexts[0])
        self.cache.reserve(self._padded(high), self._padded(length + 1), low)
        prompts = torch.from_numpy(np.stack([contexts[i] for i in first]))
        logits = self.model.prefill(prompts, self.cache, low, torch.tensor(copies))
        self.samples.extend(samples)
        for row, sample in enumerate(samples, low):
            self._enter(row, sample)
            if sample.watched:
                after = logits[copies[row - low]].log_softmax(-1)
                sample.watched_logprobs = after[list(sample.watched)].tolist()
        self._position[low:high] = length - 1
        self._cached[low:high] = length
        self._cached[[low + i for i in first]] = 0
        return self._draw(logits[copies], low, high, version)

    @torch.inference_mode()
    def step(self, version: int) -> list[Answer]:
        """One token more for every row; returns the answers that ended or report every token."""
        rows = len(self)
        padded = self._padded(rows)
        length = self._padded(int(self._position[:rows].max()) + 1)
        self.cache.reserve(padded, length, rows)
        tokens, positions = torch.from_numpy(self._last[:padded]), torch.from_numpy(self._position[:padded])
        logits = self.model.decode(tokens, positions, self.cache, length)
        return self._draw(logits, 0, rows, version)

    def answer(self, row: int, reason: FinishReason | None = None, matched: int | str | None = None) -> Answer:
        """The sample of a row as far as it has come."""
        count = self._count[row]
        return Answer(
            sample=self.samples[row],
            tokens=self._tokens[row, :count].copy(),
            logprobs=self._logprobs[row, :count].copy(),
            versions=self._versions[row, :count].copy(),
            reason=reason,
            matched=matched,
            cached=int(self._cached[row]),
        )

    @torch.inference_mode()
    def remove(self, rows: Sequence[int]) -> None:
        """Let rows go and close the gaps."""
        leaving, before = set(rows), len(self)
        after = before - len(leaving)
        targets = [row for row in leaving if row < after]
        sources = [row for row in range(after, before) if row not in leaving]
        self.sound = False
        if targets:
            for array in self._per_row():
                array[targets] = array[sources]
            for target, source in zip(targets, sources, strict=True):
                self.samples[target] = self.samples[source]
            length = int(self._position[targets].max()) + 1
            self.cache.move(torch.tensor(sources), torch.tensor(targets), min(length, self.cache.length))
        del self.samples[after:]
        # A deterministic engine computes padded rows too: what their last samples asked for must not cost anything.
        self._last[after:before] = self._position[after:before] = 0
        self._temperature[after:before] = self._top_p[after:before] = 1
        self._greedy[after:before] = self._watched[after:before] = False
        self.sound = True

    def retract(self) -> list[Sample]:
        """Take all samples out, each carrying what it has drawn."""
        for row, sample in enumerate(self.samples):
            answer = self.answer(row)
            sample.tokens, sample.logprobs, sample.versions = answer.tokens, answer.logprobs, answer.versions
        samples = list(self.samples)
        self.remove(range(len(samples)))
        return samples

    def _padded(self, number: int) -> int:
        return -(-number // self.granularity) * self.granularity

    def _per_row(self) -> tuple[Array, ...]:
        return (
            self._last,
            self._position,
            self._count,
            self._before,
            self._limit,
            self._seed,
            self._temperature,
            self._top_p,
            self._greedy,
            self._cached,
            self._watched,
            self._stops,
            self._tokens,
            self._logprobs,
            self._versions,
        )

    def _enter(self, row: int, sample: Sample) -> None:
        """Write a new sample's options into its row."""
        options, drawn = sample.options, len(sample.tokens)
        self._count[row] = drawn
        self._before[row] = sample.drawn
        self._limit[row] = options.max_new_tokens
        self._seed[row] = sample.seed
        self._greedy[row] = options.temperature == 0
        self._temperature[row] = options.temperature or 1.0
        self._top_p[row] = options.top_p
        self._watched[row] = sample.stream or bool(options.stop)
        if len(options.stop_token_ids) > self._stops.shape[1]:
            wider = np.full((len(self._stops), len(options.stop_token_ids)), _NO_TOKEN, np.int64)
            wider[:, : self._stops.shape[1]] = self._stops
            self._stops = wider
        self._stops[row] = _NO_TOKEN
        self._stops[row, : len(options.stop_token_ids)] = options.stop_token_ids
        if drawn:
            self._widen(drawn)
            self._tokens[row, :drawn] = sample.tokens
            self._logprobs[row, :drawn] = sample.logprobs
            self._versions[row, :drawn] = sample.versions

    def _draw(self, logits: torch.Tensor, low: int, high: int, version: int) -> list[Answer]:
        """Draw the next token of rows `low`..`high` from their first rows of `logits`, and write it down."""
        computed = slice(low, low + len(logits))
        seeds, counts = self._seed[computed], self._before[computed] + self._count[computed]
        top_ps = self._top_p[computed]
        greedy = self._greedy[computed]
        tokens, logprobs = draw(
            logits,
            torch.from_numpy(self._temperature[computed])[:, None],
            torch.from_numpy(top_ps)[:, None] if top_ps.min() < 1 else None,
            uniforms(seeds, counts.astype(np.uint64)),
            torch.from_numpy(greedy) if greedy.any() else None,
        )
        rows = slice(low, high)
        tokens, logprobs, counts = tokens[: high - low], logprobs[: high - low], self._count[rows]
        self._widen(int(counts.max()) + 1)
        places = (np.arange(low, high), counts)
        self._tokens[places], self._logprobs[places], self._versions[places] = tokens, logprobs, version
        self._last[rows] = tokens
        self._position[rows] += 1
        counts += 1
        stopped = (self._stops[rows] == tokens[:, None]).any(1)
        ended: list[int] = (np.flatnonzero(stopped | (counts >= self._limit[rows])) + low).tolist()
        answers = [
            self.answer(row, "stop", int(self._last[row])) if stopped[row - low] else self.answer(row, "length")
            for row in ended
        ]
        if self._watched[rows].any():
            running = set((np.flatnonzero(self._watched[rows]) + low).tolist()) - set(ended)
            answers.extend(self.answer(row) for row in sorted(running))
        if ended:
            self.remove(ended)
        return answers

    def _widen(self, width: int) -> None:
        """Make room for `width` drawn tokens a row."""
        have = self._tokens.shape[1]
        if width > have:
            more = ((0, 0), (0, max(width, 2 * have) - have))
            self._tokens, self._logprobs = np.pad(self._tokens, more), np.pad(self._logprobs, more)
            self._versions = np.pad(self._versions, more)
