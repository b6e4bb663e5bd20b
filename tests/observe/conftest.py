"""Runs that reports are made of."""

from random import Random

import pytest

from megatron_fapo.config import dump_config
from megatron_fapo.observe.runs import RunRecord, read_run
from megatron_fapo.observe.sinks import open_sinks
from megatron_fapo.records import Group, Judged, Outcome, Prompt, Rollout, Verdict, VersionSpan, floats, ints
from tests.observe.synthetic import HOSTILE, STEPS, HandClock, config_of, make_report, write_run, write_step


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> list[RunRecord]:
    root = tmp_path_factory.mktemp("runs")
    return [
        read_run(write_run(root / f"{arm}-{seed}", arm, seed, STEPS)) for arm in ("grpo", "fapo") for seed in (1, 2)
    ]


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory) -> RunRecord:
    """A run whose model, task and arm all try to get out of the page."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    config = config_of("fapo", 1, "train.arm='</script><b>fapo</b>'")
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    rollouts = [
        Rollout(
            id=f"s0-p0-r{i}", prompt_id="p0", token_ids=ints([1, 2]), logprobs=floats([0.0, 0.0]), seed=1, text=HOSTILE,
            versions=(VersionSpan(start=0, version=0),), temperature=1.0, finish_reason="stop",
        )
        for i in range(2)
    ]  # fmt: skip
    right = Outcome(right=True, score=1.0, answer="</script>", why="equal")
    wrong = Outcome(right=False, score=-1.0, answer=None, why="no answer")
    verdict = Verdict(first_wrong=2, p_flawed=1.0, votes=1, tokens=3, text=HOSTILE)
    prompt = Prompt(id="p0", task="t", question=HOSTILE, messages=(), token_ids=ints([1]), reference_answer="<i>1</i>")
    members = (
        Judged(rollout=rollouts[0], outcome=right, verdict=verdict, oracle=1),
        Judged(rollout=rollouts[1], outcome=wrong, verdict=verdict, oracle=None),
    )
    group = Group(step=0, prompt=prompt, judged=members)
    clock, rng = HandClock(), Random(0)
    with open_sinks(config.observe, folder, config=config.model_dump(mode="json"), clock=clock) as sinks:
        write_step(sinks, clock, [group], make_report(0, 0.0, rng), config.algorithm, rng)
    return read_run(folder)
