"""Settings as text to paste: flags quoted for a POSIX shell, and config.json keys."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

Render = Callable[[dict[str, Any]], str]


def json_flag(name: str) -> Render:
    """One flag with all settings as its JSON argument, on one line."""
    return lambda settings: f"{name} {shlex.quote(json.dumps(settings))}"


def plain_flags(settings: dict[str, Any]) -> str:
    """A flag for each setting, named as it is with dashes."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


def config_json(settings: dict[str, Any]) -> str:
    """One key a line; a list stays on its line, as one letter each would fill pages."""
    lines = []
    for key, value in settings.items():
        text = config_json(value).replace("\n", "\n  ") if isinstance(value, dict) else json.dumps(value)
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}"
