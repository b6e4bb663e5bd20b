"""The engine: one thread that admits samples, advances the batch and obeys commands between two tokens.

Consumes samples (`submit`) and commands (`call`) from the event loop; waits on one condition for either; produces
answers in the samples' inboxes. The HTTP side never touches the batch or the weights.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from megatron_fapo.compat.weight_group import WeightGroup
from megatron_fapo.delta import Change
from megatron_fapo.errors import FapoError, RequestRejected, ServerError
from megatron_fapo.records import Bucket, TensorSpec
from megatron_fapo.serving.engine.batch import Batch
from megatron_fapo.serving.engine.model import Model
from megatron_fapo.serving.engine.sample import Answer, Sample
from megatron_fapo.serving.engine.weights import Weights

T = TypeVar("T")
PauseMode = Literal["in_place", "retract", "abort"]

log = logging.getLogger(__name__)


class Engine:
    """A model with a batch of running samples."""

    def __init__(
        self,
        model: Model,
        weights: Weights,
        *,
        max_running: int,
        threads: int,
        granularity: int,
        find_stop: Callable[[Answer], str | None],
    ) -> None:
        self.weights = weights
        self.max_running = max_running
        self._threads = threads
        self._batch_invariant = granularity > 1
        self.versions = ["default"]
        """Every weight version so far; a token's version is an index into it."""
        self._batch = Batch(model, max_running, granularity)
        self._find_stop = find_stop
        self._waiting: deque[Sample] = deque()
        self._arrived: deque[Sample] = deque()
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._paused = False
        self._updating = False
        self._groups: dict[str, WeightGroup] = {}
        self._cache_released = False
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_failure: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failure: BaseException | None = None
        """What ended the engine's thread, if something did."""

    # The event loop's side.

    def start(self, loop: asyncio.AbstractEventLoop, on_failure: Callable[[], None]) -> None:
        """Start the thread; answers are delivered on `loop`, and `on_failure` is called there should the thread die."""
        self._loop, self._on_failure = loop, on_failure
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the token it is at."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def submit(self, samples: Sequence[Sample]) -> None:
        """Queue samples; their answers come to their inboxes."""
        with self._wake:
            self.check()
            self._arrived.extend(samples)
            self._wake.notify()

    def forget(self) -> None:
        """Drop samples that were marked aborted; nobody waits for their answers."""
        with self._wake:
            self._commands.append((self._drop_aborted, Future()))
            self._wake.notify()

    async def call(self, command: Callable[[], T]) -> T:
        """Run a command between two tokens and return its result, or raise its error.

        A command whose caller is cancelled before its turn is not run.
        """
        future: Future[T] = Future()
        with self._wake:
            self.check()
            self._commands.append((command, future))
            self._wake.notify()
        return await asyncio.wrap_future(future)

    def check(self) -> None:
        """Raise ServerError when the thread has died."""
        if self.failure is not None:
            raise ServerError(f"the engine failed: {type(self.failure).__name__}: {self.failure}")

    @property
    def version(self) -> str:
        """The weight version that is being served."""
        return self.versions[-1]

    @property
    def updating(self) -> bool:
        """Whether an update of the weights is open."""
        return self._updating

    @property
    def load(self) -> tuple[int, int]:
        """(running, waiting) samples."""
        return len(self._batch), len(self._waiting) + len(self._arrived)

    @property
    def blocked(self) -> str | None:
        """Why nothing is generated now."""
        reasons = {
            "an update of the weights is open": self._updating,
            "paused": self._paused,
            "the memory of the KV cache is released": self._cache_released,
            "the memory of the weights is released": self.weights.released,
            "the weights were released and have not been loaded since": not self.weights.usable,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    # Commands, run by the engine's thread.

    def pause(self, mode: PauseMode) -> int:
        """Stop generating: leave samples in place, send them back to the queue, or abort them. How many ran."""
        running = len(self._batch)
        self._paused = True
        if mode == "retract":
            self._waiting.extendleft(reversed(self._batch.retract()))
        elif mode == "abort":
            self.abort(None, "paused with mode abort")
        return running

    def proceed(self) -> None:
        """Generate again."""
        self._paused = False

    def abort(self, prefix: str | None, why: str) -> int:
        """End samples whose id starts with `prefix` (all when None) with what they have. How many there were."""
        return self._end(lambda sample: prefix is None or sample.id.startswith(prefix), why)

    def _drop_aborted(self) -> None:
        self._end(lambda sample: sample.aborted, "the client left")

    def _end(self, hit: Callable[[Sample], bool], why: str) -> int:
        rows = [row for row, sample in enumerate(self._batch.samples) if hit(sample)]
        answers = [self._batch.answer(row, "abort", why) for row in rows]
        queued = [sample for sample in self._waiting if hit(sample)]
        self._waiting = deque(sample for sample in self._waiting if not hit(sample))
        answers.extend(_aborted(sample, why) for sample in queued)
        self._deliver(answers)
        self._batch.remove(rows)
        return len(answers)

    def begin_update(self) -> None:
        """Generate nothing until `end_update`; running samples wait where they are."""
        self.weights.begin()
        self._updating = True

    def copy_bucket(self, bucket: Bucket) -> None:
        """Copy tensors into the model; needs an open update."""
        self._refuse_without_update()
        self.weights.copy(bucket)

    def read_folder(self, folder: Path) -> None:
        """Read all tensors of a folder into the open update."""
        self._refuse_without_update()
        self.weights.read(folder)

    def join(self, name: str, group: Callable[[], WeightGroup]) -> None:
        """Become a member of a group in which weights are sent; `group` waits for the others."""
        self._groups.pop(name, None)
        self._groups[name] = group()

    def leave(self, name: str) -> None:
        """Leave a group. Raises RequestRejected for one that was never joined."""
        if self._groups.pop(name, None) is None:
            raise RequestRejected(f"group {name!r}: not joined")

    def receive(self, specs: Sequence[TensorSpec], name: str) -> None:
        """Take tensors that rank 0 of a group sends into the open update."""
        self._refuse_without_update()
        if name not in self._groups:
            raise RequestRejected(f"group {name!r}: POST /init_weights_update_group first")
        self.weights.receive(specs, self._groups[name])

    def apply(self, changes: Sequence[tuple[TensorSpec, Change]]) -> None:
        """Overwrite what changed, in the open update."""
        self._refuse_without_update()
        for spec, change in changes:
            self.weights.apply(spec, change)

    def _refuse_without_update(self) -> None:
        if not self._updating:
            raise RequestRejected("no update is open: POST /begin_weight_update first")

    def end_update(self, version: str) -> None:
        """Close the update and generate with the new weights as `version`."""
        self._refuse_without_update()
        self.weights.end()
        self._updating = False
        self._new_version(version)

    def load_from_disk(self, folder: Path, version: str) -> None:
        """Replace the weights by those of a folder."""
        if self._updating:
            raise RequestRejected("an update is open: POST /end_weight_update first")
        self.weights.load(folder)
        self._new_version(version)

    def flush(self) -> None:
        """Free the KV cache where nothing runs."""
        self._refuse_running("flush the cache")
        self._batch.cache.free()

    def release(self, tags: Sequence[str], backup: bool) -> None:
        """Give memory back: tags weights, kv_cache."""
        self._refuse_running("release memory")
        if "weights" in tags and not self.weights.released:
            self.weights.release(backup)
        if "kv_cache" in tags:
            self._batch.cache.free()
            self._cache_released = True

    def resume(self, tags: Sequence[str]) -> None:
        """Take memory again."""
        if "weights" in tags:
            self.weights.resume()
        if "kv_cache" in tags:
            self._cache_released = False

    def memory(self) -> dict[str, int]:
        """Bytes held now, by tag."""
        return {"weights": self.weights.resident, "kv_cache": self._batch.cache.nbytes}

    def _refuse_running(self, what: str) -> None:
        if len(self._batch):
            raise RequestRejected(
                f"cannot {what} while {len(self._batch)} samples run: "
                "wait for them, or POST /pause_generation with mode retract or abort"
            )

    def _new_version(self, version: str) -> None:
        self.versions.append(version)

    # The thread.

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                while self._next():
                    pass
        except BaseException as error:
            log.exception("the engine's thread ended")
            self._fail(error)

    def _next(self) -> bool:
        """Take in what arrived, then one round; False when the engine is to stop."""
        with self._wake:
            while not (self._stopping or self._arrived or self._commands or self._can_generate()):
                self._wake.wait()
            if self._stopping:
                return False
            if self._arrived:
                self._waiting.extend(self._arrived)
                self._arrived.clear()
                if len({sample.priority for sample in self._waiting}) > 1:
                    self._waiting = deque(sorted(self._waiting, key=lambda sample: -sample.priority))
            commands, self._commands = self._commands, deque()
        for command, future in commands:
            self._obey(command, future)
        if self._can_generate():
            self._admit()
            if len(self._batch):
                self._deliver(self._batch.step(len(self.versions) - 1))
        return True

    def _can_generate(self) -> bool:
        return bool(self._waiting or len(self._batch)) and self.blocked is None

    def _obey(self, command: Callable[[], Any], future: "Future[Any]") -> None:
        """Run a command unless its caller has left. Its error is its caller's alone, unless it broke the batch."""
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = command()
        except FapoError as error:
            future.set_exception(error)
        except Exception as error:
            log.exception("a command failed")
            future.set_exception(ServerError(f"the command failed: {type(error).__name__}: {error}"))
            if not self._batch.sound:
                raise
        else:
            future.set_result(result)

    def _admit(self) -> None:
        """Prefill waiting samples while rows are free; contexts of one length go together.

        In a deterministic engine only equal contexts do, so that the shape of a prefill depends on its prompt alone.
        """
        free = self.max_running - len(self._batch)
        if not free or not self._waiting:
            return
        admitted = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        together: dict[object, list[Sample]] = {}
        for sample in admitted:
            context = sample.context
            together.setdefault(context.tobytes() if self._batch_invariant else len(context), []).append(sample)
        for samples in together.values():
            self._deliver(self._batch.add(samples, len(self.versions) - 1))

    def _deliver(self, answers: list[Answer]) -> None:
        if not answers:
            return
        answers = [self._with_stop_text(answer) for answer in answers]
        assert self._loop is not None
        self._loop.call_soon_threadsafe(_put, answers)

    def _with_stop_text(self, answer: Answer) -> Answer:
        """The answer ended, where one of its stop texts has appeared."""
        if not answer.sample.options.stop or answer.reason in ("stop", "abort"):
            return answer
        matched = self._find_stop(answer)
        if matched is None:
            return answer
        if answer.reason is None:
            self._batch.remove([self._batch.samples.index(answer.sample)])
        return Answer(
            sample=answer.sample,
            tokens=answer.tokens,
            logprobs=answer.logprobs,
            versions=answer.versions,
            reason="stop",
            matched=matched,
            cached=answer.cached,
        )

    def _fail(self, error: BaseException) -> None:
        """Wake everyone who waits; `check` then raises for them."""
        with self._wake:
            self.failure = error
            commands, samples = list(self._commands), [*self._batch.samples, *self._waiting, *self._arrived]
            self._commands.clear()
        for _, future in commands:
            if future.set_running_or_notify_cancel():
                future.set_exception(ServerError(f"the engine failed: {error}"))
        self._deliver([_aborted(sample, "the engine failed") for sample in samples])
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._on_failure)


def _aborted(sample: Sample, why: str) -> Answer:
    """The answer of a sample that is not running, with what it drew before a retraction."""
    return Answer(
        sample=sample,
        tokens=sample.tokens,
        logprobs=sample.logprobs,
        versions=sample.versions,
        reason="abort",
        matched=why,
    )


def _put(answers: list[Answer]) -> None:
    for answer in answers:
        answer.sample.inbox.put_nowait(answer)
