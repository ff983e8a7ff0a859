"""An evaluation as the numbers that a report shows, read from eval.json: nothing is drawn or worded here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import Difference
from icsearch.report.view import Counted
from icsearch.runs.schema import WAYS


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
class AllTokens:
    """Loss and KL over all tokens, where a mask counts some alone."""

    loss: float
    difference: Difference
    kl: Difference


@dataclass(frozen=True)
class EvalRow(Counted):
    """One pattern. `overlap`: by S layer, the share of its borrowed selection that its own indexer would choose.

    `all_tokens` is there where a mask says which tokens count: all other losses are over those alone.
    """

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
    all_tokens: AllTokens | None

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
    def counted_name(self) -> str:
        """What the tokens are called that a mask counts; "" without a mask."""
        count = (self.document.get("calibration") or {}).get("count", "counted")
        return "" if self.baseline.all_tokens is None else f"{count} tokens"

    @property
    def task_columns(self) -> tuple[tuple[str, str], ...]:
        """(kind, way) of every task that any pattern was given, in order of appearance."""
        return tuple(dict.fromkeys(column for row in self.rows for column in row.tasks))

    @property
    def smallest(self) -> tuple[EvalRow, ...]:
        """The searched patterns with the fewest F layers that have a uniform one beside them, the best first.

        Where none has, those with the fewest; empty where there are none.
        """
        searched = [gap.row for gap in self.gaps] or [row for row in self.rows if row.is_searched]
        fewest = min((row.full for row in searched), default=0)
        return tuple(row for row in self.rows if row.is_searched and row.full == fewest)

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
    gaps = [
        Gap(
            by_name[gap["name"]],
            by_name[gap["uniform"]],
            None if gap["gap_closed"] is None else Difference(gap["gap_closed"], _number(gap["std_err"])),
        )
        for gap in document.get("gaps") or ()
    ]
    return EvalView(name, document, tuple(rows), tuple(gaps))


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
        positions=tuple(
            Bucket(bucket["first"], bucket["last"], Difference(bucket["delta"], _number(bucket["std_err"])))
            for bucket in row.get("positions") or ()
        ),
        overlap={int(layer): share for layer, share in (row.get("borrowed_overlap") or {}).items()},
        tasks={
            (task["kind"], way): Accuracy(task[way]["accuracy"], task[way]["low"], task[way]["high"])
            for task in row.get("tasks") or ()
            for way in WAYS
            if way in task
        },
        verdict=row["verdict"],
        all_tokens=_all_tokens(row.get("all_tokens")),
    )


def _all_tokens(found: dict[str, Any] | None) -> AllTokens | None:
    if found is None:
        return None
    difference = Difference(found["delta"], _number(found["std_err"]))
    return AllTokens(found["loss"], difference, Difference(found["kl"], _number(found["kl_std_err"])))
