"""A training step on megatron-core alone, the way its quickstart writes one: the floor of benchmarks/train_step.py."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fapo.records import MicroBatch

Batch = dict[str, torch.Tensor]
CLIP_LOW, CLIP_HIGH, DUAL_CLIP = 0.2, 0.28, 10.0


class BareLoop:
    """Model, optimizer and step. `weights` is the state of a GPTModel of the same shape."""

    def __init__(self, hf: Any, spec: Any, flags: dict[str, Any], optimizer: OptimizerConfig, weights: Any) -> None:
        self.config = TransformerConfig(
            num_layers=hf.num_hidden_layers, hidden_size=hf.hidden_size, num_attention_heads=hf.num_attention_heads,
            num_query_groups=hf.num_key_value_heads, kv_channels=hf.head_dim, ffn_hidden_size=hf.intermediate_size,
            normalization="RMSNorm", layernorm_epsilon=hf.rms_norm_eps, activation_func=torch.nn.functional.silu,
            gated_linear_unit=True, add_bias_linear=False, qk_layernorm=True, attention_dropout=0.0, hidden_dropout=0.0,
            bf16=False, params_dtype=torch.float32, variable_seq_lengths=True,
            moe_token_dispatcher_type="alltoall", calculate_per_token_loss=True, **flags,
        )  # fmt: skip
        model = GPTModel(
            config=self.config, transformer_layer_spec=spec(self.config), vocab_size=hf.vocab_size,
            max_sequence_length=hf.max_position_embeddings, position_embedding_type="rope",
            rotary_base=int(hf.rope_parameters["rope_theta"]),
            share_embeddings_and_output_weights=hf.tie_word_embeddings,
        )  # fmt: skip
        model.load_state_dict(weights)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.model = DistributedDataParallel(self.config, ddp, model)
        self.optimizer = get_megatron_optimizer(optimizer, [self.model], use_gloo_process_groups=False)
        for group in self.optimizer.param_groups:  # torch's fast kernel, as on the other side
            group["fused"], group["foreach"] = True, False
        self.config.finalize_model_grads_func = lambda models, num_tokens=None, **kw: finalize_model_grads(models, **kw)
        self.config.grad_scale_func = self.optimizer.scale_loss

    def step(self, microbatches: Sequence[MicroBatch], loss_tokens: int) -> tuple[float, float]:
        """One optimizer step; loss and gradient norm."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = [get_batch(micro) for micro in microbatches]
        losses = get_forward_backward_func()(
            forward_step_func=partial(forward_step, loss_tokens), data_iterator=iter(batches), model=[self.model],
            num_microbatches=len(batches), seq_length=batches[0]["tokens"].shape[1],
            micro_batch_size=len(batches[0]["tokens"]), forward_only=False,
        )  # fmt: skip
        _, norm, _ = self.optimizer.step()
        return sum(float(loss["loss"]) for loss in losses), float(norm)


def get_batch(micro: MicroBatch) -> Batch:
    """Rows padded at the end to the longest: tokens, the tokens after them, and what the loss needs of those."""
    lengths = np.diff(micro.bounds)
    batch = {name: torch.zeros(len(lengths), max(lengths) - 1) for name in ("mask", "advantages", "old")}
    batch |= {name: torch.zeros(batch["mask"].shape, dtype=torch.long) for name in ("tokens", "labels")}
    for row, (start, end) in enumerate(zip(micro.bounds, micro.bounds[1:], strict=False)):
        inputs, after = slice(start, end - 1), slice(start + 1, end)
        for name, values, part in (
            ("tokens", micro.token_ids, inputs), ("labels", micro.token_ids, after), ("mask", micro.loss_mask, after),
            ("advantages", micro.advantages, after), ("old", micro.logprobs, after),
        ):  # fmt: skip
            batch[name][row, : end - start - 1] = torch.from_numpy(values[part].copy())
    batch["positions"] = torch.arange(batch["tokens"].shape[1]).expand_as(batch["tokens"])
    return batch


def forward_step(loss_tokens: int, batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
    """The model's own cross entropy is the negative log-prob of each label."""
    batch = next(batches)
    output = model(batch["tokens"], batch["positions"], None, labels=batch["labels"])
    return output, partial(loss_func, loss_tokens, batch)


def loss_func(loss_tokens: int, batch: Batch, cross_entropy: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
    """PPO with dual clip, token mean over the mini-batch."""
    advantages, ratio = batch["advantages"], torch.exp((-cross_entropy - batch["old"]) * batch["mask"])
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * DUAL_CLIP), loss)
    total = (loss * batch["mask"]).sum() / loss_tokens
    return total, torch.tensor(1, dtype=torch.int), {"loss": total.detach()}
