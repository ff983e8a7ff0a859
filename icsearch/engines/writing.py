"""The file that an engine reads, written with a pattern in it: a config.json or a GGUF, never in place of another."""

from __future__ import annotations

from pathlib import Path

from icsearch.engines.backbone import load_config
from icsearch.engines.export import Export
from icsearch.engines.gguf_file import write_gguf
from icsearch.engines.letters import ExportError
from icsearch.engines.native_config import edit_config
from icsearch.engines.table import find_engine
from icsearch.files import check_new
from icsearch.jsonfile import write_object


def write_file(result: Export, config: Path | None, gguf: Path | None, out: Path) -> list[str]:
    """Write what the engine reads to `out`, from the checkpoint's config.json or a GGUF; returns warnings.

    Raises ExportError where the engine reads no file, its original is not given, or `out` exists, and
    EngineConfigError for an original that does not fit.
    """
    kind = find_engine(result.engine).writes
    if kind is None:
        raise ExportError(f"{result.title} reads no file of ours, it takes flags: leave --out away and paste them")
    if kind == "GGUF":
        if gguf is None:
            raise ExportError("--out NEW.gguf is a copy of a model: give that one with --gguf OLD.gguf")
        return write_gguf(result.letters, gguf, out)
    if config is None:
        raise ExportError(
            f"--out is a config.json with the keys for {result.title}: give the original with --model-config"
        )
    check_new(out, ExportError)
    write_object(out, edit_config(load_config(config), str(config), result.letters).document)
    return []
