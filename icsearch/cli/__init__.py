"""The command line: parse, check, call one function, print. Heavy imports stay inside the commands."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icsearch import __version__
from icsearch.cli import plan as cli_plan
from icsearch.cli.options import (
    SOURCE_HELP,
    STRATEGY_HELP,
    BatchSize,
    BlockElements,
    Calibration,
    DataRanks,
    Device,
    Dtype,
    Fresh,
    KeepFull,
    Kernels,
    Memory,
    ModelArgument,
    NumSequences,
    NumShared,
    Offload,
    PipelineRanks,
    QuietFlag,
    Remote,
    Retention,
    Seed,
    SeqLen,
    Threads,
    Timeout,
)
from icsearch.endings import Terminated, raise_on_sigterm, run_to_its_end
from icsearch.processes.launch import read_launch

if TYPE_CHECKING:
    from rich.console import RenderableType

    from icsearch.processes.world import World
    from icsearch.requests import PatternRequest, RunRequest
    from icsearch.search import Progress

app = typer.Typer(
    name="icsearch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Find out which layers of a DeepSeek-Sparse-Attention model can drop their indexer, and what that costs.",
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
    from icsearch.requests import CalibrationRequest
    from icsearch.setup.inputs import calibrate as make

    request = CalibrationRequest(model, source, seq_len, num_sequences, seed, trust_remote_code)
    batches, hit = make(request, out, fresh)
    state = "already there, reused" if hit else "written"
    size = f"{batches.num_sequences} x {batches.seq_len} tokens"
    typer.echo(f"{out}: {size}, {state} (fingerprint {batches.fingerprint[:12]})")


@app.command()
def greedy(
    context: typer.Context,
    model: ModelArgument,
    calibration: Calibration,
    retention: Retention = None,
    num_shared: NumShared = None,
    stages: Annotated[
        int | None,
        typer.Option(
            help="Search in this many pipeline blocks in turn; each block's first layer stays F.",
            show_default="the blocks of --pp, else 1",
        ),
    ] = None,
    keep_full: KeepFull = "",
    objective: Annotated[
        str, typer.Option(help="What a flip is judged by: lm-loss, or kl, the KL to the all-F model.")
    ] = "lm-loss",
    strategy: Annotated[str, typer.Option(help=STRATEGY_HELP)] = "exact",
    confidence: Annotated[
        float | None,
        typer.Option(help="race: how sure to be that no step drops its best candidate.", show_default="0.95"),
    ] = None,
    tie_margin: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="race and lazy: settle on the leader once nobody is, at that confidence or by older scores, better by "
            "more than this per token.",
            show_default="off",
        ),
    ] = None,
    refine: Annotated[
        str | None,
        typer.Option(
            metavar="swaps",
            help="Improve the found pattern: move single indexers to other layers while that lowers the objective "
            "(loss or KL) by more than 2 paired standard errors, and on held-out sequences by more than 1. By the "
            "objective, the result is never worse than its start on either set of sequences.",
            show_default=False,
        ),
    ] = None,
    refine_on: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|SOURCE",
            help="Held-out sequences for --refine, none of them in the calibration.",
            show_default="demo:heldout for --calibration demo",
        ),
    ] = None,
    dp: DataRanks = None,
    pp: PipelineRanks = None,
    timeout: Timeout = 60.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Directory of the run.", show_default="runs/MODEL-greedy")
    ] = None,
    fresh: Fresh = False,
    seed: Seed = 0,
    seq_len: SeqLen = None,
    num_sequences: NumSequences = None,
    batch_size: BatchSize = None,
    memory: Memory = None,
    threads: Threads = None,
    kernels: Kernels = "auto",
    block_elements: BlockElements = None,
    offload: Offload = "auto",
    trust_remote_code: Remote = False,
    quiet: QuietFlag = False,
) -> None:
    """Search, one flip at a time, for the layers whose indexer is missed least (IndexCache, Algorithm 1)."""
    from icsearch.planning.plan import parse_bytes
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
        refine=refine,
        refine_on=refine_on,
        dp=dp,
        pp=pp,
        confidence=confidence,
        tie_margin=tie_margin,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        memory=None if memory is None else parse_bytes(memory),
        threads=threads,
        kernels=kernels,
        block_elements=block_elements,
        offload=offload,
        fresh=fresh,
    )
    _run_search("greedy", request, quiet, _world(context, timeout))


def _run_search(search: str, request: PatternRequest, quiet: bool, world: World | None = None) -> None:
    """Run a pattern-finding command of that name with its display around it, and show the result."""
    from icsearch import report

    with _display(request, quiet) as listener:
        if search == "greedy":
            from icsearch.greedy import greedy as run

            record = run(request, listener, report.write_results, world)  # type: ignore[arg-type]
        else:
            from icsearch.baseline import dp_baseline

            record = dp_baseline(request, listener, report.write_results, world)  # type: ignore[arg-type]
    _print(report.summary_table(record), f"{request.out / 'pattern.json'}, curve.csv, curve.png, report.html")


def _world(context: typer.Context, timeout: float) -> World | None:
    """The processes of this run, where a launcher has started several; they hear of the time-out."""
    world: World | None = context.obj
    if world is not None:
        world.set_timeout(timeout)
    return world


@contextlib.contextmanager
def _display(request: RunRequest, quiet: bool) -> Iterator[Progress]:
    """The display of a run: opened before anything heavy is imported, closed however the run ends."""
    from icsearch.progress import make_listener

    listener = make_listener(quiet)
    listener.info(f"loading {request.model} ...")
    from icsearch.weights.loading import quiet_transformers

    quiet_transformers()
    try:
        yield listener
    except (KeyboardInterrupt, Terminated) as ending:
        listener.close()
        typer.echo(_to_go_on(ending, request), err=True)
        raise
    finally:
        listener.close()


def _to_go_on(ending: BaseException, request: RunRequest) -> str:
    """What to do after a run was ended from outside."""
    how = "terminated" if isinstance(ending, Terminated) else "interrupted"
    command = "the same command without --fresh" if request.fresh else "the same command"
    return f"{how}; {command} continues {request.out}"


app.command("plan")(cli_plan.plan_search)


@app.command("dp-baseline")
def dp_baseline(
    context: typer.Context,
    model: ModelArgument,
    calibration: Calibration,
    retention: Retention = None,
    num_shared: NumShared = None,
    stages: Annotated[int, typer.Option(help="Keep the first layer of this many pipeline blocks F.")] = 1,
    keep_full: KeepFull = "",
    similarity: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Use the similarity of an earlier run on the same batches.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Directory of the run.", show_default="runs/MODEL-dp-baseline")
    ] = None,
    fresh: Fresh = False,
    seed: Seed = 0,
    seq_len: SeqLen = None,
    num_sequences: NumSequences = None,
    batch_size: BatchSize = None,
    memory: Memory = None,
    threads: Threads = None,
    timeout: Timeout = 60.0,
    kernels: Kernels = "auto",
    block_elements: BlockElements = None,
    offload: Offload = "auto",
    trust_remote_code: Remote = False,
    quiet: QuietFlag = False,
) -> None:
    """The baseline that the paper rejects: the pattern of highest cosine similarity, and what it really costs."""
    from icsearch.planning.plan import parse_bytes
    from icsearch.requests import BaselineRequest, CalibrationRequest, parse_layers, parse_share

    request = BaselineRequest(
        CalibrationRequest(model, calibration, seq_len, num_sequences, seed, trust_remote_code),
        out=out or default_run(model, "dp-baseline"),
        retention=parse_share(retention),
        num_shared=num_shared,
        stages=stages,
        keep_full=parse_layers(keep_full, "--keep-full"),
        similarity=similarity,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        memory=None if memory is None else parse_bytes(memory),
        threads=threads,
        kernels=kernels,
        block_elements=block_elements,
        offload=offload,
        fresh=fresh,
    )
    _run_search("dp-baseline", request, quiet, _world(context, timeout))


@app.command("eval")
def evaluate(
    context: typer.Context,
    model: ModelArgument,
    pattern: Annotated[
        list[str],
        typer.Option(
            metavar="SPEC",
            help="May be given several times: full, uniform:1/4, published:NAME, a pattern.json or RUN "
            "(RUN@1/2: its pattern at that retention), or the letters.",
        ),
    ],
    calibration: Calibration,
    retention: Annotated[
        list[str] | None, typer.Option(help="Take every run's pattern at this retention; several times for several.")
    ] = None,
    tasks: Annotated[int, typer.Option(min=0, help="Questions of each kind of task with an answer.")] = 0,
    task_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a task's prompt.", show_default="as long as the batches")
    ] = None,
    context_length: Annotated[
        list[int] | None,
        typer.Option("--context", min=1, help="Length to estimate the cost at.", show_default="the paper's four"),
    ] = None,
    measure: Annotated[
        list[int] | None, typer.Option(min=1, help="Time prefill and decode on this machine at this length.")
    ] = None,
    lm_eval: Annotated[
        str,
        typer.Option(
            metavar="TASKS", help="Run lm-evaluation-harness tasks (icsearch\\[lm-eval]).", show_default=False
        ),
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Evaluate patterns of another model too, labelled.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of the results.", show_default="runs/MODEL-eval")
    ] = None,
    fresh: Fresh = False,
    seed: Seed = 0,
    seq_len: SeqLen = None,
    num_sequences: NumSequences = None,
    batch_size: BatchSize = None,
    memory: Memory = None,
    threads: Threads = None,
    timeout: Timeout = 60.0,
    kernels: Kernels = "auto",
    block_elements: BlockElements = None,
    offload: Offload = "auto",
    trust_remote_code: Remote = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure patterns against the unmodified model on batches that no search has seen."""
    from icsearch import report
    from icsearch.pattern import parse_retention
    from icsearch.planning.plan import parse_bytes
    from icsearch.requests import CalibrationRequest, EvalRequest

    request = EvalRequest(
        CalibrationRequest(model, calibration, seq_len, num_sequences, seed, trust_remote_code),
        out=out or default_run(model, "eval"),
        patterns=tuple(pattern),
        retentions=tuple(parse_retention(text) for text in retention or ()),
        force=force,
        tasks=tasks,
        task_length=task_length,
        contexts=tuple(context_length or ()),
        measure=tuple(measure or ()),
        lm_eval=tuple(name.strip() for name in lm_eval.split(",") if name.strip()),
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        memory=None if memory is None else parse_bytes(memory),
        threads=threads,
        kernels=kernels,
        block_elements=block_elements,
        offload=offload,
        fresh=fresh,
    )
    world = _world(context, timeout)
    with _display(request, quiet) as listener:
        from icsearch.evaluate import evaluate as run

        document = run(request, listener, report.write_eval_results, world)
    _print(report.eval_table(document), f"{request.out / 'eval.json'}, eval.csv, report.html")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A pattern.json, or a RUN directory.")],
    engine: Annotated[str, typer.Option(help="transformers, vllm or sglang.")],
    retention: Annotated[
        str | None, typer.Option(help="Take the run's pattern at this retention instead of its last.")
    ] = None,
) -> None:
    """Print what an engine needs to run a pattern: launch flags or config keys. Warnings go to stderr."""
    from icsearch.export import export as export_pattern
    from icsearch.pattern import load_pattern_file, parse_retention

    path = file / "pattern.json" if file.is_dir() else file
    result = export_pattern(load_pattern_file(path), engine, parse_retention(retention) if retention else None)
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


def _print(table: RenderableType, written: str) -> None:
    from rich.console import Console

    console = Console()
    console.print(table)
    console.print(f"wrote {written}", highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Entry point: turn every way to end into one line on stderr and an exit status."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a plain terminal is no reason to fail
    raise_on_sigterm()
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.exit(_run(arguments, debug))


def _run(arguments: list[str], debug: bool) -> int:
    return run_to_its_end(lambda: _start(arguments, debug), debug)


def _start(arguments: list[str], debug: bool) -> object:
    """In this process, or in all that a launcher such as torchrun has started."""
    launch = read_launch(os.environ)
    if launch.size == 1:
        return _call(arguments)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # when torch starts it reads this: no C++ stacks
    from icsearch.processes.together import run_together

    return run_together(launch, lambda world: _call(arguments, world), debug)


def _call(arguments: list[str], world: World | None = None) -> object:
    try:
        return app(args=arguments, standalone_mode=False, obj=world)
    except typer.Abort as error:  # the parser takes an EOFError, such as a cut file's, for the end of typed input
        raise error.__cause__ or error from None
