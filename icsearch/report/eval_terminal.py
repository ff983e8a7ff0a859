"""An evaluation in a terminal: a headline and tables that fit 80 columns."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from icsearch.report import numbers
from icsearch.report.eval_view import WAYS, EvalRow, EvalView, Gap, eval_headline, gap_text, shortened, view_eval
from icsearch.runs.evaluation import CLEAR_LOSS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

NAME_WIDTH = 18
IN_SAMPLE, FOREIGN = "*", "†"
NOT_KNOWN = "not known"  # the verdict, in short, that asks for an explanation


def eval_table(document: dict[str, Any]) -> RenderableType:
    """What an evaluation found, for `rich.print`: headline, a row for each pattern, tasks, the gap closed."""
    from rich.console import Group
    from rich.text import Text

    view = view_eval(document)
    parts: list[RenderableType] = [Text(eval_headline(view)), Text(), _losses(view)]
    if view.task_columns:
        parts += [Text(), _tasks(view)]
    if view.gaps:
        parts += [Text(), _gaps(view)]
    if any(short_verdict(row.verdict) == NOT_KNOWN for row in view.rows):
        parts.append(Text(f"{NOT_KNOWN}: too few tokens to exclude a loss of {CLEAR_LOSS:g} or more", style="dim"))
    if any(row.in_sample for row in view.rows):
        parts.append(Text(f"{IN_SAMPLE} in-sample: searched on these very batches", style="dim"))
    if any(row.foreign for row in view.rows):
        parts.append(Text(f"{FOREIGN} found on another model, or on other weights of this one", style="dim"))
    return Group(*parts)


def short_verdict(verdict: str) -> str:
    """The verdict in two or three words: ``clear loss``, ``no loss seen``."""
    head = re.split(r"[:,]| than | says ", verdict, maxsplit=1)[0]
    return re.sub(r"^(a|the) | model$", "", head).replace("measurable", "small")


def _losses(view: EvalView) -> Table:
    table = _table("pattern", "F", "loss", "delta ± std_err", "KL", "top-1", "verdict")
    for row in view.rows:
        table.add_row(
            _name(row),
            str(row.full),
            numbers.loss(row.loss),
            "" if row.is_baseline else numbers.difference(row.difference),
            "" if row.is_baseline else numbers.compact(row.kl.delta),
            "" if row.is_baseline else f"{100 * row.top1_agreement:.1f}%",
            short_verdict(row.verdict),
        )
    return table


def _tasks(view: EvalView) -> Table:
    """Accuracies with the answer forced and generated, in one cell."""
    kinds = tuple(dict.fromkeys(kind for kind, _ in view.task_columns))
    ways = tuple(way for way in WAYS if any(column[1] == way for column in view.task_columns))
    table = _table("pattern", *(kind.replace("_", " ") for kind in kinds), wrap_heads=True)
    for row in view.rows:
        table.add_row(_name(row), *(_accuracies(row, kind, ways) for kind in kinds))
    table.caption = f"exact matches, {' / '.join(ways)}"
    table.caption_justify = "left"
    return table


def _accuracies(row: EvalRow, kind: str, ways: tuple[str, ...]) -> str:
    found = [row.tasks.get((kind, way)) for way in ways]
    return " / ".join("–" if accuracy is None else f"{100 * accuracy.share:.0f}%" for accuracy in found)


def _gaps(view: EvalView) -> Table:
    table = _table("pattern", "against", "gap closed")
    for gap in view.gaps:
        table.add_row(_name(gap.row), shortened(gap.uniform.name, NAME_WIDTH), _closed(gap))
    return table


def _closed(gap: Gap) -> str:
    return gap_text(gap.closed) if gap.closed else gap.why_none


def _name(row: EvalRow) -> str:
    marks = (IN_SAMPLE if row.in_sample else "") + (FOREIGN if row.foreign else "")
    return f"{shortened(row.name, NAME_WIDTH - len(marks))}{marks}"


def _table(*columns: str, wrap_heads: bool = False) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        left = column in ("pattern", "against", "verdict")
        table.add_column(
            column, justify="left" if left else "right", no_wrap=not wrap_heads or left, overflow="ellipsis"
        )
    return table
