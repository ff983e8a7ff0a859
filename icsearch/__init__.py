"""Find out which layers of a DeepSeek-Sparse-Attention model can drop their indexer, and what that costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from icsearch.core import __version__

if TYPE_CHECKING:
    from icsearch.api import (
        apply_pattern,
        calibrate,
        evaluate_patterns,
        export_checkpoint,
        export_pattern,
        find_pattern,
        load,
        restore,
    )
    from icsearch.core.errors import IcsearchError
    from icsearch.core.pattern import Pattern
    from icsearch.core.pattern_file import PatternFile, Step, load_pattern_file

__all__ = [
    "IcsearchError",
    "Pattern",
    "PatternFile",
    "Step",
    "__version__",
    "apply_pattern",
    "calibrate",
    "evaluate_patterns",
    "export_checkpoint",
    "export_pattern",
    "find_pattern",
    "load",
    "load_pattern_file",
    "restore",
]
_PLACES = {
    "IcsearchError": "core.errors",
    "Pattern": "core.pattern",
    **dict.fromkeys(("PatternFile", "Step", "load_pattern_file"), "core.pattern_file"),
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: `import icsearch` alone loads no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"icsearch.{_PLACES.get(name, 'api')}"), name)
