"""Peak memory of second-order tables, as planned and as measured: each table in its own process.

Measured is the peak of the process's resident memory over its whole life. The checkpoints have the sizes of the demo,
random weights, and an index_topk that fits their length.

Usage: python benchmarks/fisher_memory.py [--case LENGTH:SEQUENCES:BATCH:TOPK[:LAYERS] ...] [--threads 1]
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import checkpoints
from measuring import WORK, Clock, Json, Results, high_water, run_cases, run_child, write_json

FORMAT = "icsearch.bench.fisher-memory/1"
CASES = ("256:4:4:12", "8192:1:1:128", "32768:1:1:128")
SEED, DRAWS = 0, 4


def child(spec: Json) -> Json:
    """One table by `--memory`: its planned and its measured peak."""
    import torch

    from icsearch.commands.requests import CalibrationRequest, GreedyRequest
    from icsearch.commands.setup import Inputs, machine_here, memory_job, obtain, open_model, run_options
    from icsearch.model.loading import bring_up, quiet_transformers
    from icsearch.planning.memory import plan_memory
    from icsearch.sweep.branches import cut_waves, device_batches, make_place
    from icsearch.sweep.fisher import FisherSweep

    quiet_transformers()
    torch.set_num_threads(spec["threads"])
    out = Path(spec["out"])
    out.mkdir(parents=True, exist_ok=True)
    source = CalibrationRequest(spec["model"], spec["tokens"])
    request = GreedyRequest(
        source, out=out, batch_size=spec["batch_size"], threads=spec["threads"], memory=spec["memory"]
    )
    checkpoint, layout = open_model(source)
    calibration, _ = obtain(source, checkpoint, layout, out / "calibration", fresh=True)
    inputs = Inputs(checkpoint, layout, calibration)
    options = {**run_options(request, inputs, []), "draws": DRAWS}
    memory = plan_memory(memory_job(request, inputs, options), machine_here(request, options["device"]))
    table = memory.table
    assert table is not None
    dsa = bring_up(checkpoint, options, trust_remote_code=False, offload=memory.offload.where)
    loaded = high_water()
    sweep = FisherSweep(dsa, DRAWS, SEED, make_place(table.place, dsa.device, out / "states"))
    for wave in cut_waves(device_batches(calibration, spec["batch_size"], dsa.device), table.batches_per_wave):
        sweep.run(wave)
    return {
        "measured_bytes": high_water(),
        "planned_bytes": memory.table_peak,
        "table_bytes": memory.weights + table.layer_bytes,
        "loaded_bytes": loaded,
        "place": table.place,
        "batches_per_wave": table.batches_per_wave,
        "offload": memory.offload.where,
    }


def demo_sized(work: Path, length: int, topk: int, layers: int | None) -> Path:
    """A random checkpoint with the demo's sizes; the one that lies there, if there is one."""
    from icsearch.core.files import demo_checkpoint

    config = json.loads((demo_checkpoint() / "config.json").read_text())
    count = layers or config["num_hidden_layers"]
    more = {
        "num_hidden_layers": count,
        "first_k_dense_replace": count // 2,
        "max_position_embeddings": length,
        "index_topk": topk,
    }
    same = {name: config[name] for name in checkpoints.SIZES if name in config and name not in more}
    return checkpoints.random_checkpoint(work / f"fisher-{length}-{topk}-{count}", **{"layers": count, **same, **more})


def spec_of(case: str, memory: int | None, work: Path) -> Json:
    length, sequences, batch, topk, *layers = map(int, case.split(":"))
    model = demo_sized(work, length, topk, layers[0] if layers else None)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    tokens = checkpoints.random_tokens(work / f"fisher-tokens-{case}", sequences, length, vocabulary)
    out = work / f"fisher-run-{case}"
    shutil.rmtree(out, ignore_errors=True)
    return {"model": str(model), "tokens": str(tokens), "out": str(out), "batch_size": batch, "memory": memory}


def measure(results: Results, case: str, memory: int | None, threads: int, clock: Clock) -> None:
    key, expected = ("table", case, memory), 60.0
    if results.find(key):
        clock.skip(expected)
        return
    spec = spec_of(case, memory, WORK)
    results.add(key, clock.run(case, expected, lambda: run_child("fisher_memory.py", spec, threads)))


def table(results: Results) -> str:
    """Markdown."""
    head = "| case (tokens:sequences:batch:topk) | memory | entries | planned | measured | of it before | error |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for line in results.lines:
        _, case, memory = line["key"]
        sizes = (f"{line[name] / 1e6:.0f} MB" for name in ("planned_bytes", "measured_bytes", "loaded_bytes"))
        given = f"{memory / 1e6:.0f} MB" if memory else "free"
        error = line["planned_bytes"] / line["measured_bytes"] - 1
        lines.append(f"| {case} | {given} | {line['place']} | {' | '.join(sizes)} | {error:+.0%} |")
    return "\n".join(lines)


def main() -> None:
    done = run_cases(
        __doc__, "LENGTH:SEQUENCES:BATCH:TOPK[:LAYERS]", CASES, "fisher-memory.jsonl", child, measure, 60.0
    )
    if done is None:
        return
    out, results = done
    rows = [{name: value for name, value in line.items() if name not in ("machine", "dirty")} for line in results.lines]
    write_json(out.with_suffix(".json"), {"format": FORMAT, **results.origin(), "rows": rows})
    print(table(results))


if __name__ == "__main__":
    main()
