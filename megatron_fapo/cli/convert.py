"""`fapo convert`: Hugging Face folders and Megatron checkpoints, one into the other."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from megatron_fapo.config import read_config
from megatron_fapo.errors import ConfigError, DataError
from megatron_fapo.fp8 import Fp8, Scales
from megatron_fapo.policy.settings import ParallelSettings
from megatron_fapo.settings import build
from megatron_fapo.surroundings import shape_file

if TYPE_CHECKING:
    from megatron_fapo.policy.shapes import Survey

EXAMPLE = (
    "Example: fapo convert runs/fapo/checkpoints/latest --to runs/fapo/model --like configs/clock/warm-start/policy"
)

TOLERANCE = 1e-5
"""Of logits in float32, relative to the largest, between the two implementations (--verify)."""


def command(
    source: Annotated[Path, typer.Argument(help="Folder to convert. --check-shapes: a config.json or a run's YAML.")],
    to: Annotated[Path | None, typer.Option(help="Folder to write; it appears when it is complete.")] = None,
    like: Annotated[
        Path | None, typer.Option(help="Hugging Face folder whose config and tokenizer go with a run's checkpoint.")
    ] = None,
    shard_gigabytes: Annotated[float, typer.Option(help="Largest file of a Hugging Face folder.", min=0.001)] = 5.0,
    quantize: Annotated[
        Literal["fp8", "fp8-tensor"] | None,
        typer.Option(help="Write FP8 for SGLang: scales of 128 x 128 blocks, or one a matrix."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare logits, and FP8 values with theirs; needs memory for the whole model."),
    ] = False,
    check_shapes: Annotated[
        bool, typer.Option("--check-shapes", help="Build every rank without memory; compare with the checkpoint.")
    ] = False,
    tensor: Annotated[
        int, typer.Option(help="--check-shapes: tensor-parallel ranks; --quantize: ranks of a server.", min=1)
    ] = 1,
    pipeline: Annotated[int, typer.Option(help="--check-shapes: pipeline stages.")] = 1,
    virtual_pipeline: Annotated[int, typer.Option(help="--check-shapes: groups of layers on each stage.")] = 1,
    expert: Annotated[int, typer.Option(help="--check-shapes: ranks that share the experts of a layer.")] = 1,
    expert_tensor: Annotated[int, typer.Option(help="--check-shapes: ranks that share an expert's matrices.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of a table.")] = False,
) -> None:
    """Convert a Hugging Face folder into a Megatron checkpoint, or back; or check a layout at a model's true size."""
    if check_shapes:
        axes = {
            "tensor": tensor,
            "sequence": tensor > 1,
            "pipeline": pipeline,
            "virtual_pipeline": virtual_pipeline,
            "expert": expert,
            "expert_tensor": expert_tensor,
            "data": expert * expert_tensor,
        }
        if source.suffix in (".yaml", ".yml"):
            source, parallel = _of_run(source, axes)
        else:
            parallel = build(ParallelSettings, axes, name="layout")
        _check_shapes(source, parallel.with_fewest_copies(), as_json)
    elif to is None:
        raise ConfigError("--to FOLDER says where the result goes; --check-shapes needs none")
    else:
        scales: Scales | None = {None: None, "fp8": "blockwise", "fp8-tensor": "tensor"}[quantize]
        _convert(source, to, like, int(shard_gigabytes * 10**9), scales, tensor)
        if verify:
            _verify(source, to, like, quantized=scales is not None)


def _of_run(path: Path, axes: dict[str, int | bool]) -> tuple[Path, ParallelSettings]:
    """The model's config and the layout that a run's configuration names. Raises ConfigError."""
    if any(size > 1 for size in axes.values()):
        raise ConfigError(f"{path} says the layout itself: leave --tensor, --pipeline and so on out")
    config = read_config(path)
    shape = shape_file(config.policy.model)
    if shape is None:
        raise ConfigError(
            f"policy.model = {config.policy.model}: no Hugging Face model there, nor a config of its name"
        )
    return shape, config.policy.parallel


def _convert(
    source: Path, to: Path, like: Path | None, shard_bytes: int, scales: Scales | None, served_by: int
) -> None:
    from megatron_fapo.observe.model_card import run_of, write_card
    from megatron_fapo.policy import convert
    from megatron_fapo.policy.megatron_folder import is_checkpoint

    if to.resolve() == source.resolve():
        raise ConfigError(f"--to {to} is the folder that is read")
    if to.exists() and not _is_model(to):
        raise ConfigError(
            f"--to {to} is there and is no model, which alone is replaced: name a folder that is not there"
        )
    fp8 = None
    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    ) as bar:
        task = bar.add_task(f"→ {to}", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if is_checkpoint(source) or scales is not None:
            fp8 = convert.to_hugging_face(source, to, like, shard_bytes, show, scales, served_by)
            if (run := run_of(source)) is not None:
                write_card(run[0], to, step=run[1])
        else:
            convert.to_megatron(source, to, show)
    if fp8 is not None:
        typer.echo(_stays(fp8))


def _is_model(folder: Path) -> bool:
    """Whether a folder is empty, or holds what a conversion writes."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    return not names or "config.json" in names or ".metadata" in names


def _stays(fp8: Fp8) -> str:
    """What is FP8, and what is not by the names that modules have in every layer."""
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in fp8.kept}))
    return f"{len(fp8.matrices)} matrices are FP8 ({fp8.scales}); embedding, norms and {kinds} stay BF16"


def _verify(source: Path, to: Path, like: Path | None, quantized: bool) -> None:
    from megatron_fapo.policy import convert
    from megatron_fapo.policy.megatron_folder import is_checkpoint

    if quantized:
        found = convert.fp8_error(source, to, like)
        typer.echo(
            f"weights differ by {found.root_mean_square:.2%} (root mean square), at most by {found.worst:.2f} of what "
            f"e4m3's rounding allows; logits by {found.logits:.1e} at most, the largest is {found.largest_logit:.1f}"
        )
        if not found.worst <= 1.0:
            raise DataError(f"{to}: its weights are not those of {source} in FP8")
        return
    folder, megatron = (to, source) if is_checkpoint(source) else (source, to)
    gap, largest = convert.difference(folder, megatron)
    typer.echo(f"logits differ by {gap:.1e} at most, the largest is {largest:.1f}")
    if not gap <= TOLERANCE * max(largest, 1.0):
        raise DataError(f"{to}: its logits are not those of {source}")


def _check_shapes(config: Path, parallel: ParallelSettings, as_json: bool) -> None:
    from megatron_fapo.policy import shapes

    found = shapes.survey(shapes.read_config(config), parallel)
    if as_json:
        summary = {
            "tensors": len(found.expected),
            "parameters": found.parameters,
            "ranks": [asdict(part) for part in found.ranks],
            "problems": found.problems(),
        }
        typer.echo(json.dumps(summary))
    else:
        Console().print(_table(config, parallel, found))
    if problems := found.problems():
        raise ConfigError(f"{config}: {len(problems)} tensors differ, the first: {problems[0]}")


def _table(config: Path, parallel: ParallelSettings, found: "Survey") -> Table:
    axes = ", ".join(f"{name} {value}" for name, value in parallel.model_dump().items() if value not in (1, False))
    table = Table(title=f"{config.stem}: {found.parameters:,} parameters, {axes or 'one rank'}")
    for heading in ("stage", "ranks", "layers", "parameters a rank", "GiB a rank in BF16"):
        table.add_column(heading, justify="right")
    for stage in sorted({part.stage for part in found.ranks}):
        parts = [part for part in found.ranks if part.stage == stage]
        held = sorted({part.parameters for part in parts})
        layers = ", ".join(str(count) for count in sorted({part.layers for part in parts}))
        amounts = (" to ".join(f"{count:,}" for count in held), " to ".join(f"{count / 2**29:.2f}" for count in held))
        table.add_row(str(stage), str(len(parts)), layers, *amounts)
    if not found.problems():
        table.caption = f"each of the checkpoint's {len(found.expected):,} tensors exactly once, with its shape"
    return table
