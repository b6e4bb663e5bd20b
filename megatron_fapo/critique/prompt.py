"""The judge's prompt. One function makes it for training, for serving and for the benches, byte for byte the same."""

from collections.abc import Sequence

from megatron_fapo.critique.paragraphs import SEPARATOR, split
from megatron_fapo.records import Message

OPENING = (
    "The following is a math problem with its ground truth answer, along with an AI solution "
    "(split into paragraphs, enclosed with tags and indexed from 0):\n\n[Math Problem]\n\n"
)
ANSWER = "\n\n[Ground Truth]\n\n"
SOLUTION = "\n\n[AI Solution]\n\n"
CLOSING = (
    "\n\nYour task is to review and critique the solution paragraph by paragraph. Once you identify an error in a "
    "paragraph, return the index of the paragraph where the earliest error occurs. Otherwise, return the index of -1 "
    "(which typically denotes 'not found').\n\n"
    "Please reason step by step, put your final answer (i.e., the index) in \\boxed{}."
)
BENCH_OPENING = (
    "The following is a math problem and a solution (split into paragraphs, enclosed with tags and indexed from 0):"
    "\n\n[Math Problem]\n\n"
)
BENCH_SOLUTION = "\n\n[Solution]\n\n"
BENCH_CLOSING = (
    "\n\nYour task is to review and critique the solution paragraph by paragraph. Once you identify an error in a "
    "paragraph, return the index of the paragraph where the earliest error occurs. Otherwise, return the index of -1 "
    '(which typically denotes "not found").\n\n'
    "Please put your final answer (i.e., the index) in \\boxed{}."
)


def tag_open(index: int) -> str:
    """What stands before paragraph `index`."""
    return f"<paragraph_{index}>\n"


def tag_close(index: int) -> str:
    """What stands after paragraph `index`."""
    return f"\n</paragraph_{index}>"


def judge_prompt(question: str, reference_answer: str, solution: str) -> tuple[Message, ...]:
    """The chat that asks for the first wrong paragraph of `solution`: the format of the FAPO-Critic data."""
    return judge_prompt_of(question, reference_answer, split(solution))


def judge_prompt_of(question: str, reference_answer: str, paragraphs: Sequence[str]) -> tuple[Message, ...]:
    """The same for a solution that is in paragraphs already, as the benches have it."""
    content = OPENING + question + ANSWER + reference_answer + SOLUTION + _tagged(paragraphs) + CLOSING
    return (Message(role="user", content=content),)


def process_bench_prompt(question: str, paragraphs: Sequence[str]) -> tuple[Message, ...]:
    """ProcessBench's own prompt, which shows no reference answer (arXiv:2412.06559, App. D)."""
    content = BENCH_OPENING + question + BENCH_SOLUTION + _tagged(paragraphs) + BENCH_CLOSING
    return (Message(role="user", content=content),)


def _tagged(paragraphs: Sequence[str]) -> str:
    return SEPARATOR.join(tag_open(i) + text + tag_close(i) for i, text in enumerate(paragraphs))
