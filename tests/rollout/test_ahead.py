"""How far generation runs ahead of training, in virtual time: when a step's groups are begun, and how old they are."""

import asyncio
from dataclasses import replace

import pytest

from megatron_fapo.errors import ServerUnreachable
from megatron_fapo.records import VersionSpan
from megatron_fapo.rollout.ahead import Ahead
from tests.rollout.test_sampler import clean, sampler_of
from tests.virtual_time import LoopClock, ModelledServer, run_virtual

GENERATING, TRAINING, STEPS = 10.0, 6.0, 4


class Versioned(ModelledServer):
    """Names its weights; the first half of an answer was drawn with those that were there when it was asked for."""

    version = 0

    async def generate(self, request):
        begun = self.version
        async for generation in super().generate(request):
            half = len(generation.token_ids) // 2
            yield replace(
                generation,
                versions=(VersionSpan(start=0, version=begun), VersionSpan(start=half, version=self.version)),
            )


def loop(lead, server=None, steps=STEPS):
    """A loop that trains for some seconds: the groups of each step, and when the loop was done."""
    server = server or Versioned(lambda request, index: (f"{request.ids[index]}", GENERATING))

    async def work():
        drawn = []
        async with Ahead(sampler_of(server, ModelledServer(clean)), max_lead=lead, steps=steps) as ahead:
            for step in range(steps):
                server.version = step
                drawn.append(await ahead.groups(step, 2 * step))
                await LoopClock().sleep(TRAINING)
        return drawn, LoopClock().now(), server

    return run_virtual(work())


def begun(server):
    """{step: when its first group was asked for}"""
    return {int(rid[1 : rid.index("-")]): when for when, what, rid in reversed(server.log) if what == "asked"}


@pytest.mark.parametrize("lead", [0, 1, 2, 9])
def test_every_step_trains_on_the_same_prompts_whatever_the_lead(lead):
    drawn, _, _ = loop(lead)
    ids = [[judged.rollout.id for group in step.trainable for judged in group] for step in drawn]
    assert ids == [[f"s{s}-p{2 * s + p}-r{r}" for p in range(2) for r in range(2)] for s in range(STEPS)]
    assert all(not step.too_old for step in drawn)


def test_without_a_lead_generation_and_training_take_turns():
    _, ended, server = loop(0)
    assert begun(server) == {0: 0.0, 1: 16.0 + 5, 2: 2 * (16.0 + 5), 3: 3 * (16.0 + 5)}  # 5 s for the last verdicts
    assert ended == STEPS * (GENERATING + 5 + TRAINING)


def test_with_a_lead_of_one_the_next_step_is_begun_before_this_one_is_trained_on():
    _, ended, server = loop(1)
    assert begun(server) == {0: 0.0, 1: 0.0, 2: 15.0 + 6, 3: 15.0 + 6 + 6}
    # the first two together, and from then on the longer of the two phases: their 15 s began with the training before
    assert ended == 15 + TRAINING + TRAINING + (15 - TRAINING) + TRAINING + TRAINING


@pytest.mark.parametrize("lead", [0, 1, 2])
def test_no_token_is_older_than_the_lead_and_unfinished_rollouts_carry_over(lead):
    """Every other step is slow: new weights find it unfinished."""
    drawn, _, _ = loop(
        lead, Versioned(lambda request, index: ("a", 20.0 if request.ids[0][1] in "135" else 1.0)), steps=6
    )
    changed = 0
    for step, found in enumerate(drawn):
        spans = [j.rollout.versions for group in found.trainable for j in group]
        assert {s[0].version for s in spans} == {max(step - lead, 0)}
        assert all(step - lead <= span.version <= step for s in spans for span in s)
        changed += sum(s[1].version > s[0].version for s in spans)
    assert (changed > 0) == (lead > 0)


def test_a_group_that_is_too_old_is_left_out_and_counted():
    """The server misses the updates from step 2 on."""

    class Behind(Versioned):
        def __setattr__(self, name, value):
            super().__setattr__(name, min(value, 1) if name == "version" else value)

    drawn, _, _ = loop(1, Behind(lambda request, index: (f"{request.ids[index]}", 1.0)))
    assert [(len(step.groups), len(step.trainable), step.too_old) for step in drawn] == [
        (2, 2, 0),
        (2, 2, 0),
        (2, 2, 0),
        (2, 0, 2),
    ]


def test_an_error_of_a_later_step_is_raised_when_that_step_is_due_and_nothing_is_left_running():
    server = Versioned(lambda request, index: ("a", 1.0))

    async def work():
        async with Ahead(sampler_of(server, ModelledServer(clean), prompts=1), max_lead=2, steps=9) as ahead:
            await ahead.groups(0, 0)
            server.failures.append(ServerUnreachable("gone"))  # for step 3, which is begun now
            await ahead.groups(1, 1)
            await ahead.groups(2, 2)
            with pytest.raises(ServerUnreachable, match="gone"):
                await ahead.groups(3, 3)
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("groups-")]

    run_virtual(work())
