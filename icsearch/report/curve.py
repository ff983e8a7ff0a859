"""The loss curve as positions in pixels, for one run or several. The template and nothing else writes the SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from icsearch.core.statistics import Difference
from icsearch.report import numbers
from icsearch.report.scales import Axis, tick_label
from icsearch.report.view import Point, Reference, RunView

OFF_SCALE = 2.0  # a uniform pattern higher than this many times the curve's height is named at the edge instead
LABEL_LINE, LABEL_LETTER = 15.0, 6.8  # pixels between lines of text, and from letter to letter
KINK_LABEL = 150.0  # pixels that the kink's label needs
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 74.0, 18.0, 16.0, 62.0


@dataclass(frozen=True)
class Mark:
    """A value to place: x as the axis counts it, the loss difference to the baseline with its error."""

    x: float
    difference: Difference
    label: str
    tooltip: str

    @property
    def top(self) -> float:
        return self.difference.delta + numbers.finite(self.difference.std_err)

    @property
    def bottom(self) -> float:
        return self.difference.delta - numbers.finite(self.difference.std_err)


@dataclass(frozen=True)
class Series:
    """One run: its curve, its uniform patterns, and the fitted lines of its kink. `joined`: a line links its marks."""

    marks: tuple[Mark, ...]
    references: tuple[Mark, ...]
    fit: tuple[tuple[float, float], ...] = ()
    joined: bool = True


@dataclass(frozen=True)
class Placed:
    """A mark in pixels. `low`, `high`: ends of the error bar. Off scale: drawn at the top edge with its value."""

    x: float
    y: float
    high: float
    low: float
    label: str
    tooltip: str
    off_scale: bool = False
    label_x: float = 0.0
    label_y: float = 0.0
    anchor: str = "start"


@dataclass(frozen=True)
class PlacedSeries:
    """A series in pixels; `index` chooses its colour."""

    index: int
    path: str
    points: tuple[Placed, ...]
    references: tuple[Placed, ...]
    fit_path: str


@dataclass(frozen=True)
class Guide:
    """A vertical line with a label: a retention, or the kink."""

    x: float
    label: str
    anchor: str = "middle"


@dataclass(frozen=True)
class CurvePicture:
    """Everything that the SVG needs, in pixels of its view box."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    zero: float
    x_title: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    series: tuple[PlacedSeries, ...]
    guides: tuple[Guide, ...]
    kink: Guide | None
    size: str


def series_of(view: RunView, as_share: bool = False) -> Series:
    """A run's curve by shared layers, or by the share of layers where runs of different depth are compared."""
    scale = 100 / view.num_layers if as_share else 1.0
    prefix = f"{view.name}: " if as_share else ""
    return Series(
        marks=tuple(_point_mark(point, scale, prefix) for point in view.points),
        references=tuple(_reference_mark(reference, scale, prefix) for reference in view.references),
        fit=view.kink.fit if view.kink and not as_share else (),
        joined=not view.by_similarity,
    )


def _point_mark(point: Point, scale: float, prefix: str) -> Mark:
    what = "baseline" if point.step == 0 else "chosen by similarity"
    if point.layer is not None:
        what = f"step {point.step}: layer {point.layer} shared"
    tooltip = (
        f"{prefix}{what}, {point.full} F left, loss {numbers.loss(point.loss)}, {numbers.difference(point.difference)}"
    )
    return Mark(point.shared * scale, point.difference, "", tooltip)


def _reference_mark(reference: Reference, scale: float, prefix: str) -> Mark:
    pattern = reference.pattern
    tooltip = f"{prefix}{reference.label}: {len(pattern.full_layers)} F, {numbers.difference(reference.difference)}"
    return Mark(len(pattern.shared_layers) * scale, reference.difference, reference.label, tooltip)


def curve_picture(
    series: Sequence[Series],
    x_title: str,
    x_high: float,
    guides: Sequence[tuple[float, str]] = (),
    kink: tuple[float, str] | None = None,
    size: str = "wide",
) -> CurvePicture:
    """Place every series on common axes. `size` is ``wide`` or ``narrow`` (for a phone)."""
    width, height = (760.0, 430.0) if size == "wide" else (380.0, 400.0)
    x_axis = Axis(0.0, max(x_high, 1.0), MARGIN_LEFT, width - MARGIN_RIGHT)
    y_axis = _loss_axis(series, height)
    high = y_axis.high
    y_ticks = y_axis.ticks(6)
    y_step = y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else high
    return CurvePicture(
        width=width,
        height=height,
        left=MARGIN_LEFT,
        right=width - MARGIN_RIGHT,
        top=MARGIN_TOP,
        bottom=height - MARGIN_BOTTOM,
        zero=y_axis.at(0.0),
        x_title=x_title,
        x_ticks=tuple((x_axis.at(t), f"{t:.0f}") for t in x_axis.ticks(9 if size == "wide" else 6, whole=True)),
        y_ticks=tuple((y_axis.at(t), tick_label(t, y_step)) for t in y_ticks),
        series=tuple(_place(one, index, x_axis, y_axis, len(series) == 1) for index, one in enumerate(series)),
        guides=tuple(Guide(x_axis.at(x), label) for x, label in guides),
        kink=_kink_guide(kink, x_axis),
        size=size,
    )


def _loss_axis(series: Sequence[Series], height: float) -> Axis:
    """The loss axis; where labels at the top edge would lie on the zero line or the curve, it begins below them."""
    low, high = loss_range(series)
    axis = Axis(low, high, height - MARGIN_BOTTOM, MARGIN_TOP)
    labels = MARGIN_TOP + LABEL_LINE * sum(mark.difference.delta > high for one in series for mark in one.references)
    highest = max((mark.top for one in series for mark in one.marks), default=0.0)
    return replace(axis, end=labels) if len(series) == 1 and axis.at(max(0.0, highest)) < labels else axis


def loss_range(series: Sequence[Series]) -> tuple[float, float]:
    """(low, high) of the loss axis: all of the curves, and the uniform patterns that are not far above them."""
    marks = [mark for one in series for mark in one.marks]
    references = [mark for one in series for mark in one.references]
    high = max((mark.top for mark in marks), default=0.0)
    if high <= 0:
        high = max((mark.top for mark in references), default=0.0)
    extent = high - min([0.0, *(mark.bottom for mark in marks)])
    shown = [mark for mark in references if mark.top <= OFF_SCALE * extent]
    high = max([high, *(mark.top for mark in shown)])
    low = min([0.0, *(mark.bottom for mark in [*marks, *shown])])
    return (1.08 * low, 1.08 * high) if high > 0 else (min(low, 0.0), 1e-3)


def _kink_guide(kink: tuple[float, str] | None, x_axis: Axis) -> Guide | None:
    if kink is None:
        return None
    x = x_axis.at(kink[0])  # left of a kink the curve is low and leaves space for the label
    return Guide(x, kink[1], "end" if x - x_axis.start > KINK_LABEL else "start")


def _place(one: Series, index: int, x_axis: Axis, y_axis: Axis, with_labels: bool) -> PlacedSeries:
    points = tuple(_place_mark(mark, x_axis, y_axis) for mark in one.marks)
    return PlacedSeries(
        index=index,
        path=_path([(p.x, p.y) for p in points]) if one.joined else "",
        points=points,
        references=_place_references(one.references, x_axis, y_axis, with_labels),
        fit_path=_path([(x_axis.at(x), y_axis.at(y)) for x, y in one.fit]),
    )


def _path(corners: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in corners) if corners else ""


def _place_mark(mark: Mark, x_axis: Axis, y_axis: Axis) -> Placed:
    return Placed(
        x=x_axis.at(mark.x),
        y=y_axis.at(mark.difference.delta),
        high=y_axis.at(mark.top),
        low=y_axis.at(mark.bottom),
        label=mark.label,
        tooltip=mark.tooltip,
    )


def _place_references(marks: Sequence[Mark], x_axis: Axis, y_axis: Axis, with_labels: bool) -> tuple[Placed, ...]:
    placed = []
    rows = 0  # off-scale labels stand below each other, so that neighbours do not overlap
    for mark in sorted(marks, key=lambda m: m.x):
        off_scale = mark.difference.delta > y_axis.high
        placed.append(_place_reference(mark, x_axis, y_axis, off_scale, rows, with_labels))
        rows += off_scale
    return tuple(placed)


def _place_reference(mark: Mark, x_axis: Axis, y_axis: Axis, off_scale: bool, row: int, with_labels: bool) -> Placed:
    x = x_axis.at(mark.x)
    y = MARGIN_TOP + 4 if off_scale else y_axis.at(mark.difference.delta)
    label = mark.label if with_labels else ""
    to_the_left = x > (x_axis.start + x_axis.end) / 2
    if off_scale and label:
        label = f"{label}: {numbers.difference(mark.difference)}"
        to_the_left = x - x_axis.start > LABEL_LETTER * len(label)
    return Placed(
        x=x,
        y=y,
        high=y if off_scale else y_axis.at(mark.top),
        low=y if off_scale else y_axis.at(mark.bottom),
        label=label,
        tooltip=mark.tooltip,
        off_scale=off_scale,
        label_x=x - 10 if to_the_left else x + 10,
        label_y=y + 5 + row * LABEL_LINE if off_scale else y - 6,
        anchor="end" if to_the_left else "start",
    )


# --- what the two pictures of a page show ---------------------------------------------------------------------------


def run_picture(view: RunView, size: str = "wide") -> CurvePicture:
    """The curve of one run by number of shared layers, with its uniform patterns and its kink."""
    series = series_of(view)
    x_high = max([mark.x for mark in (*series.marks, *series.references)] or [1.0]) + 0.5
    kink = (view.kink.x, f"kink: {numbers.plural(round(view.kink.x), 'shared layer')}") if view.kink else None
    title = f"shared layers (S) of {view.num_layers}"
    return curve_picture([series], title, x_high, retention_guides(view.num_layers, x_high), kink, size)


def comparison_picture(views: Sequence[RunView], size: str = "wide") -> CurvePicture:
    """The curves of several runs by share of layers, each against its own baseline."""
    series = [series_of(view, as_share=True) for view in views]
    x_high = max([mark.x for one in series for mark in (*one.marks, *one.references)] or [100.0])
    return curve_picture(series, "shared layers (S), % of all", min(100.0, x_high + 1), size=size)


def retention_guides(num_layers: int, x_high: float) -> list[tuple[float, str]]:
    """Where 1/2, 1/4 and 1/8 of the layers are kept, as far as the axis goes."""
    kept = {2: -(-num_layers // 2), 4: -(-num_layers // 4), 8: -(-num_layers // 8)}
    guides = [(float(num_layers - count), f"1/{part}") for part, count in kept.items()]
    return [(x, label) for x, label in guides if x <= x_high]
