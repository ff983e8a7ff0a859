"""`icsearch export`: parse, check, call one function, print. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icsearch.cli.options import ConfigFile, EngineName


def export_pattern(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A pattern.json, or a RUN directory.")],
    engine: EngineName,
    retention: Annotated[
        str | None, typer.Option(help="Take the run's pattern at this retention instead of its last.")
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Print what an engine needs to run a pattern: launch flags or config keys. Warnings go to stderr."""
    from icsearch.engines.export import export
    from icsearch.pattern import load_pattern_file, parse_retention

    path = file / "pattern.json" if file.is_dir() else file
    result = export(load_pattern_file(path), engine, parse_retention(retention) if retention else None)
    typer.echo(f"{result.title}: {result.how}", err=True)
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(result.text)
