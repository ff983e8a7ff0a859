"""`icsearch export`: parse, check, call one function, print. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icsearch.cli.native import CheckpointOption, DropIndexers, ModelOption, OtherWeights, write_checkpoint
from icsearch.cli.options import ConfigFile, EngineName
from icsearch.errors import IcsearchError

if TYPE_CHECKING:
    from icsearch.engines.export import Export
    from icsearch.pattern import PatternFile


def export_pattern(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A pattern.json, a RUN directory, or published:NAME.")],
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
        str,
        typer.Option(
            help="Where a stage of --serve-pp would start on S: add (make that layer F), same (and another one S, by "
            "the run's losses), none (leave it)."
        ),
    ] = "add",
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
    from icsearch.engines.backbone import load_config
    from icsearch.engines.export import export
    from icsearch.engines.fitting import with_config
    from icsearch.engines.serving import Serving
    from icsearch.engines.writing import write_file
    from icsearch.pattern import load_pattern_file, parse_retention

    path = _pattern_path(str(file))
    kept = parse_retention(retention) if retention else None
    if checkpoint is not None and engine is None:
        from icsearch.engines.native import NativeRequest

        for_engines = {"--serve-pp": serve_pp, "--gguf": gguf, "--out": out, "--model-config": model_config}
        if given := [name for name, value in for_engines.items() if value is not None]:
            raise IcsearchError(f"{', '.join(given)} belong to --engine NAME: leave them out with --checkpoint")
        write_checkpoint(NativeRequest(path, checkpoint, model, kept, drop_indexers, other_weights))
        return
    if engine is None or checkpoint is not None:
        raise IcsearchError("export needs one of --engine NAME and --checkpoint OUT")
    if model is not None or drop_indexers or other_weights:
        raise IcsearchError("--model, --drop-indexers and --other-weights belong to --checkpoint OUT: leave them out")
    if repair != "add" and serve_pp is None:
        raise IcsearchError("--repair says what to do with the stages of --serve-pp: give both, or leave it out")
    if gguf is not None and out is None:
        raise IcsearchError("--gguf is copied to another file: give --out NEW.gguf")
    pattern_file = load_pattern_file(path)
    notes: list[str] = []
    if model_config is not None:
        pattern_file, notes = with_config(pattern_file, load_config(model_config), str(model_config))
    serving = None if serve_pp is None else Serving(serve_pp, repair, _losses(path, pattern_file))
    result = export(pattern_file, engine, kept, serving)
    written = [] if out is None else write_file(result, model_config, gguf, out)
    _show(result, out, [*notes, *result.warnings, *written])


def _show(result: Export, out: Path | None, warnings: list[str]) -> None:
    """The text alone on stdout: it is to be pasted, or piped."""
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    if out is None:
        typer.echo(f"{result.title}: {result.how}", err=True)
        typer.echo(result.text)
    else:
        typer.echo(f"wrote {out}")


def _pattern_path(text: str) -> Path:
    """The pattern.json of what was typed."""
    from icsearch.files import typed_path
    from icsearch.specs import published_path

    if text.startswith("published:"):
        return published_path(text)
    path = typed_path(text, IcsearchError)
    return path / "pattern.json" if path.is_dir() else path


def _losses(path: Path, pattern_file: PatternFile) -> dict[str, float]:
    """All that the run measured where its journal is there, else what its pattern.json holds."""
    from icsearch.engines.losses import losses_of_file, losses_of_run
    from icsearch.runs.record import JOURNAL_NAME, load_run

    if path.name == "pattern.json" and (path.parent / JOURNAL_NAME).exists():
        return losses_of_run(load_run(path.parent), len(pattern_file.pattern))
    return losses_of_file(pattern_file)
