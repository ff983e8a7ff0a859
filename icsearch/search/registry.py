"""The search strategies by the name that `--strategy` takes. One that is added here is known everywhere."""

from __future__ import annotations

from collections.abc import Callable

from icsearch.search.greedy import Greedy
from icsearch.search.protocol import SearchTask, Strategy

EXACT = "exact"
# Of a search on the second-order table, by default: labels drawn a sequence, patterns measured a round, rounds at most.
DRAWS, FINALISTS, ROUNDS = 4, 8, 4
LIKELY_ROUNDS = 3  # that a plan counts with: as a rule the last two find nothing better
STRATEGIES: dict[str, Callable[[SearchTask], Strategy]] = {EXACT: Greedy}


def make_strategy(task: SearchTask, name: str = EXACT) -> Strategy:
    """The strategy of that name, at its beginning."""
    return STRATEGIES[name](task)
