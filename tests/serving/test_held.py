"""What SGLang's ranks must hold, against the same fusing and sharding written in numpy the plain way."""

import hashlib

import numpy as np
import pytest

from megatron_fapo.errors import WeightsError
from megatron_fapo.held import HeldDigests, HeldLayout, differing
from megatron_fapo.records import TensorSpec
from megatron_fapo.serving.receiver import receiver

HIDDEN, HEADS, KV_HEADS, HEAD, MLP, WORDS = 8, 4, 2, 4, 12, 70


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (WORDS, HIDDEN),
        f"{layer}self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
        f"{layer}self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        f"{layer}self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        f"{layer}self_attn.q_proj.bias": (HEADS * HEAD,),
        f"{layer}self_attn.k_proj.bias": (KV_HEADS * HEAD,),
        f"{layer}self_attn.v_proj.bias": (KV_HEADS * HEAD,),
        f"{layer}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
        f"{layer}mlp.gate_proj.weight": (MLP, HIDDEN),
        f"{layer}mlp.up_proj.weight": (MLP, HIDDEN),
        f"{layer}mlp.down_proj.weight": (HIDDEN, MLP),
        "model.norm.weight": (HIDDEN,),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def digests(tensors, layout):
    held = HeldDigests(layout)
    for name, tensor in tensors.items():
        spec = TensorSpec(name=name, dtype="float32", shape=tensor.shape, offset=0, digest=f"xxh3 of {name}")
        held.add(spec, memoryview(tensor).cast("B"))
    return held.result()


def sha(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]


def by_heads(tensor, rank, ranks):
    """A rank's heads; with fewer heads than ranks, neighbours hold the same one."""
    heads = tensor.reshape(-1, HEAD, *tensor.shape[1:])
    mine = np.array_split(np.repeat(heads, max(1, ranks // len(heads)), axis=0), ranks)[rank]
    return mine.reshape(-1, *tensor.shape[1:])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fused_and_sharded_as_sglang_does(tensors, ranks):
    found = digests(tensors, HeldLayout(engine="sglang", tensor_parallel=ranks, kv_heads=KV_HEADS))
    padded = np.zeros((128, HIDDEN), np.float32)
    padded[:WORDS] = tensors["model.embed_tokens.weight"]
    layer = "model.layers.0."
    expected = {}
    for rank in range(ranks):
        on = f"@{rank}" if ranks > 1 else ""
        expected[f"model.embed_tokens.weight{on}"] = sha(np.array_split(padded, ranks)[rank])
        expected[f"model.norm.weight{on}"] = sha(tensors["model.norm.weight"])
        for kind in ("weight", "bias"):
            parts = [by_heads(tensors[f"{layer}self_attn.{p}_proj.{kind}"], rank, ranks) for p in "qkv"]
            expected[f"{layer}self_attn.qkv_proj.{kind}{on}"] = sha(*parts)
        halves = [np.array_split(tensors[f"{layer}mlp.{p}_proj.weight"], ranks)[rank] for p in ("gate", "up")]
        expected[f"{layer}mlp.gate_up_proj.weight{on}"] = sha(*halves)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            columns = np.array_split(tensors[f"{layer}{name}.weight"], ranks, axis=1)[rank]
            expected[f"{layer}{name}.weight{on}"] = sha(columns)
    assert found == expected


@pytest.mark.parametrize(("ranks", "groups"), [(1, 1), (2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("by_expert", [True, False], ids=["expert after expert", "projection after projection"])
def test_experts_are_stacked_as_sglang_does(ranks, groups, by_expert):
    rng = np.random.default_rng(0)
    shapes = {"gate_proj": (MLP, HIDDEN), "up_proj": (MLP, HIDDEN), "down_proj": (HIDDEN, MLP)}
    tensors = {
        (expert, name): rng.normal(size=shape).astype(np.float32)
        for expert in range(4)
        for name, shape in shapes.items()
    }
    order = tensors if by_expert else sorted(tensors, key=lambda place: place[1] == "down_proj")
    sent = {f"model.layers.1.mlp.experts.{expert}.{name}.weight": tensors[expert, name] for expert, name in order}
    found = digests(sent, HeldLayout(engine="sglang", tensor_parallel=ranks, experts=4, expert_parallel=groups))
    expected, shards = {}, ranks // groups
    for rank in range(ranks):
        mine, shard = np.array_split(range(4), groups)[rank // shards], rank % shards
        on = f"@{rank}" if ranks > 1 else ""
        up = [np.array_split(tensors[e, name], shards)[shard] for e in mine for name in ("gate_proj", "up_proj")]
        down = [np.array_split(tensors[e, "down_proj"], shards, axis=1)[shard] for e in mine]
        expected[f"model.layers.1.mlp.experts.w13_weight{on}"] = sha(*up)
        expected[f"model.layers.1.mlp.experts.w2_weight{on}"] = sha(*down)
    assert found == expected


def test_the_embedded_engine_holds_what_it_was_sent(tensors):
    assert digests(tensors, HeldLayout()) == {name: f"xxh3 of {name}" for name in tensors}


def test_parts_of_a_fused_parameter_that_are_missing_or_out_of_order_are_named(tensors):
    layout = HeldLayout(engine="sglang")
    some = {name: tensor for name, tensor in tensors.items() if "v_proj" not in name}
    with pytest.raises(WeightsError, match=r"qkv_proj\.bias: not all"):
        digests(some, layout)
    with pytest.raises(WeightsError, match=r"up_proj.*out of order"):
        digests(dict(reversed(tensors.items())), layout)
    expert = {"model.layers.0.mlp.experts.3.gate_proj.weight": tensors["model.norm.weight"]}
    with pytest.raises(WeightsError, match=r"experts\.3.*not known"):
        digests(expert, layout)


def test_what_differs_is_named_in_order():
    assert differing({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "x", "d": "4"}) == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("told", "experts"),
    [
        ({"ep_size": 2, "init_expert_location": "trivial", "moe_a2a_backend": "none", "enable_eplb": False}, 4),
        ({"ep_size": 2, "ep_num_redundant_experts": 2}, 0),
        ({"ep_size": 2, "moe_a2a_backend": "deepep"}, 0),
        ({"enable_dp_attention": True}, 0),
    ],
)
async def test_where_experts_may_lie_in_another_order_their_place_is_not_known(tmp_path, told, experts):
    (tmp_path / "config.json").write_text('{"num_experts": 4}')

    async def command(path, body):
        raise AssertionError(path)

    layout = receiver(command, {"model_path": str(tmp_path), "tp_size": 2, **told}, {}).layout
    assert (layout.experts, layout.expert_parallel) == (experts, told.get("ep_size", 1))
