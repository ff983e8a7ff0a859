"""Patterns as two numbers: every `freq`-th layer is F, counted from `offset` on, by each engine's own counting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from icsearch.pattern import FULL, SHARED


@dataclass(frozen=True)
class Schedule:
    """An engine's rule: layer i, from 0, is F iff max(i - offset + shift, 0) % freq == 0.

    `default_offset` is taken where none is given, and what is below `least_offset` is taken as that. With
    `fixed_offset` an offset that is given is not read.
    """

    default_offset: int = 2
    shift: int = 1
    least_offset: int | None = None
    fixed_offset: bool = False

    def effective(self, offset: int | None) -> int:
        """The offset that the engine goes by, where this one is given."""
        given = self.default_offset if offset is None or self.fixed_offset else offset
        return given if self.least_offset is None else max(given, self.least_offset)

    def letters(self, num_layers: int, freq: int, offset: int | None = None) -> str:
        """The pattern that the engine runs. S may come first: what an engine does with that is its own."""
        start = self.effective(offset) - self.shift
        return "".join(FULL if max(i - start, 0) % freq == 0 else SHARED for i in range(num_layers))

    def fit(self, letters: str) -> tuple[int, int] | None:
        """(freq, offset) that reproduce the letters, or None where no such pair does; all F are (1, the default)."""
        if SHARED not in letters:
            return 1, self.effective(None)
        first = letters.index(SHARED)  # max(...) is 1 there, and the next F is freq - 1 further
        following = letters.find(FULL, first)
        freq = (following if following >= 0 else len(letters)) - first + 1
        offset = first - 1 + self.shift
        return (freq, offset) if first and self.letters(len(letters), freq, offset) == letters else None

    def nearest(self, letters: str) -> tuple[int, int]:
        """(freq, offset) of the pattern that differs in the fewest letters; of several the one with most F.

        Then the one with the smallest freq, then offset.
        """
        _, _, freq, first = min(_differences(letters))
        return (freq, first - 1 + self.shift) if freq > 1 else (1, self.effective(None))


COMMON = Schedule()  # transformers and most engines
ATOM = Schedule(default_offset=1, shift=0)
MINIMAX_M3 = Schedule(default_offset=0, shift=0)  # of ATOM and vLLM, over the sparse layers alone
MEGATRON = Schedule(default_offset=0, least_offset=1)  # layers from 1: max(n - offset, 0), and n = i + 1
ASCEND_V4 = Schedule(fixed_offset=True)


def _differences(letters: str) -> Iterator[tuple[int, int, int, int]]:
    """(letters that differ, -F layers, freq, first layer that can be S) of every pattern that two numbers can give.

    Behind `first - 1`, an F stands at every freq-th layer. Sums along these layers are made once a freq, so that
    this takes as many steps as there are pairs.
    """
    n = len(letters)
    yield letters.count(SHARED), -n, 1, n
    in_front = [letters[:first].count(SHARED) for first in range(n + 1)]
    for freq in range(2, n + 1):
        wrong, full = [0] * (n + 1), [0] * (n + 1)  # from here on, here being an F of the schedule
        for i in range(n - 1, -1, -1):
            after = min(i + freq, n)
            gap = after - i - 1
            wrong[i] = (letters[i] == SHARED) + gap - (in_front[after] - in_front[i + 1]) + wrong[after]
            full[i] = 1 + full[after]
        for first in range(1, n):
            at = first - 1
            yield in_front[at] + wrong[at], -(at + full[at]), freq, first
