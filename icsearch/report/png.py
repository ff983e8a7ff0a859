"""curve.png through matplotlib, drawn on its own canvas without pyplot's global state."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from icsearch.report import numbers
from icsearch.report.curve import Mark, Series, loss_range, retention_guides, series_of
from icsearch.report.view import RunView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patheffects import AbstractPathEffect

# Okabe and Ito's colours, told apart by colour-blind readers too.
SEARCHED, UNIFORM, MUTED, INK = "#0072B2", "#D55E00", "#8A929C", "#22272E"


def curve_png(view: RunView, dpi: int = 160) -> bytes:
    """The loss curve of one run as PNG bytes: the same numbers as the report's picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.8), dpi=dpi, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    series = series_of(view)
    low, high = loss_range([series])
    x_high = max([mark.x for mark in (*series.marks, *series.references)] or [1.0]) + 0.5
    axes.set_xlim(-0.02 * x_high, x_high * 1.02)
    axes.set_ylim(low - 0.02 * (high - low), high)
    _style(axes, view)
    _guides(axes, retention_guides(view.num_layers, x_high))
    _searched(axes, series)
    _uniform(axes, series, high)
    _kink(axes, view)
    axes.legend(loc="center left", frameon=False, labelcolor=INK, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _style(axes: Axes, view: RunView) -> None:
    from matplotlib.ticker import MaxNLocator

    known = str(view.start["model"].get("name_or_path", ""))
    name = _short(known.encode(errors="replace").decode(), 50)  # a path may have bytes that are no sign
    state = "" if view.finished else " (unfinished)"
    axes.set_title(f"{name}: loss by shared layers{state}", loc="left", fontsize=11, color=INK, parse_math=False)
    axes.set_xlabel(f"shared layers (S) of {view.num_layers}", color=INK, labelpad=16)
    base = f" ({numbers.loss(view.points[0].loss)})" if view.points else ""
    axes.set_ylabel(f"loss above baseline{base},\nnats per token, on the batches searched on", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#E4E7EB", linewidth=0.8)
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _guides(axes: Axes, guides: list[tuple[float, str]]) -> None:
    for x, label in guides:
        axes.axvline(x, color="#D5DAE0", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"{label} F",
            (x, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -19),
            textcoords="offset points",
            fontsize=8,
            color=MUTED,
            ha="center",
            va="top",
        )


def _searched(axes: Axes, series: Series) -> None:
    axes.errorbar(
        [mark.x for mark in series.marks],
        [mark.difference.delta for mark in series.marks],
        yerr=_errors(series.marks),
        color=SEARCHED,
        marker="o",
        markersize=3.8,
        linewidth=1.8 if series.joined else 0,
        elinewidth=1,
        capsize=2,
        label=f"{'searched' if series.joined else 'chosen by similarity'}, ± 1 paired std. error",
    )


def _uniform(axes: Axes, series: Series, high: float) -> None:
    inside = [mark for mark in series.references if mark.difference.delta <= high]
    outside = [mark for mark in series.references if mark.difference.delta > high]
    if series.references:
        axes.errorbar(
            [m.x for m in inside],
            [m.difference.delta for m in inside],
            yerr=_errors(inside),
            markersize=5,
            elinewidth=1,
            capsize=2,
            label="uniform",
            color=UNIFORM,
            marker="D",
            linestyle="none",
        )
    for mark in inside:
        axes.annotate(
            mark.label,
            (mark.x, mark.difference.delta),
            xytext=(-7, 5),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=UNIFORM,
            path_effects=_halo(),
        )
    for row, mark in enumerate(outside):
        axes.plot([mark.x], [high], marker="^", markersize=6, color=UNIFORM, clip_on=False)
        text = f"{mark.label}: {numbers.difference(mark.difference)}"
        axes.annotate(
            text,
            (mark.x, high),
            xytext=(-8, -5 - 12 * row),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8.5,
            color=UNIFORM,
            path_effects=_halo(),
        )


def _halo() -> list[AbstractPathEffect]:
    """White behind the letters, so that lines do not strike them out."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3, foreground="white")]


def _kink(axes: Axes, view: RunView) -> None:
    if view.kink is None:
        return
    axes.plot(
        [x for x, _ in view.kink.fit],
        [y for _, y in view.kink.fit],
        color=MUTED,
        linewidth=1.1,
        linestyle="--",
        zorder=1.5,
        label=f"two-line fit, kink at {round(view.kink.x)}",
    )
    axes.axvline(view.kink.x, color=MUTED, linewidth=0.8, linestyle="--", zorder=1.5)


def _errors(marks: list[Mark] | tuple[Mark, ...]) -> list[float]:
    return [mark.difference.std_err if math.isfinite(mark.difference.std_err) else 0.0 for mark in marks]


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]
