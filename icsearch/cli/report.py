"""`icsearch report`: parse, check, call one function, print. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icsearch.cli.options import ConfigFile


def report_on_runs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="RUN directories, finished or not.")],
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="Where to write the page.")],
    config: ConfigFile = None,
) -> None:
    """Write one self-contained HTML page about one or several runs, from their journals alone."""
    from icsearch.report import write_report

    write_report(runs, out)
    typer.echo(f"wrote {out}")
