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

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np

from icsearch.core.pattern import FULL, Pattern
from icsearch.search.dynamic_program import solve
from icsearch.search.protocol import KL, LOSS

RANDOM_STARTS = 4
RANKED = 1024  # patterns that a search returns at most
# How far a measured pattern may be from a sum over its layers, in nats per token and in parts of what it costs: for
# what no sum can say. Sampling errors are left out, for table and losses are of the same sequences.
SMALLEST, SCATTER = 1e-4, 0.05

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

    @cached_property
    def rows(self) -> Any:
        """`drawn` by layer and source: [N, N, S * R]."""
        layers = self.drawn.shape[-1]
        return np.ascontiguousarray(np.moveaxis(self.drawn, (2, 3), (0, 1)).reshape(layers, layers, -1))

    @property
    def kl_of_a_square(self) -> float:
        """What a unit of a squared sum is in nats per token: 1 / (2 draws tokens)."""
        return 1 / (2 * self.drawn.shape[1] * sum(self.tokens))

    def predict(self, full: Full, correction: Any = None) -> Prices:
        """Loss and KL of [P, N] patterns; `correction` [2, N, N] is added for each S layer and its source."""
        sources = sources_of(full)
        drawn = np.zeros((len(full), self.rows.shape[-1]))
        for layer in range(1, full.shape[1]):
            drawn += self.rows[layer][sources[:, layer]]
        kl = (drawn**2).sum(1) * self.kl_of_a_square
        first_order = np.stack([self.true.sum(0) / sum(self.tokens), np.zeros(self.true.shape[1:])])
        numbers = first_order if correction is None else first_order + correction
        return summed(numbers, sources) + kl

    def pair_costs(self) -> Any:
        """[2, N, N]: loss and KL of one layer alone under one source, in nats per token."""
        kl = (self.rows**2).sum(-1) * self.kl_of_a_square
        return np.stack([self.true.sum(0) / sum(self.tokens) + kl, kl])


def summed(numbers: Any, sources: Any) -> Any:
    """[2, P]: for [P, N] sources, the sum over layers of numbers [2, N, N] by layer and source."""
    layers = np.arange(numbers.shape[1])
    return numbers[:, layers, sources].sum(-1)


def correction(table: SecondOrderTable, start: Pattern, measured: Mapping[Pattern, tuple[float, float]]) -> Any:
    """float64 [2, N, N]: what to add to the prices for each layer and source; zeros where nothing was measured.

    `start` is the unmodified model's pattern: what a layer uses there costs nothing. Single flips say how far the
    prices of their layers may be off: of the flipped one, and of those that the checkpoint shares behind it. Under a
    source that is dearer than the single flip's a layer may be off the more. Half of that (in variance) is one factor
    for all sources of a layer, half is each source's own.
    """
    count = table.drawn.shape[2]
    numbers = np.zeros((2, count, count))
    patterns = list(measured)
    if not patterns:
        return numbers
    full, own_full = full_of(patterns), full_of([start])[0]
    sources, usual, layers = sources_of(full), sources_of(own_full[None])[0], np.arange(count)
    residuals = np.array([measured[pattern] for pattern in patterns]).T - table.predict(full)  # [2, M]
    moved = sources != usual  # [M, N]: layers that use another selection than in the unmodified model
    flipped = own_full & ~full
    singles = [number for number, row in enumerate(flipped) if row.sum() == 1]
    prices = np.abs(np.array(list(measured.values())).T)  # [2, M]
    pairs, kl = table.pair_costs()[KL], table.predict(full)[KL]
    for price, residual in enumerate(residuals):
        spread, dearer = np.full(count, SMALLEST), np.ones((count, count))
        for number in singles:
            for layer in np.flatnonzero(moved[number]).tolist():
                spread[layer] += abs(residual[number]) + kl[number]
                dearer[layer] = np.maximum(1, pairs[layer] / (pairs[layer, sources[number, layer]] + SMALLEST))
        half = np.sqrt(0.5) * spread[:, None] * dearer  # [N, N]: priors' standard deviation, of either part
        half[layers, usual] = 0.0
        used = half[layers, sources]  # [M, N]
        alike = used @ used.T
        for layer in range(count):
            same = sources[:, layer, None] == sources[None, :, layer]
            alike += same * used[:, layer] ** 2
        scatter = SMALLEST + SCATTER * prices[price]
        scatter[singles] = SMALLEST
        weights = np.linalg.solve(alike + np.diag(scatter**2), residual)  # [M]
        numbers[price] = half * (weights @ used)[:, None]
        for layer in range(count):
            np.add.at(numbers[price, layer], sources[:, layer], used[:, layer] ** 2 * weights)
    return numbers


class PatternSearch:
    """Finds patterns of low price: `start` with some of its F layers shared, never those in `stay_full`.

    `objective` is LOSS or KL, `numbers` a `correction`. Ties go to the pattern whose letters come first.
    """

    def __init__(
        self, table: SecondOrderTable, start: Pattern, stay_full: frozenset[int], objective: int, numbers: Any
    ) -> None:
        self._table, self._objective, self._numbers = table, objective, numbers
        first_order = table.true.sum(0) / sum(table.tokens) if objective == LOSS else 0.0
        self._linear = first_order + numbers[objective]  # [N, N], beside the squared sums
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
        """Patterns with `kept` F layers and their prices: distinct local optima, then what the ways there have passed.

        Each by price, at most RANKED. The search exchanges one F layer with one S layer as long as that helps, from the
        greedy path, the exact optimum of the additive part, the most even pattern, some random ones (seeded) and
        `also`.
        """
        seen: dict[bytes, float] = {}
        optima = set()
        for full in self._starts(kept, also):
            price = float(self.price(full[None])[0])
            seen[full.tobytes()] = price
            while True:
                after, prices = self.exchanges(full)
                seen |= zip((row.tobytes() for row in after), prices.tolist(), strict=True)
                if not len(after) or not prices.min() < price:
                    break
                full, price = after[prices.argmin()], float(prices.min())
            optima.add(full.tobytes())
        lowest = [row for row, _ in heapq.nsmallest(RANKED, seen.items(), key=itemgetter(1)) if row not in optima]
        full = np.array([np.frombuffer(row, bool) for row in (*optima, *lowest)])
        ranked = zip(range(len(full)), self.price(full).tolist(), patterns_of(full), strict=True)
        # priced once more, all in one way: `exchanges` may be a rounding off, and equal prices go by letters
        order = sorted(ranked, key=lambda each: (each[0] >= len(optima), each[1], each[2].letters))
        return [(price, pattern) for _, price, pattern in order]

    def exchanges(self, full: Any) -> tuple[Full, Any]:
        """All patterns in which one movable F layer has changed places with one S layer, and their prices.

        Sharing a layer changes the sums over layers by one vector, and giving it a selection back by another; where
        the two do not touch the same layers, both add up, and all pairs are priced by one product of matrices.
        """
        givers = np.array([layer for layer in self._movable if full[layer]], dtype=int)
        takers = np.array([layer for layer in self._movable if not full[layer]], dtype=int)
        after = np.tile(full, (len(givers) * len(takers), 1))
        pairs = np.arange(len(after))
        after[pairs, np.repeat(givers, len(takers))] = False
        after[pairs, np.tile(takers, len(givers))] = True
        if not len(after):
            return after, np.zeros(0)
        rows, linear = self._table.rows, self._linear
        sources, layers = sources_of(full[None])[0], np.arange(len(full))
        before = sources[givers - 1]  # what a giver's layers borrow from once it shares

        def change(affected: Any, old: Any, new: Any) -> tuple[Any, float]:
            """Of the sums, and of the linear part, where some layers borrow from another one."""
            numbers = (rows[affected, new] - rows[affected, old]).sum(0), linear[affected, new] - linear[affected, old]
            return numbers[0], float(numbers[1].sum())

        shared = [change(sources == giver, giver, new) for giver, new in zip(givers, before, strict=True)]
        freed = [change((sources == sources[taker]) & (layers >= taker), sources[taker], taker) for taker in takers]
        now = rows[layers, sources].sum(0) + np.array([vector for vector, _ in shared])  # [givers, S * R]
        more = np.array([vector for vector, _ in freed])  # [takers, S * R]
        squares = (now**2).sum(1)[:, None] + 2 * now @ more.T + (more**2).sum(1)
        added = linear[layers, sources].sum() + np.add.outer([x for _, x in shared], [x for _, x in freed])
        prices = (squares * self._table.kl_of_a_square + added).ravel()
        touching = (sources[takers] == givers[:, None]) | (sources[takers] == before[:, None])
        prices[touching.ravel()] = self.price(after[touching.ravel()])
        return after, prices

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
