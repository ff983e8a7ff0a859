"""Letters of a pattern, one a DSA layer, and letters as most engines count them, one a decoder layer.

A decoder layer without an indexer gets F. No engine looks for a stored selection at an F, so it can do no harm there;
behind the end of a pattern engines take F as well; and an S in front of the first indexer, or at the start of a
pipeline stage, is what they refuse or crash on.
"""

from __future__ import annotations

from collections.abc import Sequence

from icsearch.errors import IcsearchError
from icsearch.pattern import FULL, Pattern


class ExportError(IcsearchError):
    """A pattern that cannot be written for an engine."""


def decoder_letters(pattern: Pattern, layer_indices: Sequence[int], num_hidden_layers: int | None) -> str:
    """One letter for each decoder layer: the pattern's at `layer_indices`, F where a layer has no indexer."""
    indices = list(layer_indices)
    if len(indices) != len(pattern):
        raise ExportError(f"{len(indices)} layer_indices for {len(pattern)} letters: expected as many; mend the file")
    if indices != sorted(set(indices)) or indices[0] < 0:
        raise ExportError(f"layer_indices {indices} are not increasing layer numbers: write the file again")
    if num_hidden_layers is None:
        if indices != list(range(len(pattern))):
            raise ExportError(
                "the pattern covers only some decoder layers, and the file does not say how many there are: "
                "add model.num_hidden_layers from the checkpoint's config.json, or give --model-config"
            )
        return pattern.letters
    if indices[-1] >= num_hidden_layers:
        raise ExportError(
            f"layer_indices reach {indices[-1]}, but model.num_hidden_layers is {num_hidden_layers}: "
            "expected smaller indices; write the file again"
        )
    letters = [FULL] * num_hidden_layers
    for index, letter in zip(indices, pattern.letters, strict=True):
        letters[index] = letter
    return "".join(letters)


def dsa_letters(letters: str, layer_indices: Sequence[int]) -> str:
    """The letters of the layers that have an indexer, of one letter for each decoder layer."""
    return "".join(letters[index] for index in layer_indices)
