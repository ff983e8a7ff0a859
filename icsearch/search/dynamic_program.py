"""The similarity baseline: the best pattern by pairwise cosine similarity (IndexCache paper, Appendix C).

The value of a pattern is the sum, over its S layers, of the similarity between the layer's own attention output
and its output under the selection of the F layer it reads from. A run of S layers depends on the F layer before
it alone, so dynamic programming finds the best pattern exactly, for every number of F layers from one table.

The paper's recurrence walks forward over the last F layer. Here it walks backward over the next one, which has
the same maxima and breaks ties from the first layer on. Sums are exact: floats are turned into integer multiples
of one power of two, so no rounding decides between two patterns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter

from icsearch.core.errors import PatternError
from icsearch.core.pattern import Pattern

# The best that can follow an F layer: its value in units, and the next F layer (the number of layers if none).
_Tail = tuple[int, int]


@dataclass(frozen=True)
class Solutions:
    """The best pattern for each number of F layers in `budgets`.

    Ties: of patterns of exactly equal value, the one whose F layers, read from layer 0 on, come first in
    lexicographic order. Its letters are the first in alphabetical order (F before S).
    """

    num_layers: int
    budgets: range
    _tails: tuple[tuple[_Tail | None, ...], ...]  # [k][j]: k more F layers after F layer j; None: impossible
    _units_per_one: int

    def pattern(self, num_full: int) -> Pattern:
        """The best pattern with exactly `num_full` F layers. PatternError if the constraints allow none."""
        self._check(num_full)
        full_layers = {0}
        layer = 0
        for remaining in range(num_full - 1, 0, -1):
            layer = self._tail(layer, remaining)[1]
            full_layers.add(layer)
        return Pattern.from_full_layers(full_layers, self.num_layers)

    def objective(self, num_full: int) -> float:
        """Sum of similarity[layer][its F source] over the S layers of `pattern(num_full)`: the exact sum, rounded once.

        PatternError if the constraints allow no such pattern.
        """
        self._check(num_full)
        return self._tail(0, num_full - 1)[0] / self._units_per_one

    def _tail(self, layer: int, remaining: int) -> _Tail:
        tail = self._tails[remaining][layer]
        if tail is None:
            raise RuntimeError(f"the table has no way on from layer {layer} with {remaining} F layers: report this")
        return tail

    def _check(self, num_full: int) -> None:
        if num_full not in self.budgets:
            raise PatternError(
                f"no pattern of {self.num_layers} layers has {num_full} F layers under these constraints: "
                f"ask for {self.budgets.start} to {self.budgets.stop - 1} F layers"
            )


def solve(
    similarity: Sequence[Sequence[float]],
    *,
    must_be_full: frozenset[int] = frozenset(),
    must_be_shared: frozenset[int] = frozenset(),
) -> Solutions:
    """The best patterns for all possible numbers of F layers, in O(N²·M) steps (paper, Appendix C).

    `similarity[i][j]`, j < i, is the mean cosine similarity of layer i under layer j's selection. Rows are of
    length i + 1, or all of length N; the diagonal and what is above it are not read. Layer 0 is always F.
    `must_be_full`: layers that stay F, as kept ones and the first layers of pipeline stages.
    `must_be_shared`: layers that have no indexer to run, as native S layers.
    PatternError for a matrix of another shape or with an entry that is not finite, and for constraints that
    contradict each other or name layers that are not there.
    """
    num_layers = len(similarity)
    _check_similarity(similarity)
    must_be_full |= {0}
    _check_constraints(num_layers, must_be_full, must_be_shared)
    budgets = range(len(must_be_full), num_layers - len(must_be_shared) + 1)
    columns, units_per_one = _exact_columns(similarity)
    # [j][n]: value of the first n layers after j, all S reading from j
    runs = [list(accumulate(column, initial=0)) for column in columns]
    successors = _successors(num_layers, must_be_full, must_be_shared)
    last_forced = max(must_be_full)
    tails: list[list[_Tail | None]] = [
        [(run[-1], num_layers) if layer >= last_forced else None for layer, run in enumerate(runs)]
    ]
    while len(tails) < budgets.stop - 1:
        tails.append(_with_one_more(tails[-1], runs, successors))
    return Solutions(num_layers, budgets, tuple(map(tuple, tails)), units_per_one)


def _with_one_more(
    tails: Sequence[_Tail | None], runs: Sequence[Sequence[int]], successors: Sequence[Sequence[int]]
) -> list[_Tail | None]:
    """The tails with one F layer more: tail[j] = max over the next F layer i > j of run(j, i) + tails[i].

    `max` keeps the first of equals and successors ascend: a tie goes to the earliest next F layer.
    """
    return [
        max(
            ((run[i - j - 1] + tail[0], i) for i in successors[j] if (tail := tails[i]) is not None),
            key=itemgetter(0),
            default=None,
        )
        for j, run in enumerate(runs)
    ]


def _successors(num_layers: int, must_be_full: frozenset[int], must_be_shared: frozenset[int]) -> list[list[int]]:
    """For each layer, those that can be the next F layer, ascending: none beyond the next that must be F."""
    successors = []
    for layer in range(num_layers):
        forced = min((full for full in must_be_full if full > layer), default=num_layers - 1)
        successors.append([i for i in range(layer + 1, forced + 1) if i not in must_be_shared])
    return successors


def _exact_columns(similarity: Sequence[Sequence[float]]) -> tuple[list[list[int]], int]:
    """The columns below the diagonal as integers, and how many of these units are 1.0.

    Column j holds layers j + 1 to N - 1. A float is an integer over a power of two, so the largest denominator
    is a common one.
    """
    num_layers = len(similarity)
    ratios = [[float(similarity[i][j]).as_integer_ratio() for i in range(j + 1, num_layers)] for j in range(num_layers)]
    units = max((denominator for column in ratios for _, denominator in column), default=1)
    return [[numerator * (units // denominator) for numerator, denominator in column] for column in ratios], units


def _check_similarity(similarity: Sequence[Sequence[float]]) -> None:
    num_layers = len(similarity)
    if num_layers == 0:
        raise PatternError("the similarity matrix is empty: expected one row per DSA layer")
    square = len(similarity[0]) == num_layers
    for layer, row in enumerate(similarity):
        expected = num_layers if square else layer + 1
        if len(row) != expected:
            raise PatternError(
                f"similarity[{layer}] has {len(row)} entries, expected {expected}: "
                f"give {num_layers} rows of {num_layers} entries, or row i with i + 1 entries"
            )
        for source in range(layer):
            if not math.isfinite(row[source]):
                raise PatternError(
                    f"similarity[{layer}][{source}] is {row[source]}, expected a finite number: measure it again"
                )


def _check_constraints(num_layers: int, must_be_full: frozenset[int], must_be_shared: frozenset[int]) -> None:
    if unknown := (must_be_full | must_be_shared) - set(range(num_layers)):
        raise PatternError(
            f"no {_layers(unknown)}: there are {num_layers} DSA layers, give numbers from 0 to {num_layers - 1}"
        )
    if 0 in must_be_shared:
        raise PatternError("layer 0 cannot be S: the first DSA layer has no earlier selection to reuse")
    if both := must_be_full & must_be_shared:
        raise PatternError(
            f"{_layers(both)} must be F and S at once: keep other layers F (--keep-full, --stages), "
            "a native S layer has no indexer to run"
        )


def _layers(layers: frozenset[int]) -> str:
    """The words ``layer 3`` or ``layers 3, 5``."""
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, sorted(layers)))}"
