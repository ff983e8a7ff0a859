"""Files that travel with the package, found alike in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def demo_checkpoint() -> Path:
    """The small trained checkpoint."""
    return _PACKAGE / "demo"


def published_patterns() -> Path:
    """The folder of pattern files: inside the package in a wheel, at the top level in a checkout."""
    installed = _PACKAGE / "patterns"
    return installed if installed.is_dir() else _PACKAGE.parent / "patterns"
