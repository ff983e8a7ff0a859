"""The patterns of an evaluation, one strip each: F layers, and what the S layers borrow, as positions in pixels."""

from __future__ import annotations

from dataclasses import dataclass

from icsearch.report import numbers
from icsearch.report.eval_view import EvalRow, EvalView, shortened
from icsearch.report.parts import LegendEntry
from icsearch.report.scales import ShareScale, label_every

LEFT, TOP, RIGHT = 2.0, 6.0, 10.0
WIDEST, NARROWEST_CELL, WIDEST_CELL = 900.0, 9.0, 44.0
STRIP, TEXT, SPACE, FOOT = 16.0, 17.0, 13.0, 34.0  # heights
LONGEST_NAME = 47
SCALE = ShareScale(0.1)


@dataclass(frozen=True)
class StripCell:
    x: float
    css: str
    tooltip: str


@dataclass(frozen=True)
class PatternStrip:
    """One pattern: its name with badges on one line, its layers below."""

    y: float
    name: str
    notes: str
    summary: str
    cells: tuple[StripCell, ...]


@dataclass(frozen=True)
class StripsPicture:
    """Everything that the SVG needs, in pixels of its view box."""

    width: float
    height: float
    cell: float
    strip: float
    strips: tuple[PatternStrip, ...]
    columns: tuple[tuple[float, str], ...]
    legend: tuple[LegendEntry, ...]


def strips_picture(view: EvalView) -> StripsPicture:
    """All patterns above each other, layer by layer."""
    n = view.num_layers
    cell = max(NARROWEST_CELL, min(WIDEST_CELL, (WIDEST - LEFT - RIGHT) / n))
    rows = [row for row in view.rows if not row.is_baseline]
    every = label_every(n, cell, 17.0)
    return StripsPicture(
        width=max(LEFT + n * cell + RIGHT, 340.0),
        height=TOP + len(rows) * (TEXT + STRIP + SPACE) + FOOT - SPACE,
        cell=cell,
        strip=STRIP,
        strips=tuple(_strip(row, index, cell) for index, row in enumerate(rows)),
        columns=tuple((LEFT + (i + 0.5) * cell, str(i)) for i in range(0, n, every)),
        legend=_legend(rows),
    )


def _strip(row: EvalRow, index: int, cell: float) -> PatternStrip:
    notes = [note for note, given in (("in-sample", row.in_sample), ("other model", row.foreign)) if given]
    return PatternStrip(
        y=TOP + index * (TEXT + STRIP + SPACE) + TEXT,
        name=shortened(row.name, LONGEST_NAME),
        notes=", ".join(notes),
        summary=overlap_summary(row),
        cells=tuple(_cell(row, layer, source, cell) for layer, source in enumerate(row.pattern.sources())),
    )


def _cell(row: EvalRow, layer: int, source: int, cell: float) -> StripCell:
    if layer == source:
        return StripCell(LEFT + layer * cell, "final-F", f"layer {layer} runs its own indexer")
    tooltip, share = f"layer {layer} uses the selection of layer {source}", row.overlap.get(layer)
    if share is None:
        return StripCell(LEFT + layer * cell, "final-S", tooltip)
    text = f"{tooltip}: {numbers.percent(share)} of it is what its own indexer would choose"
    return StripCell(LEFT + layer * cell, SCALE.css_class(share), text)


def overlap_summary(row: EvalRow) -> str:
    """``overlap 71% on average, lowest 38% (layer 9)``, or the number of F layers where none was measured."""
    kept = f"{row.full} F"
    if not row.overlap:
        return kept
    mean = sum(row.overlap.values()) / len(row.overlap)
    share, layer = min((share, layer) for layer, share in row.overlap.items())
    return f"{kept} · overlap {numbers.percent(mean)}, lowest {numbers.percent(share)} (layer {layer})"


def _legend(rows: list[EvalRow]) -> tuple[LegendEntry, ...]:
    """The classes that occur; F and unmeasured layers come from the template."""
    used = {SCALE.css_class(share) for row in rows for share in row.overlap.values()}
    return tuple(LegendEntry(css, _as_percent(label)) for css, label in SCALE.labels() if css in used)


def _as_percent(label: str) -> str:
    sign, _, bound = label.partition(" ")
    return f"{sign} {float(bound):.0%}"
