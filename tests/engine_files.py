"""Pattern files for tests of what engines are given."""

from __future__ import annotations

from typing import Any

from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import PatternFile

LETTERS = "FSFFSSFSSSSFFSSS"


def pattern_file(letters: str = LETTERS, indices: tuple[int, ...] | None = None, **model: Any) -> PatternFile:
    known = {"model_type": "glm_moe_dsa", "num_hidden_layers": len(letters)}
    return PatternFile(
        pattern=Pattern(letters),
        layer_indices=indices or tuple(range(len(letters))),
        method="greedy",
        model={**known, **model},
    )
