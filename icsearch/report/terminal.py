"""A run's or an evaluation's result in a terminal: a headline, and tables that fit 80 columns."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from icsearch.core.pattern import Pattern
from icsearch.report import numbers, sentences
from icsearch.report.eval_view import EvalRow, EvalView, view_eval
from icsearch.report.view import RunView, view_run
from icsearch.runs.record import RunRecord
from icsearch.runs.schema import WAYS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

ROWS_SHOWN = 24  # a longer search shows its first and last steps
FIRST_ROWS, LAST_ROWS = 6, 14
PATTERN_WIDTH = 23  # a longer pattern shows the letters around the flip
KL_PATTERN_WIDTH = 18  # beside the column that a search by KL has more
NAME_WIDTH = 18
FULL_STYLE, SHARED_STYLE, FLIP_STYLE = "bold white on dark_blue", "dim", "bold yellow"
IN_SAMPLE_MARK, FOREIGN_MARK = "*", "†"
TEXTS = ("pattern", "swaps", "against", "verdict")  # columns that are no numbers


def _table(*columns: str, wrap_heads: bool = False, gap: int = 1) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, gap))
    for column in columns:
        left = column in TEXTS
        table.add_column(
            column, justify="left" if left else "right", no_wrap=left or not wrap_heads, overflow="ellipsis"
        )
    return table


# --- a run ------------------------------------------------------------------------------------------------------------


def summary_table(record: RunRecord) -> RenderableType:
    """What a run found, for `rich.print`: headline, pattern, losses beside uniform ones, the steps."""
    from rich.console import Group
    from rich.text import Text

    view = view_run(record)
    parts: list[RenderableType] = [Text(sentences.headline(view)), Text()]
    if view.points:
        strip = Text()  # F stands out; without colours the letters alone say it
        for letter in view.final.pattern.letters:
            strip.append(letter, style=FULL_STYLE if letter == "F" else SHARED_STYLE)
        parts += [strip, Text(), _losses(view), Text()]
    if view.refinement is not None:
        told = sentences.refinement_sentence(view, view.refinement)
        swaps = _table("swaps", "before", "after", "change")
        for row in view.refinement.sets:
            swaps.add_row(
                f"all, {row.name}", numbers.loss(row.before), numbers.loss(row.after), numbers.difference(row.change)
            )
        for number, swap in enumerate(view.refinement.made, start=1):
            change = f"{numbers.difference(swap.change)}, held out {numbers.difference(swap.heldout)}"
            swaps.add_row(f"{number}: layer {swap.trial.from_layer} to {swap.trial.to_layer}", "", "", change)
        parts += [swaps, Text(told), Text()]
    if view.steps:
        parts.append(_steps(view))
    if view.kink is not None:
        parts.append(Text(sentences.kink_sentence(view)))
    if view.fisher is not None and view.points:
        fisher = (sentences.found_where(view), sentences.foretold(view.fisher), sentences.table_cost(record))
        parts += [Text(sentence) for sentence in fisher if sentence]
    notes = [f"=n: n other layers {sentences.tied(view)}."] if view.ties else []
    if read := sentences.weights_sentence(record):
        notes.append(f"Weights read: {read}")
    parts += [Text(note, style="dim") for note in (*notes, sentences.in_sample(view))]
    return Group(*parts)


def _losses(view: RunView) -> Table:
    by_table = view.record.by_table
    kl, gap = (["KL to baseline"], 0) if by_table else ([], 1)
    table = _table("pattern", "F layers", "loss", "delta to baseline", *kl, gap=gap)
    points = [("baseline", view.points[0])]
    if view.final.step:
        on_curve = "nested path" if by_table and view.off_curve else "searched"
        points.append(("chosen by similarity" if view.by_similarity else on_curve, view.points[-1]))
    if view.off_curve is not None:
        swapped = view.record.refinement is not None and view.record.refinement.swaps
        points.append(("searched, then swaps" if swapped else "searched, off the path", view.off_curve))
    for name, point in points:
        cells = [numbers.difference(point.difference), *(_kl(view, point.pattern) if by_table else [])]
        table.add_row(name, str(point.full), numbers.loss(point.loss), *(cells if point.step else []))
    for reference in view.references:
        same = " (as many F)" if reference is view.same_retention else ""
        cells = [numbers.difference(reference.difference), *(_kl(view, reference.pattern) if by_table else [])]
        table.add_row(f"{reference.label}{same}", str(reference.full), numbers.loss(reference.loss), *cells)
    return table


def _kl(view: RunView, pattern: Pattern) -> list[str]:
    return [numbers.difference(view.record.mean_kl(pattern.letters), sign=False)]


def _steps(view: RunView) -> Table:
    more = [*(["KL"] if view.record.has_kl else []), *([] if view.record.by_table else ["tie"])]
    gap = 0 if view.record.has_kl else 1  # one place less between the columns, where there is one more
    table = _table("step", "layer", "F", "loss", "delta ± std_err", *more, "pattern", gap=gap)
    left_out = len(view.steps) - FIRST_ROWS - LAST_ROWS if len(view.steps) > ROWS_SHOWN else 0
    for index, point in enumerate(view.steps):
        if left_out and index == FIRST_ROWS:
            table.add_row("…", "…", "…", "…", f"{left_out} more in curve.csv", *("…" for _ in more), "…")
        if not left_out or not FIRST_ROWS <= index < FIRST_ROWS + left_out:
            ties = len(view.record.commits[point.step - 1].ties)
            table.add_row(
                str(point.step),
                str(point.layer),
                str(point.full),
                numbers.loss(point.loss),
                numbers.difference(point.difference),
                *([numbers.compact(point.kl.delta)] if point.kl else []),
                *([] if view.record.by_table else [f"={ties}" if ties else ""]),
                _around_flip(point.pattern, point.layer or 0, KL_PATTERN_WIDTH if point.kl else PATTERN_WIDTH),
            )
    return table


def _around_flip(pattern: Pattern, layer: int, width: int) -> Text:
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


# --- an evaluation ----------------------------------------------------------------------------------------------------


def eval_table(document: dict[str, Any]) -> RenderableType:
    """What an evaluation found, for `rich.print`: headline, a row for each pattern, tasks, the gap closed."""
    from rich.console import Group
    from rich.text import Text

    view = view_eval(document)
    patterns = _table("pattern", "F", "loss", "delta ± std_err", "KL", "top-1", "verdict", gap=0)
    for row in view.rows:
        compared = [
            numbers.difference(row.difference),
            numbers.compact(row.kl.delta),
            f"{100 * row.top1_agreement:.1f}%",
        ]
        cells = ["", "", ""] if row.is_baseline else compared
        patterns.add_row(_name(row), str(row.full), numbers.loss(row.loss), *cells, short_verdict(row.verdict))
    parts: list[RenderableType] = [Text(sentences.eval_headline(view)), Text(), patterns]
    if view.counted_name:
        parts += [Text(), _beside(view)]
    if view.task_columns:
        parts += [Text(), _tasks(view)]
    if view.gaps:
        gaps = _table("pattern", "against", "gap closed", gap=0)
        for gap in view.gaps:
            against = numbers.shortened(gap.uniform.name, NAME_WIDTH)
            gaps.add_row(_name(gap.row), against, sentences.gap_closed(gap))
        parts += [Text(), gaps]
    if memory := sentences.memory_sentences(view):
        parts += [Text(), Text(" ".join(memory), style="dim")]
    notes = {
        sentences.NOT_KNOWN: any(sentences.NOT_KNOWN.startswith(short_verdict(row.verdict)) for row in view.rows),
        f"{IN_SAMPLE_MARK} {sentences.IN_SAMPLE}: {sentences.SEARCHED_HERE}": any(row.in_sample for row in view.rows),
        f"{FOREIGN_MARK} {sentences.FOUND_ELSEWHERE}": any(row.foreign for row in view.rows),
    }
    parts += [Text(note, style="dim") for note, told in notes.items() if told]
    return Group(*parts)


def short_verdict(verdict: str) -> str:
    """The verdict in two or three words: ``clear loss``, ``no loss seen``."""
    head = re.split(r"[:,]| than | says ", verdict, maxsplit=1)[0]
    return re.sub(r"^(a|the) | model$", "", head).replace("measurable", "small")


def _beside(view: EvalView) -> Table:
    """The loss over the tokens that count, and over all of them."""
    table = _table("pattern", view.counted_name, "all tokens", "KL of all", gap=0)
    for row in view.rows:
        if row.all_tokens is None:
            continue
        losses = [numbers.loss(row.loss), numbers.loss(row.all_tokens.loss), ""]
        costs = [numbers.difference(row.difference), numbers.difference(row.all_tokens.difference)]
        table.add_row(_name(row), *(losses if row.is_baseline else [*costs, numbers.compact(row.all_tokens.kl.delta)]))
    table.caption = f"loss, and what is above that of {view.baseline_name}, in nats per token"
    table.caption_justify = "left"
    return table


def _tasks(view: EvalView) -> Table:
    """Accuracies with the answer forced and generated, in one cell."""
    kinds = tuple(dict.fromkeys(kind for kind, _ in view.task_columns))
    ways = tuple(way for way in WAYS if any(column[1] == way for column in view.task_columns))
    table = _table("pattern", *(kind.replace("_", " ") for kind in kinds), wrap_heads=True, gap=0)
    for row in view.rows:
        shares = [[row.tasks.get((kind, way)) for way in ways] for kind in kinds]
        table.add_row(
            _name(row),
            *(" / ".join("–" if one is None else f"{100 * one.share:.0f}%" for one in both) for both in shares),
        )
    table.caption = f"exact matches, {' / '.join(ways)}"
    table.caption_justify = "left"
    return table


def _name(row: EvalRow) -> str:
    marks = (IN_SAMPLE_MARK if row.in_sample else "") + (FOREIGN_MARK if row.foreign else "")
    return f"{numbers.shortened(row.name, NAME_WIDTH - len(marks))}{marks}"
