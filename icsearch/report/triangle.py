"""Lower-triangle heatmaps, layer by source layer, as positions in pixels: similarity and overlap of selections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from icsearch.core.pattern import Pattern
from icsearch.report.parts import LegendEntry
from icsearch.report.scales import ShareScale, label_every, share_scale

LEFT, TOP, RIGHT, BOTTOM = 56.0, 8.0, 8.0, 54.0
WIDEST, NARROWEST_CELL, WIDEST_CELL = 370.0, 6.0, 24.0


@dataclass(frozen=True)
class TriangleCell:
    x: float
    y: float
    css: str
    tooltip: str


@dataclass(frozen=True)
class TrianglePicture:
    """Everything that the SVG needs, in pixels of its view box. `chosen`: corners of the outlined cells."""

    title: str
    width: float
    height: float
    cell: float
    gap: float
    left: float
    top: float
    bottom: float
    cells: tuple[TriangleCell, ...]
    chosen: tuple[tuple[float, float], ...]
    letters: tuple[tuple[float, str], ...]
    labels: tuple[tuple[float, str], ...]
    legend: tuple[LegendEntry, ...]


def triangle_picture(title: str, what: str, rows: Sequence[Sequence[float]], pattern: Pattern) -> TrianglePicture:
    """A heatmap of `rows[layer][source]`, each S layer's own source outlined. `what` names the number in tooltips."""
    n = len(pattern)
    cell = max(NARROWEST_CELL, min(WIDEST_CELL, WIDEST / n))
    scale = share_scale(value for row in rows for value in row)
    cells = tuple(
        _cell(layer, source, value, cell, scale, what)
        for layer, row in enumerate(rows)
        for source, value in enumerate(row)
    )
    return TrianglePicture(
        title=title,
        width=LEFT + n * cell + RIGHT,
        height=TOP + n * cell + BOTTOM,
        cell=cell,
        gap=1.0 if cell >= 8 else 0.5,
        left=LEFT,
        top=TOP,
        bottom=TOP + n * cell,
        cells=cells,
        chosen=_chosen(pattern, cell),
        letters=tuple((i * cell, letter) for i, letter in enumerate(pattern.letters)),
        labels=tuple(((i + 0.5) * cell, str(i)) for i in range(0, n, label_every(n, cell, 15.0))),
        legend=_legend(scale, cells),
    )


def _cell(layer: int, source: int, value: float, cell: float, scale: ShareScale, what: str) -> TriangleCell:
    tooltip = f"layer {layer} under layer {source}'s selection: {what} {value:.4f}"
    return TriangleCell(LEFT + source * cell, TOP + layer * cell, scale.css_class(value), tooltip)


def _chosen(pattern: Pattern, cell: float) -> tuple[tuple[float, float], ...]:
    pairs = [(layer, source) for layer, source in enumerate(pattern.sources()) if layer != source]
    return tuple((LEFT + source * cell, TOP + layer * cell) for layer, source in pairs)


def _legend(scale: ShareScale, cells: Sequence[TriangleCell]) -> tuple[LegendEntry, ...]:
    used = {cell.css for cell in cells}
    return tuple(LegendEntry(css, label) for css, label in scale.labels() if css in used)
