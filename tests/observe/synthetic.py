"""Runs made through the real sinks from records made by hand: groups of the clock world, an update, a clock."""

from pathlib import Path
from random import Random

from megatron_fapo.algorithm.advantages import step_advantages
from megatron_fapo.algorithm.rewards import rewards, usable
from megatron_fapo.algorithm.settings import AlgorithmSettings
from megatron_fapo.config import Config, dump_config, read_config
from megatron_fapo.observe.sinks import Sinks, open_sinks
from megatron_fapo.records import (
    Group,
    Judged,
    NotJudged,
    Outcome,
    Prompt,
    Rollout,
    StepReport,
    UpdateReport,
    Verdict,
    VersionSpan,
    WeightVersion,
    floats,
    ints,
)
from megatron_fapo.tasks import clock_world
from megatron_fapo.tasks.settings import ClockSettings
from megatron_fapo.trace import Spans

HOSTILE = (
    "<script>window.hacked = 1</script>\n\n</script><script>window.hacked = 2</script>\n\n"
    "<!-- <script> \u2028 & &lt;\n\n<img src=x onerror='window.hacked = 3'>\n\n\\boxed{1}"
)
"""A text that tries to get out of the page."""
STEPS = 20
"""Of each run that a report is made of."""

CONFIGS = Path(__file__).parents[2] / "configs" / "clock"
GROUP_SIZE = 8
PROMPTS = 16


class HandClock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


def config_of(arm: str, seed: int = 1, *overrides: str) -> Config:
    """The clock world's configuration of an arm, quiet."""
    return read_config(
        CONFIGS / f"{arm}.yaml",
        [
            f"train.seed={seed}",
            f"rollout.prompts_per_step={PROMPTS}",
            f"rollout.group_size={GROUP_SIZE}",
            "observe.console=off",
            "observe.report=false",
            *overrides,
        ],
    )


def flawed_rate(arm: str, progress: float) -> float:
    """A plateau for GRPO, a decline for FAPO: the shape of the paper's curves."""
    return 0.36 - 0.04 * progress if arm == "grpo" else 0.38 * (1 - progress) ** 1.6 + 0.07


def make_groups(arm: str, step: int, progress: float, rng: Random) -> list[Group]:
    """The groups of one step."""
    settings = ClockSettings(coarse=1.0)
    return [_group(arm, step, f"p{step * PROMPTS + i}", progress, settings, rng) for i in range(PROMPTS)]


def _group(arm: str, step: int, prompt_id: str, progress: float, settings: ClockSettings, rng: Random) -> Group:
    problem = clock_world.draw_problem(settings, rng)
    prompt = Prompt(
        id=prompt_id,
        task="clock",
        question=problem.question,
        messages=(),
        token_ids=ints(range(20)),
        reference_answer=problem.reference_answer,
    )
    right_rate = 0.55 + 0.3 * progress + rng.uniform(-0.25, 0.15)
    judged = [
        _judged(arm, f"s{step}-{prompt_id}-r{i}", prompt, problem, right_rate, flawed_rate(arm, progress), rng)
        for i in range(GROUP_SIZE)
    ]
    right = [one for one in judged if one.outcome.right]
    if arm == "fapo" and len(right) == 1:
        judged = [
            Judged(rollout=j.rollout, outcome=j.outcome, verdict=NotJudged(reason="skipped"), oracle=j.oracle)
            if j is right[0]
            else j
            for j in judged
        ]
    return Group(step=step, prompt=prompt, judged=tuple(judged))


def _judged(
    arm: str,
    rollout_id: str,
    prompt: Prompt,
    problem: clock_world.Problem,
    right_rate: float,
    flawed: float,
    rng: Random,
) -> Judged:
    right = rng.random() < right_rate
    settings = ClockSettings(slip=0.7 if rng.random() < flawed else 0.0, jump=0.0)
    if settings.slip:
        settings = ClockSettings(slip=0.7, jump=0.3)
    text = clock_world.sloppy_solution(problem, settings, rng)
    if not right:
        text = text[: text.rindex("{")] + "{" + str((int(problem.reference_answer) + 1) % 5) + "}"
    answer = text[text.rindex("{") + 1 : -1]
    tokens = len(text.split()) + 2
    rollout = Rollout(
        id=rollout_id,
        prompt_id=prompt.id,
        token_ids=ints(range(tokens)),
        logprobs=floats([-0.3] * tokens),
        versions=(VersionSpan(start=0, version=int(rollout_id[1:].split("-")[0])),),
        temperature=1.0,
        seed=rng.randrange(2**31),
        text=text,
        finish_reason="stop" if rng.random() < 0.98 else "length",
    )
    outcome = Outcome(right=right, score=1.0 if right else -1.0, answer=answer, why="equal" if right else "different")
    oracle = clock_world.first_wrong(problem, text) if right else None
    return Judged(rollout=rollout, outcome=outcome, verdict=_verdict(arm, right, oracle, problem, rng), oracle=oracle)


def _verdict(
    arm: str, right: bool, oracle: int | None, problem: clock_world.Problem, rng: Random
) -> Verdict | NotJudged:
    if not right or oracle is None:
        return NotJudged(reason="wrong")
    if arm == "grpo":
        return NotJudged(reason="off")
    if rng.random() < 0.005:
        return NotJudged(reason="failed", why="no \\boxed{} in the last 300 characters", tokens=60)
    seen = -1 if rng.random() < 0.1 else oracle
    if seen > 0 and rng.random() < 0.25:
        seen -= 1
    words = clock_world.critique(problem, seen)
    return Verdict(first_wrong=seen, p_flawed=float(seen != -1), votes=1, tokens=len(words.split()), text=words)


def make_report(step: int, progress: float, rng: Random) -> StepReport:
    """Four updates."""
    updates = tuple(
        UpdateReport(
            loss=rng.gauss(0.0, 0.01),
            grad_norm=0.8 - 0.4 * progress + rng.uniform(0, 0.2),
            learning_rate=2e-4,
            clipped_share=0.02 * rng.random(),
            kl_behaviour=0.001 * rng.random(),
            entropy=0.5 * rng.random(),
            loss_tokens=700,
            tokens=1300,
            padded_tokens=1300,
        )
        for _ in range(4)
    )
    worst = 10 ** rng.uniform(-6, -5)
    return StepReport(
        step=step, updates=updates, mismatch_mean=worst / 9, mismatch_max=worst, rescored=False, seconds=1.2
    )


def write_step(
    sinks: Sinks, clock: HandClock, groups: list[Group], report: StepReport, algorithm: AlgorithmSettings, rng: Random
) -> None:
    """One turn of the loop as the sinks see it."""
    step, spans = report.step, Spans(clock)
    with sinks.phase("publish", spans):
        clock.time += 0.1 + 0.05 * rng.random()
    with sinks.phase("generate", spans):
        for _ in range(sum(map(len, groups))):
            clock.time += 0.01
            sinks.progress(1)
        if any(isinstance(judged.verdict, Verdict) for group in groups for judged in group):
            sinks.judged(clock.time - 0.5, clock.time + 0.2)
        clock.time += 0.2
    trained = [group for group in groups if usable(group, algorithm.reward)]
    given = [rewards(group, algorithm, max_tokens=64) for group in trained]
    advantages = step_advantages(trained, given, algorithm, max_tokens=64)
    with sinks.phase("update", spans):
        clock.time += 1.2 + 0.2 * rng.random()
    weights = WeightVersion(step=step, checksum="c", tensors=1, nbytes=4)
    sinks.write(step, groups, trained, given, advantages, report, weights, spans)


def write_run(folder: Path, arm: str, seed: int = 1, steps: int = 6, *overrides: str, first: int = 0) -> Path:
    """A whole run, or from step `first` on as after a resume; each step depends on arm, seed and its number alone."""
    config = config_of(arm, seed, f"train.steps={steps}", *overrides)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config))
    clock = HandClock()
    dumped = config.model_dump(mode="json")
    with open_sinks(config.observe, folder, config=dumped, resume_step=first, clock=clock) as sinks:
        for step in range(first, steps):
            rng = Random(f"{arm}/{seed}/{step}")
            progress = step / max(steps - 1, 1)
            groups = make_groups(arm, step, progress, rng)
            write_step(sinks, clock, groups, make_report(step, progress, rng), config.algorithm, rng)
    return folder
