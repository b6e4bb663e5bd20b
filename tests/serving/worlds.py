"""Tiny models, a tokenizer for them, and Hugging Face's own answers to compare with."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_fapo.records import Bucket, TensorSpec
from megatron_fapo.weights import Segment, aligned, digest, shared_memory_folder

VOCABULARY, EOS, CONTEXT = 64, 1, 1024
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}


def make_model(folder: Path, kind: str = "qwen3", seed: int = 0, **given: float) -> Path:
    """A random model saved as Hugging Face saves one, with a word-level tokenizer; `given` are other sizes."""
    torch.manual_seed(seed)
    sizes = SIZES | given
    match kind:
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16, tie_word_embeddings=True))
        case "qwen3-moe":
            sparse = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
            sizes = {"head_dim": 16, **sparse, **sizes}
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, tie_word_embeddings=False))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=False))
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
        case "llama3-rope":
            rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0}
            rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
            model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope))
        case "gpt2":
            config = GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=CONTEXT)
            config.eos_token_id, config.bos_token_id, config.pad_token_id, config.initializer_range = EOS, None, 0, 0.15
            model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases start as ones and zeros, which would hide a mix-up
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token=f"w{EOS}")
    chat.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}w2"
    chat.save_pretrained(folder)
    return folder


@dataclass
class Reference:
    """Hugging Face's own model of a folder."""

    folder: Path
    model: torch.nn.Module = field(init=False)

    def __post_init__(self):
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def greedy(self, prompt, new):
        """Tokens of `generate` without sampling, end of sequence ignored."""
        self.model.generation_config.eos_token_id = None
        ids = torch.tensor([prompt])
        return self.model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0)[0, len(prompt) :].tolist()

    @torch.no_grad()
    def distribution(self, prompt, temperature=1.0):
        """[V] softmax(logits / temperature) of the token after the prompt."""
        return (self.model(torch.tensor([list(prompt)])).logits[0, -1] / temperature).softmax(-1)

    @torch.no_grad()
    def logprobs(self, prompt, tokens, temperature=1.0):
        """[T] log-probs of an answer under softmax(logits / temperature)."""
        ids = [*prompt, *tokens]
        logits = self.model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1] / temperature
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()

    def tensors(self):
        """Parameters under their names, tied ones once."""
        return {name: parameter.data for name, parameter in self.model.named_parameters()}


@torch.no_grad()
def with_kept_cache(old, new, prompt, tokens, split):
    """Log-probs of tokens[split:] by the new model over keys and values that the old one left behind."""
    known = [*prompt, *tokens[: split - 1]]
    cache = old(torch.tensor([known]), use_cache=True).past_key_values
    result = []
    for place in range(split, len(tokens)):
        logits = new(torch.tensor([[tokens[place - 1]]]), past_key_values=cache, use_cache=True).logits[0, -1]
        result.append(logits.log_softmax(-1)[tokens[place]].item())
    return result


def write_bucket(name, tensors) -> tuple[Segment, Bucket]:
    """Tensors in a segment of shared memory, with their table."""
    specs, offset = [], 0
    for key, tensor in tensors.items():
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        specs.append((key, tensor, data, offset))
        offset = aligned(offset + len(data))
    segment = Segment.create(shared_memory_folder() / f"fapo-{name}", max(offset, 1))
    table = []
    for key, tensor, data, start in specs:
        segment.memory[start : start + len(data)] = data
        dtype = str(tensor.dtype).removeprefix("torch.")
        table.append(TensorSpec(name=key, dtype=dtype, shape=tuple(tensor.shape), offset=start, digest=digest(data)))
    return segment, Bucket(segment=str(segment.path), nbytes=offset, tensors=tuple(table))


def eos_of(folder: Path) -> int:
    """The end-of-sequence id that a folder states."""
    return json.loads((folder / "config.json").read_text())["eos_token_id"]
