"""Exact greedy: the training-free search of the IndexCache paper (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping

from icsearch.pattern import Pattern


def cheapest(losses: Mapping[int, float]) -> int:
    """The layer with the lowest loss; of equal ones the smallest layer."""
    return min(losses, key=lambda layer: (losses[layer], layer))


class ExactGreedy:
    """At each step, score every remaining F layer flipped on its own, and commit the flip with the lowest loss."""

    def __init__(self, start: Pattern, keep_full: frozenset[int], num_shared: int) -> None:
        self.pattern = start
        self._keep_full = keep_full | {0}
        self._remaining = num_shared

    def ask(self) -> tuple[int, ...]:
        if self._remaining == 0:
            return ()
        return tuple(layer for layer in self.pattern.full_layers if layer not in self._keep_full)

    def tell(self, losses: Mapping[int, float]) -> int:
        layer = cheapest(losses)
        self.pattern = self.pattern.flip(layer)
        self._remaining -= 1
        return layer
