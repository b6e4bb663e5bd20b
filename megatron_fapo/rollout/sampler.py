"""From prompts to judged groups: generation, checking and judging of all groups stream together."""

import asyncio
import hashlib
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from megatron_fapo.algorithm.rewards import informative, usable
from megatron_fapo.algorithm.settings import AlgorithmSettings
from megatron_fapo.critique.paragraphs import paragraph_spans, token_spans
from megatron_fapo.errors import DataError, JudgeError, ServerError
from megatron_fapo.judge.answerer import ChatCodec
from megatron_fapo.judge.judge import Judge, StepEnd
from megatron_fapo.records import (
    Generation,
    GenerationRequest,
    Group,
    Judged,
    NotJudged,
    Prompt,
    Rollout,
    Sampling,
    Verdict,
)
from megatron_fapo.rollout.settings import RolloutSettings
from megatron_fapo.serving.interface import Generator
from megatron_fapo.tasks.interface import Task

T = TypeVar("T")


class Sampler:
    """Makes groups. Consumes prompts; waits for the policy's servers, the task's checks and the judge.

    Every rollout's seed comes from its id alone, so a run does not depend on the order in which servers answer.
    """

    def __init__(
        self,
        *,
        task: Task,
        servers: Generator,
        judge: Judge,
        tokenizer: ChatCodec,
        settings: RolloutSettings,
        algorithm: AlgorithmSettings,
        seed: int,
        progress: Callable[[int], None] = lambda rollouts: None,
    ) -> None:
        self._task = task
        self._servers = servers
        self.judge = judge
        self._tokenizer = tokenizer
        self._settings = settings
        self._algorithm = algorithm
        self._seed = seed
        self._progress = progress

    @property
    def prompts_per_step(self) -> int:
        """Prompts of a step, where dynamic sampling does not ask for more."""
        return self._settings.prompts_per_step

    async def collect(self, step: int, cursor: int) -> list[Group]:
        """The groups of a step: `prompts_per_step` prompts of the training stream from `cursor` on.

        With dynamic sampling there may be more, all of them in the order of the stream: `trainable` says which count.
        Raises JudgeError when too many verdicts failed, or when no group is left to train on.
        """
        wanted = self._settings.prompts_per_step
        groups = await self._draw(step, cursor, wanted)
        for _ in range(self._settings.dynamic_sampling):
            found = len(self._teaching(groups))
            if found >= wanted:
                break
            # as many as the share so far says it takes
            more = min(math.ceil((wanted - found) * len(groups) / max(found, 1)), wanted)
            groups += await self._draw(step, cursor + len(groups), more)
        if not any(usable(group, self._algorithm.reward) for group in groups):
            raise JudgeError(
                f"each of the {len(groups)} groups has a failed verdict and algorithm.reward.failed_verdict is "
                "drop_group, so nothing is left to train on; look at the judge server's log",
                step=step,
            )
        return groups

    def trainable(self, groups: Sequence[Group]) -> list[Group]:
        """Those of a step's groups that the update uses: no failed verdict, and under dynamic sampling something to
        teach, `prompts_per_step` at most. When dynamic sampling found none, those that it would have replaced."""
        fit = [group for group in groups if usable(group, self._algorithm.reward)]
        if not self._settings.dynamic_sampling:
            return fit
        return (self._teaching(fit) or fit)[: self._settings.prompts_per_step]

    def _teaching(self, groups: Sequence[Group]) -> list[Group]:
        algorithm, limit = self._algorithm, self._settings.max_new_tokens
        fit = (group for group in groups if usable(group, algorithm.reward))
        return [group for group in fit if informative(group, algorithm, max_tokens=limit)]

    async def _draw(self, step: int, cursor: int, count: int) -> list[Group]:
        return await self.sample(step, [self._task.prompt(cursor + offset) for offset in range(count)])

    async def sample(
        self, step: int, prompts: Sequence[Prompt], done: Callable[[Group], None] = lambda group: None
    ) -> list[Group]:
        """Groups of the given prompts, in their order; `done` is told each as soon as it is complete.

        The first error of any group ends the others. Raises JudgeError when too many verdicts failed.
        """
        for prompt in prompts:
            if len(prompt.token_ids) > self._settings.max_prompt_tokens:
                raise DataError(
                    f"prompt {prompt.id} has {len(prompt.token_ids)} tokens, rollout.max_prompt_tokens is "
                    f"{self._settings.max_prompt_tokens}: raise it or leave the row out"
                )

        async def group(prompt: Prompt, end: StepEnd) -> Group:
            found = await self._group(step, prompt, end)
            done(found)
            return found

        async with self.judge.step(len(prompts)) as end:
            groups = await all_or_first_error([group(prompt, end) for prompt in prompts])
        self.judge.check(groups)
        return groups

    async def _group(self, step: int, prompt: Prompt, end: StepEnd) -> Group:
        request = self._request(step, prompt)
        judge = self.judge.open(step, prompt, end)
        landed: dict[str, tuple[Rollout, asyncio.Task[None]]] = {}
        outcomes = {}

        async def check(rollout: Rollout) -> None:
            outcomes[rollout.id] = await self._task.check(prompt, rollout.text)
            judge.add(rollout, outcomes[rollout.id])

        try:
            async for generation in self._servers.generate(request):
                rollout = self._rollout(prompt, request, generation)
                landed[rollout.id] = (rollout, asyncio.ensure_future(check(rollout)))
                self._progress(1)
            if set(landed) != set(request.ids):
                raise ServerError(f"{len(landed)} of {len(request.ids)} samples came back", prompt=prompt.id, step=step)
            end.generated()
            await asyncio.gather(*(checking for _, checking in landed.values()))
            verdicts = await judge.verdicts()
        except BaseException:
            for _, checking in landed.values():
                checking.cancel()
            await judge.cancel()
            raise
        rollouts = [landed[name][0] for name in request.ids]
        oracles = {
            rollout.id: self._task.oracle(prompt, rollout.text) if outcomes[rollout.id].right else None
            for rollout in rollouts
        }
        audits = await self._audits(prompt, rollouts, verdicts, oracles)
        return Group(
            step=step,
            prompt=prompt,
            judged=tuple(
                Judged(
                    rollout=rollout,
                    outcome=outcomes[rollout.id],
                    verdict=verdicts[rollout.id],
                    oracle=oracles[rollout.id],
                    audit=audits[rollout.id],
                    wrong_from=self._wrong_from(rollout, verdicts[rollout.id]),
                )
                for rollout in rollouts
            ),
        )

    async def _audits(
        self,
        prompt: Prompt,
        rollouts: Sequence[Rollout],
        verdicts: Mapping[str, Verdict | NotJudged],
        oracles: Mapping[str, int | None],
    ) -> dict[str, int | None]:
        """{rollout id: what the audit's reference says}, while other groups are still generated."""
        audit = self.judge.audit
        if audit is None:
            return dict.fromkeys(verdicts)
        labels = await all_or_first_error(
            [audit.label(prompt, rollout, verdicts[rollout.id], oracles[rollout.id]) for rollout in rollouts]
        )
        return {rollout.id: label for rollout, label in zip(rollouts, labels, strict=True)}

    def _wrong_from(self, rollout: Rollout, verdict: Verdict | NotJudged) -> int | None:
        """The first token of the paragraph that is wrong, where the advantage needs it: it costs some decoding."""
        wanted = self._algorithm.advantage.flaw == "first_wrong_step"
        if not wanted or not isinstance(verdict, Verdict) or not verdict.flawed:
            return None
        span = paragraph_spans(rollout.text)[verdict.first_wrong]
        return token_spans(rollout.token_ids, self._tokenizer.decode, [span])[0][0]

    def _request(self, step: int, prompt: Prompt) -> GenerationRequest:
        ids = tuple(f"s{step}-{prompt.id}-r{index}" for index in range(self._settings.group_size))
        return GenerationRequest(
            ids=ids,
            token_ids=prompt.token_ids,
            seeds=tuple(seed_of(self._seed, name) for name in ids),
            sampling=Sampling(
                temperature=self._settings.temperature,
                top_p=self._settings.top_p,
                max_new_tokens=self._settings.max_new_tokens,
                stop_token_ids=self._tokenizer.eos_ids,
            ),
        )

    def _rollout(self, prompt: Prompt, request: GenerationRequest, generation: Generation) -> Rollout:
        if generation.finish_reason == "abort":
            raise ServerError("a sample was aborted at the server by somebody else", rollout=generation.id)
        return Rollout(
            id=generation.id,
            prompt_id=prompt.id,
            token_ids=generation.token_ids,
            logprobs=generation.logprobs,
            versions=generation.versions,
            temperature=self._settings.temperature,
            seed=request.seeds[request.ids.index(generation.id)],
            text=self._tokenizer.decode(generation.token_ids),
            finish_reason=generation.finish_reason,
        )


def seed_of(run_seed: int, name: str) -> int:
    """A seed in [0, 2**31) for the rollout of this name in the run of this seed."""
    return int.from_bytes(hashlib.blake2b(f"{run_seed}/{name}".encode(), digest_size=4).digest(), "big") >> 1


async def all_or_first_error(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; on the first error the rest is cancelled and that error is raised as it is."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
