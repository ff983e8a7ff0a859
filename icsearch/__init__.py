"""Find out which layers of a DeepSeek-Sparse-Attention model can drop their indexer, and what that costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icsearch.api.engines import export_checkpoint, export_pattern
    from icsearch.api.models import apply_pattern, load, restore
    from icsearch.api.runs import calibrate, evaluate_patterns, find_pattern
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
__version__ = "0.1.0"

_PLACES = {
    "api.engines": ("export_checkpoint", "export_pattern"),
    "api.models": ("apply_pattern", "load", "restore"),
    "api.runs": ("calibrate", "evaluate_patterns", "find_pattern"),
    "core.errors": ("IcsearchError",),
    "core.pattern": ("Pattern",),
    "core.pattern_file": ("PatternFile", "Step", "load_pattern_file"),
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: `import icsearch` alone loads no torch."""
    from importlib import import_module

    for place, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"icsearch.{place}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
