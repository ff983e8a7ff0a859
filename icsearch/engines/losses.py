"""Losses that a run measured, by pattern, and what they say one flip costs."""

from __future__ import annotations

from collections.abc import Mapping

from icsearch.pattern import FULL, SHARED, Pattern, PatternFile
from icsearch.runs.record import RunRecord

Losses = Mapping[str, float]  # letters to nats per token, all on the same sequences


def losses_of_file(file: PatternFile) -> dict[str, float]:
    """The losses in a pattern.json: where the search began, every step, and the end; empty where it has none."""
    found = {step.pattern: step.loss for step in file.steps}
    if file.steps and file.baseline_loss is not None:
        first = file.steps[0]
        found[first.pattern[: first.layer] + FULL + first.pattern[first.layer + 1 :]] = file.baseline_loss
    if file.loss is not None:
        found[file.pattern.letters] = file.loss
    return found


def losses_of_run(record: RunRecord, num_layers: int) -> dict[str, float]:
    """The losses in a run's journal: of every pattern of so many layers that was scored on all its sequences."""
    complete = [letters for letters in record.nll if record.nll.is_complete(letters) and len(letters) == num_layers]
    return {letters: record.loss(letters) for letters in complete}


def flip_costs(pattern: Pattern, losses: Losses) -> dict[int, float]:
    """What sharing each layer costs around a pattern, in nats per token, by position; unknown ones are left out.

    That is the difference of two measured losses, of patterns that differ in this layer alone. Of all such pairs it
    is the one that is most like `pattern` around the layer: first in how far away the F before and the F behind it
    are, which says whose selection is borrowed and by how many layers, then in all letters, then the one with the
    fewest F.
    """
    best: dict[int, tuple[int, int, int, str]] = {}
    for letters in losses:
        away = sum(a != b for a, b in zip(letters, pattern.letters, strict=True))
        for layer, letter in enumerate(letters):
            if letter == FULL and shared(letters, layer) in losses:
                nearness = (_context(letters, pattern.letters, layer), away, letters.count(FULL), letters)
                best[layer] = min(best.get(layer, nearness), nearness)
    return {layer: losses[shared(letters, layer)] - losses[letters] for layer, (*_, letters) in best.items()}


def _context(letters: str, others: str, layer: int) -> int:
    """By how many layers the F before and the F behind a layer lie elsewhere in the other pattern."""
    before = abs(letters.rfind(FULL, 0, layer) - others.rfind(FULL, 0, layer))
    behind = [len(text) if (found := text.find(FULL, layer + 1)) < 0 else found for text in (letters, others)]
    return before + abs(behind[0] - behind[1])


def shared(letters: str, layer: int) -> str:
    """The letters with S at one layer."""
    return letters[:layer] + SHARED + letters[layer + 1 :]
