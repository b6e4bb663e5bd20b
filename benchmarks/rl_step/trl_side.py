"""TRL's GRPOTrainer on the clock task; runs in TRL's own environment. Four of its steps are one RL step."""

import asyncio
import sys
import tempfile

import torch
from datasets import Dataset
from gate import Gate
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from workload import BETAS, CLIP, GROUP, LEARNING_RATE, MODEL, NEW_TOKENS, PROMPTS, SEED, UPDATES, open_clock


class Gated(TrainerCallback):
    """Opens the gate before each first of four steps and closes it after each fourth."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.tokens = 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % UPDATES == 0 and not self.gate.before_step():
            sys.exit(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % UPDATES == 0:
            self.gate.after_step(tokens=self.tokens)
            self.tokens = 0


def trainer_settings(out: str, steps: int) -> GRPOConfig:
    """Our workload in TRL's words; everything else is its default."""
    return GRPOConfig(
        output_dir=out,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=PROMPTS * GROUP // UPDATES,
        gradient_accumulation_steps=1,
        steps_per_generation=UPDATES,
        num_generations=GROUP,
        max_completion_length=NEW_TOKENS,
        temperature=1.0,
        top_k=0,
        beta=0.0,
        loss_type="bnpo",
        epsilon=CLIP[0],
        epsilon_high=CLIP[1],
        scale_rewards="group",
        learning_rate=LEARNING_RATE,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=0.0,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_steps=steps * UPDATES,
        shuffle_dataset=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        seed=SEED,
    )


def main(threads: int) -> None:
    """Train until the input ends."""
    torch.set_num_threads(threads)
    task, ours = open_clock()
    steps = 400
    prompts = [task.prompt(index) for index in range(PROMPTS * steps)]
    rows = Dataset.from_list(
        [
            {"prompt": [{"role": m.role, "content": m.content} for m in p.messages], "index": i}
            for i, p in enumerate(prompts)
        ]
    )
    gated = Gated()

    def reward(completion_ids, index, **kwargs):
        gated.tokens += sum(map(len, completion_ids))
        texts = [ours.decode(ids) for ids in completion_ids]
        return [asyncio.run(task.check(prompts[i], text)).score for i, text in zip(index, texts, strict=True)]

    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    with tempfile.TemporaryDirectory() as out:
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=trainer_settings(out, steps),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[gated],
        ).train()


if __name__ == "__main__":
    main(int(sys.argv[1]))
