"""A plan in words and as JSON (`icsearch.plan/1`): what is counted, measured, estimated and quoted is labelled so."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from icsearch import __version__
from icsearch.planning.forecast import Forecast, Plan
from icsearch.planning.placement import Fit
from icsearch.planning.plan import format_bytes
from icsearch.strategies import STRATEGIES
from icsearch.weights.holding import RESIDENT

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

PLAN_FORMAT = "icsearch.plan/1"
KINDS = {
    "layer_evaluations": "exact: counted over a rehearsal, its likely course; others: that times a measured share",
    "share": "measured: layer evaluations of exact's, on two 24-layer checkpoints (benchmarks/README.md); a race's for "
    "the waves of the placement, estimated: in the first wave it drops nobody",
    "most_layer_evaluations": "counted: a bound, without states kept between steps",
    "flops": "counted (icsearch/cost.py) over the layer evaluations",
    "weight_bytes": "counted: bytes of the checkpoint that all processes read; of lazy, estimated from its bound",
    "most_weight_bytes": "counted: a bound",
    "memory": "estimated (icsearch/planning/footprint.py): of the fullest device",
    "hours": "estimated (icsearch/planning/layer_time.py): max(FLOPs / rate, bytes / bandwidth) / efficiency, and "
    "transfers",
    "devices": "quoted",
}


def document(plan: Plan) -> dict[str, Any]:
    """The whole plan as JSON-ready data."""
    best, forecast = plan.best
    return {
        "format": PLAN_FORMAT,
        "icsearch_version": __version__,
        "kinds": {**KINDS, "efficiency": plan.basis},
        "model": _model(plan),
        "search": _search(plan),
        "devices": {"count": plan.case.devices.count, **asdict(plan.case.device)},
        "efficiency": asdict(plan.efficiency),
        "placements": [_placement(plan, one) for one in plan.fits],
        "recommended": {**_grid(best), "strategy": forecast.strategy, "command": command(plan)},
    }


def _model(plan: Plan) -> dict[str, Any]:
    model = plan.case.model
    return {
        "name_or_path": model.name,
        "model_type": model.model_type,
        "layers": model.shape.layers,
        "num_parameters": model.num_parameters,
        "checkpoint_bytes": round(model.stored_model_bytes),
        "dtype": plan.case.dtype,
        "start_pattern": model.start.letters,
    }


def _search(plan: Plan) -> dict[str, Any]:
    case = plan.case
    return {
        "num_sequences": case.workload.sequences,
        "seq_len": case.seq_len,
        "batch_size": case.batch_size,
        "num_shared": case.workload.num_shared,
        "stages": case.workload.stages,
        "flippable": len(case.workload.flippable),
    }


def _grid(one: Fit) -> dict[str, Any]:
    placement = one.placement
    return {"data": placement.data, "pipeline": placement.pipeline, "offload": placement.offload}


def _placement(plan: Plan, one: Fit) -> dict[str, Any]:
    memory = {
        "weights": one.weights,
        "states": one.states,
        "call": one.call,
        "total": one.total,
        "budget": one.budget,
        "missing": one.missing,
    }
    running = {
        "patterns_per_sweep": one.per_sweep,
        "batches_per_wave": one.wave,
        "kept_stride": one.kept.keeping.stride,
    }
    forecasts = {each.strategy: _numbers(each) for each in plan.forecasts.get(one, ())}
    fits = {"fits": not one.missing, "states_in_cpu_memory": one.resting}
    return {**_grid(one), **fits, "memory": memory, **running, "strategies": forecasts}


def _numbers(forecast: Forecast) -> dict[str, Any]:
    per_step = {
        "weight_bytes_per_step": forecast.weight_bytes_per_step,
        "hours_per_step": forecast.hours_per_step,
    }
    return {**{name: value for name, value in asdict(forecast).items() if name != "strategy"}, **per_step}


def command(plan: Plan) -> str:
    """The command line of the recommended search."""
    best, forecast = plan.best
    case, placement = plan.case, best.placement
    start = "icsearch greedy"
    if placement.processes > 1:
        start = f"torchrun --nproc-per-node {placement.processes} -m icsearch greedy"
    options = {
        "--calibration": "texts.jsonl",
        "--num-sequences": case.workload.sequences,
        "--seq-len": case.seq_len,
        "--num-shared": case.workload.num_shared,
        "--stages": case.workload.stages,
        "--strategy": forecast.strategy,
        "--device": case.device.kind,
        "--dtype": case.dtype,
    }
    if case.workload.keep_full:
        options["--keep-full"] = ",".join(map(str, case.workload.keep_full))
    if placement.processes > 1:
        options |= {"--dp": placement.data, "--pp": placement.pipeline}
    if placement.offload != RESIDENT:
        options["--offload"] = placement.offload
    return " ".join([start, case.model.checkpoint, *(f"{name} {value}" for name, value in options.items())])


def table(plan: Plan) -> RenderableType:
    """What the command prints."""
    from rich.console import Group
    from rich.text import Text

    tables = (_facts(plan), _memory_table(plan), _hours_table(plan), _strategy_table(plan), _notes(plan))
    spaced = [part for one in tables for part in (one, Text())]
    return Group(*spaced, Text(f"recommended: {command(plan)}"))


def _facts(plan: Plan) -> RenderableType:
    from rich.table import Table

    case, model, device = plan.case, plan.case.model, plan.case.device
    size = f"{model.num_parameters / 1e9:.4g}B parameters, {format_bytes(round(model.stored_model_bytes))} on disk"
    search = case.workload
    rows = Table.grid(padding=(0, 2))
    rows.add_row("model", f"{model.name} ({model.model_type}, {model.shape.layers} layers), {size}")
    rows.add_row(
        "search",
        f"{search.num_shared} of {len(search.flippable)} layers shared, in {search.stages} stage(s), on "
        f"{search.sequences} x {case.seq_len} tokens; {case.batch_size} sequence(s) a call, {case.dtype}",
    )
    rows.add_row(
        "devices",
        f"{case.devices.words}: {format_bytes(device.memory)}, {device.flops / 1e12:.4g} TFLOP/s "
        f"({device.float32_flops / 1e12:.3g} in float32), {device.bandwidth / 1e12:.3g} TB/s each ({device.source})",
    )
    return rows


def _memory_table(plan: Plan) -> RenderableType:
    """Every placement: what its fullest device holds."""
    found = _table(f"Memory of the fullest device, estimated, of {format_bytes(plan.fits[0].budget)}")
    for name in ("placement", "weights", "branches", "a call", "in all", "patterns at once"):
        found.add_column(name)
    for one in plan.fits:
        living = f"{one.per_sweep}, in CPU memory" if one.resting else str(one.per_sweep)
        verdict = f"none: {format_bytes(one.missing)} too much" if one.missing else living
        sizes = (one.weights, one.states, one.call, one.total)
        found.add_row(one.placement.words, *map(format_bytes, sizes), verdict)
    return found


def _hours_table(plan: Plan) -> RenderableType:
    """Every placement that fits: bytes read, and the hours of each strategy."""
    found = _table("Hours, estimated; bytes of weights read in a step, counted")
    for name in ("placement", "weights read a step", "hours a step", *STRATEGIES):
        found.add_column(name)
    for one, forecasts in plan.forecasts.items():
        exact = forecasts[0]
        read = format_bytes(round(exact.weight_bytes_per_step)) if one.placement.streamed else "once"
        hours = (_number(each.hours) for each in forecasts)
        found.add_row(one.placement.words, read, _number(exact.hours_per_step), *hours)
    return found


def _strategy_table(plan: Plan) -> RenderableType:
    """What each strategy computes in the recommended placement."""
    best, _ = plan.best
    found = _table(f"Layer evaluations and FLOPs of {best.placement.words}, counted; of exact, measured")
    for name in ("strategy", "of exact", "layer evaluations", "at most", "FLOPs", "at most", "hours", "at most"):
        found.add_column(name)
    for each in plan.forecasts[best]:
        counts = (f"{each.layer_evaluations:.0f}", f"{each.most_layer_evaluations}")
        work = (f"{each.flops:.2e}", f"{each.most_flops:.2e}", _number(each.hours), _number(each.most_hours))
        found.add_row(each.strategy, "" if each.share == 1 else f"{each.share:g}", *counts, *work)
    return found


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="", pad_edge=False)


def _number(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _notes(plan: Plan) -> RenderableType:
    from rich.text import Text

    return Text(
        "exact: its likely course, by rehearsal. The others: exact's times the share of layer evaluations that was "
        "measured on two 24-layer checkpoints; yours follows from its losses.\n"
        f"Hours: max(FLOPs / rate, bytes / bandwidth) / efficiency; efficiency {plan.basis}: an order of magnitude."
    )
