"""A plan in words and as JSON (`icsearch.plan/1`): what is counted, estimated and quoted is labelled so."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from icsearch.core import __version__
from icsearch.core.text import format_bytes
from icsearch.model.shape import CPU, RESIDENT
from icsearch.planning.forecast import SECONDS_AN_HOUR, Forecast, Placement, Plan
from icsearch.planning.memory import SHARE_OF_CPU
from icsearch.planning.rows import shared_starts
from icsearch.search.greedy import split_stages

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

PLAN_FORMAT = "icsearch.plan/1"
KINDS = {
    "layer_evaluations": "counted over a rehearsal, the likely course",
    "most_layer_evaluations": "counted: a bound, without states kept between steps",
    "flops": "counted (icsearch/planning/work.py) over the layer evaluations",
    "weight_bytes": "counted: bytes of the checkpoint that all processes read",
    "most_weight_bytes": "counted: a bound",
    "memory": "estimated (icsearch/planning/memory.py): of the fullest device",
    "hours": "estimated (icsearch/planning/forecast.py): of each phase max(FLOPs / (rate x efficiency), bytes / "
    "bandwidth), or of bringing weights where that is more: an order of magnitude",
    "devices": "quoted or assumed, as `sources` says of each constant",
}


def document(plan: Plan) -> dict[str, Any]:
    """The whole plan as JSON-ready data."""
    case, model, workload = plan.case, plan.case.model, plan.case.workload
    best, forecast = plan.best
    return {
        "format": PLAN_FORMAT,
        "icsearch_version": __version__,
        "kinds": KINDS,
        "model": {
            "name_or_path": model.name,
            "model_type": model.model_type,
            "layers": model.shape.layers,
            "num_parameters": model.num_parameters,
            "checkpoint_bytes": round(model.stored_model_bytes),
            "computed_bytes": case.job.weights.total,
            "dtype": case.dtype,
            "start_pattern": model.start.letters,
        },
        "search": {
            "num_sequences": workload.sequences,
            "seq_len": case.seq_len,
            "batch_size": case.batch_size,
            "num_shared": workload.num_shared,
            "stages": workload.stages,
            "flippable": len(workload.flippable),
        },
        "devices": {"count": case.devices.count, **asdict(case.device)},
        "placements": [_placement(placement, plan.forecasts.get(placement, ())) for placement in plan.placements],
        "recommended": {**_grid(best), "strategy": forecast.strategy, "command": command(plan)},
    }


def _grid(placement: Placement) -> dict[str, Any]:
    return {"data": placement.grid.data, "pipeline": placement.grid.pipeline, "offload": placement.offload}


def _placement(placement: Placement, forecasts: tuple[Forecast, ...]) -> dict[str, Any]:
    memory = placement.memory
    return {
        **_grid(placement),
        "fits": not memory.missing,
        "states_in_cpu_memory": memory.in_cpu_memory > 0,
        "memory": {
            "weights": memory.weights,
            "states": placement.states,
            "call": memory.shape.layer_bytes,
            "total": placement.total,
            "budget": memory.budget,
            "missing": memory.missing,
        },
        "patterns_per_sweep": min(memory.patterns_per_sweep, placement.patterns),
        "batches_per_wave": memory.batches_per_wave,
        "kept_stride": placement.kept.keeping.stride,
        "strategies": {
            forecast.strategy: {
                **{name: value for name, value in asdict(forecast).items() if name != "strategy"},
                "binds": forecast.binds,
                "weight_bytes_per_step": forecast.weight_bytes / forecast.steps,
                "hours_per_step": forecast.hours / forecast.steps,
            }
            for forecast in forecasts
        },
    }


def command(plan: Plan) -> str:
    """The command line of the recommended search, for a shell."""
    best, _ = plan.best
    case, grid = plan.case, best.grid
    start = ["icsearch", "fisher"]
    if grid.size > 1:
        start = ["torchrun", "--nproc-per-node", str(grid.size), "-m", *start]
    options = {
        "--calibration": "texts.jsonl",
        "--num-sequences": case.workload.sequences,
        "--seq-len": case.seq_len,
        "--batch-size": case.batch_size,
        "--num-shared": case.workload.num_shared,
        "--stages": case.workload.stages,
        "--device": case.device.kind,
        "--dtype": case.dtype,
    }
    if case.workload.keep_full:
        options["--keep-full"] = ",".join(map(str, case.workload.keep_full))
    if grid.size > 1:
        options |= {"--dp": grid.data, "--pp": grid.pipeline}
    if best.offload != RESIDENT:
        options["--offload"] = best.offload
    if case.devices.memory_given:
        options["--memory"] = f"{best.memory.budget // 10**6}MB"
    told = [str(part) for option in options.items() for part in option]
    return shlex.join([*start, case.model.checkpoint, *told])


def table(plan: Plan) -> RenderableType:
    """What the command prints, but for the recommended command; fits 80 columns."""
    from rich.console import Group
    from rich.text import Text

    parts = (_facts(plan), _memory_table(plan), _time_table(plan), _notes(plan))
    return Group(*(part for each in parts for part in (each, Text())))


def _facts(plan: Plan) -> RenderableType:
    """The case, a row for each of its sides."""
    from rich.table import Table

    case, model, device, search = plan.case, plan.case.model, plan.case.device, plan.case.workload
    count = model.num_parameters
    parameters = f"{count / 1e9:.4g}B" if count >= 10**9 else f"{count / 1e6:.4g}M"
    stored, computed = format_bytes(round(model.stored_model_bytes)), format_bytes(case.job.weights.total)
    if model.quantisation:
        weights = (
            f"{stored} on disk in {model.quantisation.label}; dequantised as they are read: {computed} in {case.dtype}"
        )
    elif model.dtype == case.dtype:
        weights = f"{computed}, on disk and in memory ({case.dtype})"
    else:
        weights = f"{stored} on disk in {model.dtype}, {computed} in {case.dtype}"
    stages = f", in {search.stages} stages" if search.stages > 1 else ""
    rows = Table.grid(padding=(0, 2))
    rows.add_row("model", f"{model.name} ({model.model_type}, {model.shape.layers} layers), {parameters} parameters")
    rows.add_row("weights", weights)
    rows.add_row(
        "search",
        f"{search.num_shared} of {len(search.flippable)} layers shared{stages}, on {search.sequences} x {case.seq_len} "
        f"tokens; {case.batch_size} sequence{'s' if case.batch_size > 1 else ''} a call, {case.dtype}",
    )
    rows.add_row(
        "devices",
        f"{case.devices.words}: {format_bytes(device.memory)}, {device.flops / 1e12:.4g} TFLOP/s "
        f"({device.float32_flops / 1e12:.3g} in float32), {device.bandwidth / 1e12:.3g} TB/s each",
    )
    firsts = [block.start for block in split_stages(len(search.start), search.stages)]
    for text in shared_starts(search.start, firsts, range(len(search.start))):  # all its layers have letters
        rows.add_row("stages", text)
    return rows


def _memory_table(plan: Plan) -> RenderableType:
    """Every placement: what its fullest device holds."""
    rows = _table(
        f"Memory of the fullest device, estimated, of {format_bytes(plan.placements[0].memory.budget)}",
        ("placement", "weights", "branches", "a call", "in all", "patterns at once"),
    )
    best, _ = plan.best
    for placement in plan.placements:
        memory = placement.memory
        patterns = min(memory.patterns_per_sweep, placement.patterns)
        verdict = f"{patterns}, in CPU memory" if memory.in_cpu_memory else str(patterns)
        if memory.missing:
            verdict = f"{'CPU ' if memory.offload.missing else ''}{format_bytes(memory.missing)} over"
        sizes = (memory.weights, placement.states, memory.shape.layer_bytes, placement.total)
        rows.add_row(placement.words, *map(format_bytes, sizes), verdict, style="bold" if placement is best else "")
    return rows


def _time_table(plan: Plan) -> RenderableType:
    """Every placement that fits: what is read and computed, and how long that takes; a row for each strategy."""
    rows = _table(
        "Layer evaluations, FLOPs, weights read in all: counted; time: estimated",
        ("placement", "evaluations", "FLOPs", "reads", "a step", "in all", "waits for"),
    )
    best, _ = plan.best
    for placement, forecasts in plan.forecasts.items():
        for forecast in forecasts:
            read = format_bytes(round(forecast.weight_bytes))
            rows.add_row(
                placement.words if forecast is forecasts[0] else f"  greedy, {forecast.strategy}",
                str(forecast.layer_evaluations),
                f"{forecast.flops:.1e}",
                "once" if placement.offload == RESIDENT else read,
                duration(forecast.hours / forecast.steps),
                duration(forecast.hours),
                "computing" if forecast.binds == "computing" else "weights",
                style="bold" if placement is best else "",
            )
    return rows


def _table(title: str, columns: tuple[str, ...]) -> Table:
    """Names to the left, numbers to the right."""
    from rich import box
    from rich.table import Table

    rows = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="",
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in columns:
        left = name in ("placement", "waits for", "patterns at once")
        rows.add_column(name, justify="left" if left else "right")
    return rows


def duration(hours: float) -> str:
    """Two digits in the unit that fits: 0.43 s, 48 s, 3.3 min, 5.2 h, 140 h."""
    seconds = hours * SECONDS_AN_HOUR
    value, unit = (seconds, "s") if seconds < 99.5 else (seconds / 60, "min") if seconds < 5970 else (hours, "h")
    return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.2g} {unit}"


def _notes(plan: Plan) -> RenderableType:
    """What the numbers are, and which placement is the best."""
    from rich.table import Table

    best, forecast = plan.best
    device, total = plan.case.device, plan.case.job.weights.total
    rows = Table.grid(padding=(0, 2))
    if copies := sorted({placement.grid.data for placement in plan.placements if placement.offload == CPU}):
        sizes = ", ".join(f"{format_bytes(total * data)} with dp {data}" for data in copies)
        room = format_bytes(int(SHARE_OF_CPU * device.node_memory))
        rows.add_row("from cpu", f"the weights are in the node's CPU memory: {sizes}, of {room} to take")
    rows.add_row(
        "evaluations",
        f"the likely course, by rehearsal; at most {forecast.most_layer_evaluations}, which take "
        f"{duration(forecast.most_hours)} with {best.words}",
    )
    rows.add_row("rows", "of each placement: fisher, whose steps are its sweeps; below it greedy")
    rows.add_row(
        "time",
        "an order of magnitude: of each phase max(FLOPs / (rate x efficiency), bytes / bandwidth), or of bringing "
        f"weights where that is more; efficiency {device.efficiency:g} ({device.sources['efficiency']})",
    )
    rows.add_row(
        "best",
        f"{best.words}: {forecast.strategy} is fastest there. It waits for {forecast.binds}: computing takes "
        f"{duration(forecast.computing_hours)}, bringing weights {duration(forecast.bringing_hours)}",
    )
    return rows
