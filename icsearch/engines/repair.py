"""Patterns whose pipeline stages all start on F, made from one whose stages do not, at the least loss.

Which layers must become F is no choice: each stage's first DSA layer. Which others to give up for them, so that no
more indexers run than before, is chosen by the losses that the run itself measured. A repaired pattern that the run
never scored has a loss estimated as if flips did not influence one another.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from icsearch.engines.losses import Losses, flip_costs
from icsearch.pattern import Pattern

ADD, SAME, NONE = "add", "same", "none"
REPAIRS = (ADD, SAME, NONE)


@dataclass(frozen=True)
class Repair:
    """A repaired pattern, the positions that changed, and its loss in nats per token.

    `loss` is None where the run's losses do not say; `measured` is False where it is an estimate.
    """

    pattern: Pattern
    made_full: tuple[int, ...]
    made_shared: tuple[int, ...] = ()
    loss: float | None = None
    measured: bool = False


def add_full(pattern: Pattern, must_be_full: Collection[int], losses: Losses) -> Repair:
    """With F at these positions, and all other letters as they are."""
    return _assess(pattern, _missing(pattern, must_be_full), (), losses)


def move_full(
    pattern: Pattern, must_be_full: Collection[int], losses: Losses, spared: Collection[int] = ()
) -> Repair | None:
    """With F at these positions and S at as many others, those that cost least to share; layer 0 and `spared` stay.

    None where the losses do not say what it costs to share as many other layers.
    """
    missing = _missing(pattern, must_be_full)
    costs = flip_costs(pattern, losses)
    kept = {0, *must_be_full, *spared}
    free = [layer for layer in pattern.full_layers if layer in costs and layer not in kept]
    if len(free) < len(missing):
        return None
    given_up = sorted(sorted(free, key=lambda layer: (costs[layer], layer))[: len(missing)])
    return _assess(pattern, missing, tuple(given_up), losses)


def _missing(pattern: Pattern, must_be_full: Collection[int]) -> tuple[int, ...]:
    return tuple(sorted(layer for layer in set(must_be_full) if not pattern.is_full(layer)))


def _assess(pattern: Pattern, made_full: tuple[int, ...], made_shared: tuple[int, ...], losses: Losses) -> Repair:
    """The repaired pattern, with its measured loss where there is one, else an estimate where the costs are known."""
    full = (set(pattern.full_layers) | set(made_full)) - set(made_shared)
    repaired = Pattern.from_full_layers(full, len(pattern))
    if repaired.letters in losses:
        return Repair(repaired, made_full, made_shared, losses[repaired.letters], measured=True)
    costs = flip_costs(pattern, losses)
    if pattern.letters not in losses or not costs.keys() >= {*made_full, *made_shared}:
        return Repair(repaired, made_full, made_shared)
    change = sum(costs[layer] for layer in made_shared) - sum(costs[layer] for layer in made_full)
    return Repair(repaired, made_full, made_shared, losses[pattern.letters] + change)
