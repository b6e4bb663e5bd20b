"""How new weights arrive, and their proof, asked over HTTP of each engine.

The first line of each docstring is a row of the table in docs/serving.md, `known_difference` what stands in it.
"""

import asyncio
import os

import numpy as np
import pytest

from megatron_fapo.errors import RequestRejected, WeightsError
from megatron_fapo.held import HeldDigests, differing
from megatron_fapo.publish.publisher import publish
from megatron_fapo.publish.settings import PublishSettings
from megatron_fapo.publish.transports import Delta, make_transport
from megatron_fapo.records import VersionSpan
from tests.publish.ends import Source
from tests.serving.conformance import collect, known_difference


async def expected_of(client, buckets):
    """What the server must hold, from the bytes of its buckets."""
    digests = HeldDigests(await client.layout())
    for segment, bucket in buckets:
        for spec in bucket.tensors:
            nbytes = int(np.prod(spec.shape)) * 4
            digests.add(spec, segment.memory[spec.offset : spec.offset + nbytes])
    return digests.result()


async def test_from_disk(server, models, model_b, prompts):
    """`/update_weights_from_disk`: the folder's weights, under `weight_version`"""
    await server.client.load_from_disk(str(models[1]), 4)
    answer = await server.generate(prompts[2], 24)
    assert answer["output_ids"] == model_b.greedy(prompts[2], 24)
    assert answer["meta_info"]["weight_version"] == "4"


async def test_from_nowhere(server, model_a, prompts):
    """A folder that cannot be read is refused with 400; the weights stay"""
    with pytest.raises(RequestRejected, match="status 400"):
        await server.client.load_from_disk("no-such-folder", 5)
    assert (await server.generate(prompts[2], 24))["output_ids"] == model_a.greedy(prompts[2], 24)


async def test_from_shared_memory(server, model_b, bucket_of, prompts, request_for):
    """`begin_weight_update`, buckets in shared memory, `end_weight_update`: the new model under its version"""
    tensors = list(model_b.tensors().items())
    await server.client.begin_update()
    for half in (tensors[:7], tensors[7:]):
        await server.client.load_bucket(bucket_of(dict(half))[1])
    await server.client.end_update(3)
    (sample,) = (await collect(server.client, request_for(prompts[3], temperature=0.0, max_new_tokens=24))).values()
    expected = model_b.greedy(prompts[3], 24)[: len(sample.token_ids)]
    assert sample.token_ids.tolist() == expected
    assert sample.versions == (VersionSpan(start=0, version=3),)
    np.testing.assert_allclose(sample.logprobs, model_b.logprobs(prompts[3], expected), atol=1e-5)


async def test_old_prefixes(server, model_b, bucket_of, prompts):
    """Prefixes that old weights computed are not used after an update"""
    prompt = prompts[4] * 4
    await server.generate(prompt, 2)
    await server.client.begin_update()
    await server.client.load_bucket(bucket_of(model_b.tensors())[1])
    await server.client.end_update(3)
    answer = await server.generate(prompt, 12)
    logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    np.testing.assert_allclose(logprobs, model_b.logprobs(prompt, answer["output_ids"]), atol=1e-5)


async def test_waits(server, model_b, bucket_of, prompts):
    """Nothing is generated while an update is open; `/health` answers"""
    await server.client.begin_update()
    waiting = asyncio.ensure_future(server.generate(prompts[2], 24))
    await asyncio.wait({waiting}, timeout=0.3)
    assert not waiting.done()
    assert await server.client.health()
    await server.client.load_bucket(bucket_of(model_b.tensors())[1])
    await asyncio.wait({waiting}, timeout=0.3)
    assert not waiting.done()
    await server.client.end_update(9)
    assert (await waiting)["output_ids"] == model_b.greedy(prompts[2], 24)


async def test_held(server, model_a, model_b, bucket_of):
    """`/weights_checker`: the digests of what is held are those of what was sent"""
    old, new = bucket_of(model_a.tensors()), bucket_of(model_b.tensors())
    assert await server.client.held() == await expected_of(server.client, [old])
    await server.client.begin_update()
    await server.client.load_bucket(new[1])
    assert await server.client.held() == await expected_of(server.client, [new])
    await server.client.end_update(3)


async def test_flipped_byte(server, model_b, bucket_of):
    """A byte that flips on its way is found by name, at the latest in the digests of what is held"""
    segment, bucket = bucket_of(model_b.tensors())
    expected = await expected_of(server.client, [(segment, bucket)])
    place = next(spec for spec in bucket.tensors if spec.name.endswith("1.self_attn.k_proj.weight"))
    segment.memory[place.offset + 1] ^= 1
    await server.client.begin_update()
    refused = ""
    try:
        await server.client.load_bucket(bucket)
    except RequestRejected as error:
        refused = str(error)
    if refused:
        assert place.name in refused
    else:
        (wrong,) = differing(expected, await server.client.held())
        assert wrong == place.name.replace("k_proj", "qkv_proj")
    segment.memory[place.offset + 1] ^= 1
    await server.client.load_bucket(bucket)
    await server.client.end_update(1)
    assert await server.client.held() == expected


async def published(server, tmp_path, transport, tensors, version, flip=None, kilobytes=48):
    """Publish tensors in several buckets, proven by what the server holds; the transport and the exporter."""
    if isinstance(transport, str):
        given = PublishSettings(transport=transport, bucket_megabytes=kilobytes / 1024, group_timeout=20)
        transport = make_transport(given, f"conformance-{os.getpid()}", tmp_path)
    source = Source(tensors, flip)
    try:
        await publish(source, [server.client], transport, version)
    finally:
        if not isinstance(transport, Delta):
            transport.close()
    return transport, source


async def arrives(server, tmp_path, transport, model, prompt):
    """A whole update; before, one with a byte that flips on its way, which stops by name."""
    place = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises((WeightsError, RequestRejected), match=r"layers\.1\.self_attn\.(k|qkv)_proj\.weight"):
        await published(server, tmp_path, transport, model.tensors(), 2, flip=place)
    assert await server.client.weight_version() == "default"
    transport, _ = await published(server, tmp_path, transport, model.tensors(), 3)
    answer = await server.generate(prompt, 24)
    assert answer["output_ids"] == model.greedy(prompt, 24)
    assert answer["meta_info"]["weight_version"] == "3"
    return transport


async def test_publish_disk(server, model_b, prompts, tmp_path):
    """Published as files on disk, proven by what is held; a flipped byte is found by name"""
    await arrives(server, tmp_path, "disk", model_b, prompts[2])
    assert not list((tmp_path / "weights").iterdir())


async def test_publish_group(server, model_b, prompts, tmp_path):
    """Published in a process group (gloo), proven by what is held; a flipped byte is found by name"""
    await arrives(server, tmp_path, "group", model_b, prompts[2])


async def test_publish_delta(server, model_b, prompts, tmp_path):
    """Published as a delta, proven by what is held; a flipped byte is found by name"""
    delta = await arrives(server, tmp_path, "delta", model_b, prompts[2])
    await published(server, tmp_path, delta, model_b.tensors(), 4)
    delta.close()


@known_difference("sglang", "takes no changes: it is sent everything")
async def test_changes(server, model_b, models, tmp_path):
    """A delta sends what changed; from another base it is refused by name, and everything is sent in full"""
    delta, _ = await published(server, tmp_path, "delta", model_b.tensors(), 3)
    full = delta.nbytes
    tensors = {name: tensor.clone() for name, tensor in model_b.tensors().items()}
    for tensor in tensors.values():
        tensor.view(-1)[::40] *= 1.5
    try:
        _, source = await published(server, tmp_path, delta, tensors, 4)
        assert (source.exports, delta.nbytes < full / 10) == (1, True)
        await server.client.load_from_disk(str(models[0]), 5)
        _, source = await published(server, tmp_path, delta, tensors, 6)
        assert (source.exports, delta.nbytes) == (2, full)
        assert await server.client.weight_version() == "6"
    finally:
        delta.close()


@known_difference("sglang", "it loads what comes: the digests of what is held tell")
async def test_incomplete(server, model_b, bucket_of):
    """An update that lacks a tensor cannot be closed"""
    name, *_ = tensors = model_b.tensors()
    _, all_of_them = bucket_of(tensors)
    await server.client.begin_update()
    await server.client.load_bucket(bucket_of({key: tensors[key] for key in tensors if key != name})[1])
    try:
        with pytest.raises(RequestRejected, match="missing"):
            await server.client.end_update(1)
    finally:
        if await server.client.weight_version() != "1":
            await server.client.load_bucket(all_of_them)
            await server.client.end_update(1)


async def test_needs_session(server):
    """Weights outside of an update are refused with 400"""
    with pytest.raises(RequestRejected, match="begin_weight_update"):
        await server.client.command("/end_weight_update", {"weight_version": "1"})
