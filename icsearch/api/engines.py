"""`icsearch export` as functions; no torch here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from icsearch.engines import native
from icsearch.engines.export import Export, export
from icsearch.engines.native import NativeCheckpoint, NativeRequest
from icsearch.pattern import PatternFile, load_pattern_file, parse_retention

if TYPE_CHECKING:
    from icsearch.api.options import Retention


def export_pattern(pattern: PatternFile | str | Path, engine: str, retention: Retention | None = None) -> Export:
    """What an engine needs to run a pattern: `text` to paste, `how` it is used, `warnings`.

    `pattern` is what a search returned, a pattern.json or a RUN directory; with `retention`, the run's pattern at
    that retention. Raises IcsearchError for an engine that is unknown, or cannot run the pattern.
    """
    kept = None if retention is None else parse_retention(str(retention))
    return export(
        pattern if isinstance(pattern, PatternFile) else load_pattern_file(_file(Path(pattern))), engine, kept
    )


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

    `pattern` is a pattern.json or a RUN directory; `model` is the one that was searched, unless another one is named.
    `drop_indexers` leaves the S layers' indexer weights out, `other_weights` lets weights through that were not
    searched on. Raises IcsearchError where the copy cannot be, or the model cannot have the pattern by its config.
    """
    kept = None if retention is None else parse_retention(str(retention))
    source = None if model is None else str(model)
    path = _file(Path(pattern))
    return native.export_checkpoint(NativeRequest(path, Path(out), source, kept, drop_indexers, other_weights))


def _file(path: Path) -> Path:
    return path / "pattern.json" if path.is_dir() else path
