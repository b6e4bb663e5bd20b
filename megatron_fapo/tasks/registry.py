"""Which task a setting names."""

from typing import assert_never

from megatron_fapo.tasks.interface import Task
from megatron_fapo.tasks.settings import ClockSettings, TaskSettings
from megatron_fapo.tasks.tokenizer import ChatTokenizer


def open_task(settings: TaskSettings, tokenizer: ChatTokenizer, seed: int) -> Task:
    """The task, ready to ask and to check; its training stream depends on `seed`."""
    from megatron_fapo.tasks.clock import ClockTask
    return ClockTask(settings, tokenizer, seed)
