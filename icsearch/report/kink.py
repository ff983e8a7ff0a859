"""Where a loss curve turns steep: a least-squares fit of two straight lines that meet. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MIN_POINTS_EACH_SIDE = 3  # the meeting point counts on both sides
MIN_POINTS = 2 * MIN_POINTS_EACH_SIDE - 1
MIN_EVIDENCE = 10.0  # difference in the Bayesian information criterion; above 10 counts as very strong
MIN_SLOPE_RATIO = 2.0
ROUNDING = 1e-12  # what is left of a perfect fit, as a share of the variance of y


@dataclass(frozen=True)
class Kink:
    """Two lines meeting at `x`: slopes in nats per token and layer, `fit` the (x, y) of start, bend and end."""

    x: float
    slope_before: float
    slope_after: float
    fit: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


def find_kink(xs: Sequence[float], ys: Sequence[float]) -> Kink | None:
    """The bend of the curve, or None where one straight line does as well or the curve does not turn steeper.

    For each x with at least three points on either side, y = a + b*x + c*max(0, x - bend) is fitted by least
    squares, and the bend with the smallest squared error is taken. It counts when the Bayesian information
    criterion prefers it to one straight line by more than 10, and the slope behind it is at least twice the slope
    before it. `xs` increase.
    """
    bends = xs[MIN_POINTS_EACH_SIDE - 1 : len(xs) - MIN_POINTS_EACH_SIDE + 1]
    if not bends:
        return None
    mean = sum(ys) / len(ys)
    floor = ROUNDING * sum((y - mean) ** 2 for y in ys)
    straight = _squares(_line_residuals(xs, ys))
    if straight <= floor:
        return None
    error, kink = min((_fit_bend(xs, ys, bend) for bend in bends), key=lambda fit: fit[0])
    evidence = len(xs) * math.log(straight / max(error, floor)) - 2 * math.log(len(xs))
    steeper = kink.slope_after > 0 and kink.slope_after >= MIN_SLOPE_RATIO * kink.slope_before
    return kink if evidence > MIN_EVIDENCE and steeper else None


def _fit_bend(xs: Sequence[float], ys: Sequence[float], bend: float) -> tuple[float, Kink]:
    """(squared error, fit) with the bend given. The change of slope comes first, out of what a line leaves of it."""
    beyond = [max(0.0, x - bend) for x in xs]
    beyond_alone = _line_residuals(xs, beyond)
    change = sum(a * y for a, y in zip(beyond_alone, ys, strict=True)) / _squares(beyond_alone)
    rest = [y - change * b for y, b in zip(ys, beyond, strict=True)]
    intercept, slope = _line(xs, rest)

    def value(x: float) -> float:
        return intercept + slope * x + change * max(0.0, x - bend)

    ends = ((xs[0], value(xs[0])), (bend, value(bend)), (xs[-1], value(xs[-1])))
    return _squares(_line_residuals(xs, rest)), Kink(bend, slope, slope + change, ends)


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """(intercept, slope) of the least-squares line."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    return mean_y - slope * mean_x, slope


def _line_residuals(xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    intercept, slope = _line(xs, ys)
    return [y - intercept - slope * x for x, y in zip(xs, ys, strict=True)]


def _squares(values: Sequence[float]) -> float:
    return sum(value * value for value in values)
