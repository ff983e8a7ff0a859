"""Patterns whose pipeline stages all start on F, made from one whose stages do not, at the least loss.

Which layers must become F is no choice: each stage's first DSA layer. Which others to give up for them, so that no
more indexers run than before, is chosen by the losses that the run itself measured. The loss of a repaired pattern
that the run never scored is estimated flip by flip, each at what it cost where the run measured it in the most similar
surroundings.
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
    missing = tuple(sorted(layer for layer in set(must_be_full) if not pattern.is_full(layer)))
    at, loss = pattern, losses.get(pattern.letters)
    for layer in missing:
        at = Pattern.from_full_layers({*at.full_layers, layer}, len(at))
        loss = _loss_of(at, loss, flip_costs(at, losses).get(layer), -1, losses)
    return Repair(at, missing, loss=loss, measured=at.letters in losses)


def move_full(pattern: Pattern, must_be_full: Collection[int], losses: Losses) -> Repair | None:
    """With F at these positions and S at as many others: one by one the cheapest to share; layer 0 stays.

    None where the losses do not say what it costs to share as many other layers.
    """
    added = add_full(pattern, must_be_full, losses)
    at, loss, given_up = added.pattern, added.loss, []
    for _ in added.made_full:
        costs = flip_costs(at, losses)
        free = [layer for layer in at.full_layers if layer in costs and layer not in {0, *must_be_full}]
        if not free:
            return None
        cheapest = min(free, key=lambda layer: (costs[layer], layer))
        at = at.flip(cheapest)
        loss = _loss_of(at, loss, costs[cheapest], 1, losses)
        given_up.append(cheapest)
    return Repair(at, added.made_full, tuple(sorted(given_up)), loss, at.letters in losses)


def _loss_of(at: Pattern, before: float | None, cost: float | None, sign: int, losses: Losses) -> float | None:
    """The measured loss of a pattern, else the one before it and what the flip between them costs."""
    if at.letters in losses:
        return losses[at.letters]
    return None if before is None or cost is None else before + sign * cost
