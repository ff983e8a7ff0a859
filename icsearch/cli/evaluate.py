"""`icsearch eval`: parse, check, call one function, print. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icsearch.cli.options import (
    BatchSize,
    BlockElements,
    Calibration,
    ConfigFile,
    Device,
    Dtype,
    Fresh,
    Kernels,
    Memory,
    ModelArgument,
    NumSequences,
    Offload,
    QuietFlag,
    Remote,
    Seed,
    SeqLen,
    Threads,
    Timeout,
)
from icsearch.cli.running import default_run, display, print_result, world_of


def evaluate_patterns(
    ctx: typer.Context,
    model: ModelArgument,
    pattern: Annotated[
        list[str],
        typer.Option(
            metavar="SPEC",
            help="May be given several times: full, uniform:1/4, published:NAME, a pattern.json or RUN "
            "(RUN@1/2: its pattern at that retention), the letters, or what an engine is given: a config.json, "
            "overrides as JSON, freq:4,offset:2, with its name in front where rules differ (megatron:freq:4).",
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
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Length to estimate the cost at.", show_default="the paper's four"),
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
    force: Annotated[
        bool, typer.Option("--force/--no-force", help="Evaluate patterns of another model too, labelled.")
    ] = False,
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
    config: ConfigFile = None,
) -> None:
    """Measure patterns against the unmodified model on batches that no search has seen."""
    from icsearch.commands.requests import CalibrationRequest, EvalRequest
    from icsearch.core.pattern import parse_retention
    from icsearch.core.text import parse_bytes

    request = EvalRequest(
        CalibrationRequest(model, calibration, seq_len, num_sequences, seed, trust_remote_code),
        out=out or default_run(model, "eval"),
        patterns=tuple(pattern),
        retentions=tuple(parse_retention(text) for text in retention or ()),
        force=force,
        tasks=tasks,
        task_length=task_length,
        contexts=tuple(context or ()),
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
    world = world_of(ctx, timeout)
    with display(request, quiet) as listener:
        from icsearch.commands.evaluate import evaluate
        from icsearch.report.terminal import eval_table
        from icsearch.report.write import write_eval_results

        document = evaluate(request, listener, write_eval_results, world)
    print_result(eval_table(document), f"{request.out / 'eval.json'}, eval.csv, report.html")
