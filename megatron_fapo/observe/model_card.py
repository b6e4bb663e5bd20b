"""The model card (README.md) that goes with a trained model: what it is, how it was trained, on what, how it fared.

It names no path of the machine that it was trained on: folders are called by their last part.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_fapo.errors import DataError
from megatron_fapo.observe import run_info
from megatron_fapo.observe.glossary import metric
from megatron_fapo.observe.interface import files_of
from megatron_fapo.observe.runs import LAST, RunRecord, read_run

NAME = "README.md"

SHOWN = (
    "rollout/right_share",
    "flawed/oracle",
    "flawed/judge",
    "flawed/unjudged_share",
    "audit/j",
    "rollout/length_mean",
    "rollout/truncated_share",
    "mismatch/mean",
)
"""Metrics of training that the card has, where the run has them."""


def write_card(run: Path, model: Path, step: int | None = None) -> None:
    """Write the card of the run in folder `run` into the model's folder; after `step` steps, where not all.

    Raises DataError when the run cannot be read or the card not be written.
    """
    name = model.resolve().name
    record = read_run(run)
    text = card(record, record.path.resolve().name if name == "model" else name, step)
    path = model / NAME
    with files_of(path):
        path.write_text(text, encoding="utf-8")


def run_of(checkpoint: Path) -> tuple[Path, int] | None:
    """(run folder, step) of a checkpoint `RUN/checkpoints/step-N` (or a link to one); None for one of no run."""
    folder = checkpoint.resolve()
    run = folder.parent.parent
    number = folder.name.removeprefix("step-")
    if folder.parent.name != "checkpoints" or not number.isdigit() or not (run / run_info.NAME).is_file():
        return None
    return run, int(number)


def card(run: RunRecord, name: str, step: int | None = None) -> str:
    """The card's text: YAML for the hub, then Markdown."""
    config = _without_folders(run.config)
    done = len(run.steps) if step is None else step
    lines = [(at, metrics) for at, metrics in run.lines if at < done or (at == done and _evaluated(metrics))]
    base, data = str(config["policy"]["model"]), _data(config["task"])
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": base} if _on_hub(base) else {}),
        "tags": ["reinforcement-learning", "fapo", "reasoning", "megatron-fapo"],
        **({"datasets": [data]} if _on_hub(data) else {}),
        **({"model-index": [{"name": name, "results": results}]} if (results := list(_index(config, lines))) else {}),
    }
    parts = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {name}",
        "",
        *_method(run, config, done, base, data),
        "## How it fared",
        "",
        *_training_table(lines, done),
        *_evaluation_table(lines),
        *_results(run.path),
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        "```",
        "",
        "It was trained to reason step by step and to put its final answer into `\\boxed{}`, under its chat template.",
        "",
        "## Limits",
        "",
        f"It was trained on {data} alone; nothing was measured on other tasks, for safety or for bias. “Flawed” and",
        "“sound” are the judge's or the oracle's word, and a judge errs.",
        "",
        "## The run",
        "",
        f"Started {run.info.started}, seed {run.info.seed}, "
        + ", ".join(f"{package} {version}" for package, version in run.info.versions.items())
        + ".",
        "",
        "<details><summary>Whole configuration</summary>",
        "",
        "```yaml",
        yaml.safe_dump(config, sort_keys=False, allow_unicode=True).strip(),
        "```",
        "",
        "</details>",
        "",
    ]
    return "\n".join(parts)


def _method(run: RunRecord, config: Mapping[str, Any], done: int, base: str, data: str) -> Iterator[str]:
    rollout, algorithm, judge = config["rollout"], config["algorithm"], config["judge"]
    asked = "rewards of right answers corrected by a judge that looks for the first wrong step"
    how = f"FAPO ([arXiv:2510.22543](https://arxiv.org/abs/2510.22543)): {asked}" if judge["enabled"] else "plain GRPO"
    yield f"`{base}` after {done} steps of reinforcement learning with verifiable rewards on {data}, by {how}."
    yield ""
    yield "| setting | value |"
    yield "|---|---|"
    settings = {
        "arm": run.info.arm,
        "prompts × rollouts a step": f"{rollout['prompts_per_step']} × {rollout['group_size']}",
        "longest response": f"{rollout['max_new_tokens']} tokens",
        "temperature": rollout["temperature"],
        "learning rate": config["policy"]["optimizer"]["learning_rate"],
        "updates a step": config["batch"]["updates"],
        "advantage": algorithm["advantage"]["estimator"],
        "loss": algorithm["loss"]["objective"]["name"],
    }
    if judge["enabled"]:
        settings["judge"] = config["servers"]["judge"].get("model", "the policy itself")
    for key, value in settings.items():
        yield f"| {key} | {value} |"
    yield ""


def _training_table(lines: list[tuple[int, dict[str, float]]], done: int) -> Iterator[str]:
    steps = [metrics for at, metrics in lines if "rollout/right_share" in metrics]
    yield f"Means over the first and the last {min(LAST, len(steps))} of {done} steps of training:"
    yield ""
    yield "| metric | first | last | meaning |"
    yield "|---|---|---|---|"
    for name in SHOWN:
        first, last = (_mean(part, name) for part in (steps[:LAST], steps[-LAST:]))
        if last is not None:
            yield f"| `{name}` | {_form(name, first)} | {_form(name, last)} | {_meaning(name)} |"
    yield ""


def _evaluation_table(lines: list[tuple[int, dict[str, float]]]) -> Iterator[str]:
    evaluated = [(at, metrics) for at, metrics in lines if _evaluated(metrics)]
    if not evaluated:
        return
    at, metrics = evaluated[-1]
    yield f"Held-out evaluation after {at} steps:"
    yield ""
    yield "| metric | value | meaning |"
    yield "|---|---|---|"
    for name, value in metrics.items():
        if name.startswith("eval/"):
            yield f"| `{name}` | {_form(name, value)} | {_meaning(name)} |"
    yield ""


def _results(run: Path) -> Iterator[str]:
    """What `fapo eval --out RUN/FOLDER` left in the run's folder."""
    for path in sorted(run.glob("*/result.json")):
        with files_of(path):
            text = path.read_text()
        try:
            found = json.loads(text)
            rows = [
                f"| {on} | {result['prompts']} × {result['samples']} | `{name}` | {100 * interval['value']:.1f} % "
                f"[{100 * interval['low']:.1f}, {100 * interval['high']:.1f}] |"
                for on, result in found.items()
                for name, interval in result["intervals"].items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not the result of an evaluation ({error})") from None
        yield from ("By `fapo eval`, with 95 % intervals:", "", "| on | prompts × samples | score | value |")
        yield from ("|---|---|---|---|", *rows, "")


def _index(config: Mapping[str, Any], lines: list[tuple[int, dict[str, float]]]) -> Iterator[dict[str, Any]]:
    """The hub's model-index: the last held-out evaluation."""
    evaluated = [metrics for _, metrics in lines if _evaluated(metrics)]
    if evaluated:
        task = config["task"]["name"]
        scores = {name: value for name, value in evaluated[-1].items() if metric(name).unit == "share"}
        yield {
            "task": {"type": "text-generation"},
            "dataset": {"name": f"{task}, held out", "type": task},
            "metrics": [
                {"type": name.removeprefix("eval/"), "value": round(value, 4)}
                for name, value in scores.items()
                if name.startswith("eval/")
            ],
        }


def _evaluated(metrics: Mapping[str, float]) -> bool:
    return "eval/right_share" in metrics


def _data(task: Mapping[str, Any]) -> str:
    return str(task["train"]) if "train" in task else f"task `{task['name']}`"


def _on_hub(name: str) -> bool:
    """Whether it reads as `owner/name` and is no folder."""
    return name.count("/") == 1 and not Path(name).exists() and not name.endswith((".parquet", ".json", ".jsonl"))


def _mean(steps: list[dict[str, float]], name: str) -> float | None:
    values = [metrics[name] for metrics in steps if name in metrics]
    return sum(values) / len(values) if values else None


def _meaning(name: str) -> str:
    return metric(name).description.replace("|", "\\|")


def _form(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if metric(name).unit == "share" and name != "audit/j" else f"{value:.3g}"


def _without_folders(value: Any) -> Any:
    """The same values, absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value
