"""A modelled generation server: continuous batching, a KV cache of limited size, time from a roofline.

All running samples get a token in each decode step. Between two events (a sample ends, one comes, the cache is full)
the batch stays the same and its context grows by one token a sample and step, so the time of any number of steps is a
sum in closed form, and a whole response costs the model two events.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass, field

from megatron_fapo.plan.times import Rates

Cause = str
"""What decode time is spent on: `weights`, `cache`, `arithmetic`, `fixed`, or `prefill`."""

NEARLY = 1e-6
"""Tokens that are none: rounding."""


@dataclass(slots=True)
class Sample:
    """One answer to be written."""

    name: str
    prompt: int
    """Tokens of its context before the answer."""
    length: int
    """Tokens of the answer."""
    prefill: int
    """Tokens of the prompt that must be read: 0 where another sample of the same prompt did."""
    done: float = 0.0
    """Tokens written before it was retracted."""


@dataclass(slots=True)
class Engine:
    """The state of a server at an instant; `advance` moves it on."""

    rates: Rates
    capacity: int
    """Tokens of the KV cache."""
    max_running: int
    waiting: deque[Sample] = field(default_factory=deque)
    spent: dict[Cause, float] = field(default_factory=dict)
    retracted: int = 0
    tokens: float = 0.0
    """Written so far."""
    _running: dict[str, tuple[Sample, float]] = field(default_factory=dict)
    """{name: (sample, step in which it got its place)}."""
    _ends: list[tuple[float, int, str]] = field(default_factory=list)
    _order: int = 0
    _steps: float = 0.0
    _context: float = 0.0
    _prefill: float = 0.0
    """Seconds of prefill that come before the next decode step."""

    def add(self, sample: Sample) -> None:
        """Queue a sample."""
        self.waiting.append(sample)
        self._admit()

    def drop(self, name: str) -> float:
        """Forget a sample that nobody waits for any more; how many tokens of it are written."""
        if name in self._running:
            since = self._running[name][1]
            sample = self._leave(name)
            self._forget(name)
            self._admit()
            return sample.done + self._steps - since
        done = sum(sample.done for sample in self.waiting if sample.name == name)
        self.waiting = deque(sample for sample in self.waiting if sample.name != name)
        return done

    @property
    def running(self) -> int:
        """Samples that get a token in the next step."""
        return len(self._running)

    def until_event(self) -> float | None:
        """Seconds to the next end or retraction; None when nothing runs."""
        steps = self._steps_to_event()
        return None if steps is None else self._prefill + self._seconds(steps)

    def advance(self, seconds: float) -> list[str]:
        """Names of the samples that end within these seconds, at most up to the next event."""
        reading = min(seconds, self._prefill)
        self._prefill -= reading
        self._spend("prefill", reading)
        steps = self._steps_to_event()
        if steps is None:
            return []
        left = seconds - reading
        if left < self._seconds(steps):
            steps = self._steps_within(left)
        self._move(steps)
        ended = []
        while self._ends and self._ends[0][0] <= self._steps + NEARLY:
            ended.append(heapq.heappop(self._ends)[2])
            self._leave(ended[-1])
        while self._running and self._context > self.capacity - self.running + NEARLY and self.running > 1:
            self._retract()
        if ended:
            self._admit()
        return ended

    def _admit(self) -> None:
        """Start the samples that wait, in their order, as long as there are a place and room in the cache.

        Room is kept for a tenth of what the running ones may still write, as SGLang's new_token_ratio ends up.
        """
        while self.waiting and self.running < self.max_running:
            sample = self.waiting[0]
            needs = sample.prompt + sample.done
            if self.running and self._context + 1.1 * needs + self.running > 0.97 * self.capacity:
                return
            self.waiting.popleft()
            self._running[sample.name] = (sample, self._steps)
            self._order += 1
            heapq.heappush(self._ends, (self._steps + sample.length - sample.done, self._order, sample.name))
            self._context += needs
            self._prefill += self.rates.prefill(sample.prefill + sample.done)

    def _leave(self, name: str) -> Sample:
        sample, since = self._running.pop(name)
        self._context -= sample.prompt + sample.done + (self._steps - since)
        return sample

    def _retract(self) -> None:
        """The youngest gives its cache back and starts again later from what it has written."""
        name = next(reversed(self._running))
        since = self._running[name][1]
        sample = self._leave(name)
        sample.done += self._steps - since
        self.waiting.appendleft(sample)
        self._forget(name)
        self.retracted += 1

    def _forget(self, name: str) -> None:
        self._ends = [entry for entry in self._ends if entry[2] != name]
        heapq.heapify(self._ends)

    def _steps_to_event(self) -> float | None:
        if not self._running:
            return None
        steps = max(self._ends[0][0] - self._steps, 0.0)
        if self.running > 1:
            steps = min(steps, max((self.capacity - self._context) / self.running, 0.0))
        return steps

    def _memory(self) -> tuple[float, float]:
        """Seconds of memory traffic of the next step, and by how much each step has more."""
        return self.rates.weights + self.rates.token * self._context, self.rates.token * self.running

    def _bound(self) -> float:
        """Steps for which arithmetic takes longer than memory."""
        first, more = self._memory()
        return max((self.rates.sample * self.running - first) / more, 0.0) if more else 0.0

    def _seconds(self, steps: float) -> float:
        """Of the next `steps` steps."""
        first, more = self._memory()
        early = min(self._bound(), steps)
        late = steps - early
        memory = first * late + more * (early * late + late * late / 2)
        return self.rates.fixed * steps + self.rates.sample * self.running * early + memory

    def _steps_within(self, seconds: float) -> float:
        """Steps that take so long: the inverse of `_seconds`."""
        first, more = self._memory()
        early = self._bound()
        each = self.rates.fixed + self.rates.sample * self.running
        if seconds <= early * each:
            return seconds / each
        left, linear = seconds - early * each, self.rates.fixed + first + more * early
        if more == 0.0:
            return early + left / linear
        return early + 2 * left / (linear + math.sqrt(linear * linear + 2 * more * left))

    def _move(self, steps: float) -> None:
        early = min(self._bound(), steps)
        late = steps - early
        self._spend("fixed", self.rates.fixed * steps)
        self._spend("arithmetic", self.rates.sample * self.running * early)
        self._spend("weights", self.rates.weights * late)
        self._spend(
            "cache",
            self._seconds(steps)
            - self.rates.fixed * steps
            - self.rates.sample * self.running * early
            - self.rates.weights * late,
        )
        self._steps += steps
        self._context += steps * self.running
        self.tokens += steps * self.running

    def _spend(self, cause: Cause, seconds: float) -> None:
        self.spent[cause] = self.spent.get(cause, 0.0) + seconds


def drain(engine: Engine) -> tuple[float, dict[str, float]]:
    """Seconds until everything queued is written, and when each sample ended."""
    now, ended = 0.0, {}
    while (wait := engine.until_event()) is not None:
        now += wait
        ended.update(dict.fromkeys(engine.advance(wait), now))
    return now, ended
