"""An evaluation as the numbers that a report shows. Everything is read from eval.json; nothing is drawn here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import Difference
from icsearch.report import numbers
from icsearch.report.scales import CostScale, cost_scale
from icsearch.runs.evaluation import excludes_clear_loss

WAYS = ("forced", "generated")


@dataclass(frozen=True)
class Accuracy:
    """Exact matches of one task, answered in one of the two ways, with Wilson's 95% interval."""

    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Bucket:
    """Tokens at positions [first, last): the loss difference to the unmodified model."""

    first: int
    last: int
    difference: Difference


@dataclass(frozen=True)
class EvalRow:
    """One pattern. `overlap`: by S layer, the share of its borrowed selection that its own indexer would choose."""

    name: str
    pattern: Pattern
    method: str
    in_sample: bool
    foreign: bool
    loss: float
    difference: Difference  # to the unmodified model
    perplexity: float
    kl: Difference
    top1_agreement: float
    positions: tuple[Bucket, ...]
    overlap: dict[int, float]
    tasks: dict[tuple[str, str], Accuracy]
    verdict: str

    @property
    def full(self) -> int:
        return len(self.pattern.full_layers)

    @property
    def shared(self) -> int:
        return len(self.pattern.shared_layers)

    @property
    def is_baseline(self) -> bool:
        return self.method == "full"

    @property
    def is_searched(self) -> bool:
        """Neither the unmodified model nor a uniform pattern, against which the others are held."""
        return self.method not in ("full", "uniform")

    @property
    def series(self) -> str:
        """What the row belongs to in a picture: a run with its nested patterns (``NAME @1/4``), or a method."""
        run, at, _ = self.name.rpartition(" @")
        return run if at else self.method


@dataclass(frozen=True)
class Gap:
    """(uniform - pattern) / (uniform - full) as `closed`; None where uniform costs nothing measurable."""

    row: EvalRow
    uniform: EvalRow
    closed: Difference | None

    @property
    def uniform_is_better(self) -> bool:
        """Whether uniform has a lower loss than the unmodified model, beyond two standard errors."""
        return self.closed is None and self.uniform.difference.delta < -2 * self.uniform.difference.std_err

    @property
    def why_none(self) -> str:
        """Why no share is given: what uniform costs."""
        return "uniform has a lower loss than all F" if self.uniform_is_better else "uniform costs nothing measurable"


@dataclass(frozen=True)
class EvalView:
    """All that a report shows of one evaluation; rows with most F layers first, then by loss."""

    name: str
    document: dict[str, Any]
    rows: tuple[EvalRow, ...]
    gaps: tuple[Gap, ...]

    @property
    def num_layers(self) -> int:
        return len(self.baseline.pattern)

    @property
    def model_name(self) -> str:
        return str((self.document.get("model") or {}).get("name_or_path") or "model")

    @property
    def baseline(self) -> EvalRow:
        return self.rows[0]

    @property
    def baseline_name(self) -> str:
        return "the checkpoint as it is" if self.baseline.shared else "the all-F model"

    @property
    def task_columns(self) -> tuple[tuple[str, str], ...]:
        """(kind, way) of every task that any pattern was given, in order of appearance."""
        return tuple(dict.fromkeys(column for row in self.rows for column in row.tasks))

    @property
    def scale(self) -> CostScale:
        """Colours of loss differences: neutral up to the smallest standard error, within four decades of the largest.

        Errors grow with the differences here, so that a typical one would hide what the best patterns cost.
        """
        others = [row.difference for row in self.rows if not row.is_baseline]
        floor = max([0.0, *(abs(d.delta) for d in others)]) / 1e4
        errors = [max(d.std_err, floor) for d in others if d.std_err > 0]
        return cost_scale([d.delta for d in others], sorted(errors)[:1])

    def gap_of(self, row: EvalRow) -> Gap | None:
        return next((gap for gap in self.gaps if gap.row is row), None)


def view_eval(document: dict[str, Any], name: str = "") -> EvalView:
    """Read eval.json's content. `name` tells evaluations apart where a page shows several.

    Raises KeyError, TypeError, ValueError or AttributeError where it is not what an evaluation writes.
    """
    rows = sorted(map(_row, document["rows"]), key=lambda row: (not row.is_baseline, -row.full, row.loss))
    if not rows or not rows[0].is_baseline:
        raise ValueError("it has no row of the unmodified model, 'full'")
    by_name = {row.name: row for row in rows}
    return EvalView(name, document, tuple(rows), tuple(_gap(gap, by_name) for gap in document.get("gaps") or ()))


def _number(value: float | None) -> float:
    """What strict JSON has no word for comes back as nan: the error of a single sequence."""
    return math.nan if value is None else value


def _row(row: dict[str, Any]) -> EvalRow:
    return EvalRow(
        name=row["name"],
        pattern=Pattern(row["pattern"]),
        method=row["method"],
        in_sample=row["in_sample"],
        foreign=row["foreign"],
        loss=row["loss"],
        difference=Difference(row["delta"], _number(row["std_err"])),
        perplexity=_number(row["perplexity"]),
        kl=Difference(row["kl"], _number(row["kl_std_err"])),
        top1_agreement=row["top1_agreement"],
        positions=tuple(_bucket(bucket) for bucket in row.get("positions") or ()),
        overlap={int(layer): share for layer, share in (row.get("borrowed_overlap") or {}).items()},
        tasks=_tasks(row.get("tasks") or ()),
        verdict=row["verdict"],
    )


def _bucket(bucket: dict[str, Any]) -> Bucket:
    return Bucket(bucket["first"], bucket["last"], Difference(bucket["delta"], _number(bucket["std_err"])))


def _tasks(tasks: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Accuracy]:
    return {
        (task["kind"], way): Accuracy(task[way]["accuracy"], task[way]["low"], task[way]["high"])
        for task in tasks
        for way in WAYS
        if way in task
    }


def _gap(gap: dict[str, Any], rows: dict[str, EvalRow]) -> Gap:
    closed = gap["gap_closed"]
    return Gap(
        rows[gap["name"]], rows[gap["uniform"]], None if closed is None else Difference(closed, _number(gap["std_err"]))
    )


# --- sentences ----------------------------------------------------------------------------------------------------


def smallest(view: EvalView) -> tuple[EvalRow, ...]:
    """The searched patterns with the fewest F layers that have a uniform one beside them, the best first.

    Where none has, those with the fewest; empty where there are none.
    """
    compared = [gap.row for gap in view.gaps]
    searched = compared or [row for row in view.rows if row.is_searched]
    fewest = min((row.full for row in searched), default=0)
    return tuple(row for row in view.rows if row.is_searched and row.full == fewest)


def eval_headline(view: EvalView) -> str:
    """What the evaluation says of the best pattern at the smallest retention, each number with its error."""
    best = next(iter(smallest(view)), None)
    if best is None:
        if len(view.rows) == 1:
            loss = numbers.loss(view.baseline.loss)
            return f"Only {view.baseline_name} was evaluated: a loss of {loss} nats per token."
        return f"{numbers.plural(len(view.rows), 'pattern')} evaluated."
    kept = f"{best.full} of {view.num_layers} layers keep their indexer ({numbers.percent(best.pattern.retention)})"
    lead = f"With the pattern “{best.name}”, {kept} and {_change(best, view)}"
    against = _against_uniform(view.gap_of(best), view.baseline_name)
    return " ".join(filter(None, [lead, against, _where_measured(best)]))


def _change(row: EvalRow, view: EvalView) -> str:
    difference, baseline = row.difference, f"{view.baseline_name} at {numbers.loss(view.baseline.loss)}"
    if math.isnan(difference.std_err):
        signed = numbers.difference(difference)
        return f"the loss changes by {signed} nats per token from {baseline} (one sequence: no standard error)."
    if abs(difference.delta) <= 2 * difference.std_err:
        errors = "one standard error" if difference.is_tie else "two standard errors"
        signed = numbers.difference(difference)
        found = f"the loss is that of {baseline} within {errors} ({signed} nats per token)"
        return f"{found}." if excludes_clear_loss(difference) else f"{found}: too few tokens to exclude a clear loss."
    amount = numbers.with_error(abs(difference.delta), difference.std_err, sign=False)
    return f"the loss {'rises' if difference.delta > 0 else 'falls'} by {amount} nats per token from {baseline}."


def _against_uniform(gap: Gap | None, baseline: str) -> str:
    if gap is None:
        return ""
    uniform, cost = "The uniform pattern with as many F layers", gap.uniform.difference
    if gap.uniform_is_better:
        amount = numbers.with_error(-cost.delta, cost.std_err, sign=False)
        return f"{uniform} has a lower loss than {baseline}, by {amount}: there is no gap to close."
    if gap.closed is None:
        return f"{uniform} costs nothing measurable ({numbers.difference(cost)}): there is no gap to close."
    text, share = f"{uniform} costs {numbers.difference(cost)}", gap_text(gap.closed)
    if gap.closed.delta > max(1.0, 2 * gap.closed.std_err):
        return f"{text}: all of that gap is closed ({share})."
    closed = f"{text}: {share} of that gap is closed"
    if abs(gap.closed.delta) <= 2 * gap.closed.std_err:
        return f"{closed}, within two standard errors of nothing."
    return f"{closed}." if gap.closed.delta > 0 else f"{closed}: uniform is better."


def _where_measured(row: EvalRow) -> str:
    notes = ["In-sample: it was searched on these very batches."] if row.in_sample else []
    return " ".join([*notes, "The pattern was found on another model."] if row.foreign else notes)


def gap_text(closed: Difference) -> str:
    """``47% ± 3%``, a negative share where the pattern is worse than uniform."""
    decimals = 1 if closed.std_err < 0.0095 else 0
    text = f"{100 * closed.delta:.{decimals}f}%"
    if not math.isfinite(closed.std_err):
        return text
    return f"{text} ± {100 * closed.std_err:.{decimals}f}%" if closed.std_err >= 5e-4 else f"{text} ± <0.1%"


def shortened(name: str, width: int) -> str:
    """The name with its middle left out: its end tells a run's patterns apart."""
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}"


def perplexity(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"
