"""`icsearch report`: parse, check, call one function, print. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icsearch.cli.options import ConfigFile


def report_on_runs(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="RUN directories, finished or not, or those of an eval.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write it. Without this, a model card is printed."),
    ] = None,
    model_card: Annotated[
        bool,
        typer.Option(
            "--model-card/--no-model-card",
            help="A section for a model card of the Hugging Face hub, with its metadata.",
        ),
    ] = False,
    config: ConfigFile = None,
) -> None:
    """Write one self-contained HTML page about one or several runs, from their journals alone, or a model card."""
    from icsearch.report import write

    if out is None and not model_card:
        raise write.ReportError("report needs --out FILE.html to write the page to, or --model-card")
    if out is None:
        typer.echo(write.model_card(runs), nl=False)
        return
    (write.write_model_card if model_card else write.write_report)(runs, out)
    typer.echo(f"wrote {out}")
