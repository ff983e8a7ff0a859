"""The search strategies by the name that `--strategy` takes. One that is added here is known everywhere."""

from __future__ import annotations

from collections.abc import Callable

from icsearch.search.greedy import Greedy
from icsearch.search.protocol import Strategy, Task

EXACT = "exact"
STRATEGIES: dict[str, Callable[[Task], Strategy]] = {EXACT: Greedy}


def make_strategy(task: Task, name: str = EXACT) -> Strategy:
    """The strategy of that name, at its beginning."""
    return STRATEGIES[name](task)
