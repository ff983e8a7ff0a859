"""Lazy greedy: a flip's cost when it was last scored is taken for a bound on its cost now.

As in the accelerated greedy algorithm (Minoux, 1978; CELF: Leskovec and others, 2007), but for two things. There the
bound holds by submodularity; here a flip can become cheaper as more layers are shared, so bounds are lowered by a
slack learned from how much they have been off so far. And a flip's cost changes most where the layer that it borrows
from, or those that borrow from it, have changed: the F layers around each committed flip are always scored again.

With a tie margin, in nats per token, the best so far is settled on once no bound less the slack is below it by more
than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import mean_loss, project
from icsearch.search.protocol import Task

POOL_SIZE = 3  # how many more are scored at a time
RESCAN_EVERY = 8  # of so many turns of a stage, one scores every candidate
ROUNDING = 1e-9  # nats per token, far above what adding up in another order changes
SLACK_FACTOR = 1.5  # slack, as a multiple of the largest drop below a bound so far


class Lazy:
    """Pools: the smallest bounds first, until the winner so far is below every other bound less the slack.

    With a `tie_margin`, until it is no more than that above them.
    """

    def __init__(self, task: Task, tie_margin: float | None = None) -> None:
        self._tokens = task.tokens
        self._margin = tie_margin or 0.0
        self._known: dict[int, Sequence[float]] = {}  # last differences to the committed pattern, by layer
        self._touched: set[int] = set()  # layers whose surroundings have changed since they were scored
        self._visits: dict[int, int] = {}  # by stage
        self._largest_drop: float | None = None
        self._pool: list[int] = []
        self._let_in: list[int] = []
        self._waiting: list[int] = []
        self._fresh: Mapping[int, Sequence[float]] = {}
        self._everyone = False
        self._violations: list[int] = []
        self.missed = False

    @property
    def violations(self) -> tuple[int, ...]:
        return tuple(self._violations)

    @property
    def spared(self) -> tuple[int, ...]:
        if self._everyone:
            return ()
        best = self._best()
        return tuple(layer for layer in self._waiting if not self._is_above(layer, best))

    @property
    def slack(self) -> float:
        """In nats per token; infinite while no bound has been held against a new score."""
        return math.inf if self._largest_drop is None else SLACK_FACTOR * self._largest_drop + ROUNDING

    def open(self, candidates: tuple[int, ...], turn: int) -> tuple[int, ...]:
        forced = [layer for layer in candidates if layer in self._touched or layer not in self._known]
        self._waiting = sorted(set(candidates) - set(forced), key=lambda layer: (self._bound(layer), layer))
        self._violations, self.missed, self._let_in = [], False, []
        visit = self._visits.get(turn, 0)
        self._visits[turn] = visit + 1
        self._everyone = visit % RESCAN_EVERY == 0
        first = self._take(forced)
        return candidates if self._everyone else first

    def more(self, differences: Mapping[int, Sequence[float]], winner: int) -> tuple[int, ...]:
        self._fresh = differences
        self._observe(self._pool)
        if not self._everyone:
            return self._next()
        while pool := self._next():  # what would have been scored
            self._observe(pool)
        self.missed = winner in self._waiting
        self._observe(self._waiting)
        return ()

    def close(self, before: Pattern, layer: int) -> None:
        self._touched -= self._fresh.keys()
        self._known |= self._fresh
        del self._known[layer]
        full = before.full_layers
        place = full.index(layer)
        self._touched |= {full[place - 1], *full[place + 1 : place + 2]}

    def _take(self, forced: Sequence[int] = ()) -> tuple[int, ...]:
        self._pool = sorted([*forced, *self._waiting[:POOL_SIZE]])
        self._waiting = self._waiting[POOL_SIZE:]
        self._let_in += self._pool
        return tuple(self._pool)

    def _next(self) -> tuple[int, ...]:
        """The next pool, unless the best so far, less the tie margin, is below every bound less the slack."""
        if not self._waiting or self._is_above(self._waiting[0], self._best() - self._margin):
            return ()
        return self._take()

    def _is_above(self, layer: int, cost: float) -> bool:
        """Whether the bound of a layer, less the slack, is no lower than a cost."""
        return self._bound(layer) - self.slack >= cost

    def _best(self) -> float:
        """The smallest difference so far, by those scored on all sequences where there are any."""
        costs = {layer: project(self._fresh[layer], self._tokens).delta for layer in self._let_in}
        complete = [cost for layer, cost in costs.items() if len(self._fresh[layer]) == len(self._tokens)]
        return min(complete or costs.values())

    def _observe(self, pool: Sequence[int]) -> None:
        """Learn from how far below their last difference the new ones are, on the sequences that both know.

        Layers with other surroundings say nothing: they are scored whatever their bound is.
        """
        for layer in pool:
            if layer not in self._known or layer in self._touched:
                continue
            common = min(len(self._known[layer]), len(self._fresh[layer]))
            tokens = self._tokens[:common]
            drop = mean_loss(self._known[layer][:common], tokens) - mean_loss(self._fresh[layer][:common], tokens)
            if drop > self.slack:
                self._violations.append(layer)
            self._largest_drop = max(drop, self._largest_drop or 0.0)

    def _bound(self, layer: int) -> float:
        """The last difference, less one standard error where it was estimated from a part of the sequences."""
        last = project(self._known[layer], self._tokens)
        return last.delta - last.std_err
