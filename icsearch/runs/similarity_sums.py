"""Similarities of layers as the journal of a similarity baseline has them, summed up. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from icsearch.journal import Event
from icsearch.jsonfile import FieldError


@dataclass
class SimilaritySums:
    """Lower triangles summed over choosing queries, as they come in batch by batch.

    `numerics` are those that they were measured with, where that was another run's.
    """

    cosine: list[list[float]] = field(default_factory=list)
    overlap: list[list[float]] = field(default_factory=list)
    sequences: int = 0
    queries: int = 0
    numerics: dict[str, Any] | None = None

    def check(self, event: Event) -> None:
        """Raise FieldError unless its sequences are those that come next."""
        first, _ = event["sequences"]
        if first != self.sequences:
            raise FieldError(f"similarity of sequence {first} behind {self.sequences} sequences")

    def add(self, event: Event) -> None:
        """Take in an event that `check` lets through."""
        _, last = event["sequences"]
        self.numerics = event.get("numerics")
        self.sequences, self.queries = last, self.queries + event["queries"]
        self.cosine = _added(self.cosine, event["cosine"])
        self.overlap = _added(self.overlap, event["overlap"])

    def means(self) -> dict[str, Any]:
        """`cosine` and `overlap` as means, and the number of `queries` that they are taken over."""
        triangles = {"cosine": self.cosine, "overlap": self.overlap}
        means = {name: [[x / self.queries for x in row] for row in rows] for name, rows in triangles.items()}
        return {**means, "queries": self.queries}


def _added(sums: list[list[float]], more: list[list[float]]) -> list[list[float]]:
    if not sums:
        return [list(row) for row in more]
    return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(sums, more, strict=True)]
