"""The tables of docs/planner.md: `memory` (planned against measured bytes), `checks` (planned against published times),
`judge` (what the judge costs, where it sits, by which lever less), `sensitivity` (each assumption 20 % up and down),
`assumptions`.

    python benchmarks/planner.py checks
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_fapo.config import Config, read_config
from megatron_fapo.plan.assumptions import Assumptions, card
from megatron_fapo.plan.deployment import Deployment, Servers, deployment
from megatron_fapo.plan.estimate import estimate
from megatron_fapo.plan.memory import state
from megatron_fapo.plan.shape import Shape, part
from megatron_fapo.plan.simulate import Simulation, simulate
from megatron_fapo.plan.times import publish, switch
from megatron_fapo.policy.settings import ParallelSettings, PolicySettings

CONFIGS = Path(__file__).parents[1] / "configs"
H100 = card("h100")
ASSUMED = Assumptions()
TINY = {
    "vocab_size": 4003,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 352,
    "tie_word_embeddings": False,
}


def show(*rows: Sequence[object]) -> None:
    """A Markdown table, its first row the heading."""
    lines = [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    sys.stdout.write("\n".join(lines) + "\n\n")
    sys.stdout.flush()


def memory(steps: int) -> None:
    """Bytes that ranks of a small model free when they offload, against `plan.memory.state`."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megatron_fapo.policy.local import LocalRanks

    rows: list[Sequence[object]] = [("layout", "dtype", "owner", "planned, bytes", "measured, bytes", "error")]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**TINY)).save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text("{}")
        shape = Shape.of({**TINY, "model_type": "qwen3"})
        for axes in ({}, {"tensor": 2}, {"data": 2}):
            for dtype in ("float32", "bfloat16"):
                parallel = ParallelSettings(**axes)
                settings = PolicySettings(model=Path(folder), parallel=parallel, dtype=dtype, timeout=120)
                planned = state(settings, part(shape, parallel, 0))
                with LocalRanks(settings, seed=1) as ranks:
                    ranks.call("update", *_one_update(ranks.layout))
                    freed = ranks.call("offload", ("parameters", "gradients", "optimizer"))[0]
                for owner, measured in freed.items():
                    expected = getattr(planned, owner)
                    layout = ", ".join(f"{axis} {size}" for axis, size in axes.items()) or "one rank"
                    rows.append((layout, dtype, owner, expected, measured, f"{expected / measured - 1:+.2%}"))
    show(*rows)


def _one_update(layout: Any) -> tuple[Any, Any]:
    """A step of two small groups, so that Adam has its moments."""
    import numpy as np

    from megatron_fapo.algorithm.settings import LossSettings
    from megatron_fapo.batch.pack import make_batch
    from megatron_fapo.batch.settings import BatchSettings
    from megatron_fapo.records import Group, Judged, NotJudged, Outcome, Prompt, Rollout, floats, ints

    outcome = Outcome(right=True, score=1.0, answer=None, why="equal")
    groups = []
    for number in range(2):
        name = f"p{number}"
        prompt = Prompt(id=name, task="t", question="", messages=(), token_ids=ints([1, 2]), reference_answer="")
        rollouts = [
            Rollout(
                id=f"s0-{name}-r{index}",
                prompt_id=name,
                token_ids=ints([3, 4, 5]),
                logprobs=floats([-8.0] * 3),
                versions=(),
                temperature=1.0,
                seed=0,
                text="",
                finish_reason="stop",
            )
            for index in range(2)
        ]
        judged = tuple(
            Judged(rollout=r, outcome=outcome, verdict=NotJudged(reason="off"), oracle=None) for r in rollouts
        )
        groups.append(Group(step=0, prompt=prompt, judged=judged))
    advantages = [[floats(np.ones(3)), floats(-np.ones(3))] for _ in groups]
    return make_batch(groups, advantages, layout, BatchSettings(), 1), LossSettings()


QWEN3_32B = {
    "model_type": "qwen3",
    "num_hidden_layers": 64,
    "hidden_size": 5120,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 25600,
    "vocab_size": 151936,
}


def _nemo(shape: Shape, parallel: dict[str, Any], tensor: int) -> tuple[Config, Deployment]:
    """NeMo-RL's performance recipes: 64 x 32 samples of at most 4096 tokens on 32 H100, plain GRPO."""
    config = read_config(
        CONFIGS / "qwen2.5-32b.yaml",
        [
            "rollout={prompts_per_step: 64, group_size: 32, max_new_tokens: 4096}",
            "batch={updates: 4, tokens_per_microbatch: 4096, skip_zero_advantage: false}",
            "policy.recompute=none",
            "judge.enabled=false",
        ],
    )
    policy = Servers(
        shape=shape, count=32 // tensor, tensor=tensor, memory_fraction=0.6, max_running=256, context_length=4608
    )
    made = Deployment(
        card=H100,
        shape=shape,
        parallel=ParallelSettings(**parallel),
        policy=policy,
        judge=None,
        placement="colocated",
        judge_place="slice",
    )
    return config, made


def checks(steps: int) -> None:
    """Times and shares that others published, none of which is among the assumptions."""
    import json

    rows: list[Sequence[object]] = [("what", "published", "planned", "error")]

    def row(what: str, published: float, planned: float, unit: str) -> None:
        rows.append((what, f"{published:g} {unit}", f"{planned:.3g} {unit}", f"{planned / published - 1:+.0%}"))

    moe = Shape.of(json.loads((CONFIGS / "models" / "qwen3-30b-a3b.json").read_text()))
    dense = Shape.of(QWEN3_32B)
    # tokens a second and GPU, times GPUs and seconds, are the tokens of 2048 samples
    for name, shape, layout, tensor, seconds, rate in (
        ("Qwen3-32B", dense, {"tensor": 4, "sequence": True, "pipeline": 4, "data": 2}, 4, 376, 571),
        ("Qwen3-30B-A3B", moe, {"expert": 8, "data": 32}, 2, 192, 1102),
    ):
        mean = rate * 32 * seconds / 2048 - ASSUMED.prompt_tokens
        plan = estimate(*_nemo(shape, layout, tensor), ASSUMED, mean)
        row(f"NeMo-RL, {name}, 32 H100, GRPO: a step", seconds, plan.seconds, "s")
    for name, published in (("32B", 14.2), ("30B-A3B", 32.2)):
        model = {"32B": dense, "30B-A3B": moe}[name]
        split = replace(_nemo(model, {"data": 32, "expert": 1}, 2)[1], placement="split")
        row(f"verl, weights over NCCL, {name}", published, publish(split, ASSUMED), "s")
    small = Shape.of(json.loads((CONFIGS / "models" / "qwen3-4b.json").read_text()))
    config, made = _nemo(small, {"data": 4}, 1)
    row(
        "Relax#170, 4B on 4 GPUs: both changes of phase and weights",
        13.3,
        switch(made, config.policy, ASSUMED) + publish(made, ASSUMED),
        "s",
    )
    for name, mean, shares in (("qwen2.5-math-7b", 1100, (42, 18, 33)), ("qwen2.5-32b", 2300, (60, 14, 20))):
        run = read_config(
            CONFIGS / f"{name}.yaml",
            ["judge.skip=false", "judge.step_deadline=null", "batch.skip_zero_advantage=false"],
        )
        found = simulate(run, deployment(run, H100), ASSUMED, steps=steps, mean=mean)
        whole = found.mean("seconds")
        landed = found.mean("rollouts_landed")
        for part_, published, planned in (
            ("rollouts", shares[0], landed),
            ("judge", shares[1], found.mean("generate") - landed),
            ("update", shares[2], found.mean("update")),
        ):
            row(f"FAPO, {name}: share of {part_}", published, 100 * planned / whole, "%")
    show(*rows)


def judge(steps: int) -> None:
    """The judge's overhead at 7B, 32B and 70B: where it sits, and levers."""
    head = ("run", "judge", "lever", "GPUs", "judge", "learning", "publish", "switch", "overhead", "failed")
    sizes = (("qwen2.5-math-7b", 32, 1100), ("qwen2.5-32b", 64, 2300), ("llama-3.3-70b", 128, 2300))
    cases: list[tuple[str, str, list[str], dict[str, Any]]] = [
        ("after", "", [], {}),
        ("shared", "", [], {}),
        ("slice", "", [], {}),
        ("slice", "15 s", ["judge.step_deadline=15"], {}),
        ("slice", "cascade", ["judge.cascade.clean_below=0.05"], {}),
        ("slice", "cascade, 15 s", ["judge.cascade.clean_below=0.05", "judge.step_deadline=15"], {}),
        ("slice", "verdicts of 1000 tokens", [], {"verdict_tokens": 1000.0}),
        ("slice", "1000 tokens, cascade", ["judge.cascade.clean_below=0.05"], {"verdict_tokens": 1000.0}),
    ]
    rows: list[Sequence[object]] = [head]
    for name, gpus, mean in sizes:
        for place, lever, overrides, changes in cases:
            config = read_config(CONFIGS / f"{name}.yaml", ["judge.step_deadline=null", *overrides])
            made = deployment(config, H100, gpus=gpus, judge_place=place)  # type: ignore[arg-type]
            rows.append(
                (
                    name,
                    place,
                    lever or "none",
                    gpus,
                    *_costs(simulate(config, made, replace(ASSUMED, **changes), steps=steps, mean=mean)),
                )
            )
        config = read_config(CONFIGS / f"{name}.yaml", ["judge.step_deadline=null"])
        made = deployment(config, H100, gpus=2 * gpus, placement="split")
        rows.append(
            (
                name,
                "slice, ranks apart",
                "none",
                2 * gpus,
                *_costs(simulate(config, made, ASSUMED, steps=steps, mean=mean)),
            )
        )
    show(*rows)


def _costs(found: Simulation) -> tuple[str, ...]:
    shares = (found.judge_overhead, found.learning_share, found.publish_share, found.switch_share, found.overhead)
    return (*(f"{share:.1%}" for share in shares), f"{found.mean('failed') / max(found.mean('judged'), 1):.1%}")


def sensitivity(steps: int) -> None:
    """Seconds of a step and overhead of the 32B run when one assumption is 20 % less or more."""
    config = read_config(CONFIGS / "qwen2.5-32b.yaml")
    made = deployment(config, H100)

    def found(assume: Assumptions) -> tuple[float, float]:
        one = simulate(config, made, assume, steps=steps)
        return one.mean("seconds"), one.overhead

    seconds, overhead = found(ASSUMED)
    rows: list[Sequence[object]] = [
        ("assumption", "value", "step at -20 %", "at +20 %", "overhead at -20 %", "at +20 %"),
        ("as they are", "", f"{seconds:.0f} s", f"{seconds:.0f} s", f"{overhead:.1%}", f"{overhead:.1%}"),
    ]
    for name in Assumptions.names():
        low, high = found(ASSUMED.scaled(name, 0.8)), found(ASSUMED.scaled(name, 1.2))
        rows.append(
            (
                f"`{name}`",
                f"{getattr(ASSUMED, name):g}",
                *(f"{one[0] / seconds - 1:+.1%}" for one in (low, high)),
                *(f"{one[1]:.1%}" for one in (low, high)),
            )
        )
    show(*rows)


def assumptions(steps: int) -> None:
    """All of them, with their sources."""
    rows: list[Sequence[object]] = [("name", "value", "unit", "what", "source")]
    for name in Assumptions.names():
        about = Assumptions.about(name)
        rows.append((f"`{name}`", f"{getattr(ASSUMED, name):g}", about["unit"], about["about"], about["source"]))
    show(*rows)


TABLES: dict[str, Callable[[int], None]] = {
    one.__name__: one for one in (memory, checks, judge, sensitivity, assumptions)
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--steps", type=int, default=2, help="steps of each simulation")
    arguments = parser.parse_args()
    TABLES[arguments.table](arguments.steps)
