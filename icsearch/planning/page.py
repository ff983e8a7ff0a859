"""A plan in words and as JSON (`icsearch.plan/1`): what is counted, measured, estimated and quoted is labelled so."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from icsearch import __version__
from icsearch.core.text import format_bytes
from icsearch.model.shape import CPU, RESIDENT
from icsearch.planning.forecast import PATIENCE, SECONDS_AN_HOUR, Forecast, Plan
from icsearch.planning.offload import SHARE_OF_CPU
from icsearch.planning.placement import Fit, missing_cpu_bytes, weight_sizes
from icsearch.planning.stage_starts import shared_starts
from icsearch.search.greedy import split_stages
from icsearch.search.registry import STRATEGIES

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

PLAN_FORMAT = "icsearch.plan/1"
EXACT = "exact"
KINDS = {
    "layer_evaluations": "exact: counted over a rehearsal, its likely course; others: that times a measured share",
    "share": "measured: layer evaluations of exact's, on two 24-layer checkpoints (benchmarks/README.md); a race's for "
    "the waves of the placement, estimated: in the first wave it drops nobody",
    "most_layer_evaluations": "counted: a bound, without states kept between steps",
    "flops": "counted (icsearch/cost/work.py) over the layer evaluations",
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
        "computed_bytes": weight_sizes(plan.case).total,
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
    """The command line of the recommended search, for a shell."""
    best, forecast = plan.best
    case, placement = plan.case, best.placement
    start = ["icsearch", "greedy"]
    if placement.processes > 1:
        start = ["torchrun", "--nproc-per-node", str(placement.processes), "-m", *start]
    options = {
        "--calibration": "texts.jsonl",
        "--num-sequences": case.workload.sequences,
        "--seq-len": case.seq_len,
        "--batch-size": case.batch_size,
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
    if case.devices.memory_given:
        options["--memory"] = f"{case.budget // 10**6}MB"
    told = [str(part) for option in options.items() for part in option]
    return shlex.join([*start, case.model.checkpoint, *told])


def table(plan: Plan) -> RenderableType:
    """What the command prints, but for the recommended command; fits 80 columns."""
    from rich.console import Group
    from rich.text import Text

    tables = (_facts(plan), _memory_table(plan), _hours_table(plan), _strategy_table(plan), _notes(plan))
    return Group(*(part for one in tables for part in (one, Text())))


def _facts(plan: Plan) -> RenderableType:
    from rich.table import Table

    case, model, device = plan.case, plan.case.model, plan.case.device
    search = case.workload
    stages = f", in {search.stages} stages" if search.stages > 1 else ""
    calls = f"{case.batch_size} sequence{'s' if case.batch_size > 1 else ''} a call"
    rows = Table.grid(padding=(0, 2))
    rows.add_row(
        "model",
        f"{model.name} ({model.model_type}, {model.shape.layers} layers), {_millions(model.num_parameters)} parameters",
    )
    rows.add_row("weights", _weights_words(plan))
    rows.add_row(
        "search",
        f"{search.num_shared} of {len(search.flippable)} layers shared{stages}, on "
        f"{search.sequences} x {case.seq_len} tokens; {calls}, {case.dtype}",
    )
    rows.add_row(
        "devices",
        f"{case.devices.words}: {format_bytes(device.memory)}, {device.flops / 1e12:.4g} TFLOP/s "
        f"({device.float32_flops / 1e12:.3g} in float32), {device.bandwidth / 1e12:.3g} TB/s each ({device.source})",
    )
    firsts = [block.start for block in split_stages(len(search.start), search.stages)]
    for text in shared_starts(search.start, firsts, range(len(search.start))):  # all its layers have letters
        rows.add_row("stages", text)
    return rows


def _millions(number: int) -> str:
    """Such as 743.9B, 2.015M."""
    return f"{number / 1e9:.4g}B" if number >= 10**9 else f"{number / 1e6:.4g}M"


def _weights_words(plan: Plan) -> str:
    """What the checkpoint takes on disk, and as the run computes with it."""
    case, model = plan.case, plan.case.model
    stored, computed = round(model.stored_model_bytes), format_bytes(weight_sizes(case).total)
    if model.quantised:
        return f"{format_bytes(stored)} on disk in FP8; dequantised as they are read: {computed} in {case.dtype}"
    if model.dtype == case.dtype:
        return f"{computed}, on disk and in memory ({case.dtype})"
    return f"{format_bytes(stored)} on disk in {model.dtype}, {computed} in {case.dtype}"


def _memory_table(plan: Plan) -> RenderableType:
    """Every placement: what its fullest device holds."""
    found = _table(f"Memory of the fullest device, estimated, of {format_bytes(plan.fits[0].budget)}")
    for name in ("placement", "weights", "branches", "a call", "in all", "patterns at once"):
        found.add_column(name)
    for one in plan.fits:
        living = f"{one.per_sweep}, in CPU memory" if one.resting else str(one.per_sweep)
        verdict = _missing(plan, one) if one.missing else living
        sizes = (one.weights, one.states, one.call, one.total)
        found.add_row(one.placement.words, *map(format_bytes, sizes), verdict)
    return found


def _missing(plan: Plan, one: Fit) -> str:
    """By how much a placement does not fit: on the device, or into the CPU memory beside it."""
    where = "CPU " if missing_cpu_bytes(plan.case, one.placement) == one.missing else ""
    return f"{where}{format_bytes(one.missing)} over"


def _hours_table(plan: Plan) -> RenderableType:
    """Every placement that fits: bytes read, and how long each strategy takes."""
    found = _table(
        "Weights that a step of exact reads, counted; the time of such a step, and of each search, estimated"
    )
    for name in ("placement", "reads", "a step", *STRATEGIES):
        found.add_column(name, justify="left" if name == "placement" else "right")
    for one, forecasts in plan.forecasts.items():
        exact = forecasts[0]
        read = format_bytes(round(exact.weight_bytes_per_step)) if one.placement.streamed else "once"
        times = (duration(each.hours) for each in forecasts)
        found.add_row(one.placement.words, read, duration(exact.hours_per_step), *times)
    return found


def _strategy_table(plan: Plan) -> RenderableType:
    """What each strategy computes in the recommended placement."""
    best, _ = plan.best
    found = _table(f"{best.placement.words}: layer evaluations (of exact's, measured), FLOPs, counted; time, estimated")
    for name in ("strategy", "of exact", "evaluations", "at most", "FLOPs", "at most", "time", "at most"):
        found.add_column(name, justify="left" if name == "strategy" else "right")
    for each in plan.forecasts[best]:
        counts = (f"{each.layer_evaluations:.0f}", f"{each.most_layer_evaluations}")
        work = (f"{each.flops:.1e}", f"{each.most_flops:.1e}", duration(each.hours), duration(each.most_hours))
        found.add_row(each.strategy, "" if each.share == 1 else f"{each.share:.2f}", *counts, *work)
    return found


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="",
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def duration(hours: float) -> str:
    """Two digits in the unit that fits: 0.43 s, 48 s, 3.3 min, 5.2 h, 140 h."""
    seconds = hours * SECONDS_AN_HOUR
    value, unit = (seconds, "s") if seconds < 99.5 else (seconds / 60, "min") if seconds < 5970 else (hours, "h")
    return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.2g} {unit}"


def _notes(plan: Plan) -> RenderableType:
    from rich.text import Text

    return Text(
        f"{_cpu_memory(plan)}"
        "exact: its likely course, by rehearsal. The others: exact's times the share of layer evaluations that was "
        "measured on two 24-layer checkpoints; yours follows from its losses. A race drops nobody in its first wave, "
        "so it saves less in few waves; each portion of lazy reads streamed weights again.\n"
        f"Time: max(FLOPs / rate, bytes / bandwidth) / efficiency; efficiency {plan.basis}: an order of magnitude.\n"
        f"Recommended: {reason(plan)}."
    )


def _cpu_memory(plan: Plan) -> str:
    """What weights take that rest in CPU memory, where a placement keeps them there; a line, or nothing."""
    copies = sorted({one.placement.data for one in plan.fits if one.placement.offload == CPU})
    if not copies:
        return ""
    total, room = weight_sizes(plan.case).total, int(SHARE_OF_CPU * plan.case.device.node_memory)
    sizes = ", ".join(f"{format_bytes(total * data)} with dp {data}" for data in copies)
    return f"from cpu: the weights rest in the node's CPU memory, {sizes}, of {format_bytes(room)} to take.\n"


def reason(plan: Plan) -> str:
    """Why the recommended placement and strategy are these."""
    best, chosen = plan.best
    least = min(plan.forecasts[best], key=lambda one: one.hours)
    place = "the placement that exact is fastest on"
    certain = f"{place}, and exact, whose choices are certain"
    if chosen.strategy == EXACT and chosen.hours > PATIENCE:
        return f"{certain}: no other strategy is faster there"
    if chosen.strategy != EXACT:
        return f"{place}, and there the fastest strategy, for exact takes more than {PATIENCE:.0f} h"
    within = f"{certain}, for it ends within {PATIENCE:.0f} h"
    if least.strategy == EXACT:
        return within
    return f"{within}; {least.strategy} would take {duration(least.hours)} in place of {duration(chosen.hours)}"
