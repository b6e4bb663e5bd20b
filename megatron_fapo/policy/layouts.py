"""Which layouts a model can have, and why not the others. Light: the configuration is checked before torch loads."""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_fapo.errors import ConfigError
from megatron_fapo.policy.settings import ParallelSettings


def check_layout(model: Mapping[str, Any], parallel: ParallelSettings) -> None:
    """Refuse what cannot work with this model, or would train it wrongly without an error.

    `model` is the content of its config.json. Raises ConfigError with the reason.
    """
    experts = model.get("num_experts") or model.get("num_local_experts") or 0
    problems = (*_division_problems(model, parallel, experts), *_expert_problems(model, parallel, experts))
    for problem in problems:
        raise ConfigError(f"policy.parallel.{problem}")


def check_backend(parallel: ParallelSettings, backend: str) -> None:
    """Refuse what the backend of torch.distributed cannot do. Raises ConfigError with the reason."""
    if backend == "gloo" and parallel.expert > 1 and parallel.expert_tensor > 1:
        raise ConfigError(
            f"policy.parallel.expert_tensor = {parallel.expert_tensor} with expert = {parallel.expert}: ranks gather "
            "different numbers of tokens, which gloo cannot; on a CPU set expert_tensor=1 or expert=1"
        )
    if backend == "nccl" and parallel.virtual_pipeline > 1 and parallel.pipeline == 2:
        raise ConfigError(
            f"policy.parallel.virtual_pipeline = {parallel.virtual_pipeline} with pipeline = 2: the previous stage is "
            "the next one too, and without the tags that NCCL lacks they mix up the shapes of microbatches; set "
            "pipeline=4 or virtual_pipeline=1"
        )


def _division_problems(model: Mapping[str, Any], parallel: ParallelSettings, experts: int) -> Iterator[str]:
    tensor, pipeline, virtual = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline
    wide = () if experts else ("intermediate_size",)
    for key in ("num_attention_heads", "num_key_value_heads", *wide):
        if (model.get(key) or 0) % tensor:
            yield f"tensor = {tensor} does not divide the model's {key} = {model[key]}"
    layers = model.get("num_hidden_layers", 0)
    if layers % pipeline:
        yield f"pipeline = {pipeline} does not divide the model's num_hidden_layers = {layers}"
    elif layers % (pipeline * virtual):
        yield (
            f"virtual_pipeline = {virtual} times pipeline = {pipeline} does not divide the model's "
            f"num_hidden_layers = {layers}"
        )


def _expert_problems(model: Mapping[str, Any], parallel: ParallelSettings, experts: int) -> Iterator[str]:
    tensor, expert, shares = parallel.tensor, parallel.expert, parallel.expert_tensor
    if not experts:
        if expert > 1 or shares > 1:
            yield f"expert = {expert}, expert_tensor = {shares}: the model has no experts"
        return
    if experts % expert:
        yield f"expert = {expert} does not divide the model's num_experts = {experts}"
    width = model.get("moe_intermediate_size") or 0
    if width % shares:
        yield f"expert_tensor = {shares} does not divide the model's moe_intermediate_size = {width}"
    if tensor > 1 and not parallel.sequence:
        yield f"tensor = {tensor} needs sequence=true for a mixture of experts: Megatron refuses to train it without"
    if shares not in (1, tensor):
        yield f"expert_tensor = {shares} must be 1 or tensor = {tensor}"
    elif expert == 1 and shares != tensor:
        yield (
            f"expert_tensor = 1 with tensor = {tensor} and expert = 1: each tensor-parallel rank would keep the "
            f"experts' gradients of its own tokens, unsummed; set expert_tensor={tensor}, or expert above 1"
        )
