"""The command line: parse, check, call one function, print. Heavy imports stay inside the commands."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icsearch import __version__
from icsearch.errors import IcsearchError

if TYPE_CHECKING:
    from icsearch.record import RunRecord
    from icsearch.requests import GreedyRequest

EXIT_FAILURE, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="icsearch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Find out which layers of a DeepSeek-Sparse-Attention model can drop their indexer, and what that costs.",
)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, a hub id, or demo.")]
SeqLen = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens per sequence.", show_default="4 x index_topk, at least 256"),
]
NumSequences = Annotated[int | None, typer.Option(min=1, help="Calibration sequences.", show_default="48")]
Seed = Annotated[int, typer.Option(help="Seed of the choice and order of calibration texts.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings along.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="No plan and no progress, only the result.")]
SOURCE_HELP = (
    "Ready batches (a directory with calibration.safetensors), or a text source: demo, demo:heldout, "
    "FILE.txt, FILE.jsonl, FILE.parquet, hf:NAME[:CONFIG][:SPLIT]."
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. May stand anywhere.")] = False,
) -> None:
    if version:
        typer.echo(f"icsearch {__version__}")
        raise typer.Exit


@app.command()
def calibrate(
    model: ModelArgument,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)],
    out: Annotated[Path, typer.Option(help="Directory for calibration.safetensors and calibration.json.")],
    seq_len: SeqLen = None,
    num_sequences: NumSequences = None,
    seed: Seed = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace other batches that lie in --out.")] = False,
    trust_remote_code: Remote = False,
) -> None:
    """Tokenise a text source with the model's tokenizer, pack it into sequences, and cache them."""
    from icsearch.prepare import calibrate as make
    from icsearch.requests import CalibrationRequest

    request = CalibrationRequest(model, source, seq_len, num_sequences, seed, trust_remote_code)
    batches, hit = make(request, out, fresh)
    state = "already there, reused" if hit else "written"
    size = f"{batches.num_sequences} x {batches.seq_len} tokens"
    typer.echo(f"{out}: {size}, {state} (fingerprint {batches.fingerprint[:12]})")


@app.command()
def greedy(
    model: ModelArgument,
    calibration: Annotated[str, typer.Option(metavar="DIR|SOURCE", help=SOURCE_HELP)],
    retention: Annotated[
        str | None,
        typer.Option(help="Share of layers to keep F, as 1/4 or 0.25: ceil(r x N) layers stay.", show_default="1/4"),
    ] = None,
    num_shared: Annotated[
        int | None, typer.Option(help="Flip exactly this many layers, instead of --retention.")
    ] = None,
    stages: Annotated[
        int, typer.Option(help="Search in this many pipeline blocks in turn; each block's first layer stays F.")
    ] = 1,
    keep_full: Annotated[str, typer.Option(metavar="0,5,9", help="Layers that must stay F.", show_default="")] = "",
    objective: Annotated[str, typer.Option(help="What a flip is judged by: lm-loss.")] = "lm-loss",
    strategy: Annotated[str, typer.Option(help="exact: every remaining layer is scored in every step.")] = "exact",
    device: Annotated[str, typer.Option(help="auto (cuda, then cpu), cpu, cuda, cuda:0.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Directory of the run.", show_default="runs/MODEL-greedy")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard what RUN holds and start over.")] = False,
    seed: Seed = 0,
    seq_len: SeqLen = None,
    num_sequences: NumSequences = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences per layer call; the bits follow it.", show_default="1024 tokens' worth"),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory budget, such as 8GB. It decides how many candidates live at once, never the bits.",
            show_default="80% of what is free",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; the bits follow them.", show_default="torch's")
    ] = None,
    trust_remote_code: Remote = False,
    quiet: QuietFlag = False,
) -> None:
    """Search, one flip at a time, for the layers whose indexer is missed least (IndexCache, Algorithm 1)."""
    from icsearch.plan import parse_bytes
    from icsearch.requests import CalibrationRequest, GreedyRequest, parse_layers, parse_share

    request = GreedyRequest(
        CalibrationRequest(model, calibration, seq_len, num_sequences, seed, trust_remote_code),
        out=out or default_run(model, "greedy"),
        retention=parse_share(retention),
        num_shared=num_shared,
        stages=stages,
        keep_full=parse_layers(keep_full, "--keep-full"),
        objective=objective,
        strategy=strategy,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        memory=None if memory is None else parse_bytes(memory),
        threads=threads,
        fresh=fresh,
    )
    _run_greedy(request, quiet)


def _run_greedy(request: GreedyRequest, quiet: bool) -> None:
    from icsearch import report
    from icsearch.progress import make_listener

    listener = make_listener(quiet)
    listener.info(f"loading {request.model} ...")
    from icsearch.greedy import greedy as search
    from icsearch.model import quiet_transformers

    quiet_transformers()
    try:
        record = search(request, listener)
    except KeyboardInterrupt:
        listener.close()
        listener.info(f"interrupted; the same command continues {request.out}")
        raise
    finally:
        listener.close()
    report.write_results(request.out, record)
    _show(record, request.out)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A pattern.json.")],
    engine: Annotated[str, typer.Option(help="transformers, vllm or sglang.")],
    retention: Annotated[
        str | None, typer.Option(help="Take the run's pattern at this retention instead of its last.")
    ] = None,
) -> None:
    """Print what an engine needs to run a pattern: launch flags or config keys. Warnings go to stderr."""
    from icsearch.export import export as export_pattern
    from icsearch.pattern import load_pattern_file, parse_retention

    result = export_pattern(load_pattern_file(file), engine, parse_retention(retention) if retention else None)
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(result.text)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="RUN directories, finished or not.")],
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="Where to write the page.")],
) -> None:
    """Write one self-contained HTML page about one or several runs, from their journals alone."""
    from icsearch.report import write_report

    write_report(runs, out)
    typer.echo(f"wrote {out}")


def default_run(model: str, method: str) -> Path:
    """runs/MODEL-METHOD, from the last part of the model's name."""
    return Path("runs") / f"{Path(model).name or 'model'}-{method}"


def _show(record: RunRecord, out: Path) -> None:
    from rich.console import Console

    from icsearch.report import summary_table

    console = Console()
    console.print(summary_table(record))
    console.print(f"wrote {out / 'pattern.json'}, curve.csv, curve.png, report.html", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point: turn every way to end into one line on stderr and an exit status."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.exit(_run(arguments, debug))


def _run(arguments: list[str], debug: bool) -> int:
    try:
        status = app(args=arguments, standalone_mode=False)
        return status if isinstance(status, int) else 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to flush to
        return EXIT_FAILURE
    except Exception as error:  # the last line of defence: whatever happens, one line and a status
        if debug:
            traceback.print_exc()
        message, status = _explain(error)
        print(f"icsearch: {' '.join(message.split())}", file=sys.stderr)
        return status


def _explain(error: Exception) -> tuple[str, int]:
    """The line for the user and the exit status."""
    if isinstance(error, typer.Abort):
        return "aborted", EXIT_INTERRUPTED
    if isinstance(error, IcsearchError):
        return str(error), EXIT_BAD_INPUT
    if hasattr(error, "format_message"):  # a usage error of the command-line parser
        return f"{error.format_message()} (see icsearch --help)", EXIT_BAD_INPUT
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "the disk is full: free some space and repeat the command; it continues where it stopped", EXIT_FAILURE
    return f"{type(error).__name__}: {error} (--debug shows where)", EXIT_FAILURE
