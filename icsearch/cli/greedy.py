"""`icsearch greedy`: parse, check, call one function, print. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icsearch.cli.options import (
    BatchSize,
    BlockElements,
    Calibration,
    ConfigFile,
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
    Objective,
    Offload,
    PipelineRanks,
    QuietFlag,
    Refine,
    Remote,
    Retention,
    Seed,
    SeqLen,
    Strategy,
    Threads,
    Timeout,
)
from icsearch.cli.running import default_run, display, print_result, world_of


def greedy_search(
    ctx: typer.Context,
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
    objective: Objective = "lm-loss",
    strategy: Strategy = "exact",
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
    refine: Refine = None,
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
    config: ConfigFile = None,
) -> None:
    """Search, one flip at a time, for the layers whose indexer is missed least (IndexCache, Algorithm 1)."""
    from icsearch.commands.requests import CalibrationRequest, GreedyRequest, parse_layers, parse_share
    from icsearch.core.text import parse_bytes

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
    world = world_of(ctx, timeout)
    with display(request, quiet) as listener:
        from icsearch.commands.greedy import greedy
        from icsearch.report.terminal import summary_table
        from icsearch.report.write import write_results

        record = greedy(request, listener, write_results, world)
    print_result(summary_table(record), f"{request.out / 'pattern.json'}, curve.csv, curve.png, report.html")
