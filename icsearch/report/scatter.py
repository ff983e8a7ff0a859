"""Loss against retention for every pattern of an evaluation, as positions in pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from icsearch.core.statistics import Difference
from icsearch.report import numbers
from icsearch.report.curve import Guide, retention_guides
from icsearch.report.eval_view import EvalRow, EvalView
from icsearch.report.scales import Axis, LogAxis, tick_label

MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 66.0, 18.0, 16.0, 62.0
DODGE = 9.0  # pixels between patterns of different series with as many F layers
UNIFORM_COLOUR = 1  # orange, as in the report of a run
SHAPES = {"uniform": "diamond", "dp-baseline": "square", "published": "triangle", "letters": "cross"}


@dataclass(frozen=True)
class SeriesStyle:
    """How one run or method is drawn; `index` chooses its colour."""

    name: str
    index: int
    shape: str


@dataclass(frozen=True)
class ScatterMark:
    """One pattern. `high`, `low`: ends of the error bar. Hollow: searched on the batches it is measured on."""

    x: float
    y: float
    high: float
    low: float
    hollow: bool
    foreign: bool
    tooltip: str


@dataclass(frozen=True)
class ScatterSeries:
    """One run or method; `path` joins a run's nested patterns."""

    style: SeriesStyle
    path: str
    marks: tuple[ScatterMark, ...]


@dataclass(frozen=True)
class ScatterPicture:
    """Everything that the SVG needs, in pixels of its view box."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    zero_x: float
    zero_y: float
    unit: str
    x_title: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    guides: tuple[Guide, ...]
    series: tuple[ScatterSeries, ...]
    size: str


def scatter_picture(view: EvalView, size: str = "wide") -> ScatterPicture:
    """Place every pattern by its shared layers and its loss difference. `size` is ``wide`` or ``narrow``."""
    width, height = (760.0, 430.0) if size == "wide" else (380.0, 400.0)
    others = [row for row in view.rows if not row.is_baseline]
    x_axis = Axis(0.0, max([row.shared for row in others], default=1) + 0.75, MARGIN_LEFT + 8, width - MARGIN_RIGHT)
    y_axis = loss_axis(others, view.scale.noise, height - MARGIN_BOTTOM, MARGIN_TOP)
    return ScatterPicture(
        width=width,
        height=height,
        left=MARGIN_LEFT,
        right=width - MARGIN_RIGHT,
        top=MARGIN_TOP,
        bottom=height - MARGIN_BOTTOM,
        zero_x=x_axis.at(0.0),
        zero_y=y_axis.at(0.0),
        unit=numbers.compact(y_axis.unit),
        x_title=f"shared layers (S) of {view.num_layers}",
        x_ticks=tuple((x_axis.at(t), f"{t:.0f}") for t in x_axis.ticks(9 if size == "wide" else 6, whole=True)),
        y_ticks=tuple((y_axis.at(t), _tick(t)) for t in y_axis.ticks(22.0)),
        guides=tuple(Guide(x_axis.at(x), label) for x, label in retention_guides(view.num_layers, x_axis.high)),
        series=_place_all(view, others, x_axis, y_axis),
        size=size,
    )


def loss_axis(rows: Sequence[EvalRow], unit: float, start: float, end: float) -> LogAxis:
    """An axis that holds every mark with its error bar, and some space about zero."""
    high = max([unit, *(_top(row.difference) for row in rows)])
    low = min([-unit / 2, *(_bottom(row.difference) for row in rows)])
    return LogAxis(1.1 * low, 1.2 * high, start, end, unit)


def styles(view: EvalView) -> tuple[SeriesStyle, ...]:
    """The series in order of appearance; uniform keeps its colour, the others take the rest in turn."""
    names = list(dict.fromkeys((row.series, row.method) for row in view.rows if not row.is_baseline))
    free = [index for index in range(6) if index != UNIFORM_COLOUR]
    others = [name for name, method in names if method != "uniform"]
    return tuple(
        SeriesStyle(
            name,
            UNIFORM_COLOUR if method == "uniform" else free[others.index(name) % len(free)],
            SHAPES.get(method, "circle"),
        )
        for name, method in names
    )


def _place_all(view: EvalView, rows: Sequence[EvalRow], x_axis: Axis, y_axis: LogAxis) -> tuple[ScatterSeries, ...]:
    offsets = _offsets(rows)
    found = []
    for style in styles(view):
        own = [row for row in rows if row.series == style.name]
        marks = tuple(_place(row, x_axis.at(row.shared) + offsets[row.name], y_axis) for row in own)
        corners = [(mark.x, mark.y) for mark in marks] if is_nested_run(own) else []
        found.append(ScatterSeries(style, _path(corners), marks))
    return tuple(found)


def is_nested_run(rows: Sequence[EvalRow]) -> bool:
    """Whether these are several patterns of one search, each with F layers of the one before it only."""
    kept = [set(row.pattern.full_layers) for row in rows]
    nested = all(later < earlier for earlier, later in itertools.pairwise(kept))
    return len(rows) > 1 and nested and all(row.series != row.method for row in rows)


def _offsets(rows: Sequence[EvalRow]) -> dict[str, float]:
    """Pixels to either side, so that patterns with as many F layers do not hide each other."""
    beside: dict[int, list[str]] = {}
    for row in rows:
        beside.setdefault(row.shared, []).append(row.name)
    return {
        name: (index - (len(names) - 1) / 2) * DODGE for names in beside.values() for index, name in enumerate(names)
    }


def _place(row: EvalRow, x: float, y_axis: LogAxis) -> ScatterMark:
    notes = [note for note, given in (("in-sample", row.in_sample), ("other model", row.foreign)) if given]
    label = f"{row.name} ({', '.join(notes)})" if notes else row.name
    difference = row.difference
    return ScatterMark(
        x=x,
        y=y_axis.at(difference.delta),
        high=y_axis.at(_top(difference)),
        low=y_axis.at(_bottom(difference)),
        hollow=row.in_sample,
        foreign=row.foreign,
        tooltip=f"{label}: {row.full} F, loss {numbers.loss(row.loss)}, {numbers.difference(difference)}",
    )


def _path(corners: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in corners) if corners else ""


def _top(difference: Difference) -> float:
    return difference.delta + numbers.finite(difference.std_err)


def _bottom(difference: Difference) -> float:
    return difference.delta - numbers.finite(difference.std_err)


def _tick(value: float) -> str:
    return tick_label(value, abs(value)) if value else "0"
