"""`icsearch import`: parse, check, call one function, print. Heavy imports stay inside."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from icsearch.cli.options import ConfigFile, EngineName


def import_engine_pattern(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="What an engine is given: a config.json or its checkpoint directory, a GGUF, a file or text with "
            "overrides as JSON, freq:4,offset:2; or letters.",
        ),
    ],
    engine: EngineName = None,
    model_config: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG.json", help="The model's config.json: how many layers, and which have an indexer."
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Instead of --model-config: so many layers, all with an indexer."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="pattern.json", help="Write a pattern.json, for eval and export.")
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Print the pattern that an engine runs today, one letter for each DSA layer. Notes go to stderr.

    It is read by the rules of --engine; letters and a GGUF need none.
    """
    from icsearch.core.files import check_new
    from icsearch.engines.read import import_pattern
    from icsearch.model.config import Backbone, EngineConfigError, load_config, read_backbone

    if out is not None:
        check_new(out, EngineConfigError)
    if model_config is not None and layers is not None:
        raise EngineConfigError("--model-config and --layers both say how many layers there are: give one of them")
    backbone = None if layers is None else Backbone.alike(layers)
    if model_config is not None:
        backbone = read_backbone(load_config(model_config), str(model_config))
    text = source[0] if len(source) == 1 else shlex.join(source)
    found = import_pattern(text, engine, backbone)
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)
    if out is not None:
        found.pattern_file(text).save(out)
        typer.echo(f"wrote {out}", err=True)
    typer.echo(found.pattern.letters)
