"""Real SGLang serves what `fapo convert` wrote, in FP8, and takes new weights in that form.

On a CPU SGLang's own code reads, fuses and holds the FP8 parameters; products are taken by the stand-in of
tests/support/sglang, with the floats that they stand for.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_fapo.fp8 import served
from megatron_fapo.held import HeldDigests, HeldLayout
from megatron_fapo.policy.export import summed_by_servers
from megatron_fapo.policy.quantize import dequantize, quantize
from megatron_fapo.records import Bucket, GenerationRequest, Sampling, TensorSpec, ints
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.launcher import launch_one
from megatron_fapo.serving.settings import ServerSettings
from megatron_fapo.weights import Segment, aligned, digest, shared_memory_folder
from tests.conftest import lacking
from tests.serving.conformance import SGLANG

ROOT = Path(__file__).parents[2]
POLICY = ROOT / "configs" / "clock" / "warm-start" / "policy"
PROMPT = [3, 17, 5, 40, 8, 21, 9, 33]

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clock policy through a Megatron checkpoint into FP8, as a user types it."""
    root = tmp_path_factory.mktemp("fp8")
    fapo = [str(Path(sys.executable).parent / "fapo"), "convert"]
    for words in ([POLICY, "--to", root / "megatron"], [root / "megatron", "--to", root / "fp8", "--quantize", "fp8"]):
        subprocess.run([*fapo, *map(str, words)], cwd=ROOT, check=True, capture_output=True)
    return root / "fp8"


def in_order(tensors: Tensors) -> Tensors:
    """Query before key and gate before up, as they are published."""
    return dict(sorted(tensors.items(), key=lambda item: item[0].replace("q_proj", "a_proj")))


def put(tensors: Tensors, segment: Segment) -> Bucket:
    """The tensors in a bucket."""
    specs, offset = [], 0
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        segment.memory[offset : offset + len(data)] = data
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name=name, dtype=dtype, shape=tuple(tensor.shape), offset=offset, digest=digest(data)))
        offset = aligned(offset + len(data))
    return Bucket(segment=str(segment.path), nbytes=offset, tensors=tuple(specs))


def must_hold(bucket: Bucket, segment: Segment, layout: HeldLayout) -> dict[str, str]:
    held = HeldDigests(layout)
    for spec, data in summed_by_servers(bucket.tensors, torch.frombuffer(segment.memory, dtype=torch.uint8)):
        held.add(spec, data)
    return held.result()


@torch.no_grad()
def by_transformers(weights: Tensors, tokens: list[int]) -> torch.Tensor:
    """Log-probs [tokens, vocabulary] of the floats that FP8 weights stand for, in BF16."""
    plain = {
        name: dequantize(tensor, weights[f"{name}_scale_inv"]) if f"{name}_scale_inv" in weights else tensor
        for name, tensor in weights.items()
        if not name.endswith("_scale_inv")
    }
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.bfloat16)
    assert not model.load_state_dict(plain, strict=False).unexpected_keys
    return torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), -1)


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_sglang_holds_the_folder_and_then_the_published_weights(fp8_folder: Path, tmp_path: Path) -> None:
    if not SGLANG.is_file():
        lacking("SGLang's environment is missing: make sglang-cpu")
    settings = ServerSettings.model_validate(
        {
            "model": str(fp8_folder),
            "engine": "sglang",
            "quantization": "fp8",
            "dtype": "bfloat16",
            "context_length": 128,
            "max_running": 8,
            "start_timeout": 500,
            "sglang": {"on_cpu": True, "max_total_tokens": 4096, "python": str(SGLANG), "memory_fraction": 0.3},
        }
    )
    before = in_order(load_file(fp8_folder / "model.safetensors"))
    segment = Segment.create(shared_memory_folder() / f"fapo-test-sglang-fp8-{os.getpid()}", 2**22)
    server = await launch_one(settings, tmp_path / "log", 0)
    try:
        async with ServerClient(server.url, timeout=120) as client:
            layout = await client.layout()
            kept = json.loads((fp8_folder / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
            assert layout.kept_in_bf16 == tuple(kept)
            held = await client.held()
            assert held == must_hold(put(before, segment), segment, layout)

            noise = torch.Generator().manual_seed(1)
            masters = {
                name: tensor.float() * (1 + 0.05 * torch.randn(tensor.shape, generator=noise))
                for name, tensor in load_file(POLICY / "model.safetensors").items()
            }
            fp8 = served({name: tuple(tensor.shape) for name, tensor in masters.items()}, kept)
            after = in_order(dict(part for name, tensor in masters.items() for part in quantize(fp8, name, tensor)))
            bucket = put(after, segment)
            await client.begin_update()
            await client.load_bucket(bucket)
            assert await client.held() == must_hold(bucket, segment, layout) != held
            await client.end_update(7)

            sampling = Sampling(temperature=1.0, max_new_tokens=24)
            request = GenerationRequest(ids=("a",), token_ids=ints(PROMPT), seeds=(1,), sampling=sampling)
            (sample,) = [sample async for sample in client.generate(request)]
    finally:
        await server.stop()
        segment.remove()
    assert {span.version for span in sample.versions} == {7}
    drawn = torch.from_numpy(sample.token_ids.astype("int64"))
    scores = [by_transformers(weights, [*PROMPT, *drawn.tolist()]) for weights in (after, before)]
    ours, old = (
        each[len(PROMPT) - 1 : -1].gather(1, drawn[:, None])[:, 0].sub(torch.tensor(sample.logprobs)).abs().mean()
        for each in scores
    )
    assert ours < 0.05, (ours, old)
    assert old > 4 * ours, (ours, old)
