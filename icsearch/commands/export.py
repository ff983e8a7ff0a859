"""An export: its settings for an engine, from a saved pattern. No torch here."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from icsearch.commands.requests import ExportRequest
from icsearch.commands.specs import pattern_file_of, published_path, split_retention
from icsearch.core.errors import IcsearchError
from icsearch.core.files import typed_path
from icsearch.core.pattern import parse_retention
from icsearch.core.pattern_file import PatternFile, load_pattern_file
from icsearch.engines.export import Export, Serving, export, with_config
from icsearch.engines.native import layers_with_indexer
from icsearch.engines.pipeline import ADD, Losses, losses_of_file, losses_of_run
from icsearch.engines.read import how_to_save, is_letters
from icsearch.model.config import load_config, read_backbone
from icsearch.runs.record import JOURNAL_NAME, load_run

FILE_NAME = "pattern.json"


def saved_pattern(text: str, retention: Fraction | None = None) -> tuple[Path, Fraction | None]:
    """The pattern.json of what was typed (the file itself, a RUN, RUN@1/2, or published:NAME), and the retention.

    Raises IcsearchError for letters, for a run that is not finished, and where both name a retention.
    """
    if text.startswith("published:"):
        return published_path(text), retention
    if is_letters(text):
        raise IcsearchError(
            "letters alone do not say whose they are: expected a pattern.json, a RUN, RUN@1/2 or published:NAME; "
            f"{how_to_save(text)} writes one"
        )
    run, at = split_retention(text)
    path = pattern_file_of(run, IcsearchError)
    if not at or not path.exists():
        return (path if not at else typed_path(text, IcsearchError)), retention
    if retention is not None:
        raise IcsearchError(f"{text} and --retention both name a retention: give one of them")
    return path, parse_retention(at)


def engine_settings(request: ExportRequest, source: Path | PatternFile) -> Export:
    """What the request's engine needs to run the pattern of a pattern.json, or of what a search returned.

    Its warnings begin with what `model_config` says. Raises IcsearchError for an engine that is unknown, or cannot run
    the pattern, and for a config or a layout that does not fit.
    """
    file = source if isinstance(source, PatternFile) else load_pattern_file(source)
    notes: list[str] = []
    if request.model_config is not None:
        path = request.model_config
        config = load_config(path)
        num_layers = read_backbone(config, str(path)).num_layers
        with_indexer = layers_with_indexer(path, num_layers) if path.is_dir() else None  # the weights that lie there
        file, notes = with_config(file, config, str(path), with_indexer)
    serving = None
    if request.serve_pp is not None:
        losses: Losses = losses_of_file(file)  # or all that the run measured, where its journal is there
        if isinstance(source, Path) and source.name == FILE_NAME and (source.parent / JOURNAL_NAME).exists():
            losses = losses_of_run(load_run(source.parent), len(file.pattern))
        serving = Serving(request.serve_pp, request.repair or ADD, losses)
    result = export(file, request.engine, request.retention, serving)
    return replace(result, warnings=(*notes, *result.warnings))
