"""How good is a judge? Fresh rollouts of a policy on the clock world, the judge's verdicts against the oracle.

    python tools/judge_quality.py                                  the demo's warm start
    python tools/judge_quality.py --policy runs/MINE/model         a policy after training

The last line is JSON: precision, recall and F1 of "flawed" over the right rollouts, the share of verdicts that could
be read, the share with the exact index, and the policy's own right and flawed shares.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from megatron_fapo.critique.boxed import last_boxed
from megatron_fapo.critique.paragraphs import split
from megatron_fapo.critique.prompt import judge_prompt
from megatron_fapo.critique.verdict import parse_verdict
from megatron_fapo.records import Ints, Prompt
from megatron_fapo.tasks.clock import ClockTask
from megatron_fapo.tasks.settings import ClockSettings
from megatron_fapo.tasks.tokenizer import ChatTokenizer

WARM_START = Path(__file__).resolve().parents[1] / "configs" / "clock" / "warm-start"
SEED = 900
"""Of the prompts and the sampling; no run and no training uses it."""
NEW_TOKENS = 96

Judged = tuple[int | None, int | str]
"""The oracle's index, and the judge's or why it has none."""


def main() -> None:
    """Sample, judge, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=WARM_START / "policy")
    parser.add_argument("--judge", type=Path, default=WARM_START / "judge")
    parser.add_argument("--prompts", type=int, default=1200)
    arguments = parser.parse_args()
    tokenizer = ChatTokenizer.load(arguments.policy)
    task = ClockTask(ClockSettings(), tokenizer, SEED)
    prompts = [task.prompt(index) for index in range(arguments.prompts)]
    texts = generate(arguments.policy, tokenizer, [prompt.token_ids for prompt in prompts], greedy=False)
    right = [
        (prompt, text)
        for prompt, text in zip(prompts, texts, strict=True)
        if (last_boxed(text) or "").strip() == prompt.reference_answer
    ]
    judged = judge(arguments.judge, task, right)
    numbers = {"rollouts": len(prompts), "right": round(len(right) / len(prompts), 4), **agreement(judged)}
    Console(soft_wrap=True, highlight=False).print(json.dumps(numbers), markup=False)


def judge(folder: Path, task: ClockTask, right: list[tuple[Prompt, str]]) -> list[Judged]:
    """Greedy verdicts on right rollouts, with the oracle's."""
    tokenizer = ChatTokenizer.load(folder)
    questions = [
        tokenizer.encode_chat(judge_prompt(prompt.question, prompt.reference_answer, text)) for prompt, text in right
    ]
    verdicts = generate(folder, tokenizer, questions, greedy=True)
    return [
        (task.oracle(prompt, text), parse_verdict(verdict, len(split(text))))
        for (prompt, text), verdict in zip(right, verdicts, strict=True)
    ]


def agreement(judged: list[Judged]) -> dict[str, float]:
    """What the verdicts are worth; one that cannot be read counts as not flagged."""
    truth = torch.tensor([oracle != -1 for oracle, _ in judged])
    flagged = torch.tensor([isinstance(verdict, int) and verdict != -1 for _, verdict in judged])
    hits = int((truth & flagged).sum())
    precision, recall = hits / max(int(flagged.sum()), 1), hits / max(int(truth.sum()), 1)
    return {
        "flawed": round(float(truth.float().mean()), 4),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "f1": round(2 * precision * recall / max(precision + recall, 1e-9), 4),
        "exact": round(sum(oracle == verdict for oracle, verdict in judged) / len(judged), 4),
        "parsed": round(sum(isinstance(verdict, int) for _, verdict in judged) / len(judged), 4),
    }


@torch.inference_mode()
def generate(folder: Path, tokenizer: ChatTokenizer, prompts: list[Ints], *, greedy: bool) -> list[str]:
    """One answer to each prompt, by Hugging Face `generate`, at temperature 1 or greedily."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers: list[str] = []
    for start in range(0, len(prompts), 400):
        part = [torch.from_numpy(ids.astype("int64")) for ids in prompts[start : start + 400]]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_side="left")
        lengths = torch.tensor([len(row) for row in part])
        mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long()
        choice = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, **choice)
        answers += [tokenizer.decode(row[ids.shape[1] :].numpy()) for row in made]
    return answers


if __name__ == "__main__":
    main()
