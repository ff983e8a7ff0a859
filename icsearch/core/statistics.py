"""Losses as numbers: totals, differences and their paired standard errors. Pure Python, no torch.

A loss is known as one float64 sum of negative log-likelihoods per sequence, plus the counted tokens of each
sequence. The sequence is the independent unit, so every error is taken over sequences.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import StatisticsError, correlation


@dataclass(frozen=True)
class Difference:
    """A loss difference in nats per token, and its standard error paired over sequences (nan for one sequence)."""

    delta: float
    std_err: float

    @property
    def is_tie(self) -> bool:
        """True where the difference is within one standard error, so that the sign is not known."""
        return not abs(self.delta) > self.std_err


def mean_loss(nll: Sequence[float], tokens: Sequence[int]) -> float:
    """Summed NLL / counted tokens, in nats. Sums are added in sequence order, so the bits do not depend on who adds."""
    total = 0.0
    for value in nll:
        total += value
    return total / sum(tokens)


def paired_difference(nll: Sequence[float], reference: Sequence[float], tokens: Sequence[int]) -> Difference:
    """Loss minus reference loss on the same sequences, with the ratio estimator's standard error.

    For sequences of equal length this is the standard error of the mean of the per-sequence differences.
    """
    differences = [a - b for a, b in zip(nll, reference, strict=True)]
    delta = mean_loss(nll, tokens) - mean_loss(reference, tokens)
    n = len(differences)
    if n < 2:
        return Difference(delta, math.nan)
    residuals = [d - delta * t for d, t in zip(differences, tokens, strict=True)]
    variance = n / (n - 1) * math.fsum(r * r for r in residuals)
    return Difference(delta, math.sqrt(variance) / sum(tokens))


def wilson_interval(hits: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95% confidence interval of a share hits / total (Wilson's score interval; z is the normal quantile)."""
    if total == 0:
        return 0.0, 1.0
    share = hits / total
    center = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, -1 to 1. nan where there is none: all of one side are equal, or one."""
    try:
        return correlation(_ranks(xs), _ranks(ys))
    except StatisticsError:
        return math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal values share the mean of theirs."""
    order = sorted(values)
    return [(bisect_left(order, value) + 1 + bisect_right(order, value)) / 2 for value in values]
