"""`icsearch export`: parse, check, call one function, print. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icsearch.cli.native import CheckpointOption, DropIndexers, ModelOption, OtherWeights, write_checkpoint
from icsearch.cli.options import ConfigFile, EngineName

if TYPE_CHECKING:
    from icsearch.engines.export import Export


def export_pattern(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A pattern.json, a RUN (RUN@1/2: at that retention), or published:NAME."),
    ],
    engine: EngineName = None,
    retention: Annotated[
        str | None, typer.Option(help="Take the run's pattern at this retention instead of its last.")
    ] = None,
    model_config: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG.json", help="The checkpoint's config.json, or its directory: check the pattern against it."
        ),
    ] = None,
    serve_pp: Annotated[
        str | None,
        typer.Option(metavar="N|0,20,40", help="Pipeline stages that it will be served in, or each one's first layer."),
    ] = None,
    repair: Annotated[
        str | None,
        typer.Option(
            help="Where a stage of --serve-pp would start on S: add (make that layer F), same (and another one S, by "
            "the run's losses), none (leave it).",
            show_default="add",
        ),
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(metavar="OLD.gguf", help="llamacpp: the model to copy, with the pattern set.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="NEW", help="Write the file that the engine reads: NEW.gguf, or --model-config's with the keys."
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    model: ModelOption = None,
    drop_indexers: DropIndexers = False,
    other_weights: OtherWeights = False,
    config: ConfigFile = None,
) -> None:
    """Print what an engine needs to run a pattern, or write a checkpoint that has it. All else goes to stderr."""
    from icsearch.commands.export import ExportRequest, engine_settings, saved_pattern
    from icsearch.commands.requests import parse_share
    from icsearch.engines.export import write_file

    path, kept = saved_pattern(str(file), parse_share(retention))
    request = ExportRequest(
        engine=engine or "",
        checkpoint=checkpoint,
        retention=kept,
        model_config=model_config,
        serve_pp=serve_pp,
        repair=repair,
        gguf=gguf,
        out=out,
        model=model,
        drop_indexers=drop_indexers,
        other_weights=other_weights,
    )
    if copy := request.native(path):
        write_checkpoint(copy)
        return
    result = engine_settings(request, path)
    written = [] if out is None else write_file(result, model_config, gguf, out)
    _show(result, out, [*result.warnings, *written])


def _show(result: Export, out: Path | None, warnings: list[str]) -> None:
    """The text alone on stdout: it is to be pasted, or piped."""
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    if out is None:
        typer.echo(f"{result.title}: {result.how}", err=True)
        typer.echo(result.text)
    else:
        typer.echo(f"wrote {out}")
