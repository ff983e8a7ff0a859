"""The result in a terminal: a few lines, a strip of letters, a table that fits 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icsearch.core.pattern import Pattern
from icsearch.report import numbers
from icsearch.report.choices import what_was_left_out
from icsearch.report.refined import RefinementSection, refinement_section
from icsearch.report.streaming import weights_sentence
from icsearch.report.view import Point, RunView, headline, kink_sentence, view_run
from icsearch.runs.record import RunRecord

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

ROWS_SHOWN = 24  # a longer search shows its first and last steps
FIRST_ROWS, LAST_ROWS = 6, 14
PATTERN_WIDTH = 23  # a longer pattern shows the letters around the flip
KL_PATTERN_WIDTH = 18  # beside the column that a search by KL has more
FULL_STYLE, SHARED_STYLE, FLIP_STYLE = "bold white on dark_blue", "dim", "bold yellow"


def summary_table(record: RunRecord) -> RenderableType:
    """What a run found, for `rich.print`: headline, pattern, losses beside uniform ones, the steps."""
    from rich.console import Group
    from rich.text import Text

    view = view_run(record)
    parts: list[RenderableType] = [Text(headline(view)), Text()]
    if view.points:
        parts += [pattern_strip(view.final.pattern), Text(), _losses(view), Text()]
    if (refinement := refinement_section(record)) is not None:
        parts += [_refinement(refinement), Text(refinement.sentence), Text()]
    if view.steps:
        parts.append(_steps(view))
    if view.kink is not None:
        parts.append(Text(kink_sentence(view)))
    if any(commit.ties for commit in record.commits):
        parts.append(Text("=n: n other layers were within one standard error of the one chosen", style="dim"))
    if left_out := what_was_left_out(record):
        parts.append(Text(left_out, style="dim"))
    if read := weights_sentence(record):
        parts.append(Text(f"Weights read: {read}", style="dim"))
    parts.append(Text("In-sample: measured on the batches searched on. Confirm with icsearch eval.", style="dim"))
    return Group(*parts)


def pattern_strip(pattern: Pattern) -> Text:
    """The letters, F standing out; without colours the letters alone say it."""
    from rich.text import Text

    strip = Text()
    for letter in pattern.letters:
        strip.append(letter, style=FULL_STYLE if letter == "F" else SHARED_STYLE)
    return strip


def _losses(view: RunView) -> Table:
    table = _table("pattern", "F layers", "loss", "delta to baseline")
    points = [("baseline", view.points[0])]
    if view.final.step:
        points.append(("chosen by similarity" if view.by_similarity else "searched", view.points[-1]))
    if view.refined is not None:
        points.append(("searched, then swaps", view.refined))
    for name, point in points:
        table.add_row(name, str(point.full), numbers.loss(point.loss), _delta(point))
    for reference in view.references:
        same = " (as many F)" if reference is view.same_retention else ""
        full = str(len(reference.pattern.full_layers))
        delta = numbers.difference(reference.difference)
        table.add_row(f"{reference.label}{same}", full, numbers.loss(reference.loss), delta)
    return table


def _refinement(refinement: RefinementSection) -> Table:
    """Before and after on both sets, then the swaps."""
    table = _table("swaps", "before", "after", "change")
    for row in refinement.sets:
        table.add_row(f"all, {row.name}", row.before, row.after, row.change)
    for swap in refinement.swaps:
        change = f"{swap.change}, held out {swap.heldout}"
        table.add_row(f"{swap.number}: layer {swap.from_layer} to {swap.to_layer}", "", "", change)
    return table


def _steps(view: RunView) -> Table:
    by_kl = ["KL"] if view.record.by_kl else []
    gap = 0 if by_kl else 1  # one place less between the columns, where there is one more
    table = _table("step", "layer", "F", "loss", "delta ± std_err", *by_kl, "tie", "pattern", gap=gap)
    steps = view.steps
    left_out = len(steps) - FIRST_ROWS - LAST_ROWS if len(steps) > ROWS_SHOWN else 0
    for index, point in enumerate(steps):
        if left_out and index == FIRST_ROWS:
            table.add_row("…", "…", "…", "…", f"{left_out} more in curve.csv", *("…" for _ in by_kl), "", "…")
        if not left_out or not FIRST_ROWS <= index < FIRST_ROWS + left_out:
            table.add_row(*_step_cells(view, point))
    return table


def _step_cells(view: RunView, point: Point) -> tuple[str | Text, ...]:
    ties = len(view.record.commits[point.step - 1].ties)
    return (
        str(point.step),
        str(point.layer),
        str(point.full),
        numbers.loss(point.loss),
        _delta(point),
        *([numbers.compact(point.kl.delta)] if point.kl else []),
        f"={ties}" if ties else "",
        around_flip(point.pattern, point.layer or 0, KL_PATTERN_WIDTH if point.kl else PATTERN_WIDTH),
    )


def _delta(point: Point) -> str:
    return "" if point.step == 0 else numbers.difference(point.difference)


def around_flip(pattern: Pattern, layer: int, width: int = PATTERN_WIDTH) -> Text:
    """The letters, or those around `layer` where they are too many, with the flipped letter marked."""
    from rich.text import Text

    n = len(pattern)
    inside = width - 2  # one place on either side for an ellipsis
    first = 0 if n <= width else min(max(layer - inside // 2, 0), n - inside)
    last = n if n <= width else first + inside
    text = Text("…" if first else "", style=SHARED_STYLE)
    for position in range(first, last):
        style = FLIP_STYLE if position == layer else "" if pattern.is_full(position) else SHARED_STYLE
        text.append(pattern.letters[position], style=style)
    return text.append("…" if last < n else "", style=SHARED_STYLE)


def _table(*columns: str, gap: int = 1) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, gap))
    for column in columns:
        left = column in ("pattern", "swaps")
        table.add_column(column, justify="left" if left else "right", no_wrap=True, overflow="ellipsis")
    return table
