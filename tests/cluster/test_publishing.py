"""A server that dies under any way for weights comes back with what the others hold, and stops none of them.

Real servers, keepers and transports; the trained model is a folder of tensors.
"""

import asyncio
import gc
import os
import signal
from contextlib import asynccontextmanager

import pytest

from megatron_fapo.cluster.publishing import PolicyWeights
from megatron_fapo.errors import RankLost
from megatron_fapo.publish.settings import PublishSettings
from megatron_fapo.publish.transports import make_transport
from megatron_fapo.serving.hooks import Hooks
from megatron_fapo.serving.launcher import launch
from megatron_fapo.serving.settings import ServerSettings
from megatron_fapo.weights import digest
from tests.publish.ends import Source
from tests.serving.worlds import CONTEXT, Reference, make_model

WAYS = ["shared_memory", "disk", "group", "delta"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "a")


@pytest.fixture
def tensors(folder):
    """(of a step, of the next one): a part of each tensor differs."""
    first = {name: tensor * 1.5 for name, tensor in Reference(folder).tensors().items()}
    second = {name: tensor.clone() for name, tensor in first.items()}
    for tensor in second.values():
        tensor.view(-1)[::40] *= 1.5
    return first, second


class Model(Source):
    """`Source` with a victim, which dies once a bucket of the next export has been written."""

    victim: int | None = None

    async def next_bucket(self, segment, nbytes):
        bucket = await super().next_bucket(segment, nbytes)
        if self.victim is not None and len(self.left) < len(self.tensors) / 2:
            os.kill(self.victim, signal.SIGKILL)
            self.victim = None
        return bucket

    lost = gone = False
    """Whether the sending rank dies in its next broadcast, or its machine does, which closes no connection."""

    async def send_bucket(self, bucket):
        if self.lost:
            self.lost, self.sender = False, None  # which closes its connections
            gc.collect()
            raise RankLost("process died")
        if self.gone:
            self.gone = False
            raise RankLost("no sign of life")
        return await super().send_bucket(bucket)


@asynccontextmanager
async def publishing(folder, tmp_path, way, model, count, group_timeout=20):
    """(group of servers, their weights, an event that is set when one came back and was brought up to date)."""
    back = asyncio.Event()
    settings = ServerSettings(model=str(folder), context_length=CONTEXT, count=count)
    given = PublishSettings(transport=way, bucket_megabytes=48 / 1024, group_timeout=group_timeout)
    transport = make_transport(given, f"publishing-{os.getpid()}", tmp_path)
    async with launch(settings, "policy", tmp_path, Hooks()) as group:
        weights = PolicyWeights(model, group, transport)
        ours = group.hooks.catch_up

        async def catch_up(client):
            found = await ours(client)
            back.set()
            return found

        group.hooks.catch_up = catch_up
        yield group, weights, back
    transport.close()


async def pid_of(client):
    return (await client.info())["pid"]


async def all_hold(group, version, tensors):
    """Whether every server says this version, and holds these tensors."""
    sums = {name: digest(tensor.numpy().tobytes()) for name, tensor in tensors.items()}
    held = [(await client.held(), await client.weight_version()) for client in group.clients]
    return held == [(sums, str(version))] * len(held)


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
async def test_a_server_that_dies_comes_back_with_the_present_weights(folder, tmp_path, tensors, way):
    """Between two publications, and within one; then the ranks hold an older version, as after a recovery."""
    first, second = tensors
    model = Model(first)
    async with publishing(folder, tmp_path, way, model, 3 if way == "group" else 2) as (group, weights, back):
        await weights.publish(1)
        os.kill(await pid_of(group.clients[0]), signal.SIGKILL)
        await until(lambda: back.is_set() and all(map(group.may_ask, group.clients)))
        assert await all_hold(group, 1, first)

        back.clear()
        model.tensors, model.victim = dict(second), await pid_of(group.clients[-1])
        await weights.publish(2)
        assert model.victim is None
        await until(lambda: back.is_set() and all(map(group.may_ask, group.clients)))
        assert await all_hold(group, 2, second)

        weights.forget()
        model.tensors = dict(first)
        await weights.publish(1)
        assert await all_hold(group, 1, first)


async def test_a_rank_that_dies_in_a_broadcast_is_what_the_run_hears_of(folder, tmp_path, tensors):
    """And not of the servers whose connection it broke; they take the next publication."""
    first, second = tensors
    model = Model(first)
    async with publishing(folder, tmp_path, "group", model, 1) as (group, weights, _):
        await weights.publish(1)
        model.tensors, model.lost = dict(second), True
        with pytest.raises(RankLost, match="process died"):
            await weights.publish(2)
        await weights.publish(2)
        assert await all_hold(group, 2, second)


async def test_a_sender_whose_machine_is_gone_is_waited_for_as_long_as_is_said(folder, tmp_path, tensors):
    first, second = tensors
    model = Model(first)
    async with publishing(folder, tmp_path, "group", model, 1, group_timeout=3) as (group, weights, _):
        await weights.publish(1)
        model.tensors, model.gone = dict(second), True
        start = asyncio.get_running_loop().time()
        with pytest.raises(RankLost, match="no sign of life"):
            await weights.publish(2)
        assert 3 <= asyncio.get_running_loop().time() - start < 20
        await weights.publish(2)
        assert await all_hold(group, 2, second)


class Dying(Model):
    """`Model` whose ranks die, when `dying`, once half of the tensors have been written."""

    dying = False

    async def next_bucket(self, segment, nbytes):
        if self.dying and len(self.left) < len(self.tensors) / 2:
            self.dying = False
            raise RankLost("process died")
        return await super().next_bucket(segment, nbytes)


async def test_a_rank_that_dies_between_two_buckets_leaves_no_base_for_a_delta(folder, tmp_path, tensors):
    """Its files hold some buckets of the new version and some of the old: everything is sent in full."""
    first, second = tensors
    model = Dying(first)
    async with publishing(folder, tmp_path, "delta", model, 1) as (group, weights, _):
        transport = weights._transport
        await weights.publish(1)
        await weights.publish(1)
        assert (transport.changed, transport.nbytes) == (0, 0)
        model.tensors, model.dying = dict(second), True
        with pytest.raises(RankLost):
            await weights.publish(2)
        model.tensors = dict(first)  # as the checkpoint has it
        await weights.publish(1)
        assert transport.changed is None
        assert await all_hold(group, 1, first)
        model.tensors = dict(second)
        await weights.publish(2)
        assert transport.changed > 0
        assert await all_hold(group, 2, second)
