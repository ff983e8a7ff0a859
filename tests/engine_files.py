"""Pattern files for tests of what engines are given."""

from __future__ import annotations

import shlex
from typing import Any

from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import PatternFile
from icsearch.engines.export import Export

LETTERS = "FSFFSSFSSSSFFSSS"


def pattern_file(letters: str = LETTERS, indices: tuple[int, ...] | None = None, **model: Any) -> PatternFile:
    known = {"model_type": "glm_moe_dsa", "num_hidden_layers": len(letters)}
    return PatternFile(
        pattern=Pattern(letters),
        layer_indices=indices or tuple(range(len(letters))),
        method="greedy",
        model={**known, **model},
    )


def part_read(exported: Export) -> str:
    """Of what export prints the part that import reads: a flag's JSON value, or Megatron's two numbers."""
    words = shlex.split(exported.text)
    if words[0] == "--dsa-indexer-topk-freq":
        return f"freq:{words[1]},offset:{words[3]}"
    return words[1] if words[0].startswith("--") else exported.text
