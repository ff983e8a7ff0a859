"""The heatmap steps × layers as positions in pixels: what each candidate of each step would have cost."""

from __future__ import annotations

from dataclasses import dataclass

from icsearch.report import numbers
from icsearch.report.parts import LegendEntry
from icsearch.report.scales import CostScale, cost_scale, label_every
from icsearch.report.view import Cell, RunView

LEFT, TOP, RIGHT, BOTTOM = 56.0, 8.0, 10.0, 58.0
WIDEST = 860.0


@dataclass(frozen=True)
class HeatCell:
    """One rectangle; `css` is its colour class."""

    x: float
    y: float
    css: str
    committed: bool
    tied: bool
    partial: bool
    tooltip: str


@dataclass(frozen=True)
class HeatPicture:
    """Everything that the SVG needs, in pixels of its view box."""

    width: float
    height: float
    cell_width: float
    cell_height: float
    left: float
    top: float
    bottom: float
    right: float
    cells: tuple[HeatCell, ...]
    columns: tuple[tuple[float, str], ...]
    rows: tuple[tuple[float, str], ...]
    borders: tuple[float, ...]
    final: tuple[tuple[float, str], ...]
    final_y: float
    legend: tuple[LegendEntry, ...]
    noise: str
    rounds: bool
    partial: bool


def heat_picture(view: RunView) -> HeatPicture | None:
    """The heatmap of a run, or None before the first candidate is scored."""
    if not view.cells:
        return None
    scale = scale_of(view)
    rows = step_rows(view)
    count = len(set(rows.values()))
    n = view.num_layers
    cell_width = max(9.0, min(50.0, WIDEST / n))
    cell_height = max(9.0, min(22.0, 420.0 / count))
    bottom = TOP + count * cell_height
    column_every = label_every(n, cell_width, 17.0)
    return HeatPicture(
        width=LEFT + n * cell_width + RIGHT,
        height=bottom + BOTTOM,
        cell_width=cell_width,
        cell_height=cell_height,
        left=LEFT,
        top=TOP,
        bottom=bottom,
        right=LEFT + n * cell_width,
        cells=tuple(_place(cell, rows[cell.step], scale, cell_width, cell_height) for cell in view.cells),
        columns=tuple((LEFT + (i + 0.5) * cell_width, str(i)) for i in range(0, n, column_every)),
        rows=tuple((TOP + (row + 0.5) * cell_height, label) for row, label in _row_labels(rows, cell_height)),
        borders=tuple(LEFT + first * cell_width for first, _ in view.blocks[1:]),
        final=tuple((LEFT + i * cell_width, letter) for i, letter in enumerate(view.points[-1].pattern.letters)),
        final_y=bottom + 5,
        legend=tuple(legend(scale, view)),
        noise=numbers.compact(scale.noise),
        rounds=len(view.blocks) > 1,
        partial=any(cell.given_up_after is not None for cell in view.cells),
    )


def step_rows(view: RunView) -> dict[int, int]:
    """The row of each step, from 0.

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


def _row_labels(rows: dict[int, int], height: float) -> list[tuple[int, str]]:
    """(row, its steps) for the rows that have space for a label."""
    steps: dict[int, list[int]] = {}
    for step, row in rows.items():
        steps.setdefault(row, []).append(step)
    every = label_every(len(steps), height, 13.0)
    names = {row: f"{min(s)}–{max(s)}" if len(s) > 1 else f"{s[0]}" for row, s in steps.items()}
    return [(row, names[row]) for row in names if row == 0 or (row + 1) % every == 0]


def scale_of(view: RunView) -> CostScale:
    """The colour scale of a run's costs, starting at the noise of the candidates' differences."""
    return cost_scale([c.cost.delta for c in view.cells], (c.cost.std_err for c in view.cells))


def legend(scale: CostScale, view: RunView) -> list[LegendEntry]:
    """The classes that occur, the smallest cost first, each with the costs that it stands for."""
    return [LegendEntry(css, label) for css, label in scale.labels([cell.cost.delta for cell in view.cells])]


def _place(cell: Cell, row: int, scale: CostScale, width: float, height: float) -> HeatCell:
    note = ", committed" if cell.committed else ", tied with the one committed" if cell.tied else ""
    if cell.given_up_after is not None:
        note = f", given up after {numbers.plural(cell.given_up_after, 'sequence')}"
    return HeatCell(
        x=LEFT + cell.layer * width,
        y=TOP + row * height,
        css=scale.css_class(cell.cost.delta),
        committed=cell.committed,
        tied=cell.tied,
        partial=cell.given_up_after is not None,
        tooltip=f"step {cell.step}, layer {cell.layer}: {numbers.difference(cell.cost)}{note}",
    )
