"""The chat in which a policy is asked to solve a problem."""

from megatron_fapo.records import Message

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def solve_prompt(question: str) -> tuple[Message, ...]:
    """One user turn: the question, then how to answer."""
    return (Message(role="user", content=question + INSTRUCTION),)
