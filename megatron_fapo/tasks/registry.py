"""Which task a setting names."""

from megatron_fapo.errors import ConfigError
from megatron_fapo.tasks.clock import ClockTask
from megatron_fapo.tasks.critic import CritiqueTask
from megatron_fapo.tasks.interface import Task
from megatron_fapo.tasks.maths import MathTask
from megatron_fapo.tasks.settings import ClockSettings, CritiqueSettings, MathSettings
from megatron_fapo.tasks.tokenizer import ChatTokenizer


def open_task(settings: object, tokenizer: ChatTokenizer, seed: int) -> Task:
    """The task, ready to ask and to check; its training stream depends on `seed`.

    Raises ConfigError for settings of no task, DataError for rows that cannot be used.
    """
    match settings:
        case ClockSettings():
            return ClockTask(settings, tokenizer, seed)
        case MathSettings():
            return MathTask(settings, tokenizer, seed)
        case CritiqueSettings():
            return CritiqueTask(settings, tokenizer, seed)
        case _:
            raise ConfigError(f"task: no task for {type(settings).__name__}; known are clock, math and critique")
