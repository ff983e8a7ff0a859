"""The files that a run's or an evaluation's directory gets, and pages and model cards of several, from saved JSON."""

from __future__ import annotations

import contextlib
import csv
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icsearch.core.errors import IcsearchError
from icsearch.core.files import check_new, refusing, typed_path, write_atomically
from icsearch.report import canvas, figures
from icsearch.report.eval_view import EvalView, view_eval
from icsearch.report.page import render_page
from icsearch.report.view import Point, RunView, view_run
from icsearch.runs import results
from icsearch.runs.evaluation import load_eval
from icsearch.runs.record import RunRecord, load_run

CSV_COLUMNS = ("step", "layer", "decoder_layer", "full_layers", "retention", "loss", "delta", "std_err", "pattern")
KL_COLUMNS = ("kl", "kl_std_err")
PREDICTED_COLUMNS = ("predicted_loss", "predicted_kl")
# Task accuracies, KIND_forced and KIND_generated, stand before the last column.
EVAL_CSV_COLUMNS = (
    "name",
    "method",
    "retention",
    "full_layers",
    "in_sample",
    "other_model",
    "loss",
    "delta",
    "std_err",
    "perplexity",
    "kl",
    "kl_std_err",
    "top1_agreement",
    "pattern",
)
EVAL_NAME = "eval.json"
PAGE_MARK = "– icsearch report</title>"  # as the template of a page has it
_HEAD_BYTES = 2**16


class ReportError(IcsearchError):
    """A report that cannot be made or written."""


def write_results(run_dir: Path, record: RunRecord) -> list[Path]:
    """Write pattern.json, curve.csv, curve.png and report.html into `run_dir`, each whole or not at all.

    Raises JournalError while the baseline or a committed pattern has no complete loss.
    """
    view = _view(record, run_dir)
    known = view.fisher.measured if view.fisher else ()
    predicted = {one.pattern.letters: (one.predicted.loss.delta, one.predicted.kl.delta) for one in known}
    pattern_file = results.pattern_file(record, predicted)
    contents: dict[str, str | bytes] = {
        "curve.csv": curve_csv(view),
        "curve.png": canvas.png(figures.curve([view])),
        "report.html": render_page([view]),
    }
    pattern_file.save(run_dir / "pattern.json")
    for name, content in contents.items():
        write_atomically(run_dir / name, content)
    return [run_dir / "pattern.json", *(run_dir / name for name in contents)]


def write_eval_results(directory: Path, document: dict[str, Any]) -> list[Path]:
    """Write eval.csv and report.html for the content of eval.json, each whole or not at all."""
    view = _eval_view(document, directory)
    contents = {"eval.csv": eval_csv(view), "report.html": render_page([], [view])}
    for name, content in contents.items():
        write_atomically(directory / name, content)
    return [directory / name for name in contents]


def write_report(runs: Sequence[Path], out: Path) -> None:
    """One HTML page for RUN directories and for those that hold an eval.json, which come first.

    Unfinished runs are shown as such. Raises JournalError where a directory is not a RUN or its journal cannot be
    read, ReportError where `out` cannot be written, or is a file that is no page of ours: such a page is replaced.
    """
    out = _checked_out(out, "report.html")
    if out.exists() and not _is_page(out):
        raise ReportError(f"{out} exists and is no page of icsearch: give another --out, or remove it first")
    searched, evaluated = _views(runs)
    _write(out, render_page(searched, evaluated))


def model_card(runs: Sequence[Path]) -> str:
    """A model-card section with the hub's metadata, for finished RUN directories and those that hold an eval.json.

    Raises ReportError where a run is not finished, or they are of several checkpoints; JournalError as `write_report`.
    """
    from icsearch.report.card import render_card

    searched, evaluated = _views(runs)
    for view in searched:
        if not view.record.finished:
            raise ReportError(f"the search {view.name} is not finished: repeat its command to finish it")
    told = [*(view.start["model"] for view in searched), *(view.document.get("model") for view in evaluated)]
    models = {str((model or {}).get("fingerprint")) for model in told}
    if len(models) > 1:
        raise ReportError(f"a model card is of one checkpoint, and these are of {len(models)}: give those of one")
    return render_card(searched, evaluated)


def write_model_card(runs: Sequence[Path], out: Path) -> None:
    """Write `model_card` to a new file; raises as that does, and ReportError where `out` exists or has no place."""
    out = _checked_out(out, "card.md")
    check_new(out, ReportError)
    _write(out, model_card(runs))


def _views(runs: Sequence[Path]) -> tuple[list[RunView], list[EvalView]]:
    """The searches and the evaluations of these directories."""
    if not runs:
        raise ReportError("no run to report on: give at least one directory of icsearch greedy, dp-baseline or eval")
    runs = [typed_path(str(run), ReportError) for run in runs]
    evaluated = [run for run in runs if (run / EVAL_NAME).is_file()]
    searches = [_view(load_run(run), run) for run in runs if run not in evaluated]
    return searches, [_eval_view(load_eval(run / EVAL_NAME), run) for run in evaluated]


def _checked_out(out: Path, example: str) -> Path:
    """Refuse a place that no file can be written to, before anything is read."""
    out = typed_path(str(out), ReportError)
    if out.is_dir():
        raise ReportError(f"{out} is a directory: give the name of a file, such as {out / example}")
    if not out.parent.is_dir():
        raise ReportError(f"no directory {out.parent} to write {out.name} into: create it, or give another --out")
    with _writing(out):
        tempfile.TemporaryFile(dir=out.parent).close()
    return out


def _is_page(path: Path) -> bool:
    """Whether a file is a page that a report wrote, which can be made again."""
    if not path.is_file():  # a pipe or a device
        return False
    try:
        with open(path, "rb") as file:
            return PAGE_MARK.encode() in file.read(_HEAD_BYTES)
    except OSError:  # locked: whose it is cannot be told
        return False


def _write(out: Path, content: str) -> None:
    with _writing(out):
        write_atomically(out, content)


def _writing(out: Path) -> contextlib.AbstractContextManager[None]:
    return refusing(lambda reason: ReportError(f"cannot write {out}: {reason}"))


def curve_csv(view: RunView) -> str:
    """The loss curve as CSV, one row per committed flip; row 0 is the baseline. Losses in nats per token.

    Where the KL was measured, that and its error stand before the last column, and what a second-order table had said.
    """
    *columns, last = CSV_COLUMNS
    more = [*(KL_COLUMNS if view.record.has_kl else ()), *(PREDICTED_COLUMNS if view.record.by_table else ())]
    rows: list[list[object]] = [[*columns, *more, last]]
    for point in view.points:
        layers = ["" if layer is None else layer for layer in (point.layer, point.decoder_layer)]
        difference = [point.difference.delta, point.difference.std_err]
        kl = [point.kl.delta, point.kl.std_err] if point.kl else []
        named = [point.step, *layers, point.full, point.pattern.retention, point.loss]
        rows.append([*named, *difference, *kl, *_predicted(view, point), point.pattern.letters])
    return _csv(rows)


def _predicted(view: RunView, point: Point) -> list[object]:
    """What a second-order table had said of loss and KL: nothing of the baseline, which it starts from."""
    if not view.record.by_table:
        return []
    known = view.fisher.of(point.pattern) if view.fisher else None
    if known is None:
        return ["", ""]
    return [view.points[0].loss + known.predicted.loss.delta, known.predicted.kl.delta]


def eval_csv(view: EvalView) -> str:
    """An evaluation as CSV, one row per pattern. Losses and KL in nats per token; a task not given is empty.

    Where a mask counts some tokens alone, those over all stand beside them.
    """
    *columns, last = EVAL_CSV_COLUMNS
    of_all = ("all_tokens_loss", "all_tokens_delta", "all_tokens_std_err", "all_tokens_kl") if view.counted_name else ()
    rows: list[list[object]] = [[*columns, *of_all, *(f"{kind}_{way}" for kind, way in view.task_columns), last]]
    for row in view.rows:
        flags = [str(flag).lower() for flag in (row.in_sample, row.foreign)]
        loss = [row.loss, row.difference.delta, row.difference.std_err, row.perplexity]
        beside = [row.kl.delta, row.kl.std_err, row.top1_agreement]
        if (everything := row.all_tokens) is not None:
            beside += [everything.loss, everything.difference.delta, everything.difference.std_err, everything.kl.delta]
        tasks = [row.tasks[column].share if column in row.tasks else "" for column in view.task_columns]
        named = [row.name, row.method, row.pattern.retention, row.full]
        rows.append([*named, *flags, *loss, *beside, *tasks, row.pattern.letters])
    return _csv(rows)


def _csv(rows: list[list[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _eval_view(document: dict[str, Any], directory: Path) -> EvalView:
    try:
        return view_eval(document, directory.resolve().name)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ReportError(
            f"the {EVAL_NAME} of {directory} is damaged ({type(error).__name__}: {error}): evaluate again"
        ) from None


def _view(record: RunRecord, run_dir: Path) -> RunView:
    try:
        return view_run(record, run_dir.resolve().name)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ReportError(
            f"the journal in {run_dir} is damaged ({type(error).__name__}: {error}): "
            "restore the file, or start over with --fresh"
        ) from None
