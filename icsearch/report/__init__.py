"""Curves, heatmaps and tables of a run, from its saved journal alone: files, an HTML page, a terminal summary.

Losses here are in-sample: they are measured on the calibration batches that the search chose by.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from icsearch.errors import IcsearchError
from icsearch.files import write_atomically
from icsearch.record import RunRecord, load_run
from icsearch.report.kink import Kink, find_kink
from icsearch.report.page import render_page
from icsearch.report.terminal import summary_table
from icsearch.report.view import RunView, view_run

__all__ = [
    "CSV_COLUMNS",
    "Kink",
    "ReportError",
    "RunView",
    "curve_csv",
    "find_kink",
    "summary_table",
    "view_run",
    "write_report",
    "write_results",
]

CSV_COLUMNS = (
    "step",
    "layer",
    "decoder_layer",
    "full_layers",
    "retention",
    "loss",
    "delta",
    "std_err",
    "pattern",
)


class ReportError(IcsearchError):
    """A report that cannot be made or written."""


def write_results(run_dir: Path, record: RunRecord) -> list[Path]:
    """Write pattern.json, curve.csv, curve.png and report.html into `run_dir`, each whole or not at all.

    Raises JournalError while the baseline or a committed pattern has no complete loss.
    """
    from icsearch.report.png import curve_png

    pattern_file = record.pattern_file()
    view = _view(record, run_dir)
    contents: dict[str, str | bytes] = {
        "curve.csv": curve_csv(view),
        "curve.png": curve_png(view),
        "report.html": render_page([view]),
    }
    pattern_file.save(run_dir / "pattern.json")
    for name, content in contents.items():
        write_atomically(run_dir / name, content)
    return [run_dir / "pattern.json", *(run_dir / name for name in contents)]


def write_report(runs: Sequence[Path], out: Path) -> None:
    """One HTML page for one RUN directory or several; unfinished runs are shown as such.

    Raises JournalError where a directory is not a RUN or its journal cannot be read, ReportError where `out`
    cannot be written.
    """
    if not runs:
        raise ReportError("no run to report on: give at least one RUN directory of icsearch greedy")
    if out.is_dir():
        raise ReportError(f"{out} is a directory: give the name of an HTML file, such as {out / 'report.html'}")
    if not out.parent.is_dir():
        raise ReportError(f"no directory {out.parent} to write {out.name} into: create it, or give another --out")
    page = render_page([_view(load_run(run), run) for run in runs])
    try:
        write_atomically(out, page)
    except OSError as error:
        raise ReportError(f"cannot write {out}: {error.strerror or error}") from None


def curve_csv(view: RunView) -> str:
    """The loss curve as CSV, one row per committed flip; row 0 is the baseline. Losses in nats per token."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for point in view.points:
        writer.writerow(
            [
                point.step,
                "" if point.layer is None else point.layer,
                "" if point.decoder_layer is None else point.decoder_layer,
                point.full,
                point.pattern.retention,
                point.loss,
                point.difference.delta,
                point.difference.std_err,
                point.pattern.letters,
            ]
        )
    return text.getvalue()


def _view(record: RunRecord, run_dir: Path) -> RunView:
    try:
        return view_run(record, run_dir.resolve().name)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ReportError(
            f"the journal in {run_dir} is damaged ({type(error).__name__}: {error}): "
            "restore the file, or start over with --fresh"
        ) from None
