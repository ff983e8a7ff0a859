"""`icsearch export`: parse, check, call one function, print. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icsearch.cli.native import CheckpointOption, DropIndexers, ModelOption, OtherWeights, write_checkpoint
from icsearch.cli.options import ConfigFile, EngineName
from icsearch.errors import IcsearchError


def export_pattern(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A pattern.json, or a RUN directory.")],
    engine: EngineName = None,
    retention: Annotated[
        str | None, typer.Option(help="Take the run's pattern at this retention instead of its last.")
    ] = None,
    checkpoint: CheckpointOption = None,
    model: ModelOption = None,
    drop_indexers: DropIndexers = False,
    other_weights: OtherWeights = False,
    config: ConfigFile = None,
) -> None:
    """Print what an engine needs to run a pattern, or write a checkpoint that has it. Warnings go to stderr."""
    from icsearch.engines.export import export
    from icsearch.files import typed_path
    from icsearch.pattern import load_pattern_file, parse_retention

    path = typed_path(str(file), IcsearchError)
    path = path / "pattern.json" if path.is_dir() else path
    kept = parse_retention(retention) if retention else None
    if checkpoint is not None and engine is None:
        from icsearch.engines.native import NativeRequest

        write_checkpoint(NativeRequest(path, checkpoint, model, kept, drop_indexers, other_weights))
        return
    if engine is None or checkpoint is not None:
        raise IcsearchError("export needs one of --engine NAME and --checkpoint OUT")
    if model is not None or drop_indexers or other_weights:
        raise IcsearchError("--model, --drop-indexers and --other-weights belong to --checkpoint OUT: leave them out")
    result = export(load_pattern_file(path), engine, kept)
    typer.echo(f"{result.title}: {result.how}", err=True)
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(result.text)
