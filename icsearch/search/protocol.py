"""What a strategy and the search loop say to each other. Numbers and layers only: no strategy sees a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from icsearch.core.pattern import Pattern


@dataclass(frozen=True)
class Ask:
    """Flips of the committed pattern to score, each on its own, on the sequences [first, last)."""

    layers: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class Choice:
    """One committed flip, and how it was chosen.

    `scored` are the layers that were scored in this step; on every sequence, but for those `dropped` as worse than
    the leader, and those `within_margin`, for which the leader was taken by the tie margin. `settled` is the number
    of sequences after which that was done last, None where the losses of all sequences decided. `stale` are the
    candidates that were not scored, because an older loss ruled them out; `spared` those of them that it could rule
    out only by the tie margin. `violations` are the layers that turned
    out cheaper than their older loss and its slack allowed, and `missed` says that only a full rescan found the
    winner.
    """

    layer: int
    scored: tuple[int, ...]
    dropped: tuple[int, ...] = ()
    within_margin: tuple[int, ...] = ()
    stale: tuple[int, ...] = ()
    settled: int | None = None
    violations: tuple[int, ...] = ()
    missed: bool = False
    spared: tuple[int, ...] = ()


class Strategy(Protocol):
    """One search, one flip at a time."""

    @property
    def pattern(self) -> Pattern:
        """The committed pattern."""

    def begin(self, start_sums: Sequence[float]) -> None:
        """Take the objective's sum on each sequence under the start pattern; called once, before anything else."""

    def ask(self) -> Ask | None:
        """What to score next; None once the search is over."""

    def tell(self, sums: Mapping[int, Sequence[float]]) -> Choice | None:
        """Take the objective's sums of every layer asked for, one for each sequence asked for, in order.

        Commits a flip and returns it, or returns None where more is to be asked first.
        """


@dataclass(frozen=True)
class Task:
    """What is searched: K = `num_shared` flips of `start`, of layers outside of `keep_full`, in so many `stages`.

    `tokens` are the counted tokens of each sequence. Sequences are scored in whole batches; `looks` are the numbers
    of sequences scored after each batch, the last one being all of them.
    """

    start: Pattern
    keep_full: frozenset[int]
    num_shared: int
    stages: int
    tokens: tuple[int, ...]
    looks: tuple[int, ...]


def looks_of(sequences: int, batch_size: int) -> tuple[int, ...]:
    """How many sequences are scored after each batch."""
    return (*range(batch_size, sequences, batch_size), sequences)
