"""One evaluation as the rows and pictures of its page section; the templates lay them out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from icsearch.core.statistics import Difference
from icsearch.report import numbers
from icsearch.report.eval_view import Accuracy, EvalRow, EvalView, Gap, eval_headline, gap_text, perplexity, smallest
from icsearch.report.parts import LegendEntry, Provenance, Tile, provenance, value_and_error
from icsearch.report.scales import Axis, LogAxis
from icsearch.report.scatter import ScatterPicture, SeriesStyle, scatter_picture, styles
from icsearch.report.strips import StripsPicture, strips_picture
from icsearch.runs.results import split_notes

GAP_BAR = 180.0  # pixels
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Value:
    """A number and what stands below it: its error, or its interval. `css`, `bar`: colour and length of a bar, in %."""

    text: str
    note: str = ""
    css: str = ""
    bar: float = 0.0


@dataclass(frozen=True)
class TableRow:
    """One pattern as text."""

    name: str
    badges: tuple[str, ...]
    verdict: str
    cells: tuple[Value, ...]


@dataclass(frozen=True)
class RetentionGroup:
    """The rows with as many F layers."""

    title: str
    rows: tuple[TableRow, ...]


@dataclass(frozen=True)
class GapRow:
    """How much of uniform's loss a pattern avoids, and the bar that shows it, in pixels."""

    name: str
    badges: tuple[str, ...]
    uniform: str
    cost: str
    uniform_cost: str
    closed: str
    why_none: str
    x: float
    low: float
    high: float


@dataclass(frozen=True)
class GapTable:
    """`zero`, `one`: where the bars' scale has nothing and all of the gap closed."""

    rows: tuple[GapRow, ...]
    width: float
    zero: float
    one: float


@dataclass(frozen=True)
class Table:
    """Rows under headings; the first column names the row."""

    heads: tuple[str, ...]
    rows: tuple[TableRow, ...]


@dataclass(frozen=True)
class EstimateTable:
    """The cost of patterns that cost the same: as many F layers, whatever they are."""

    title: str
    names: str
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class EvalSection:
    """One evaluation, ready for the template."""

    number: int
    view: EvalView
    title: str
    headline: str
    cautions: tuple[str, ...]
    best_of: str
    tiles: tuple[Tile, ...]
    warnings: tuple[str, ...]
    task_heads: tuple[tuple[str, tuple[str, ...]], ...]
    groups: tuple[RetentionGroup, ...]
    pictures: tuple[ScatterPicture, ...]
    styles: tuple[SeriesStyle, ...]
    gaps: GapTable | None
    positions: Table | None
    position_legend: tuple[LegendEntry, ...]
    strips: StripsPicture
    has_overlap: bool
    letters: tuple[tuple[str, str], ...]
    estimates: tuple[EstimateTable, ...]
    measured: Table | None
    notes: tuple[str, ...]
    provenance: Provenance


def eval_section(view: EvalView, number: int) -> EvalSection:
    """Everything that the page says about one evaluation."""
    positions = _positions(view)
    cautions, notes = split_notes(view.document.get("notes") or ())
    return EvalSection(
        number=number,
        view=view,
        title=view.model_name,
        headline=eval_headline(view),
        cautions=cautions,
        best_of=_best_of(view),
        tiles=tuple(_tiles(view)),
        warnings=tuple(_warnings(view)),
        task_heads=task_heads(view),
        groups=retention_groups(view),
        pictures=tuple(scatter_picture(view, size) for size in ("wide", "narrow")),
        styles=styles(view),
        gaps=_gap_table(view.gaps) if view.gaps else None,
        positions=positions,
        position_legend=_position_legend(view) if positions else (),
        strips=strips_picture(view),
        has_overlap=any(row.overlap for row in view.rows),
        letters=tuple((row.name, row.pattern.letters) for row in view.rows),
        estimates=estimate_tables(view.document.get("cost_rows") or ()),
        measured=measured_table(view.document.get("measured") or ()),
        notes=notes,
        provenance=_provenance(view),
    )


# --- on top -------------------------------------------------------------------------------------------------------


def _tiles(view: EvalView) -> list[Tile]:
    tiles = [Tile("unmodified", numbers.loss(view.baseline.loss), "nats per token")]
    best = next(iter(smallest(view)), None)
    if best is None:
        return tiles
    tiles.append(Tile("indexers kept", f"{best.full} of {view.num_layers}", best.name))
    tiles.append(Tile("cost, nats per token", *value_and_error(best.difference)))
    gap = view.gap_of(best)
    if gap is not None:
        tiles.append(Tile("uniform, as many F", *value_and_error(gap.uniform.difference)))
    if gap is not None and gap.closed is not None:
        value, _, error = gap_text(gap.closed).partition(" ± ")
        tiles.append(Tile("gap closed", value, f"± {error}" if error else "no error: one sequence"))
    return tiles


def _best_of(view: EvalView) -> str:
    """That the best was chosen by the very losses shown, which favours it."""
    count = len(smallest(view))
    if count < 2:
        return ""
    return f"The best of {count} patterns of that size by these very losses, which favours it a little."


def _warnings(view: EvalView) -> list[str]:
    in_sample = [row.name for row in view.rows if row.in_sample]
    foreign = [row.name for row in view.rows if row.foreign]
    found = []
    if in_sample:
        found.append(
            f"In-sample: {', '.join(in_sample)}. The search chose by these very batches, so held-out text would show "
            "a higher loss."
        )
    if foreign:
        found.append(f"Found on another model, or on other weights of this one: {', '.join(foreign)}.")
    return found


# --- the table ----------------------------------------------------------------------------------------------------


def badges(row: EvalRow) -> tuple[str, ...]:
    """What a reader must know of a row before its numbers."""
    return tuple(text for text, given in (("in-sample", row.in_sample), ("other model", row.foreign)) if given)


def task_heads(view: EvalView) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Each task with the ways in which it was answered."""
    ways: dict[str, list[str]] = {}
    for kind, way in view.task_columns:
        ways.setdefault(kind.replace("_", " "), []).append(way)
    return tuple((kind, tuple(found)) for kind, found in ways.items())


def retention_groups(view: EvalView) -> tuple[RetentionGroup, ...]:
    """The rows of the table, by number of F layers, most first."""
    counts = dict.fromkeys(row.full for row in view.rows)
    return tuple(
        RetentionGroup(_retention(full, view), tuple(_table_row(r, view) for r in view.rows if r.full == full))
        for full in counts
    )


def _retention(full: int, view: EvalView) -> str:
    share = numbers.percent(full / view.num_layers)
    return f"{full} of {view.num_layers} layers keep their indexer ({share})"


def _table_row(row: EvalRow, view: EvalView) -> TableRow:
    tasks = tuple(_accuracy(row.tasks.get(column)) for column in view.task_columns)
    cells = (
        Value(numbers.loss(row.loss)),
        Value("–") if row.is_baseline else with_note(row.difference),
        Value(perplexity(row.perplexity)),
        Value("–") if row.is_baseline else with_note(row.kl, sign=False),
        Value("–" if row.is_baseline else f"{100 * row.top1_agreement:.1f}%"),
    )
    return TableRow(row.name, badges(row), row.verdict, cells + tasks)


def with_note(difference: Difference, sign: bool = True) -> Value:
    """A number with its error below it."""
    if difference == Difference(0.0, 0.0):
        return Value("0")
    text, _, error = numbers.with_error(difference.delta, difference.std_err, sign).partition(" ± ")
    return Value(text, f"± {error}" if error else "")


def _accuracy(accuracy: Accuracy | None) -> Value:
    if accuracy is None:
        return Value("–")
    return Value(f"{100 * accuracy.share:.0f}%", f"{100 * accuracy.low:.0f}–{100 * accuracy.high:.0f}")


# --- the gap ------------------------------------------------------------------------------------------------------


def _gap_table(gaps: Sequence[Gap]) -> GapTable:
    ordered = sorted(gaps, key=lambda gap: (-gap.row.full, gap.row.loss))
    known = [gap.closed for gap in gaps if gap.closed is not None]
    low = max(-1.0, min([0.0, *(closed.delta - numbers.finite(closed.std_err) for closed in known)]))
    high = min(2.0, max([1.0, *(closed.delta + numbers.finite(closed.std_err) for closed in known)]))
    axis = Axis(low, high, 4.0, GAP_BAR - 4.0)
    return GapTable(tuple(_gap_row(gap, axis) for gap in ordered), GAP_BAR, axis.at(0.0), axis.at(1.0))


def _gap_row(gap: Gap, axis: Axis) -> GapRow:
    closed = gap.closed or Difference(0.0, 0.0)
    error = numbers.finite(closed.std_err)
    return GapRow(
        name=gap.row.name,
        badges=badges(gap.row),
        uniform=gap.uniform.name,
        cost=numbers.difference(gap.row.difference),
        uniform_cost=numbers.difference(gap.uniform.difference),
        closed=gap_text(gap.closed) if gap.closed else "",
        why_none=gap.why_none,
        x=_within(axis, closed.delta),
        low=_within(axis, closed.delta - error),
        high=_within(axis, closed.delta + error),
    )


def _within(axis: Axis, value: float) -> float:
    return axis.at(min(max(value, axis.low), axis.high))


# --- by position --------------------------------------------------------------------------------------------------


def _positions(view: EvalView) -> Table | None:
    """Loss differences by position, with bars on the logarithmic scale of the picture."""
    buckets = next((row.positions for row in view.rows if row.positions), ())
    if not buckets:
        return None
    rows = [row for row in view.rows if not row.is_baseline and len(row.positions) == len(buckets)]
    highest = max([view.scale.noise, *(bucket.difference.delta for row in rows for bucket in row.positions)])
    axis = LogAxis(0.0, highest, 0.0, 100.0, view.scale.noise)
    heads = tuple(f"{bucket.first}–{bucket.last - 1}" for bucket in buckets)
    return Table(heads, tuple(_position_row(row, view, axis) for row in rows))


def _position_row(row: EvalRow, view: EvalView, axis: LogAxis) -> TableRow:
    cells = []
    for bucket in row.positions:
        value = with_note(bucket.difference)
        delta = bucket.difference.delta
        cells.append(Value(value.text, value.note, view.scale.css_class(delta), axis.at(max(delta, 0.0))))
    return TableRow(row.name, badges(row), row.verdict, tuple(cells))


def _position_legend(view: EvalView) -> tuple[LegendEntry, ...]:
    deltas = [b.difference.delta for row in view.rows if not row.is_baseline for b in row.positions]
    return tuple(LegendEntry(css, label) for css, label in view.scale.labels(deltas))


# --- what it saves ------------------------------------------------------------------------------------------------


def estimate_tables(costs: Sequence[Mapping[str, Any]]) -> tuple[EstimateTable, ...]:
    """One table for all patterns of the same cost; the unmodified model, which saves nothing, is left out."""
    tables: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for cost in costs:
        if any(row["removed_share"] for row in cost["rows"]):
            tables.setdefault(tuple(_estimate_row(row) for row in cost["rows"]), []).append(cost["name"])
    found = sorted(tables.items(), key=lambda table: table[0][0][3])
    return tuple(
        EstimateTable(f"{rows[0][3]} of the indexer work removed", ", ".join(names), rows) for rows, names in found
    )


def _estimate_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        numbers.count(row["context"]),
        numbers.percent(row["indexer_share_full"]),
        numbers.percent(row["indexer_share_pattern"]),
        numbers.percent(row["removed_share"]),
        speed_up(row["prefill_speedup_estimate"]),
        speed_up(row["decode_speedup_estimate"]),
    )


def speed_up(ratio: float) -> str:
    return f"{ratio:.2f}×" if math.isfinite(ratio) else "–"


def measured_table(measured: Sequence[Mapping[str, Any]]) -> Table | None:
    """Timed ratios: a row for each pattern, a column for each length and phase."""
    if not measured:
        return None
    columns = sorted({(PHASES.index(one["phase"]), one["length"]) for one in measured})
    known = {(one["name"], PHASES.index(one["phase"]), one["length"]): one for one in measured}
    rows = [
        TableRow(name, (), "", tuple(_ratio(known.get((name, *column))) for column in columns))
        for name in dict.fromkeys(one["name"] for one in measured)
    ]
    return Table(tuple(f"{PHASES[phase]}, {numbers.count(length)}" for phase, length in columns), tuple(rows))


def _ratio(one: Mapping[str, Any] | None) -> Value:
    if one is None:
        return Value("–")
    return Value(speed_up(one["median"]), f"{one['min']:.2f}–{one['max']:.2f}")


def _provenance(view: EvalView) -> Provenance:
    document = view.document
    cost = document.get("cost") or {}
    run = {"icsearch": document.get("icsearch_version"), "layers with an indexer": view.num_layers}
    if "layer_evaluations" in cost:
        run["layer evaluations"] = numbers.count(cost["layer_evaluations"])
    if "seconds" in cost:
        run["time spent measuring"] = numbers.duration(cost["seconds"])
    groups = ("model", "calibration", "options", "environment")
    return provenance([("Evaluation", run), *((name.capitalize(), document.get(name) or {}) for name in groups)])
