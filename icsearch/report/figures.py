"""The pictures of a run and of an evaluation, one matplotlib Figure each."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import Difference
from icsearch.report import numbers
from icsearch.report.canvas import INK, MUTED, PALETTE, PAPER, PIXEL, SERIES, drawing, fit, new_figure, note, plain
from icsearch.report.eval_view import EvalRow, EvalView
from icsearch.report.sentences import badges, overlap_summary
from icsearch.report.view import RunView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNIFORM_SERIES = 1  # orange, as in the curve of a run
KL_SERIES = 2  # green
MARKERS = {"uniform": "D", "dp-baseline": "s", "published": "^", "letters": "P"}
CHART, NARROW_CHART = (6.7, 3.6), (3.0, 3.3)  # inches of the axes; a page shows the narrow one on a phone
CHART_MARGINS = (0.85, 0.12, 0.3, 0.58)  # left, right, top, bottom
OFF_SCALE = 2.0  # a uniform pattern higher than this many times the curve's height is named at the edge instead
EDGE_LINE = 0.06  # of the picture's height, for a label at the edge
DODGE = 0.014  # of the picture's width, between patterns with as many F layers
CELL_GAP = 0.04  # of a cell's width
TRIANGLE, NARROW_TRIANGLE = 370.0, 225.0  # pixels; two and three in a row
CELL_MARGINS = (0.65, 0.1, 0.05, 0.42)


# --- colours ----------------------------------------------------------------------------------------------------------

WARM_LEVELS, COOL_LEVELS = 8, 4  # half decades of rising loss, from the noise up, and of falling loss
SHARE_LEVELS = 9


@dataclass(frozen=True)
class CostScale:
    """Colour classes of loss differences, nats per token: one neutral up to `noise`, then half decades to each side.

    Where `signed` is False there is only one side.
    """

    noise: float
    signed: bool = True

    @property
    def bounds(self) -> list[float]:
        """The largest absolute cost of each level."""
        return [self.noise * 10 ** (level / 2) for level in range(WARM_LEVELS)]

    def css_class(self, cost: float) -> str:
        """``h0``, ``h3`` for a rise, ``c2`` for a fall."""
        level = bisect_left(self.bounds, abs(cost))
        return f"h{level}" if cost > 0 or level == 0 else f"c{min(level, COOL_LEVELS)}"

    def labels(self, costs: Iterable[float]) -> list[tuple[str, str]]:
        """(class, what it stands for) for all classes from the lowest of the costs to the highest."""
        bounds = [numbers.compact(bound) for bound in self.bounds]
        cool = [(f"c{level}", f"≥ -{bounds[level]}") for level in range(1, COOL_LEVELS)]
        cool.append((f"c{COOL_LEVELS}", f"< -{bounds[COOL_LEVELS - 1]}"))
        warm = [
            ("h0", f"within ±{bounds[0]}" if self.signed else f"≤ {bounds[0]}"),
            *((f"h{i}", f"≤ {bounds[i]}") for i in range(1, WARM_LEVELS)),
        ]
        labels = [*reversed(cool), *warm, (f"h{WARM_LEVELS}", f"> {bounds[-1]}")]
        names = [name for name, _ in labels]
        places = [names.index(name) for name in ("h0", *map(self.css_class, costs))]
        return labels[min(places) : max(places) + 1]


def cost_scale(costs: Sequence[float], errors: Iterable[float]) -> CostScale:
    """A scale that starts at the noise: the median standard error, rounded to one digit.

    Without errors (one sequence) it spans the levels down from the largest cost.
    """
    known = sorted(error for error in errors if math.isfinite(error) and error > 0)
    largest = max((abs(cost) for cost in costs), default=0.0)
    noise = known[len(known) // 2] if known else largest / 10 ** (WARM_LEVELS / 2)
    return CostScale(float(f"{noise:.0e}") if noise > 0 else 1e-6)


def run_scale(view: RunView) -> CostScale:
    """The colours of a run's costs."""
    return cost_scale([cell.cost.delta for cell in view.cells], (cell.cost.std_err for cell in view.cells))


def eval_scale(view: EvalView) -> CostScale:
    """The colours of an evaluation: neutral up to the smallest error, within four decades of the largest difference.

    Errors grow with the differences here, so that a typical one would hide what the best patterns cost.
    """
    others = [row.difference for row in view.rows if not row.is_baseline]
    floor = max([0.0, *(abs(d.delta) for d in others)]) / 1e4
    errors = [max(d.std_err, floor) for d in others if d.std_err > 0]
    return cost_scale([d.delta for d in others], sorted(errors)[:1])


@dataclass(frozen=True)
class ShareScale:
    """Nine colour classes of equal width for values up to 1: h0 the highest, h8 all that is left below."""

    step: float

    def css_class(self, value: float) -> str:
        level = math.ceil((1 - value) / self.step - 1e-9) - 1
        return f"h{min(max(level, 0), SHARE_LEVELS - 1)}"

    def labels(self, values: Iterable[float]) -> list[tuple[str, str]]:
        """(class, what it stands for) for the classes that occur, the highest first."""
        decimals = max(0, -math.floor(math.log10(self.step) + 1e-9))
        bounds = [f"{1 - (level + 1) * self.step:.{decimals}f}" for level in range(SHARE_LEVELS)]
        labels = [(f"h{level}", f"≥ {bound}") for level, bound in enumerate(bounds[:-1])]
        used = set(map(self.css_class, values))
        return [label for label in [*labels, (f"h{SHARE_LEVELS - 1}", f"< {bounds[-2]}")] if label[0] in used]


def kl_scale(values: Sequence[float]) -> CostScale:
    """A scale that begins at the smallest of what is more than nothing, or four decades below the largest."""
    least = min((value for value in values if value > 0), default=0.0)
    noise = max(least, max(values, default=0.0) / 10 ** (WARM_LEVELS / 2))
    return CostScale(float(f"{noise:.0e}") if noise > 0 else 1e-6, signed=False)


def share_scale(values: Iterable[float]) -> ShareScale:
    """A scale of round steps whose lowest class, open below, holds little more than the smallest value."""
    rough = max(1 - min(values, default=0.0), 1e-9) / (SHARE_LEVELS + 1)
    power = 10.0 ** math.floor(math.log10(rough))
    return ShareScale(max(next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9)), 1e-3))


# --- the loss curve ---------------------------------------------------------------------------------------------------


@drawing()
def curve(views: Sequence[RunView], size: tuple[float, float] = CHART) -> Figure:
    """The loss curve of one run by its shared layers, with its kink; of several runs by the share of their layers.

    Uniform patterns stand beside it; those far above are named at the upper edge. So does what was found off the nested
    path by a search on a second-order table, with the path's KL where it is alone.
    """
    figure, axes = new_figure()
    alone = views[0] if len(views) == 1 else None
    low, high = loss_range(views)
    above = sum(r.difference.delta > high for r in alone.references) if alone else 1
    axes.set_ylim(low, low + (high - low) / (1 - min(EDGE_LINE * above, 0.5)))
    x_high = 100.0
    if alone:
        x_high = 0.5 + max([1, *(p.shared for p in alone.points), *(r.shared for r in alone.references)])
        base = f" ({numbers.loss(alone.points[0].loss)})" if alone.points else ""
        state = "" if alone.record.finished else " (unfinished)"
        what = f"loss above baseline{base}{', and KL' if alone.record.by_table else ''}{state}"
        axes.set_title(f"{plain(alone.model_name, round(6 * size[0]))}: {what}", fontsize=10)
        _retentions(axes, alone.num_layers, x_high)
        _kink(axes, alone)
    axes.set_xlim(-0.02 * x_high, 1.02 * x_high)
    for index, view in enumerate(views):
        x_scale = 1.0 if alone else 100 / view.num_layers
        name = "chosen by similarity" if view.by_similarity else "searched"
        colour, label = SERIES[index % len(SERIES)], f"{name}, ± one paired standard error"
        axes.errorbar(
            [point.shared * x_scale for point in view.points],
            [point.difference.delta for point in view.points],
            yerr=[numbers.finite(point.difference.std_err) for point in view.points],
            color=colour,
            marker="o",
            markersize=4,
            linewidth=0 if view.by_similarity else 2,
            elinewidth=1.1,
            label=("nested path, loss" if view.record.by_table else label) if alone else plain(view.name, 40),
        )
        if view.record.by_table:
            _off_path(axes, view, x_scale, colour, alone is not None)
        _references(axes, view, x_scale, high, None if alone else colour)
    _axes_of_losses(axes, f"shared layers (S) of {alone.num_layers}" if alone else "shared layers (S), % of all")
    if alone and alone.record.by_table:
        axes.set_ylabel("above baseline, nats per token")
    return fit(figure, axes, *size, CHART_MARGINS, 2.5)


def loss_range(views: Sequence[RunView]) -> tuple[float, float]:
    """(low, high) of the loss axis: all of the curves, and the uniform patterns that are not far above them."""
    points = [_ends(point.difference) for view in views for point in (*view.points, *view.off_path)]
    if len(views) == 1 and views[0].record.by_table:
        points += [_ends(point.kl) for point in views[0].points if point.kl]
    references = [_ends(reference.difference) for view in views for reference in view.references]
    high = max((top for _, top in points), default=0.0)
    if high <= 0:
        high = max((top for _, top in references), default=0.0)
    extent = high - min([0.0, *(bottom for bottom, _ in points)])
    shown = [ends for ends in references if ends[1] <= OFF_SCALE * extent]
    high = max([high, *(top for _, top in shown)])
    low = min([0.0, *(bottom for bottom, _ in [*points, *shown])])
    return (1.08 * low - 0.02 * high, 1.08 * high) if high > 0 else (1.08 * low - 2e-5, 1e-3)


def _off_path(axes: Axes, view: RunView, x_scale: float, colour: str, alone: bool) -> None:
    points = view.off_path
    if alone:
        kl = [point.kl or Difference(0.0, 0.0) for point in view.points]
        axes.errorbar(
            [point.shared * x_scale for point in view.points],
            [one.delta for one in kl],
            yerr=[numbers.finite(one.std_err) for one in kl],
            color=SERIES[KL_SERIES],
            marker="s",
            markersize=3.5,
            linewidth=1.2,
            elinewidth=0.9,
            label="nested path, KL",
        )
    if points:
        axes.errorbar(
            [point.shared * x_scale for point in points],
            [point.difference.delta for point in points],
            yerr=[numbers.finite(point.difference.std_err) for point in points],
            color=colour,
            markerfacecolor=PAPER,
            marker="*",
            markersize=11,
            linestyle="none",
            elinewidth=1.1,
            zorder=3,
            label="best measured, off the path" if alone else "",
        )


def _ends(difference: Difference) -> tuple[float, float]:
    """The ends of an error bar."""
    error = numbers.finite(difference.std_err)
    return difference.delta - error, difference.delta + error


def _axes_of_losses(axes: Axes, x_title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x_title, labelpad=13)
    axes.set_ylabel("loss above baseline, nats per token")
    axes.grid(axis="y", linewidth=0.8)
    axes.axhline(0, color=MUTED, linewidth=1, zorder=1.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _retentions(axes: Axes, num_layers: int, x_high: float) -> None:
    """Where 1/2, 1/4 and 1/8 of the layers are kept, as far as the axis goes."""
    for part in (2, 4, 8):
        x = num_layers - -(-num_layers // part)
        if x <= x_high:
            axes.axvline(x, color=MUTED, linewidth=0.8, linestyle=":", zorder=1)
            note(axes, f"1/{part} F", (x, 0), (0, -23), MUTED, "center", xycoords=("data", "axes fraction"), fontsize=8)


def _kink(axes: Axes, view: RunView) -> None:
    if view.kink is None:
        return
    x = view.kink.x
    dashed: dict[str, Any] = {"color": INK, "alpha": 0.5, "linestyle": "--", "zorder": 1.5}
    axes.plot(*zip(*view.kink.fit, strict=True), linewidth=1.1, label="two straight lines", **dashed)
    axes.axvline(x, linewidth=0.9, **dashed)
    left = x > view.num_layers / 3  # left of a kink the curve is low and leaves space for the label
    place = (x, sum(axes.get_ylim()) / 2)
    note(
        axes,
        f"kink: {numbers.plural(round(x), 'shared layer')}",
        place,
        (-6 if left else 6, 0),
        INK,
        "right" if left else "left",
    )


def _references(axes: Axes, view: RunView, x_scale: float, high: float, colour: str | None) -> None:
    """Diamonds for uniform patterns, triangles at the edge for those above `high`; named where no `colour` is given."""
    uniform = sorted(view.references, key=lambda reference: reference.shared)
    xs = {reference.label: reference.shared * x_scale for reference in uniform}
    inside = [reference for reference in uniform if reference.difference.delta <= high]
    outside = [reference for reference in uniform if reference.difference.delta > high]
    if uniform:
        axes.errorbar(
            [xs[reference.label] for reference in inside],
            [reference.difference.delta for reference in inside],
            yerr=[numbers.finite(reference.difference.std_err) for reference in inside],
            color=colour or PALETTE["uniform"],
            markerfacecolor=PAPER if colour else PALETTE["uniform"],
            marker="D",
            markersize=5.5,
            linestyle="none",
            elinewidth=1.2,
            label="" if colour else "uniform, same batches",
        )
    bottom, top = axes.get_ylim()
    for reference in uniform:
        x, y, text, up = xs[reference.label], reference.difference.delta, reference.label, 6
        if reference in outside:  # with its value, since no axis says it; labels stand below each other
            y = top if colour else top - (outside.index(reference) + 0.5) * EDGE_LINE * (top - bottom)
            text, up = f"{text}: {numbers.difference(reference.difference)}", 0
            axes.plot([x], [y], "^", markersize=6.5, color=colour or PALETTE["uniform"], clip_on=False)
        if colour is None:
            side, ha = (-6, "right") if x > sum(axes.get_xlim()) / 2 else (6, "left")
            note(axes, text, (x, y), (side, up), PALETTE["uniform"], ha, weight="bold")


# --- colours in cells -------------------------------------------------------------------------------------------------


def _cells(axes: Axes, corners: Sequence[tuple[float, float]], height: float, **style: Any) -> None:
    """Rectangles of width 1 with a gap about them, all in one path: a page of many cells stays small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path
    from matplotlib.transforms import Affine2D

    square, shrunk = Path.unit_rectangle(), Affine2D().scale(1 - 2 * CELL_GAP, height - 2 * CELL_GAP)
    rectangles = [square.transformed(shrunk + Affine2D().translate(x + CELL_GAP, y + CELL_GAP)) for x, y in corners]
    if rectangles:
        axes.add_patch(PathPatch(Path.make_compound_path(*rectangles), **{"linewidth": 0, **style}))


def _coloured(
    axes: Axes, classes: Mapping[tuple[float, float], str], height: float, labels: Sequence[tuple[str, str]]
) -> None:
    """Cells in the colours of their classes; the labels make the legend."""
    for css, label in labels:
        corners = [corner for corner, own in classes.items() if own == css]
        _cells(axes, corners or [(-9, -9)], height, facecolor=PALETTE[css], label=label)


def _letters(axes: Axes, pattern: Pattern, y: float, height: float) -> None:
    """A row of layers, F filled."""
    for letter, name in (("F", "full"), ("S", "shared")):
        corners = [(float(i), y) for i, own in enumerate(pattern.letters) if own == letter]
        _cells(axes, corners, height, facecolor=PALETTE[name])


def _cell_axes(axes: Axes, width: float, height: float, pixels: float) -> None:
    """Layers from the left, rows downwards, as many labels as there is space for."""
    from matplotlib.ticker import FixedLocator

    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=MUTED)
    layers = [i + 0.5 for i in range(0, int(width), label_every(int(width), pixels, 17.0))]
    axes.xaxis.set_major_locator(FixedLocator(layers))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x - 0.5:.0f}")
    axes.set_xlabel("layer", fontsize=8.5)


def label_every(count: int, pixels: float, needed: float) -> int:
    """Label each n-th of `count` cells of `pixels` each so that labels have `needed` pixels: 1, 2, 5, 10, 20..."""
    return next((every for every in (1, 2, 5, 10, 20, 50, 100) if every * pixels >= needed), count)


@drawing()
def heatmap(view: RunView) -> Figure:
    """What each candidate of each step would have cost, layer by layer; the pattern reached in the last row."""
    rows = step_rows(view)
    count, n = len(set(rows.values())), view.num_layers
    width, height = max(9.0, min(50.0, 860 / n)), max(9.0, min(22.0, 420 / count))
    figure, axes = new_figure()
    scale, places = run_scale(view), {cell: (float(cell.layer), float(rows[cell.step])) for cell in view.cells}
    classes = {place: scale.css_class(cell.cost.delta) for cell, place in places.items()}
    _coloured(axes, classes, 1, scale.labels(cell.cost.delta for cell in view.cells))
    _cells(
        axes, [place for cell, place in places.items() if cell.committed], 1, fill=False, edgecolor=INK, linewidth=1.4
    )
    tied = [place for cell, place in places.items() if cell.tied]
    axes.plot([x + 0.5 for x, _ in tied], [y + 0.5 for _, y in tied], ".", color=INK, markersize=4)
    _letters(axes, view.points[-1].pattern, count + 0.25, 0.55)
    for first, _ in view.blocks[1:]:
        axes.axvline(first, color=INK, linewidth=0.8, alpha=0.6)
    _cell_axes(axes, n, count + 0.85, width)
    steps = {row: [step for step in rows if rows[step] == row] for row in range(count)}
    every = label_every(count, height, 13.0)
    shown = [row for row in steps if row == 0 or (row + 1) % every == 0]
    names = [f"{min(steps[row])}–{max(steps[row])}" if len(steps[row]) > 1 else f"{steps[row][0]}" for row in shown]
    axes.set_yticks([row + 0.5 for row in shown], names)
    axes.set_ylabel("steps" if len(view.blocks) > 1 else "step", fontsize=8.5)
    return fit(figure, axes, n * width * PIXEL, (count + 0.85) * height * PIXEL, CELL_MARGINS, 1.05)


def step_rows(view: RunView) -> dict[int, int]:
    """The row of each step in the heatmap, from 0.

    With pipeline stages a row is a round: it holds one step of each block, whose layers do not overlap, and a new
    one begins when the blocks start over.
    """
    first_layers = {cell.step: cell.layer for cell in reversed(view.cells)}
    rows: dict[int, int] = {}
    row, last_block = -1, len(view.blocks)
    for step in sorted(first_layers):
        block = next(i for i, (first, last) in enumerate(view.blocks) if first <= first_layers[step] < last)
        row += block <= last_block
        rows[step], last_block = row, block
    return rows


@drawing()
def triangle(
    rows: Sequence[Sequence[float]],
    pattern: Pattern,
    scale: CostScale | ShareScale | None = None,
    side: float = TRIANGLE,
) -> Figure:
    """`rows[layer][source]` below the diagonal, each S layer's own source outlined, the pattern along both edges.

    Without a scale the values are shares. `side`: pixels, where layers are neither very few nor very many.
    """
    n = len(pattern)
    width = max(6.0, min(24.0, side / n))
    figure, axes = new_figure()
    values = {
        (float(source), float(layer)): value for layer, row in enumerate(rows) for source, value in enumerate(row)
    }
    scale = scale or share_scale(values.values())
    _coloured(axes, {p: scale.css_class(v) for p, v in values.items()}, 1, scale.labels(values.values()))
    chosen = [(float(source), float(layer)) for layer, source in enumerate(pattern.sources()) if layer != source]
    _cells(axes, chosen, 1, fill=False, edgecolor=INK, linewidth=1.3)
    _letters(axes, pattern, n + 0.3, 0.6)
    _cell_axes(axes, n, n + 0.9, width)
    axes.set_yticks(axes.get_xticks(), [f"{tick - 0.5:.0f}" for tick in axes.get_xticks()])
    axes.set_xlabel("source layer", fontsize=8.5)
    axes.set_ylabel("layer", fontsize=8.5)
    entry = 1.15 if isinstance(scale, CostScale) else 0.86
    return fit(figure, axes, n * width * PIXEL, (n + 0.9) * width * PIXEL, CELL_MARGINS, entry)


OVERLAP_SCALE = ShareScale(0.1)


@drawing()
def strips(view: EvalView) -> Figure:
    """The patterns of an evaluation below each other: F layers filled, S layers by what they borrow."""
    n, rows = view.num_layers, [row for row in view.rows if not row.is_baseline]
    width, line = max(9.0, min(44.0, 888 / n)), 2.9  # a strip of height 1, and its name above it
    figure, axes = new_figure()
    classes: dict[tuple[float, float], str] = {}
    for index, row in enumerate(rows):
        y = index * line + 1.2
        for layer, letter in enumerate(row.pattern.letters):
            share = row.overlap.get(layer)
            unmeasured = "full" if letter == "F" else "shared"
            classes[float(layer), y] = unmeasured if share is None else OVERLAP_SCALE.css_class(share)
        notes = f" ({', '.join(badges(row))})" if badges(row) else ""
        given: dict[str, Any] = {"fontsize": 8.5, "va": "bottom", "clip_on": False}
        axes.text(0.04, y - 0.1, f"{plain(row.name, 47)}{notes}", weight="bold", **given)
        axes.text(n, y - 0.1, overlap_summary(row), color=MUTED, ha="right", **given)
    shares = OVERLAP_SCALE.labels(share for row in rows for share in row.overlap.values())
    labels = [("full", "F: runs its indexer"), *((css, f"{label[:2]}{float(label[2:]):.0%}") for css, label in shares)]
    if "shared" in classes.values():
        labels.append(("shared", "S: borrows the selection before it"))
    _coloured(axes, classes, 1, labels)
    _cell_axes(axes, n, max(len(rows), 1) * line - 0.6, width)
    axes.set_yticks([])
    margins = (0.05, max(0.1, 3.5 - n * width * PIXEL), 0.05, 0.42)
    return fit(figure, axes, n * width * PIXEL, max(len(rows), 1) * line * 17 * PIXEL, margins, 1.2)


# --- an evaluation ----------------------------------------------------------------------------------------------------


@drawing()
def scatter(view: EvalView, size: tuple[float, float] = CHART) -> Figure:
    """Loss against retention for every pattern. Hollow: in-sample. A line joins the nested patterns of one search.

    The loss axis is linear up to the smallest standard error and logarithmic beyond.
    """
    from matplotlib.ticker import SymmetricalLogLocator

    figure, axes = new_figure()
    others = [row for row in view.rows if not row.is_baseline]
    unit, x_high = eval_scale(view).noise, max([row.shared for row in others], default=1) + 0.75
    high = max([unit, *(_ends(row.difference)[1] for row in others)])
    low = min([-unit / 2, *(_ends(row.difference)[0] for row in others)])
    decades = math.log10(max(high, -low) / unit)
    axes.set_yscale("symlog", linthresh=unit, linscale=0.5)
    axes.yaxis.set_major_locator(
        SymmetricalLogLocator(base=10, linthresh=unit, subs=(1, 2, 5) if decades < 3 else (1,))
    )
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}".replace("-", "−"))
    axes.set_xlim(-0.03 * x_high, x_high)
    axes.set_ylim(1.1 * low, 1.2 * high)
    _retentions(axes, view.num_layers, x_high)
    axes.plot(
        [0], [0], "o", color=INK, markersize=5, label=f"{view.baseline_name} ({numbers.loss(view.baseline.loss)})"
    )
    xs = {}
    for row in others:  # those with as many F layers stand side by side
        beside = [other.name for other in others if other.shared == row.shared]
        place = beside.index(row.name) - (len(beside) - 1) / 2
        xs[row.name] = row.shared + place * DODGE * x_high * CHART[0] / size[0]
    for name, method, colour in series(view):
        rows = [row for row in others if (row.series, row.method) == (name, method)]
        marker = MARKERS.get(method, "o")
        if is_nested_run(rows):
            axes.plot(
                [xs[row.name] for row in rows], [row.difference.delta for row in rows], color=colour, linewidth=1.8
            )
        for row in rows:
            axes.errorbar(
                [xs[row.name]],
                [row.difference.delta],
                yerr=numbers.finite(row.difference.std_err),
                color=colour,
                marker=marker,
                markersize=6.5,
                markerfacecolor=PAPER if row.in_sample else colour,
                linestyle="none",
                elinewidth=1.2,
                label=plain(name, 30) if row is rows[0] else "",
            )
    _axes_of_losses(axes, f"shared layers (S) of {view.num_layers}")
    return fit(figure, axes, *size, CHART_MARGINS, 1.9)


def series(view: EvalView) -> list[tuple[str, str, str]]:
    """(name, method, colour) of what is told apart in a picture: a run with its nested patterns, or a method.

    Uniform patterns keep their colour, the others take the rest in turn.
    """
    free = itertools.cycle([colour for index, colour in enumerate(SERIES) if index != UNIFORM_SERIES])
    names = dict.fromkeys((row.series, row.method) for row in view.rows if not row.is_baseline)
    return [(*name, SERIES[UNIFORM_SERIES] if name[1] == "uniform" else next(free)) for name in names]


def is_nested_run(rows: Sequence[EvalRow]) -> bool:
    """Whether these are several patterns of one search, each with F layers of the one before it only."""
    kept = [set(row.pattern.full_layers) for row in rows]
    nested = all(later < earlier for earlier, later in itertools.pairwise(kept))
    return len(rows) > 1 and nested and all(row.series != row.method for row in rows)
