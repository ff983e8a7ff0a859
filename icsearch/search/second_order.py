"""The search on a second-order table: every pattern has a price before it is run, and what was measured mends it.

`SecondOrderTable.predict` gives KL and loss of any pattern (see `sweep.fisher` for what the table holds):

    KL(P)   = 1/2 sum over sequences of mean over draws of (sum over layers i of drawn[i][source(i)])^2 / tokens
    loss(P) = sum over sequences and layers of true[i][source(i)] / tokens + KL(P)

It leaves out that selections downstream change when states do, which early layers suffer most from, and what is of
third order. So measured patterns come back as a `Correction`: what they are off by is taken for a sum over their S
layers of a number for each layer and source, and the most likely such numbers are found by ridge regression (the
posterior mean of a Gaussian process). Numbers alone; no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from icsearch.core.pattern import FULL, Pattern
from icsearch.search.dynamic_program import solve

LOSS, KL = 0, 1  # rows of what is predicted and measured
RANDOM_STARTS = 4
# The prior of a correction: how far a layer's number may be off, in parts of what its single flip costs, and how far a
# measured pattern may be from a sum over its layers.
SMALLEST, SCATTER = 1e-4, 0.05  # nats per token; parts of what is to be explained

Full = Any  # bool [P, N]: which layers are F, of P patterns
Prices = Any  # float64 [2, P]: loss above the unmodified model's and KL, in nats per token


def full_of(patterns: Iterable[Pattern]) -> Full:
    """[P, N], True where a layer is F."""
    return np.array([[letter == FULL for letter in pattern.letters] for pattern in patterns])


def patterns_of(full: Full) -> list[Pattern]:
    """The patterns of [P, N] rows."""
    return [Pattern.from_full_layers(set(np.flatnonzero(row)), len(row)) for row in full]


def sources_of(full: Full) -> Any:
    """int [P, N]: the layer whose selection each layer uses."""
    return np.maximum.accumulate(np.where(full, np.arange(full.shape[1]), 0), axis=1)


@dataclass(frozen=True)
class SecondOrderTable:
    """drawn [S, R, N, N] and true [S, N, N], float64, rows layers, columns sources; `tokens` [S] are counted ones."""

    drawn: Any
    true: Any
    tokens: Sequence[int]

    def predict(self, full: Full, correction: Any = None) -> Prices:
        """Loss and KL of [P, N] patterns; `correction` [2, N, N] is added for each S layer and its source."""
        drawn, true = self.sums(sources_of(full))
        kl = (drawn**2).sum(0) / (2 * self.drawn.shape[1])
        prices = np.stack([true.sum(0) + kl, kl]) / sum(self.tokens)
        return prices if correction is None else prices + summed(correction, sources_of(full))

    def sums(self, sources: Any) -> tuple[Any, Any]:
        """Over layers, of [P, N] sources: drawn [S * R, P] and true [S, P]."""
        sequences, draws, layers, _ = self.drawn.shape
        drawn = np.zeros((sequences * draws, len(sources)))
        true = np.zeros((sequences, len(sources)))
        for layer in range(1, layers):
            drawn += self.drawn[:, :, layer, :].reshape(sequences * draws, layers)[:, sources[:, layer]]
            true += self.true[:, layer, :][:, sources[:, layer]]
        return drawn, true

    def pair_costs(self) -> Any:
        """[2, N, N]: loss and KL of one layer alone under one source, in nats per token."""
        kl = (self.drawn**2).sum((0, 1)) / (2 * self.drawn.shape[1])
        return np.stack([self.true.sum(0) + kl, kl]) / sum(self.tokens)


def summed(numbers: Any, sources: Any) -> Any:
    """[2, P]: for [P, N] sources, the sum over layers of numbers [2, N, N] by layer and source."""
    layers = np.arange(numbers.shape[1])
    return numbers[:, layers, sources].sum(-1)


def correction(table: SecondOrderTable, measured: Mapping[Pattern, tuple[float, float]]) -> Any:
    """float64 [2, N, N]: what to add to the prices for each S layer and source; zeros where nothing was measured.

    Single flips say how far each layer's prices may be off. Half of a layer's number is common to all sources.
    """
    count = table.drawn.shape[2]
    numbers = np.zeros((2, count, count))
    patterns = list(measured)
    if not patterns:
        return numbers
    full = full_of(patterns)
    sources, layers = sources_of(full), np.arange(count)
    residuals = np.array([measured[pattern] for pattern in patterns]).T - table.predict(full)  # [2, M]
    shared = sources != layers  # [M, N]
    singles = {int(row.argmax()): number for number, row in enumerate(shared) if row.sum() == 1}
    for price, residual in enumerate(residuals):
        spread = np.full(count, SMALLEST)
        for layer, number in singles.items():
            spread[layer] += abs(residual[number]) + table.predict(full[number : number + 1])[KL, 0]
        prior = spread**2  # of a layer's number
        alike = np.zeros((len(patterns), len(patterns)))
        for layer in range(count):
            both = np.outer(shared[:, layer], shared[:, layer])
            same = both & (sources[:, layer, None] == sources[None, :, layer])
            alike += prior[layer] * (both / 2 + same / 2)
        scatter = SMALLEST + SCATTER * np.abs(residual)
        scatter[list(singles.values())] = SMALLEST
        weights = np.linalg.solve(alike + np.diag(scatter**2), residual)  # [M]
        for layer in range(count):
            heard = weights * shared[:, layer]
            numbers[price, layer] += prior[layer] * heard.sum() / 2
            np.add.at(numbers[price, layer], sources[:, layer], prior[layer] * heard / 2)
        numbers[price, layers, layers] = 0.0  # an F layer, or one that keeps what it had
    return numbers


class PatternSearch:
    """Finds patterns of low price: `start` with some of its F layers shared, never those in `stay_full`.

    `objective` is LOSS or KL, `numbers` a `correction`. Ties go to the pattern whose letters come first.
    """

    def __init__(
        self, table: SecondOrderTable, start: Pattern, stay_full: frozenset[int], objective: int, numbers: Any
    ) -> None:
        self._table, self._objective, self._numbers = table, objective, numbers
        self._start = full_of([start])[0]
        self._movable = [layer for layer in start.full_layers if layer not in stay_full | {0}]
        self._fixed = frozenset(start.full_layers) - set(self._movable)
        self._native = frozenset(start.shared_layers)

    def price(self, full: Full) -> Any:
        """[P], by the objective."""
        return self._table.predict(full, self._numbers)[self._objective]

    def path(self, flips: int) -> list[Pattern]:
        """Nested patterns: one layer after another is shared, each the cheapest beside those before it."""
        full, path = self._start, list[Pattern]()
        for _ in range(flips):
            left = [layer for layer in self._movable if full[layer]]
            after = np.tile(full, (len(left), 1))
            after[np.arange(len(left)), left] = False
            full = after[int(self.price(after).argmin())]
            path += patterns_of(full[None])
        return path

    def best(self, kept: int, also: Iterable[Pattern] = ()) -> list[tuple[float, Pattern]]:
        """Patterns with `kept` F layers by price: all that local search has seen on its ways to local optima.

        It exchanges one F layer with one S layer as long as that helps, from the greedy path, the exact optimum of the
        additive part, the most even pattern, some random ones (seeded) and `also`.
        """
        seen: dict[bytes, tuple[float, Any]] = {}
        for start in self._starts(kept, also):
            full, price = start, float(self.price(start[None])[0])
            seen[full.tobytes()] = price, full
            while True:
                after = self._exchanged(full)
                if not len(after):
                    break
                prices = self.price(after)
                seen |= {row.tobytes(): (float(each), row) for row, each in zip(after, prices, strict=True)}
                best = int(prices.argmin())
                if not prices[best] < price:
                    break
                full, price = after[best], float(prices[best])
        priced = [(price, patterns_of(full[None])[0]) for price, full in seen.values()]
        return sorted(priced, key=lambda pair: (pair[0], pair[1].letters))

    def _starts(self, kept: int, also: Iterable[Pattern]) -> list[Any]:
        count, moving = len(self._start), kept - len(self._fixed)
        additive = -(self._table.pair_costs() + self._numbers)[self._objective]
        exact = solve(additive.tolist(), must_be_full=self._fixed - {0}, must_be_shared=self._native).pattern(kept)
        chance = np.random.default_rng(0)
        chosen = [chance.choice(len(self._movable), moving, replace=False) for _ in range(RANDOM_STARTS)]
        even = (np.arange(moving) * len(self._movable)) // max(moving, 1)
        rows = list(full_of([exact, *self.path(len(self._movable) - moving)[-1:]]))
        for places in (even, *chosen):
            row = np.zeros(count, dtype=bool)
            row[[*self._fixed, *(self._movable[place] for place in places)]] = True
            rows.append(row)
        return [*rows, *(full_of([pattern])[0] for pattern in also if len(pattern.full_layers) == kept)]

    def _exchanged(self, full: Any) -> Full:
        """All patterns in which one movable F layer has changed places with one S layer, in layer order."""
        giving = [layer for layer in self._movable if full[layer]]
        taking = [layer for layer in self._movable if not full[layer]]
        pairs = [(giver, taker) for giver in giving for taker in taking]
        after = np.tile(full, (len(pairs), 1))
        if pairs:
            givers, takers = zip(*pairs, strict=True)
            after[np.arange(len(pairs)), givers] = False
            after[np.arange(len(pairs)), takers] = True
        return after
