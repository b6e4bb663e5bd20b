"""The judge's prompt is, byte for byte, the one of its training data."""

import json
import re
from pathlib import Path

from megatron_fapo.critique.paragraphs import split
from megatron_fapo.critique.prompt import judge_prompt
from megatron_fapo.records import Message


def test_prompt_in_full() -> None:
    (message,) = judge_prompt("What is 1 + 1?", "2", "One and one\nis two.\n\n\n\n\\boxed{2}\n")
    assert message == Message(
        role="user",
        content="The following is a math problem with its ground truth answer, along with an AI solution (split into "
        "paragraphs, enclosed with tags and indexed from 0):\n\n[Math Problem]\n\nWhat is 1 + 1?\n\n[Ground Truth]\n\n"
        "2\n\n[AI Solution]\n\n<paragraph_0>\nOne and one\nis two.\n</paragraph_0>\n\n<paragraph_1>\n\\boxed{2}\n"
        "</paragraph_1>\n\nYour task is to review and critique the solution paragraph by paragraph. Once you identify "
        "an error in a paragraph, return the index of the paragraph where the earliest error occurs. Otherwise, return "
        "the index of -1 (which typically denotes 'not found').\n\nPlease reason step by step, put your final answer "
        "(i.e., the index) in \\boxed{}.",
    )


def test_the_authors_rows_are_rebuilt_from_their_parts(fapo_critic_sample: Path) -> None:
    sample = [json.loads(line) for line in fapo_critic_sample.read_text().splitlines()]
    for row in sample:
        (turn,) = row["prompt"]
        content = turn["content"]
        question, rest = content.split("[Math Problem]\n\n", 1)[1].split("\n\n[Ground Truth]\n\n")
        answer, rest = rest.split("\n\n[AI Solution]\n\n")
        tagged = rest.rsplit("\n\nYour task is to review", 1)[0]
        parts = [text for _, text in re.findall(r"<paragraph_(\d+)>\n(.*?)\n</paragraph_\1>", tagged, re.DOTALL)]
        solution = "\n\n".join(parts)
        assert judge_prompt(question, answer, solution) == (Message(role="user", content=content),)
        assert len(split(solution)) == row["extra_info"]["total_steps"]
    assert len(sample) == 100
