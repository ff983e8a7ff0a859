"""Search strategies: they ask which flips to score, are told the losses, and commit one. They see no model.

A strategy is a combination of small parts; see `stepwise`.
"""

from __future__ import annotations

from dataclasses import dataclass

from icsearch.search.greedy import Complete, Everyone, StepwiseGreedy, split_stages
from icsearch.search.lazy import Lazy
from icsearch.search.protocol import Ask, Choice, Strategy, Task, looks_of
from icsearch.search.race import Race, testing_looks

__all__ = [
    "DEFAULT_CONFIDENCE",
    "STRATEGIES",
    "Ask",
    "Choice",
    "Options",
    "Strategy",
    "Task",
    "looks_of",
    "make_strategy",
    "split_stages",
    "testing_looks",
]


DEFAULT_CONFIDENCE = 0.95
STRATEGIES = ("exact", "race", "lazy", "race+lazy")


@dataclass(frozen=True)
class Options:
    """The name of a strategy, and what it can be told.

    `confidence` is that of a race; `tie_margin` (nats per token) lets a race or lazy bounds settle near-ties.
    """

    name: str = "exact"
    confidence: float = DEFAULT_CONFIDENCE
    tie_margin: float | None = None

    @property
    def races(self) -> bool:
        return "race" in self.name.split("+")

    @property
    def is_lazy(self) -> bool:
        return "lazy" in self.name.split("+")


def make_strategy(task: Task, options: Options = Options()) -> Strategy:
    """The strategy of that name, at its beginning."""
    pools = Lazy(task, options.tie_margin) if options.is_lazy else Everyone()
    contest = Race(task, options.confidence, options.tie_margin) if options.races else Complete(task.tokens)
    return StepwiseGreedy(task, pools, contest)
