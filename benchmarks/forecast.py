"""The plan's hours against measured ones: one efficiency fitted on layer calls, checked on others and on searches.

Every measurement is a process of its own on one thread: CPU seconds of a layer call with its own indexer and without,
of a dense layer and of one with experts, and of the LM head, on random checkpoints of several shapes; the smallest of
some repeats. The efficiency of the CPU in devices.toml is fitted on the shapes and lengths in FITTED: the one with
which the median estimate is neither too high nor too low. Then whole greedy searches are run, and their CPU seconds
compared with the plan's hours.

Usage: python benchmarks/forecast.py [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import checkpoints
from icsearch.commands.plan import make_case
from icsearch.commands.requests import CalibrationRequest, PlanRequest
from icsearch.model.shape import BLOCK_ELEMENTS
from icsearch.planning.devices import Device, Devices, device_table
from icsearch.planning.footprint import Call
from icsearch.planning.forecast import Clock as PlanClock
from icsearch.planning.forecast import Course, Phase, head_phase, layer_phases
from icsearch.planning.modelfile import open_model_file
from icsearch.planning.rehearsal import layer_evaluations
from icsearch.sweep.distributed.launch import Grid
from measuring import RESULTS, WORK, Clock, Json, Results, machine, run_child, write_json
from memory import LAYERS, SHAPES

FORMAT = "icsearch.bench.forecast/2"
CPU = device_table()["cpu"]
FITTED = (
    "small:512:4", "small:2048:1", "small:8192:1", "wide:1024:1", "wide:4096:1", "experts:1024:1", "experts:4096:1",
    "latents:1024:1", "latents:4096:1", "words:1024:1",
)  # fmt: skip
HELD_OUT = (
    "small:1024:1", "small:4096:1", "small:16384:1", "wide:2048:1", "wide:8192:1", "experts:512:4", "experts:2048:1",
    "latents:2048:1", "latents:8192:1", "words:2048:1", "heavy:1024:1", "heavy:2048:1",
)  # fmt: skip
SEARCHES = ("small:1024:4:2", "wide:2048:2:2", "experts:1024:2:1", "latents:2048:2:1")  # shape:length:sequences:flips
DENSE, EXPERTS = 1, LAYERS - 1  # a layer of each kind


# --- in a process of its own -------------------------------------------------------------------------------------


def child(spec: Json) -> Json:
    import torch

    torch.set_num_threads(spec["threads"])
    return search(spec) if spec["what"] == "search" else calls(spec)


def calls(spec: Json) -> Json:
    """CPU seconds of one layer call of each kind and role, and of the LM head."""
    import torch

    from icsearch.core.pattern import Pattern
    from icsearch.model import loading
    from icsearch.model.checkpoint import open_checkpoint
    from icsearch.model.slot import SelectionStore
    from icsearch.sweep.sweep import sequence_nll

    dsa = loading.load(open_checkpoint(spec["model"]), device="cpu", block_elements=BLOCK_ELEMENTS["cpu"])
    ids = torch.randint(dsa.config.vocab_size, (spec["batch_size"], spec["length"]))
    counted = torch.ones_like(ids, dtype=torch.bool)
    seconds = {}
    with torch.inference_mode():
        arguments, states = dsa.capture_calls(ids), dsa.embed(ids)
        first = SelectionStore(Pattern("F" * LAYERS))
        states = dsa.run_layer(0, states, arguments[0], first)
        for index, role in [(i, role) for i in sorted({DENSE, EXPERTS}) for role in "FS"]:
            pattern = Pattern("F" + role * (LAYERS - 1))

            def run(index: int = index, pattern: Pattern = pattern) -> object:
                store = SelectionStore(pattern, first.selection)
                return dsa.run_layer(index, states, arguments[index], store)

            seconds[f"{index}{role}"] = fastest(run, spec["repeats"])
        seconds["head"] = fastest(
            lambda: sequence_nll(dsa.final_norm(states), dsa.lm_head, ids, counted), spec["repeats"]
        )
    return {"seconds": seconds}


def fastest(run: Callable[[], object], repeats: int) -> float:
    """CPU seconds: the machine may be busy. The first one is warm-up."""
    run()
    found = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        found.append(time.process_time() - started)
    return min(found)


def search(spec: Json) -> Json:
    """CPU seconds of a greedy search, from its first sweep to its last loss."""
    from icsearch.commands.greedy import greedy
    from icsearch.commands.progress import Quiet
    from icsearch.commands.requests import GreedyRequest

    class Listener(Quiet):
        started = 0.0

        def planned(self, *arguments: object) -> None:
            self.started = time.process_time()

    listener = Listener()
    request = GreedyRequest(
        CalibrationRequest(spec["model"], spec["tokens"]),
        out=Path(spec["out"]),
        num_shared=spec["flips"],
        batch_size=1,
        threads=spec["threads"],
        fresh=True,
    )
    record = greedy(request, listener)
    runs = record.layer_sequences / len(record.tokens)
    return {"seconds": time.process_time() - listener.started, "layer_evaluations": runs}


# --- the parent --------------------------------------------------------------------------------------------------


def model_of(name: str) -> Path:
    return checkpoints.random_checkpoint(WORK / f"memory-{name}", LAYERS, **SHAPES[name])


def measure_calls(results: Results, case: str, repeats: int, threads: int, clock: Clock) -> None:
    key, expected = ("calls", case), 20.0
    if results.find(key):
        clock.skip(expected)
        return
    name, length, batch = case.split(":")
    spec: Json = {"what": "calls", "model": str(model_of(name)), "length": int(length), "batch_size": int(batch)}
    results.add(key, clock.run(case, expected, lambda: run_child("forecast.py", {**spec, "repeats": repeats}, threads)))


def measure_search(results: Results, case: str, threads: int, clock: Clock) -> None:
    key, expected = ("search", case), 60.0
    if results.find(key):
        clock.skip(expected)
        return
    name, length, sequences, flips = case.split(":")
    vocabulary = SHAPES[name].get("vocab_size", checkpoints.SIZES["vocab_size"])
    tokens = checkpoints.random_tokens(WORK / f"forecast-{case}", int(sequences), int(length), vocabulary)
    spec: Json = {"what": "search", "model": str(model_of(name)), "tokens": str(tokens), "flips": int(flips)}
    spec["out"] = str(WORK / f"forecast-run-{case}")
    results.add(key, clock.run(f"search {case}", expected, lambda: run_child("forecast.py", spec, threads)))


def phases_of(case: str) -> dict[str, list[Phase]]:
    """The phases of every call that a case measures."""
    name, length, batch = case.split(":")
    call = Call(open_model_file(str(model_of(name))).shape, int(batch), int(length), 4, BLOCK_ELEMENTS["cpu"])
    layers = {f"{i}{role}": layer_phases(call, i, role == "F") for i in {DENSE, EXPERTS} for role in "FS"}
    return {**layers, "head": [head_phase(call)]}


def seconds_of(phases: Sequence[Phase], device: Device) -> float:
    return sum(device.seconds(phase.flops, phase.bytes, in_float32=True) for phase in phases)


def fit(rows: Sequence[tuple[list[Phase], float]]) -> Device:
    """The CPU with the efficiency of which the median of estimate / measured is 1: it falls as the efficiency grows."""
    least, most = 0.01, 1.0
    for _ in range(20):
        device = replace(CPU, efficiency=(least + most) / 2)
        too_slow = statistics.median(seconds_of(phases, device) / seconds for phases, seconds in rows) > 1
        least, most = (device.efficiency, most) if too_slow else (least, device.efficiency)
    return device


def compared(results: Results, cases: Sequence[str], device: Device) -> list[Json]:
    """Each measured call beside its estimate."""
    rows = []
    for case in cases:
        line = results.find(("calls", case))
        if line is None:
            continue
        for name, phases in phases_of(case).items():
            estimate, seconds = seconds_of(phases, device), line["seconds"][name]
            rows.append({"case": case, "call": name, "seconds": seconds, "estimate": estimate})
    return [{**row, "error": row["estimate"] / row["seconds"] - 1} for row in rows]


def searches(results: Results, fitted: Device) -> list[Json]:
    """Each measured search beside its plan."""
    rows = []
    for case in SEARCHES:
        line = results.find(("search", case))
        if line is None:
            continue
        name, length, sequences, flips = case.split(":")
        request = PlanRequest(
            model=str(model_of(name)),
            num_shared=int(flips),
            seq_len=int(length),
            num_sequences=int(sequences),
            batch_size=1,
        )
        device = replace(fitted, memory=8 * 10**9, read_rate=1e15)  # loading is not measured
        planned = replace(make_case(request), devices=Devices(1, device))
        place = planned.place(Grid(), "none")
        sweeps = planned.workload.likely("exact", place.memory.patterns_per_sweep, place.kept.keeping)
        seconds, _, _ = Course(planned, place, PlanClock(planned)).seconds(sweeps)
        rows.append(
            {
                "case": case,
                "seconds": line["seconds"],
                "estimate": seconds,
                "layer_evaluations": line["layer_evaluations"],
                "planned_layer_evaluations": layer_evaluations(sweeps),
                "error": seconds / line["seconds"] - 1,
            }
        )
    return rows


def summarise(results: Results) -> Json:
    measured = [
        (phases, line["seconds"][name])
        for case in FITTED
        if (line := results.find(("calls", case))) is not None
        for name, phases in phases_of(case).items()
    ]
    device = fit(measured)
    groups = {
        "fitted": compared(results, FITTED, device),
        "held out": compared(results, HELD_OUT, device),
        "searches": searches(results, device),
    }
    errors = {
        name: {
            "median": statistics.median(abs(row["error"]) for row in rows),
            "largest": max(abs(row["error"]) for row in rows),
            "calls": len(rows),
        }
        for name, rows in groups.items()
        if rows
    }
    return {
        "format": FORMAT,
        **results.origin(),
        "efficiency": device.efficiency,
        "errors": errors,
        **{name.replace(" ", "_"): rows for name, rows in groups.items()},
    }


def table(document: Json) -> str:
    """Markdown."""
    lines = ["| | measured | median error | largest error |", "|---|---|---|---|"]
    for name, one in document["errors"].items():
        lines.append(f"| {name} | {one['calls']} | {one['median']:.0%} | {one['largest']:.0%} |")
    lines += ["", "| search (shape:tokens:sequences:flips) | CPU seconds | estimate | error |", "|---|---|---|---|"]
    for row in document["searches"]:
        lines.append(f"| {row['case']} | {row['seconds']:.1f} | {row['estimate']:.1f} | {row['error']:+.0%} |")
    lines += ["", f"efficiency = {document['efficiency']:.3g}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "forecast.jsonl")
    parser.add_argument("--fresh", action="store_true", help="discard what --out holds")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    results = Results.open(arguments.out, machine(1), arguments.fresh)
    clock = Clock(20.0 * len(FITTED + HELD_OUT) + 60.0 * len(SEARCHES))
    for case in FITTED + HELD_OUT:
        measure_calls(results, case, arguments.repeats, 1, clock)
    for case in SEARCHES:
        measure_search(results, case, 1, clock)
    document = summarise(results)
    write_json(arguments.out.with_suffix(".json"), document)
    print(table(document))


if __name__ == "__main__":
    main()
