"""Search strategies: they ask which flips to score, are told the losses, and commit one. They see no model.

A strategy is a combination of small parts; see `stepwise`.
"""

from __future__ import annotations

from dataclasses import dataclass

from icsearch.strategies.exact import Complete, Everyone
from icsearch.strategies.protocol import Ask, Choice, Strategy, Task, looks_of
from icsearch.strategies.stages import split_stages
from icsearch.strategies.stepwise import StepwiseGreedy

__all__ = ["Ask", "Choice", "Options", "Strategy", "Task", "looks_of", "make_strategy", "split_stages"]


@dataclass(frozen=True)
class Options:
    """The name of a strategy, and what it can be told."""

    name: str = "exact"


def make_strategy(task: Task, options: Options = Options()) -> Strategy:
    """The strategy of that name, at its beginning."""
    return StepwiseGreedy(task, Everyone(), Complete(task.tokens))
