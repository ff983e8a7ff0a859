"""`icsearch dp-baseline`: parse, check, call one function, print. Heavy imports stay inside."""

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
    KeepFull,
    Kernels,
    Memory,
    ModelArgument,
    NumSequences,
    NumShared,
    Offload,
    QuietFlag,
    Remote,
    Retention,
    Seed,
    SeqLen,
    Threads,
    Timeout,
)
from icsearch.cli.running import default_run, display, print_result, world_of


def similarity_baseline(
    ctx: typer.Context,
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
    config: ConfigFile = None,
) -> None:
    """The baseline that the paper rejects: the pattern of highest cosine similarity, and what it really costs."""
    from icsearch.commands.requests import BaselineRequest, CalibrationRequest, parse_layers, parse_share
    from icsearch.core.text import parse_bytes

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
    world = world_of(ctx, timeout)
    with display(request, quiet) as listener:
        from icsearch.commands.baseline import dp_baseline
        from icsearch.report.terminal import summary_table
        from icsearch.report.write import write_results

        record = dp_baseline(request, listener, write_results, world)
    print_result(summary_table(record), f"{request.out / 'pattern.json'}, curve.csv, curve.png, report.html")
