"""`icsearch export` as a function; no torch here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from icsearch.engines.export import Export, export
from icsearch.pattern import PatternFile, load_pattern_file, parse_retention

if TYPE_CHECKING:
    from icsearch.api.options import Retention


def export_pattern(pattern: PatternFile | str | Path, engine: str, retention: Retention | None = None) -> Export:
    """What an engine needs to run a pattern: `text` to paste, `how` it is used, `warnings`.

    `pattern` is what a search returned, a pattern.json or a RUN directory; with `retention`, the run's pattern at
    that retention. Raises IcsearchError for an engine that is unknown, or cannot run the pattern.
    """
    kept = None if retention is None else parse_retention(str(retention))
    return export(pattern if isinstance(pattern, PatternFile) else _read(Path(pattern)), engine, kept)


def _read(path: Path) -> PatternFile:
    return load_pattern_file(path / "pattern.json" if path.is_dir() else path)
