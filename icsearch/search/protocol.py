"""What a strategy and the search loop say to each other. Numbers and layers only: no strategy sees a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from icsearch.core.pattern import Pattern
from icsearch.runs.journal import Event
from icsearch.runs.record import Choice

LOSS, KL = 0, 1  # rows of prices, of a search on a second-order table


@dataclass(frozen=True)
class SearchTask:
    """What is searched: K = `num_shared` flips of `start`, of layers outside of `keep_full`, in so many `stages`.

    `tokens` are the counted tokens of each sequence.
    """

    start: Pattern
    keep_full: frozenset[int]
    num_shared: int
    stages: int
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, start: Event) -> SearchTask:
        """That of a run which began so."""
        options = start["options"]
        return cls(
            start=Pattern(start["start_pattern"]),
            keep_full=frozenset(options["keep_full"]),
            num_shared=options["num_shared"],
            stages=options["stages"],
            tokens=tuple(start["tokens"]),
        )


class Strategy(Protocol):
    """One search, one flip at a time."""

    pattern: Pattern  # the committed one

    def ask(self) -> tuple[int, ...]:
        """The layers whose flips of the committed pattern to score next, each on its own; none: the search is over."""

    def tell(self, sums: Mapping[int, Sequence[float]]) -> Choice:
        """Take the objective's sum on each sequence for every layer asked for; commit one of the flips, and say so."""
