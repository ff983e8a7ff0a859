"""What a tracker is told of a run or an evaluation: a function of what is saved, so that gaps can be filled later."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import Difference
from icsearch.runs.record import Candidate, Commit, RunRecord
from icsearch.runs.refinement import Trial

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table, and the same as single numbers for trackers that take no tables."""

    name: str
    columns: tuple[str, ...]
    data: tuple[tuple[Cell, ...], ...]
    numbers: Mapping[str, float]

    def markdown(self) -> str:
        """The table as Markdown, for trackers that show text."""
        lines = [self.columns, ("---",) * len(self.columns), *self.data]
        return "\n".join("| " + " | ".join(_shown(cell) for cell in line) + " |" for line in lines)


@dataclass(frozen=True)
class Row:
    """What is logged together: numbers (losses in nats per token) and perhaps a table, at a step of the run."""

    step: int
    values: Mapping[str, float]
    table: Table | None = None


# Makes a row when it is asked for: most have been logged already.
MakeRow = Callable[[], Row]


def run_rows(record: RunRecord) -> list[MakeRow]:
    """The baseline as step 0, each committed flip with its candidates, and behind them each swap of a refinement.

    As far as the run has come. Steps are numbered as in pattern.json; swaps go on behind the last of them.
    """
    full = record.start_pattern
    if not record.nll.is_complete(full.letters):
        return []
    swaps = record.refinement.swaps if record.refinement else []
    return [
        lambda: Row(0, _losses(record, full.letters)),
        *(partial(_commit_row, record, commit) for commit in record.commits),
        *(partial(_swap_row, record, len(record.commits) + i, swap) for i, swap in enumerate(swaps, start=1)),
    ]


def _commit_row(record: RunRecord, commit: Commit) -> Row:
    values = {**_losses(record, commit.pattern), "layer": float(commit.layer)}
    return Row(commit.step, values, _candidates(record, commit))


def _swap_row(record: RunRecord, step: int, swap: Trial) -> Row:
    layers = {"from_layer": float(swap.from_layer), "to_layer": float(swap.to_layer)}
    return Row(step, {**_losses(record, swap.pattern), **layers})


def eval_rows(document: Mapping[str, Any]) -> list[MakeRow]:
    """The rows of an eval.json as one table, and each row's numbers by its name."""
    columns = ("name", "pattern", "retention", "loss", "delta", "std_err", "perplexity", "kl", "top1_agreement")
    rows = document["rows"]
    numbers = {
        f"{row['name']}/{column}": float(row[column])
        for row in rows
        for column in columns[2:]
        if _is_finite(row[column])
    }
    data = tuple(tuple(_cell(row[column]) for column in columns) for row in rows)
    return [lambda: Row(0, numbers, Table("patterns", columns, data, {}))]


def configuration(start: Mapping[str, Any]) -> dict[str, Any]:
    """The options and the identity of a run, flat: text, numbers and flags, as trackers take them."""
    flat = {f"model_{key}": start["model"].get(key) for key in ("name_or_path", "model_type", "fingerprint")}
    flat |= {f"calibration_{key}": start["calibration"].get(key) for key in ("source", "num_sequences", "seq_len")}
    flat |= {"icsearch_version": start["icsearch_version"], **start["options"]}
    return {key: _flat(value) for key, value in flat.items() if value is not None}


def _losses(record: RunRecord, letters: str) -> dict[str, float]:
    pattern, difference = Pattern(letters), record.difference(letters)
    values = {
        "loss": record.loss(letters),
        **_difference(difference, ""),
        "retention": pattern.retention,
        "full_layers": float(len(pattern.full_layers)),
    }
    kl = record.mean_kl(letters)
    return values if kl is None else {**values, "kl": kl.delta, **_error(kl, "kl_")}


def _difference(difference: Difference, prefix: str) -> dict[str, float]:
    return {f"{prefix}delta": difference.delta, **_error(difference, prefix)}


def _error(difference: Difference, prefix: str) -> dict[str, float]:
    """The standard error; nothing where one sequence tells none."""
    return {f"{prefix}std_err": difference.std_err} if math.isfinite(difference.std_err) else {}


def _candidates(record: RunRecord, commit: Commit) -> Table:
    """The flips that a step chose from, by layer; losses of those given up are on the sequences that they had."""
    found = sorted((*record.candidates(commit.step), *record.given_up(commit.step)), key=lambda one: one.layer)
    indices: Sequence[int] = record.start["layer_indices"]
    data = tuple(
        (
            one.layer,
            indices[one.layer],
            one.loss,
            one.difference.delta,
            _cell(one.difference.std_err),
            one.sequences,
            _outcome(one, commit),
        )
        for one in found
    )
    columns = ("layer", "decoder_layer", "loss", "delta", "std_err", "sequences", "outcome")
    numbers = {f"candidates/layer_{one.layer}": one.difference.delta for one in found}
    return Table("candidates", columns, data, numbers)


def _outcome(candidate: Candidate, commit: Commit) -> str:
    if candidate.layer == commit.layer:
        return "shared"
    names = {"tied": commit.ties, "dropped": commit.dropped, "within margin": commit.within_margin}
    return next((name for name, layers in names.items() if candidate.layer in layers), "")


def _flat(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool)) else " ".join(map(str, _flattened(value)))


def _flattened(value: Any) -> list[Any]:
    return [item for part in value for item in _flattened(part)] if isinstance(value, (list, tuple)) else [value]


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _cell(value: Any) -> Cell:
    """A cell of a table; an unknown number is empty."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell).replace("|", "\\|")
