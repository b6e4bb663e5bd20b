"""Build a Megatron model and its optimizer from a Hugging Face folder."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from megatron_fapo.compat.device import Device  # before torch and megatron

import torch  # isort: skip
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from transformers import AutoConfig

from megatron_fapo.batch.balance import crossover
from megatron_fapo.batch.layout import Layout
from megatron_fapo.compat.bridge import make_bridge
from megatron_fapo.errors import ConfigError, DataError
from megatron_fapo.policy import megatron_folder, pieces
from megatron_fapo.policy.hf_folder import Weights
from megatron_fapo.policy.layouts import check_backend, check_layout
from megatron_fapo.policy.logprobs import Projection
from megatron_fapo.policy.network import interface_towards
from megatron_fapo.policy.precision import fp8_flags, token_multiple
from megatron_fapo.policy.settings import ParallelSettings, PolicySettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One rank's part of the policy."""

    bridge: Any
    """mbridge's knowledge of names and shapes."""
    chunks: tuple[Any, ...]
    """The bare GPTModels of this pipeline stage: one, or several under virtual pipeline parallelism."""
    parallel: tuple[Any, ...]
    """The same behind Megatron's data parallelism: what schedules and optimizer get."""
    optimizer: Any
    config: Any
    """Megatron's TransformerConfig."""
    projection: Projection
    """The output layer: its true vocabulary, and how many tokens' logits exist at once."""


def connect(rank: int, address: str, port: int, settings: PolicySettings, device: Device, seed: int) -> Layout:
    """Join the ranks' process groups and seed the random streams. Waits for all ranks, `settings.timeout` at most."""
    parallel = settings.parallel
    torch.set_num_threads(settings.threads)
    # warn_only: what has no deterministic form on this device is named in the log rather than refused
    torch.use_deterministic_algorithms(settings.deterministic, warn_only=True)
    torch.backends.cuda.enable_cudnn_sdp(not settings.deterministic)  # its backward has no deterministic form
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it costs time and hides nothing here
    # gloo would ask the resolver for the host's name, and listen where that points
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_towards(address))
    dist.init_process_group(
        device.backend,
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=parallel.world,
        timeout=timedelta(seconds=settings.timeout),
    )
    with device.active():
        make_groups(parallel, settings.timeout)
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)
    return Layout(
        tp=parallel.tensor,
        sp=parallel.sequence,
        pp=parallel.pipeline,
        vpp=parallel.virtual_pipeline,
        cp=parallel.context,
        dp=parallel.data,
        total_multiple=token_multiple(settings),
        packed=_packed(settings, device),
    )


def _packed(settings: PolicySettings, device: Device) -> bool:
    fused = device.spec == "transformer_engine"
    if settings.sequences == "packed" and not fused and settings.parallel.context > 1:
        raise ConfigError(
            "policy.sequences = packed with policy.parallel.context above 1 needs Transformer Engine, whose attention "
            "knows where a rank's parts of packed sequences lie; set policy.sequences = rows"
        )
    return fused if settings.sequences == "auto" else settings.sequences == "packed"


def make_groups(parallel: ParallelSettings, timeout: float = 600.0) -> None:
    """Megatron's process groups, from the default group of torch.distributed, whose timeout they do not inherit."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout / 60,
    )


def build(settings: PolicySettings, device: Device) -> Model:
    """Build this rank's part with the weights of `settings.model`, and its optimizer. Collective over all ranks.

    Raises ConfigError for a config or layout that cannot be built, DataError for a folder that does not hold it.
    """
    if not (settings.model / "config.json").is_file():
        raise DataError(f"{settings.model}: no Hugging Face model here, config.json is missing")
    hf_config = AutoConfig.from_pretrained(settings.model)
    check_backend(settings.parallel, device.backend)
    bridge, chunks = assemble(hf_config, settings, device)
    if megatron_folder.is_checkpoint(settings.model):
        megatron_folder.Checkpoint(settings.model).load(chunks)
    else:
        pieces.load(bridge, chunks, Weights(settings.model))
    for chunk in chunks:
        chunk.to(device.torch_device())
    parallel = tuple(
        _data_parallel(chunk, bridge.config, settings, first=place == 0) for place, chunk in enumerate(chunks)
    )
    optimizer = _optimizer(parallel, settings, device)
    bridge.config.finalize_model_grads_func = _finalize
    bridge.config.grad_scale_func = optimizer.scale_loss
    held = sum(param.numel() for chunk in chunks for param in chunk.parameters())
    log.info("rank %d holds %d parameters", dist.get_rank(), held)
    return Model(
        bridge=bridge,
        chunks=chunks,
        parallel=parallel,
        optimizer=optimizer,
        config=bridge.config,
        projection=_projection(hf_config.vocab_size, settings),
    )


def _projection(vocabulary: int, settings: PolicySettings) -> Projection:
    """As many tokens at once as the setting has room for their float32 logits on one rank."""
    shard = -(-vocabulary // settings.parallel.tensor)
    chunk = max(settings.logits_megabytes * 2**20 // (4 * shard), 1)
    return Projection(vocabulary=vocabulary, chunk=chunk, entropy=settings.entropy)


def _recompute_flags(settings: PolicySettings, device: Device) -> dict[str, Any]:
    """Megatron's names for what `settings.recompute` asks."""
    if "layernorm" in settings.recompute_modules and device.spec == "local":
        # Megatron 0.16.1 asks Transformer Engine about FP8 there without having imported it
        raise ConfigError("policy.recompute_modules: layernorm needs Transformer Engine, which is not installed")
    if settings.recompute == "none":
        return {}
    if settings.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(settings.recompute_modules)}
    some = settings.recompute_layers
    return {
        "recompute_granularity": "full",
        "recompute_method": "block" if some else "uniform",
        "recompute_num_layers": some or 1,
    }


def crossover_of(model: Model) -> float:
    """Length at which attention costs the model as much as everything else, from Megatron's own shapes."""
    config = model.config
    return crossover(
        layers=config.num_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        groups=config.num_query_groups,
        head_dim=config.kv_channels,
        mlp=config.moe_router_topk * config.moe_ffn_hidden_size if config.num_moe_experts else config.ffn_hidden_size,
        vocabulary=model.projection.vocabulary,
    )


def assemble(hf_config: Any, settings: PolicySettings, device: Device, **flags: Any) -> tuple[Any, tuple[Any, ...]]:
    """The bridge and this rank's GPTModels, without weights. `flags` are TransformerConfig fields.

    Raises ConfigError for a config or layout that cannot be built.
    """
    check_layout(hf_config.to_dict(), settings.parallel)
    bridge = make_bridge(
        hf_config,
        device,
        getattr(torch, settings.dtype),
        settings.parallel.tensor,
        sequence_parallel=settings.parallel.sequence,
        variable_seq_lengths=True,
        batch_p2p_comm=False,
        overlap_p2p_comm=False,
        deallocate_pipeline_outputs=False,  # with gloo a freed output can still be on its way
        calculate_per_token_loss=True,  # gradients are summed: the loss carries its own 1 / tokens
        **fp8_flags(hf_config, settings, device),
        **_recompute_flags(settings, device),
        **flags,
    )
    return bridge, tuple(_chunk(bridge, stage) for stage in _virtual_stages(settings))


def _virtual_stages(settings: PolicySettings) -> Sequence[int | None]:
    count = settings.parallel.virtual_pipeline
    return range(count) if count > 1 else [None]


def _chunk(bridge: Any, virtual_stage: int | None) -> Any:
    """The GPTModel of one group of layers of this rank."""
    ends = {"ignore_virtual": False, "vp_stage": virtual_stage}
    chunk = bridge._model_provider([])(
        pre_process=parallel_state.is_pipeline_first_stage(**ends),
        post_process=parallel_state.is_pipeline_last_stage(**ends),
        vp_stage=virtual_stage,
    )
    chunk.model_type = ModelType.encoder_or_decoder
    for param in chunk.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(param)
    return chunk


def _data_parallel(module: Any, config: Any, settings: PolicySettings, first: bool) -> Any:
    inner = Float16Module(config, module) if settings.dtype == "bfloat16" else module
    return DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=settings.optimizer.distributed,
            overlap_grad_reduce=False,
            check_for_nan_in_grad=False,  # the gradient norm is checked, and its error names the step
        ),
        inner,
        disable_bucketing=not first,
    )


def _optimizer(parallel: Sequence[Any], settings: PolicySettings, device: Device) -> Any:
    chosen = settings.optimizer
    if chosen.cpu_offload and not device.memory.apart:
        raise ConfigError("policy.optimizer.cpu_offload needs a CUDA device: on a CPU all state is on the host already")
    if chosen.cpu_offload and settings.dtype == "float32":
        raise ConfigError(
            "policy.optimizer.cpu_offload: Megatron moves master weights, which float32 has not; use bfloat16"
        )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=chosen.learning_rate,
            min_lr=0.0,
            weight_decay=chosen.weight_decay,
            adam_beta1=chosen.beta1,
            adam_beta2=chosen.beta2,
            adam_eps=chosen.epsilon,
            clip_grad=chosen.clip_grad,
            use_distributed_optimizer=chosen.distributed,
            bf16=settings.dtype == "bfloat16",
            params_dtype=getattr(torch, settings.dtype),
            fp8_recipe=None if settings.fp8 is None else settings.fp8.recipe,
            optimizer_cpu_offload=chosen.cpu_offload > 0,
            optimizer_offload_fraction=chosen.cpu_offload,
            overlap_cpu_optimizer_d2h_h2d=chosen.cpu_offload > 0,
            use_precision_aware_optimizer=chosen.cpu_offload > 0 and chosen.distributed,
        ),
        list(parallel),
        use_gloo_process_groups=False,
    )
    if device.fused_adam:
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
    return optimizer


def release(model: Model) -> None:
    """Cut what keeps a model alive that nobody uses any more.

    Gradient hooks and the config's callbacks lead from the model to itself through objects of C++, where Python's
    collector does not look; with the model, its process groups and their threads would stay.
    """
    model.config.grad_scale_func = model.config.finalize_model_grads_func = None
    for part in model.parallel:
        part.grad_accs.clear()
    for module in (module for chunk in model.chunks for module in chunk.modules()):
        dispatcher = getattr(module, "token_dispatcher", None)
        for name, value in vars(dispatcher).items() if dispatcher is not None else ():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:  # the last microbatch's whole graph
                setattr(dispatcher, name, None)


def _finalize(models: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
    """Reduce gradients over ranks, without Megatron's own division by the tokens it saw."""
    finalize_model_grads(models, None, **kwargs)
