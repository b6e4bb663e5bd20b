"""The workload that every side runs: the sizes of one RL step on the clock task."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "configs" / "clock" / "warm-start" / "policy"
CONFIG = ROOT / "configs" / "clock" / "grpo.yaml"
SEED = 1
PROMPTS, GROUP, UPDATES, NEW_TOKENS = 32, 8, 4, 64
LEARNING_RATE, BETAS, CLIP = 2e-4, (0.9, 0.95), (0.2, 0.28)


def open_clock(seed: int = SEED):  # type: ignore[no-untyped-def]  # runs in TRL's environment too
    """Task `clock` with the configuration's world, and its tokenizer."""
    import yaml

    from megatron_fapo.tasks.clock import ClockTask
    from megatron_fapo.tasks.settings import ClockSettings
    from megatron_fapo.tasks.tokenizer import ChatTokenizer

    fapo = yaml.safe_load((CONFIG.parent / "fapo.yaml").read_text())
    tokenizer = ChatTokenizer.load(MODEL)
    return ClockTask(ClockSettings(**fapo["task"]), tokenizer, seed), tokenizer
