"""The floor: one process, our decoder in-process, a Hugging Face model and fused AdamW. No server, Ray or Megatron.

It does what a step needs and nothing else: sampled log-probs are kept, rows without advantage stay out of the
update, rows are sorted by length.
"""

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
import torch
from gate import Gate
from transformers import AutoModelForCausalLM
from workload import BETAS, CLIP, GROUP, LEARNING_RATE, MODEL, NEW_TOKENS, PROMPTS, SEED, UPDATES, open_clock

from megatron_fapo.serving.engine.batch import Batch
from megatron_fapo.serving.engine.decoder import Decoder, Shape
from megatron_fapo.serving.engine.sample import Options, Sample


def sample(batch, prompts, step, eos):
    """[(prompt index, prompt ids, response ids, log-probs)] of PROMPTS × GROUP rollouts."""
    options = Options(temperature=1.0, max_new_tokens=NEW_TOKENS, stop_token_ids=tuple(eos))
    answers, lengths = [], {}
    for place, prompt in enumerate(prompts):
        ids = np.asarray(prompt.token_ids, np.int64)
        for index in range(GROUP):
            seed = (SEED * 1_000_003 + step * PROMPTS * GROUP + place * GROUP + index) % 2**31
            one = Sample(id=str(place), index=index, prompt=ids, options=options, seed=seed, stream=False, inbox=None)
            lengths.setdefault(len(ids), []).append(one)
    for same in lengths.values():
        answers += batch.add(same, 0)
    while len(batch):
        answers += batch.step(0)
    return [(int(a.sample.id), a.sample.prompt, a.tokens, a.logprobs) for a in answers]


def update(model, optimizer, rows, tokens):
    """One optimizer step on the rows that have an advantage."""
    optimizer.zero_grad(set_to_none=True)
    if rows:
        longest = max(len(p) + len(r) for p, r, _, _ in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        old, advantage, mask = (torch.zeros(len(rows), longest) for _ in range(3))
        for i, (prompt, response, logprobs, value) in enumerate(rows):
            start, end = len(prompt), len(prompt) + len(response)
            ids[i, :start], ids[i, start:end] = torch.from_numpy(prompt), torch.from_numpy(response.astype(np.int64))
            old[i, start:end], advantage[i, start:end], mask[i, start:end] = torch.from_numpy(logprobs), value, 1.0
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        new = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        ratio = torch.exp((new - old[:, 1:]) * mask[:, 1:])
        clipped = ratio.clamp(1 - CLIP[0], 1 + CLIP[1])
        loss = -torch.minimum(ratio * advantage[:, 1:], clipped * advantage[:, 1:]) * mask[:, 1:]
        (loss.sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def main(threads: int) -> None:
    """Train until the input ends."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    task, tokenizer = open_clock()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    shape = Shape.read(json.loads((Path(MODEL) / "config.json").read_text()))
    decoder = Decoder(shape, torch.float32, 128)
    batch = Batch(decoder, PROMPTS * GROUP, 1)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=BETAS, weight_decay=0.0, fused=True)
    gate, step = Gate(), 0
    while gate.before_step():
        copy_weights(model, decoder)
        prompts = [task.prompt(step * PROMPTS + i) for i in range(PROMPTS)]
        rollouts = sample(batch, prompts, step, tokenizer.eos_ids)
        scores = [asyncio.run(task.check(prompts[i], tokenizer.decode(r))).score for i, _, r, _ in rollouts]
        rewards = np.zeros((PROMPTS, GROUP))
        for (i, _, _, _), score, slot in zip(rollouts, scores, slots(rollouts), strict=True):
            rewards[i, slot] = score
        advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-6)
        rows = [
            (i, (p, r, logprobs, advantages[i, slot]))
            for (i, p, r, logprobs), slot in zip(rollouts, slots(rollouts), strict=True)
        ]
        order = np.random.default_rng(step).permutation(PROMPTS).reshape(UPDATES, -1)
        for part in order:
            mine = [row for i, row in rows if i in part]
            tokens = sum(len(row[1]) for row in mine)
            update(model, optimizer, [row for row in mine if row[3] != 0.0], tokens)
        gate.after_step(tokens=sum(len(r) for _, _, r, _ in rollouts))
        step += 1


def slots(rollouts):
    """The place of each rollout in its group."""
    seen = {}
    for i, *_ in rollouts:
        seen[i] = seen.get(i, -1) + 1
        yield seen[i]


@torch.no_grad()
def copy_weights(model, decoder):
    """The trained weights into the decoder that samples."""
    source = dict(model.named_parameters())
    for name, target in decoder.parameters.items():
        target.copy_(source[name])
    decoder.refresh()


if __name__ == "__main__":
    main(int(sys.argv[1]))
