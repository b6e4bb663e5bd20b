"""Generation, checking and judging stream together: shown in virtual time, where overlap is exact arithmetic."""

from dataclasses import replace

import pytest

from megatron_fapo.algorithm.settings import AlgorithmSettings
from megatron_fapo.errors import DataError, JudgeError, ServerError, ServerUnreachable, TaskError
from megatron_fapo.judge.answerer import Served
from megatron_fapo.judge.ask import Asker
from megatron_fapo.judge.judge import Judge, Rules
from megatron_fapo.judge.settings import JudgeSettings
from megatron_fapo.records import Message, Outcome, Prompt, Verdict, ints
from megatron_fapo.rollout.sampler import Sampler, seed_of
from megatron_fapo.rollout.settings import RolloutSettings
from tests.virtual_time import LoopClock, ModelledServer, Words, run_virtual


class Echo:
    """A task whose answers are right when they do not contain an x."""

    name = "echo"

    def prompt(self, index: int) -> Prompt:
        text = f"question {index}"
        message = Message(role="user", content=text)
        tokens = Words().encode_chat((message,))
        return Prompt(
            id=f"p{index}", task="echo", question=text, messages=(message,), token_ids=tokens, reference_answer=""
        )

    async def check(self, prompt: Prompt, text: str) -> Outcome:
        if "!" in text:
            raise TaskError("checker broke")
        right = "x" not in text
        return Outcome(right=right, score=1.0 if right else -1.0, answer=text, why="")

    def oracle(self, prompt: Prompt, text: str) -> int | None:
        return -1


def sampler_of(policy, judge_server, *, prompts=2, size=2, settings=None, algorithm=None):
    algorithm = algorithm or AlgorithmSettings()
    rollout = RolloutSettings(prompts_per_step=prompts, group_size=size, **(settings or {}))
    judge_settings = JudgeSettings(probe_share=0.0)
    rules = Rules(judge=judge_settings, algorithm=algorithm, group_size=size, max_tokens=100)
    asker = Asker(Served(judge_server, Words()), judge_settings, LoopClock(), seed=1)
    return Sampler(
        task=Echo(),
        servers=policy,
        judge=Judge(asker, rules, LoopClock()),
        tokenizer=Words(),
        settings=rollout,
        algorithm=algorithm,
        seed=1,
    )


def sample(policy, judge_server, **settings):
    async def work():
        sampler = sampler_of(policy, judge_server, **settings)
        groups = await sampler.collect(step=4, cursor=10)
        return groups, LoopClock().now()

    return run_virtual(work())


def test_dynamic_sampling_replaces_groups_that_teach_nothing():
    """Prompts 10, 11 and 12 are always right; from 13 on the second rollout is wrong."""

    def policy(request, index):
        number = int(request.ids[index].split("-")[1][1:])
        return ("x" if number >= 13 and index == 1 else f"{number}"), 1.0

    asked = {"dynamic_sampling": 3}
    groups, _ = sample(ModelledServer(policy), ModelledServer(clean), prompts=2, settings=asked)
    # two, two more since none taught, and two rather than four though so far only one in four taught
    assert [group.prompt.id for group in groups] == ["p10", "p11", "p12", "p13", "p14", "p15"]
    sampler = sampler_of(ModelledServer(policy), ModelledServer(clean), prompts=2, settings=asked)
    assert [group.prompt.id for group in sampler.trainable(groups)] == ["p13", "p14"]


def test_dynamic_sampling_gives_up_after_its_rounds_and_trains_on_what_it_has():
    right = ModelledServer(lambda request, index: ("right", 1.0))
    groups, _ = sample(right, ModelledServer(clean), prompts=2, settings={"dynamic_sampling": 2})
    assert len(groups) == 6
    sampler = sampler_of(right, ModelledServer(clean), prompts=2, settings={"dynamic_sampling": 2})
    assert len(sampler.trainable(groups)) == 2


def clean(request, index):
    return r"\boxed{-1}", 5.0


def test_groups_come_in_the_order_of_prompts_with_ids_that_name_step_prompt_and_rollout():
    policy = ModelledServer(lambda request, index: (f"{request.ids[index]}", 9.0 - index))
    groups, _ = sample(policy, ModelledServer(clean), prompts=3)
    assert [[judged.rollout.id for judged in group] for group in groups] == [
        [f"s4-p{prompt}-r{index}" for index in range(2)] for prompt in (10, 11, 12)
    ]
    for group in groups:
        for judged in group:
            assert judged.rollout.text == judged.rollout.id
            assert judged.rollout.seed == seed_of(1, judged.rollout.id)
            assert isinstance(judged.verdict, Verdict)


def test_verdicts_are_hidden_behind_generation_that_still_runs():
    """Group p10 is done at 2 s and judged until 7 s; p11 generates until 20 s and ends wrong: no verdict after it."""
    seconds = {"s4-p10-r0": 1.0, "s4-p10-r1": 2.0, "s4-p11-r0": 3.0, "s4-p11-r1": 20.0}
    policy = ModelledServer(
        lambda request, index: ("x" if "p11" in request.ids[index] else f"{index}", seconds[request.ids[index]])
    )
    judge = ModelledServer(clean)
    _, ended = sample(policy, judge)
    assert [when for when, what, _ in judge.log if what == "asked"] == [2.0, 2.0]
    assert ended == 20.0


def test_the_last_verdict_alone_prolongs_a_step():
    policy = ModelledServer(lambda request, index: (f"{index}", 10.0))
    _, ended = sample(policy, ModelledServer(clean))
    assert ended == 15.0


@pytest.mark.parametrize("error", [ServerUnreachable("gone"), TaskError("checker broke")], ids=["server", "task"])
def test_the_first_error_ends_the_step_as_it_was_raised(error):
    policy = ModelledServer(lambda request, index: ("!" if "p11" in request.ids[index] else "a", 1.0))
    if isinstance(error, ServerUnreachable):
        policy.failures.append(error)
    with pytest.raises(type(error), match=str(error)):
        sample(policy, ModelledServer(clean))


def test_a_group_that_comes_back_short_is_an_error():
    class Lossy(ModelledServer):
        async def generate(self, request):
            async for generation in super().generate(request):
                if not generation.id.endswith("r1"):
                    yield generation

    with pytest.raises(ServerError, match="1 of 2 samples came back"):
        sample(Lossy(lambda request, index: ("a", 1.0)), ModelledServer(clean))


def test_an_aborted_sample_never_becomes_a_rollout():
    class Aborting(ModelledServer):
        async def generate(self, request):
            async for generation in super().generate(request):
                yield replace(generation, finish_reason="abort")

    with pytest.raises(ServerError, match="aborted"):
        sample(Aborting(lambda request, index: ("a", 1.0)), ModelledServer(clean))


def test_a_step_with_nothing_left_to_train_on_is_an_error():
    broken = ModelledServer(lambda request, index: ("no box", 1.0))
    with pytest.raises(JudgeError, match="each of the 2 groups has a failed verdict"):
        sample(ModelledServer(lambda request, index: (f"{index}", 1.0)), broken)


def test_a_prompt_that_is_too_long_is_named():
    with pytest.raises(DataError, match="prompt p10 has 11 tokens"):
        sample(ModelledServer(clean), ModelledServer(clean), settings={"max_prompt_tokens": 10})


def test_seeds_differ_by_run_and_name_and_fit_31_bits():
    seeds = {seed_of(run, f"s{step}-p0-r0") for run in range(20) for step in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert ints([max(seeds)])[0] == max(seeds)


def test_the_flagged_paragraph_is_found_among_the_tokens_where_the_penalty_needs_it():
    """A token is a character here: the paragraph that the judge names begins at its first one."""
    policy = ModelledServer(lambda request, index: (f"first {index}\n\nsecond one\n\nthird", 1.0))
    flag = ModelledServer(lambda request, index: (r"\boxed{1}", 1.0))
    by_token = AlgorithmSettings(advantage={"flaw": "first_wrong_step"})
    groups, _ = sample(policy, flag, algorithm=by_token)
    assert {judged.wrong_from for group in groups for judged in group} == {len("first 0\n\n")}
    groups, _ = sample(policy, flag)
    assert {judged.wrong_from for group in groups for judged in group} == {None}
