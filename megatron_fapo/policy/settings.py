"""Settings of the policy: its model, how it is spread over ranks, its optimizer."""

from math import lcm
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_fapo.settings import Settings

Rescore = Literal["never", "when_stale", "always"]
"""Whether behaviour log-probs are computed again by Megatron before the updates of a step."""


Recompute = Literal["none", "selective", "full"]
"""Which activations the backward pass computes again instead of finding them in memory."""

RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "shared_experts"]
"""Parts of a layer as Megatron's `recompute_modules` names them."""


class ParallelSettings(Settings):
    """How the model is spread over ranks: tensor × context × data × pipeline of them."""

    tensor: Annotated[int, Field(ge=1)] = 1
    """Ranks that share each matrix. Divides attention heads, KV heads and the MLP's width."""
    sequence: bool = False
    """Spread the norms between the matrices over the tensor-parallel ranks too (sequence parallelism): less memory,
    the same communication. A mixture of experts under tensor parallelism needs it."""
    pipeline: Annotated[int, Field(ge=1)] = 1
    """Ranks that hold consecutive layers. Divides the number of layers."""
    virtual_pipeline: Annotated[int, Field(ge=1)] = 1
    """Groups of layers that each pipeline rank holds in turn (interleaved schedule): a smaller bubble, more messages.
    Together with `pipeline` divides the number of layers."""
    context: Annotated[int, Field(ge=1)] = 1
    """Ranks that share each sequence. Rows are padded to a multiple of twice this number."""
    expert: Annotated[int, Field(ge=1)] = 1
    """Ranks that share the experts of a layer; taken from the tensor, context and data ranks. Divides the experts."""
    expert_tensor: Annotated[int, Field(ge=1)] = 1
    """Ranks that share each matrix of an expert: 1, or `tensor`. Divides the experts' width."""
    data: Annotated[int, Field(ge=1)] = 1
    """Copies of the model that consume different sequences."""

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    def with_fewest_copies(self) -> Self:
        """The same layout with the smallest `data` that still holds every expert once."""
        share = self.tensor * self.context
        return self.changed(data=lcm(share, self.expert * self.expert_tensor) // share)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence needs tensor of 2 or more: it spreads work over the tensor-parallel ranks")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(f"virtual_pipeline = {self.virtual_pipeline} needs pipeline of 2 or more")
        stage, experts = self.tensor * self.context * self.data, self.expert * self.expert_tensor
        if stage % experts:
            raise ValueError(
                f"expert × expert_tensor = {experts} does not divide tensor × context × data = {stage}: "
                "experts are spread over the ranks of one pipeline stage"
            )
        return self


class Fp8Settings(Settings):
    """Matrix products of the layers in FP8, by Transformer Engine's recipes, on CUDA. Embedding, output layer, norms,
    softmax, attention's products, master weights and reductions stay as they are."""

    recipe: Literal["delayed", "tensorwise", "blockwise"] = "blockwise"
    """How scales are found: from the history of maxima, from each tensor, from each block of 128 (CUDA 12.9)."""
    format: Literal["e4m3", "hybrid"] = "e4m3"
    """Number format: e4m3 throughout, or e5m2 for gradients (hybrid)."""
    edge_layers_bf16: Annotated[int, Field(ge=0)] = 1
    """First and last layers that stay in BF16. Must be 0 with the delayed recipe."""

    @property
    def tokens(self) -> int:
        """The tokens of a matrix product are a multiple of this."""
        return 128 if self.recipe == "blockwise" else 16

    @model_validator(mode="after")
    def _known_to_megatron(self) -> Self:
        if self.recipe == "delayed" and self.edge_layers_bf16:
            raise ValueError("recipe 'delayed' has no layers in BF16: set edge_layers_bf16 to 0 or take another recipe")
        return self


class OptimizerSettings(Settings):
    """AdamW with a learning-rate schedule counted in optimizer steps."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """The rate after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Optimizer steps over which the rate grows linearly from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What the rate does after warm-up."""
    decay_steps: Annotated[int, Field(gt=0)] | None = None
    """For cosine: the optimizer step at which the floor is reached."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """For cosine: the final rate as a share of `learning_rate`."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the mean of gradients."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the mean of squared gradients."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the mean of squared gradients."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay of matrices; vectors (norms, biases) never decay."""
    clip_grad: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    distributed: bool = True
    """Spread optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""
    cpu_offload: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of moments and master weights that live on the host, where their part of the step is computed too
    (Megatron's `optimizer_cpu_offload`). CUDA only."""

    @model_validator(mode="after")
    def _cosine_has_an_end(self) -> Self:
        if self.schedule == "cosine" and (self.decay_steps is None or self.decay_steps <= self.warmup_steps):
            raise ValueError("schedule 'cosine' needs decay_steps greater than warmup_steps")
        return self


class PolicySettings(Settings):
    """The model that is trained."""

    model: Path
    """Folder of a Hugging Face model: config, safetensors, tokenizer."""
    parallel: ParallelSettings = ParallelSettings()
    """How the model is spread over ranks."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """AdamW and its schedule."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in; master weights and reductions are float32."""
    fp8: Fp8Settings | None = None
    """Matrix products in FP8 (CUDA with Transformer Engine); null for none. `dtype` must be bfloat16."""
    rescore: Rescore = "never"
    """Whether behaviour log-probs are computed again by Megatron before the updates: `never` keeps those that were
    sampled, `when_stale` rescores a step in which a rollout has tokens of older weights, `always` every step."""
    reference: bool = False
    """Keep the starting weights in host memory as the reference policy of a KL penalty (`algorithm.loss.kl`)."""
    sequences: Literal["auto", "rows", "packed"] = "auto"
    """How a microbatch is laid out: a row for each sequence, padded at its end, or all of them end to end in one row,
    whose bounds attention knows. `auto` packs where Transformer Engine computes attention."""
    recompute: Recompute = "none"
    """Activations that the backward pass computes again: `none`, those of `recompute_modules`, or whole layers
    (`full`). The gradients are the same; full costs about a third more time and leaves one tensor a layer."""
    recompute_layers: Annotated[int, Field(ge=1)] | None = None
    """For full: layers of each pipeline stage, from its first, that are recomputed; null takes all."""
    recompute_modules: tuple[RecomputeModule, ...] = ("core_attn",)
    """For selective: parts of each layer. Fused attention keeps little, so `mlp` or `layernorm` may save more;
    `layernorm` needs Transformer Engine."""
    logits_megabytes: Annotated[int, Field(ge=1)] = 256
    """Most memory for the float32 logits of one rank: log-probs are computed over as many tokens at once as fit. A
    chunk and about three copies of it exist in the backward pass; more than one chunk computes the logits twice."""
    entropy: bool = True
    """Report the entropy of the policy's distributions, one more reading of the logits."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after which a rank that waits for another gives up."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads of each rank."""
    deterministic: bool = True
    """Use operations whose results do not depend on scheduling; one that has no such form runs, with a warning."""

    @model_validator(mode="after")
    def _layers_of_full(self) -> Self:
        if self.recompute_layers is not None and self.recompute != "full":
            raise ValueError(f"recompute_layers needs recompute = full, found {self.recompute}")
        return self

    @model_validator(mode="after")
    def _fp8_on_top_of_bf16(self) -> Self:
        if self.fp8 is not None and self.dtype != "bfloat16":
            raise ValueError(f"fp8 needs dtype = bfloat16, found {self.dtype}")
        return self
