"""The commands: each takes what was asked as requests, calls one function, and prints. Heavy imports stay inside."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from icsearch.calibration.far import FAR
from icsearch.cli.running import Session, print_result, running
from icsearch.commands.requests import (
    BaselineRequest,
    CachedCalibrationRequest,
    CheckRequest,
    EvalRequest,
    ExportRequest,
    FisherRequest,
    GreedyRequest,
    ImportRequest,
    PlanRequest,
    ReportRequest,
)

if TYPE_CHECKING:
    from icsearch.engines.native import NativeCheckpoint

RESULTS = "pattern.json, curve.csv, curve.png, report.html"
FISHER_RESULTS = f"{RESULTS}, fisher.npz, fisher.json"
BASELINE_RESULTS = f"{RESULTS}, similarity.npz, similarity.json"


def calibrate(context: typer.Context, request: CachedCalibrationRequest, session: Session) -> None:
    """Make calibration batches of a text.

    Tokenised by the model's tokenizer, packed into sequences, and cached: the same command again reads them.
    """
    with running(context, request, session) as (progress, world):
        from icsearch.commands.calibrate import calibrate as make

        batches, hit = make(request, progress, world)
    state = "already there, reused" if hit else "written"
    size = f"{batches.num_sequences} x {batches.seq_len} tokens"
    typer.echo(f"{request.out}: {size}, {state} (fingerprint {batches.fingerprint[:12]})")
    if request.count == FAR:
        counted, of = sum(batches.counted_tokens()), batches.num_sequences * (batches.seq_len - 1)
        typer.echo(f"{counted} of {of} predictions count ({counted / of:.1%}), those of far tokens")


def fisher(context: typer.Context, request: FisherRequest, session: Session) -> None:
    """Find the layers to share, in a few passes.

    Every flip is priced by gradients, to second order; what is proposed is measured. For Algorithm 1 itself: greedy.
    """
    with running(context, request, session) as (progress, world):
        from icsearch.commands.fisher import fisher
        from icsearch.report.terminal import summary_table
        from icsearch.report.write import write_results

        record = fisher(request, progress, write_results, world)
    print_result(summary_table(record), f"{request.out / FISHER_RESULTS}")


def greedy(context: typer.Context, request: GreedyRequest, session: Session) -> None:
    """Find the layers whose indexer is missed least.

    One flip at a time (IndexCache, Algorithm 1). The same command on an unfinished RUN goes on with it.
    """
    with running(context, request, session) as (progress, world):
        from icsearch.commands.greedy import greedy
        from icsearch.report.terminal import summary_table
        from icsearch.report.write import write_results

        record = greedy(request, progress, write_results, world)
    print_result(summary_table(record), f"{request.out / RESULTS}")


def dp_baseline(context: typer.Context, request: BaselineRequest, session: Session) -> None:
    """Find the pattern of highest cosine similarity.

    The baseline that the paper rejects, and what its pattern really costs.
    """
    with running(context, request, session) as (progress, world):
        from icsearch.commands.baseline import dp_baseline
        from icsearch.report.terminal import summary_table
        from icsearch.report.write import write_results

        record = dp_baseline(request, progress, write_results, world)
    print_result(summary_table(record), f"{request.out / BASELINE_RESULTS}")


def evaluate(context: typer.Context, request: EvalRequest, session: Session) -> None:
    """Measure patterns against the unmodified model.

    On batches that no search has seen. Letters, and what an engine is given, are patterns too.
    """
    with running(context, request, session) as (progress, world):
        from icsearch.commands.evaluate import evaluate
        from icsearch.report.terminal import eval_table
        from icsearch.report.write import write_eval_results

        document = evaluate(request, progress, write_eval_results, world)
    print_result(eval_table(document), f"{request.out / 'eval.json'}, eval.csv, report.html")


def plan(request: PlanRequest) -> None:
    """Say what a search will take, from a config.json.

    Memory, FLOPs, hours, and the command to start it.
    """
    from rich.console import Console

    from icsearch.commands import plan as planned
    from icsearch.planning import serving
    from icsearch.planning.page import command, document, table

    console = Console()
    if request.serve:
        bought = planned.serving(request)
        if request.json:
            typer.echo(dumps(serving.document(bought), indent=1))
        else:
            console.print(serving.table(bought))
        return
    made = planned.plan(request)
    if request.json:
        typer.echo(dumps(document(made), indent=1))
        return
    console.print(table(made))
    console.print(f"recommended:\n{command(made)}", soft_wrap=True, highlight=False, markup=False)


def export(request: ExportRequest) -> None:
    """Print what an engine needs to run a pattern.

    Or write a checkpoint that has it. What is to be pasted goes to stdout, all else to stderr.
    """
    from icsearch.commands.export import engine_settings, saved_pattern
    from icsearch.engines.export import write_file
    from icsearch.engines.native import export_checkpoint

    path, kept = saved_pattern(request.file, request.retention)
    if request.checkpoint is not None:
        written = export_checkpoint(
            path,
            request.checkpoint,
            model=request.model,
            retention=kept,
            drop_indexers=request.drop_indexers,
            other_weights=request.other_weights,
            tell=lambda line: typer.echo(f"copying: {line}", err=True),
        )
        _say("warning", written.notes)
        typer.echo("\n".join(_summary(written)))
        return
    result = engine_settings(replace(request, retention=kept), path)
    if request.out is None:
        _say("warning", result.warnings)
        typer.echo(f"{result.title}: {result.how}", err=True)
        typer.echo(result.text)
    else:
        _say("warning", (*result.warnings, *write_file(result, request.model_config, request.gguf, request.out)))
        typer.echo(f"wrote {request.out}")


def _say(what: str, lines: tuple[str, ...]) -> None:
    for line in lines:
        typer.echo(f"{what}: {line}", err=True)


def _summary(result: NativeCheckpoint) -> list[str]:
    """What a copy of a checkpoint is, in a few lines."""
    from icsearch.core.text import format_bytes

    config = result.config
    place = "text_config of config.json" if config.nested else "config.json"
    removed = f"; {', '.join(config.removed)} removed" if config.removed else ""
    lines = [
        f"{result.out}: {result.source} with {result.pattern}",
        f"  {place}: {', '.join(config.written)} written{removed}",
        f"  {result.copied}",
    ]
    if result.dropped:
        lines.append(f"  {len(result.dropped)} indexer tensors left out: {format_bytes(result.bytes_saved)} saved")
    if result.left_out:
        kinds = Counter(Path(name).suffix for name in result.left_out)
        lines.append(f"  files left out: {', '.join(f'{count} x *{kind}' for kind, count in sorted(kinds.items()))}")
    return lines


def import_pattern(request: ImportRequest) -> None:
    """Print the pattern that an engine runs today.

    One letter for each DSA layer, by the rules of that engine. Notes go to stderr.
    """
    from icsearch.core.files import check_new
    from icsearch.engines import read
    from icsearch.model.config import Backbone, EngineConfigError, load_config, read_backbone

    if request.out is not None:
        check_new(request.out, EngineConfigError)
    backbone = None if request.layers is None else Backbone.alike(request.layers)
    if request.model_config is not None:
        backbone = read_backbone(load_config(request.model_config), str(request.model_config))
    text = request.source[0] if len(request.source) == 1 else shlex.join(request.source)
    found = read.import_pattern(text, request.engine, backbone)
    _say("note", tuple(found.notes))
    if request.out is not None:
        found.pattern_file(text).save(request.out)
        typer.echo(f"wrote {request.out}", err=True)
    typer.echo(found.pattern.letters)


def check(request: CheckRequest) -> None:
    """Say what engines will run with a config.json.

    Where they differ, and what is wrong with it: exit code 2 then.
    """
    from icsearch.commands.check import check as make_check

    made = make_check(request)
    if request.json:
        typer.echo(dumps(made.document(), indent=1))
    else:
        typer.echo("\n".join(made.lines()))
    if made.problems:
        raise typer.Exit(2)


def report(request: ReportRequest) -> None:
    """Write one HTML page about runs, or a model card.

    Self-contained, from what they saved alone. Without --out a model card is printed.
    """
    from icsearch.report import write

    if request.out is not None:
        (write.write_model_card if request.model_card else write.write_report)(list(request.runs), request.out)
        typer.echo(f"wrote {request.out}")
    elif request.model_card:
        typer.echo(write.model_card(list(request.runs)), nl=False)
    else:
        raise write.ReportError("report needs --out FILE.html to write the page to, or --model-card")
