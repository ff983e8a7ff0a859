"""Find out which layers of a DeepSeek-Sparse-Attention model can drop their indexer, and what that costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icsearch.api import apply_pattern, load, restore

__all__ = ["__version__", "apply_pattern", "load", "restore"]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """The public functions, imported when first asked for: `import icsearch` alone loads no torch."""
    if name in __all__:
        from icsearch import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
