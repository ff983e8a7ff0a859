"""Numbers as readers see them: as many digits as the error allows. Losses are nats per token."""

from __future__ import annotations

import math

from icsearch.core.statistics import Difference

MAX_DECIMALS = 7


def loss(value: float) -> str:
    """A loss in nats per token, four decimals."""
    return f"{value:.4f}"


def with_error(delta: float, std_err: float, sign: bool = True) -> str:
    """``+0.0412 ± 0.0035``, two digits of an error; without one (one sequence only) the number alone."""
    decimals = 4
    if math.isfinite(std_err) and std_err > 0:
        decimals = min(max(1 - math.floor(math.log10(std_err)), 1), MAX_DECIMALS)
    plus = "+" if sign else ""
    number = f"{delta:{plus}.{decimals}f}"
    return f"{number} ± {std_err:.{decimals}f}" if math.isfinite(std_err) else number


def difference(value: Difference | None, sign: bool = True) -> str:
    """A difference with its standard error; a dash where there is none."""
    return "–" if value is None else with_error(value.delta, value.std_err, sign)


def compact(value: float) -> str:
    """Two significant digits without trailing noise, for ticks and slopes: 0.00042, 0.013, 1.5."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{decimals}f}" if decimals <= MAX_DECIMALS + 1 else f"{value:.1e}"


def percent(share: float) -> str:
    """A share in per cent: whole, or one decimal below ten."""
    return f"{100 * share:.0f}%" if abs(share) >= 0.0995 else f"{100 * share:.1f}%"


def exact_percent(share: float | None) -> str:
    """A share in per cent to one decimal; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.1f}%"


def count(value: float) -> str:
    """A count with thin separators, one decimal only where it is not whole: 12,345."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def duration(seconds: float) -> str:
    """``48 s``, ``3 min 20 s``, ``5 h 12 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def plural(number: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def finite(value: float) -> float:
    """The value, or zero where it is not a number: the length of an error bar."""
    return value if math.isfinite(value) else 0.0


def share(value: Difference) -> str:
    """A share with its error: ``47% ± 3%``, more digits where the error allows."""
    decimals = 1 if value.std_err < 0.0095 else 0
    text = f"{100 * value.delta:.{decimals}f}%"
    if not math.isfinite(value.std_err):
        return text
    return f"{text} ± {100 * value.std_err:.{decimals}f}%" if value.std_err >= 5e-4 else f"{text} ± <0.1%"


def perplexity(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def ratio(value: float) -> str:
    """``1.35×``; a dash where there is none."""
    return f"{value:.2f}×" if math.isfinite(value) else "–"


def shortened(name: str, width: int) -> str:
    """The name with its middle left out: its end tells a run's patterns apart."""
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}"
