"""`icsearch plan`: parse, check, call one function, print. Heavy imports stay inside."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from icsearch.cli.options import BatchSize, ConfigFile, Dtype, KeepFull, NumSequences, NumShared, Retention, SeqLen


def plan_search(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A directory with config.json, a config.json, a hub id, or demo.")
    ],
    devices: Annotated[
        str, typer.Option(help="How many of what: 8xH200, 1xH100, 8xB200, 8xA100, 2xcpu (processes of one thread).")
    ] = "1xcpu",
    retention: Retention = None,
    num_shared: NumShared = None,
    stages: Annotated[int, typer.Option(help="Pipeline blocks that are searched in turn.")] = 1,
    keep_full: KeepFull = "",
    seq_len: SeqLen = None,
    num_sequences: NumSequences = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    device_memory: Annotated[
        str | None, typer.Option(help="Memory of one device, such as 80GB.", show_default="the device's")
    ] = None,
    device_flops: Annotated[
        str | None, typer.Option(help="Dense 16-bit FLOP/s of one device, such as 989T.", show_default="the device's")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="Bandwidth of its memory, such as 4.8TB/s.", show_default="the device's")
    ] = None,
    read_rate: Annotated[
        str | None, typer.Option(help="What the node reads weights from disk with.", show_default="4GB/s, assumed")
    ] = None,
    json: Annotated[bool, typer.Option("--json/--no-json", help="Print the plan as JSON (icsearch.plan/1).")] = False,
    config: ConfigFile = None,
) -> None:
    """Say what a search will take, from a config.json alone: memory, FLOPs, hours, and the command to start it."""
    from rich.console import Console

    from icsearch.commands.requests import CalibrationRequest, parse_layers, parse_share
    from icsearch.core.text import parse_bytes
    from icsearch.planning.devices import parse_devices, parse_rate
    from icsearch.planning.forecast import PlanRequest, make_plan
    from icsearch.planning.page import command, document, table

    request = PlanRequest(
        CalibrationRequest(model, "", seq_len, num_sequences),
        out=Path(),
        retention=parse_share(retention),
        num_shared=num_shared,
        stages=stages,
        keep_full=parse_layers(keep_full, "--keep-full"),
        batch_size=batch_size,
        dtype=dtype,
        devices=parse_devices(
            devices,
            memory=None if device_memory is None else parse_bytes(device_memory),
            flops=None if device_flops is None else parse_rate(device_flops, "--device-flops"),
            bandwidth=None if bandwidth is None else parse_rate(bandwidth, "--bandwidth"),
            read_rate=None if read_rate is None else parse_rate(read_rate, "--read-rate"),
        ),
    )
    made = make_plan(request)
    if json:
        typer.echo(dumps(document(made), indent=1))
        return
    console = Console()
    console.print(table(made))
    console.print(f"recommended:\n{command(made)}", soft_wrap=True, highlight=False, markup=False)
