"""Losses as numbers: totals, differences and their paired standard errors. Pure Python, no torch.

A loss is known as one float64 sum of negative log-likelihoods per sequence, plus the counted tokens of each
sequence. The sequence is the independent unit, so every error is taken over sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


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


@dataclass(frozen=True)
class Projection:
    """A loss difference on all sequences as the first ones foretell it: its standard error is that of what is left.

    `degrees` of freedom are the first sequences' number, less one, where they are equally long; else fewer.
    """

    delta: float
    std_err: float
    degrees: float


def project(differences: Sequence[float], tokens: Sequence[int]) -> Projection:
    """Foretell summed differences / summed tokens of all sequences from the differences of the first n.

    The ratio r of the first n is taken on for the rest. The rest's error is that of its own sequences and that of r:
    with a spread of s per token within a sequence of t tokens, s² (sum of t² left + (tokens left / tokens seen)²
    sum of t² seen), as in the model-based theory of ratio estimators (Royall, 1970, with a variance of t²). For
    sequences of equal length that is the mean difference and its standard error times sqrt(1 - n / S), the finite
    population's. The degrees of freedom are Satterthwaite's, of the sum of squares that s is estimated from.
    """
    n = len(differences)
    seen, left = tokens[:n], tokens[n:]
    ratio = math.fsum(differences) / sum(seen)
    if not left:
        return Projection(ratio, 0.0, math.inf)
    squares, squares_left = (float(sum(t * t for t in some)) for some in (seen, left))
    degrees = squares**2 / sum(t**4 for t in seen) - 1
    if n < 2 or degrees <= 0:
        return Projection(ratio, math.nan, 0.0)
    residuals = math.fsum((d - ratio * t) ** 2 for d, t in zip(differences, seen, strict=True))
    variance = n / (n - 1) * residuals / squares * (squares_left + (sum(left) / sum(seen)) ** 2 * squares)
    return Projection(ratio, math.sqrt(variance) / sum(tokens), degrees)


def wilson_interval(hits: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95% confidence interval of a share hits / total (Wilson's score interval; z is the normal quantile)."""
    if total == 0:
        return 0.0, 1.0
    share = hits / total
    center = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def student_tail(t: float, degrees: float) -> float:
    """P(T > t) of Student's t distribution, t >= 0, accurate to many digits however small it is.

    Half the regularised incomplete beta function I_x(degrees / 2, 1 / 2) at x = degrees / (degrees + t²).
    """
    if t == 0:
        return 0.5
    a, b, square = degrees / 2, 0.5, t * t
    x, rest = degrees / (degrees + square), square / (degrees + square)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log_front - a * math.log1p(square / degrees)) * math.sqrt(rest)
    if x < (a + 1) / (a + b + 2):
        return front / (2 * a * _beta_fraction(a, b, x))
    return (1 - front / (b * _beta_fraction(b, a, rest))) / 2


def _beta_fraction(a: float, b: float, x: float) -> float:
    """1 + d1/(1 + d2/(1 + ...)), the incomplete beta function's continued fraction (DLMF 8.17.22), from its far end.

    A hundred terms are far more than 15 digits need where x is below (a + 1) / (a + b + 2).
    """
    value = 1.0
    for m in range(100, 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        value = 1 + even / (1 + odd / value)
    return 1 - (a + b) * x / ((a + 1) * value)
