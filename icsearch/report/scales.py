"""Axes and colour scales as pure functions: from numbers to pixels and colour classes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from icsearch.report.numbers import compact

WARM_LEVELS = 8  # half decades of rising loss, from the noise up
COOL_LEVELS = 4  # half decades of falling loss


@dataclass(frozen=True)
class Axis:
    """A linear map from [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 6, whole: bool = False) -> list[float]:
        """Round numbers inside the range, about `count` of them; whole numbers only if asked."""
        step = nice_step((self.high - self.low) / max(count, 1))
        if whole:
            step = max(1.0, math.ceil(step))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def tick_label(value: float, step: float) -> str:
    """A tick with the decimals that its step needs."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{decimals}f}"


@dataclass(frozen=True)
class CostScale:
    """Signed logarithmic colour classes for loss differences (nats per token). Below `noise` all is one neutral class.

    Level 0 is |cost| <= noise; level n > 0 reaches noise * 10^(n/2), rising losses up to 8, falling ones to -4.
    """

    noise: float

    def level(self, cost: float) -> int:
        if abs(cost) <= self.noise:
            return 0
        level = max(1, math.ceil(2 * math.log10(abs(cost) / self.noise)))
        return min(level, WARM_LEVELS) if cost > 0 else -min(level, COOL_LEVELS)

    def css_class(self, cost: float) -> str:
        """``h0``, ``h3`` for a rise, ``c2`` for a fall."""
        level = self.level(cost)
        return f"h{level}" if level >= 0 else f"c{-level}"

    def upper_bound(self, level: int) -> float:
        """The largest absolute cost of a level but the last."""
        return float(self.noise * 10 ** (abs(level) / 2))

    def labels(self, costs: Iterable[float]) -> list[tuple[str, str]]:
        """(class, what it stands for) for all classes from the lowest of the costs to the highest."""
        levels = [0, *map(self.level, costs)]
        return [
            (f"h{level}" if level >= 0 else f"c{-level}", self._label(level))
            for level in range(min(levels), max(levels) + 1)
        ]

    def _label(self, level: int) -> str:
        if level == 0:
            return f"within ±{compact(self.noise)}"
        last = WARM_LEVELS if level > 0 else COOL_LEVELS
        if abs(level) == last:
            sign = "> " if level > 0 else "< -"
            return f"{sign}{compact(self.upper_bound(abs(level) - 1))}"
        if level > 0:
            return f"≤ {compact(self.upper_bound(level))}"
        return f"≥ -{compact(self.upper_bound(level))}"


def cost_scale(costs: Sequence[float], errors: Iterable[float]) -> CostScale:
    """A scale that starts at the noise: the median standard error, rounded to one digit.

    Without errors (one sequence) it spans the levels down from the largest cost.
    """
    known = sorted(error for error in errors if math.isfinite(error) and error > 0)
    if known:
        return CostScale(one_digit(known[len(known) // 2]))
    largest = max((abs(cost) for cost in costs), default=0.0)
    return CostScale(one_digit(largest / 10 ** (WARM_LEVELS / 2)) if largest > 0 else 1e-6)


def one_digit(value: float) -> float:
    """Rounded to one significant digit."""
    return float(f"{value:.0e}")


def label_every(count: int, pixels: float, needed: float) -> int:
    """Label each n-th of `count` cells of `pixels` each so that labels have `needed` pixels: 1, 2, 5, 10, 20..."""
    for every in (1, 2, 5, 10, 20, 50, 100):
        if every * pixels >= needed:
            return every
    return count


@dataclass(frozen=True)
class LogAxis:
    """[low, high] to pixels [start, end], symmetric about zero: linear up to about `unit`, logarithmic beyond."""

    low: float
    high: float
    start: float
    end: float
    unit: float

    def at(self, value: float) -> float:
        """Pixel of a value."""
        low, high = self._stretched(self.low), self._stretched(self.high)
        return self.start + (self._stretched(value) - low) / (high - low) * (self.end - self.start)

    def _stretched(self, value: float) -> float:
        return math.copysign(math.log1p(abs(value) / self.unit), value)

    def ticks(self, pixels: float) -> list[float]:
        """Zero and powers of ten, then twice and five times those, where neighbours stay `pixels` apart."""
        found = [0.0]
        for factor in (1, 5, 2):
            for sign in (1, -1):
                for power in range(math.floor(math.log10(self.unit)), math.ceil(math.log10(self._largest)) + 1):
                    value = sign * float(f"{factor}e{power}")
                    if self.low <= value <= self.high and all(self._apart(value, other) >= pixels for other in found):
                        found.append(value)
        return sorted(found)

    @property
    def _largest(self) -> float:
        return max(abs(self.low), abs(self.high), self.unit)

    def _apart(self, one: float, other: float) -> float:
        return abs(self.at(one) - self.at(other))


SHARE_LEVELS = 9


@dataclass(frozen=True)
class ShareScale:
    """Nine colour classes of equal width for values up to 1: h0 the highest, h8 all that is left below."""

    step: float

    def css_class(self, value: float) -> str:
        level = math.ceil((1 - value) / self.step - 1e-9) - 1
        return f"h{min(max(level, 0), SHARE_LEVELS - 1)}"

    def labels(self) -> list[tuple[str, str]]:
        """(class, what it stands for), the highest first."""
        decimals = max(0, -math.floor(math.log10(self.step) + 1e-9))
        bounds = [f"{1 - (level + 1) * self.step:.{decimals}f}" for level in range(SHARE_LEVELS)]
        last = (f"h{SHARE_LEVELS - 1}", f"< {bounds[-2]}")
        return [*((f"h{level}", f"≥ {bound}") for level, bound in enumerate(bounds[:-1])), last]


def share_scale(values: Iterable[float]) -> ShareScale:
    """A scale of round steps whose lowest class, open below, holds little more than the smallest value."""
    lowest = min(values, default=0.0)
    return ShareScale(max(nice_step(max(1 - lowest, 1e-9) / (SHARE_LEVELS + 1)), 1e-3))
