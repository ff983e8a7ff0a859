"""`icsearch export` as functions; no torch here."""

from __future__ import annotations

from pathlib import Path

from icsearch.api.options import Retention, fraction
from icsearch.commands.export import ExportRequest, engine_settings, saved_pattern
from icsearch.core.pattern_file import PatternFile
from icsearch.engines import native
from icsearch.engines.export import Export
from icsearch.engines.native import NativeCheckpoint, NativeRequest


def export_pattern(
    pattern: PatternFile | str | Path,
    engine: str,
    retention: Retention | None = None,
    *,
    model_config: str | Path | None = None,
    serve_pp: str | int | None = None,
    repair: str | None = None,
) -> Export:
    """What an engine needs to run a pattern: `text` to paste, `how` it is used, `warnings`.

    `pattern` is what a search returned, a pattern.json, a RUN, ``RUN@1/2`` or ``published:NAME``; with `retention`, the
    run's pattern at that retention. `model_config` is the checkpoint's config.json, to check the pattern against;
    `serve_pp` the pipeline stages that it will be served in, 4 or ``0,20,40``, and `repair` what to do where one would
    start on S: ``add`` (by default), ``same`` or ``none``. Raises IcsearchError for an engine that is unknown, or
    cannot run the pattern.
    """
    kept = None if retention is None else fraction(retention)
    source, kept = (pattern, kept) if isinstance(pattern, PatternFile) else saved_pattern(str(pattern), kept)
    request = ExportRequest(
        engine=engine,
        retention=kept,
        model_config=None if model_config is None else Path(model_config),
        serve_pp=None if serve_pp is None else str(serve_pp),
        repair=repair,
    )
    return engine_settings(request, source)


def export_checkpoint(
    pattern: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    retention: Retention | None = None,
    drop_indexers: bool = False,
    other_weights: bool = False,
) -> NativeCheckpoint:
    """Copy a checkpoint to `out` with a config.json that holds the pattern, as `icsearch export --checkpoint` does.

    `pattern` is a pattern.json, a RUN, ``RUN@1/2`` or ``published:NAME``; `model` is the one that was searched, unless
    another one is named. `drop_indexers` leaves the S layers' indexer weights out, `other_weights` lets weights through
    that were not searched on. Raises IcsearchError where the copy cannot be, or the model cannot have the pattern by
    its config.
    """
    path, kept = saved_pattern(str(pattern), None if retention is None else fraction(retention))
    source = None if model is None else str(model)
    return native.export_checkpoint(NativeRequest(path, Path(out), source, kept, drop_indexers, other_weights))
