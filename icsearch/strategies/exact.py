"""The two plain parts: every candidate is scored, and on every sequence. Together they are Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from icsearch.pattern import Pattern
from icsearch.statistics import mean_loss
from icsearch.strategies.protocol import Ask


def cheapest(losses: Mapping[int, float]) -> int:
    """The layer with the lowest loss; of equal ones the smallest layer."""
    return min(losses, key=lambda layer: (losses[layer], layer))


class Everyone:
    """Pools: one, of all candidates."""

    violations: tuple[int, ...] = ()
    missed = False
    spared: tuple[int, ...] = ()

    def open(self, candidates: tuple[int, ...], turn: int) -> tuple[int, ...]:
        return candidates

    def more(self, differences: Mapping[int, Sequence[float]], winner: int) -> tuple[int, ...]:
        return ()

    def close(self, before: Pattern, layer: int) -> None: ...


class Complete:
    """Contest: all of a pool on all sequences; the lowest loss wins."""

    dropped: tuple[int, ...] = ()
    within_margin: tuple[int, ...] = ()
    settled: int | None = None

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._pool: tuple[int, ...] = ()
        self.sums: dict[int, list[float]] = {}

    def open(self, candidates: int) -> None:
        self.sums = {}

    def enter(self, pool: tuple[int, ...]) -> None:
        self._pool = pool

    def ask(self) -> Ask | None:
        return Ask(self._pool, 0, len(self._tokens)) if self._pool else None

    def tell(self, sums: Mapping[int, Sequence[float]]) -> None:
        self.sums |= {layer: list(sums[layer]) for layer in self._pool}
        self._pool = ()

    @property
    def winner(self) -> int:
        return cheapest({layer: mean_loss(sums, self._tokens) for layer, sums in self.sums.items()})
