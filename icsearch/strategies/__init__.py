"""Search strategies: they ask which flips to score, are told the losses, and commit one. They see no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from icsearch.pattern import Pattern
from icsearch.strategies.exact import ExactGreedy
from icsearch.strategies.stages import StagedGreedy, split_stages

__all__ = ["ExactGreedy", "StagedGreedy", "Strategy", "make_strategy", "split_stages"]


class Strategy(Protocol):
    """One search, one flip at a time."""

    @property
    def pattern(self) -> Pattern:
        """The committed pattern."""

    def ask(self) -> tuple[int, ...]:
        """The F layers to flip, each on its own, and score; empty once the search is over."""

    def tell(self, losses: Mapping[int, float]) -> int:
        """Take the loss of every layer asked for, commit one flip, and return its layer."""


def make_strategy(start: Pattern, keep_full: frozenset[int], num_shared: int, stages: int) -> Strategy:
    """Exact greedy, or the pipeline split where there are several stages."""
    if stages == 1:
        return ExactGreedy(start, keep_full, num_shared)
    return StagedGreedy(start, keep_full, num_shared, stages)
