"""One all-F forward: transformers' modules against our arithmetic. Time, peak memory, and what ties do.

Times and memory are those of processes of their own, stock and ours in turns, as paired ratios. Then, on the same
inputs layer by layer, how many selections differ and how many of those are ties; and how far the losses are apart
with the reference's ties as `torch.topk` breaks them, with ties broken by our rule (earliest of equal scores), and,
in our arithmetic, with the opposite rule. As a measure of what float32 can tell apart at all: how far stock's own loss
moves when its embeddings are changed in their last bit.

Usage: python benchmarks/kernels.py [--lengths 2048,8192,32768] [--repeats 3] [--compare MODEL:LENGTH ...]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoints
from measuring import RESULTS, WORK, Clock, Json, Peak, Results, machine, ratios, run_child, spread, write_json

FORMAT = "icsearch.bench.kernels/1"
RANDOM = "random:12"
LAYERS = 12
STOCK_UP_TO = 8192  # beyond that its scores alone take many GB
FORWARDS = {2048: 3}  # timed in one process; elsewhere one
COMPARED = (f"{RANDOM}:2048", f"{RANDOM}:8192", "demo:2048")
ROUNDING = 16 * 2.0**-23  # of the largest score of a query: two float32 sums in another order
# Seconds of a forward of this model on two cores, for the expected duration.
SECONDS = {"stock": 1.6 / 2048**2, "ours": 0.25 / 2048**1.6}
START = 6.0  # seconds for a process to import torch and load


def expected_seconds(arithmetic: str, length: int, threads: int) -> float:
    power = {"stock": 2.0, "ours": 1.6}[arithmetic]
    return START + FORWARDS.get(length, 1) * SECONDS[arithmetic] * length**power * 2 / min(threads, 2)


# --- in a process of its own -------------------------------------------------------------------------------------


def child(spec: Json) -> Json:
    import torch

    torch.set_num_threads(spec["threads"])
    return compare(spec) if spec["what"] == "compare" else measure(spec)


def measure(spec: Json) -> Json:
    """Seconds of a forward (the mean, where several are made) and the memory above the loaded model."""
    import stock

    tokens = stock.read_tokens(Path(spec["tokens"]), 1, 1)
    forward = {"stock": stock_forward, "ours": our_forward}[spec["arithmetic"]](spec["model"])
    forward(tokens.input_ids[:, :128], tokens.counted[:, :128])
    peak = Peak().start()
    started = time.perf_counter()
    for _ in range(spec["forwards"]):
        nll = forward(tokens.input_ids, tokens.counted)
    seconds = (time.perf_counter() - started) / spec["forwards"]
    return {"seconds": seconds, "loss": nll / tokens.count, **peak.numbers()}


def stock_forward(directory: str, earliest: bool = False, nudged: bool = False) -> Any:
    import stock

    model = stock.StockModel(Path(directory), earliest)
    if nudged:
        import edge_ties

        edge_ties.nudge(model)
    return lambda input_ids, counted: model.nll("F" * len(model.roles), input_ids, counted)[0]


def our_forward(directory: str) -> Any:
    from icsearch.model import checkpoint, loading
    from icsearch.model.shape import BLOCK_ELEMENTS
    from icsearch.sweep.branches import Batch
    from icsearch.sweep.sweep import naive_nll

    dsa = loading.load(checkpoint.open_checkpoint(directory), device="cpu", block_elements=BLOCK_ELEMENTS["cpu"])
    return lambda input_ids, counted: naive_nll(dsa, dsa.start_pattern, [Batch(0, input_ids, counted)])[0]


def compare(spec: Json) -> Json:
    """Losses of one sequence under each rule for ties, and each layer's selections on the reference's inputs."""
    from unittest import mock

    import edge_ties
    import stock
    from icsearch.model import ops

    tokens = stock.read_tokens(Path(spec["tokens"]), 1, 1)
    inputs = (tokens.input_ids, tokens.counted)
    ours = our_forward(spec["model"])
    losses = {
        "stock": stock_forward(spec["model"])(*inputs),
        "stock_earliest": stock_forward(spec["model"], earliest=True)(*inputs),
        "stock_earliest_nudged": stock_forward(spec["model"], earliest=True, nudged=True)(*inputs),
        "ours": ours(*inputs),
    }
    with mock.patch.object(ops, "top_tokens", edge_ties.latest_of_equal(ops.top_tokens)):
        losses["ours_latest"] = ours(*inputs)
    losses = {name: nll / tokens.count for name, nll in losses.items()}
    return {"losses": losses, "selections": edge_ties.count_differences(Path(spec["model"]), tokens, ROUNDING)}


# --- the parent --------------------------------------------------------------------------------------------------


def time_forwards(results: Results, lengths: Sequence[int], repeats: int, threads: int, clock: Clock) -> None:
    for length in lengths:
        model, tokens = checkpoints.prepare(RANDOM, length, 1, WORK)
        for repeat in range(repeats):
            for arithmetic in ("stock", "ours") if length <= STOCK_UP_TO else ("ours",):
                key = ("time", length, arithmetic, repeat)
                expected = expected_seconds(arithmetic, length, threads)
                if results.find(key):
                    clock.skip(expected)
                    continue
                spec: Json = {"what": "time", "arithmetic": arithmetic, "model": str(model), "tokens": str(tokens)}
                spec["forwards"] = FORWARDS.get(length, 1)
                label = f"{length} tokens, {arithmetic}, repeat {repeat + 1}"
                results.add(key, clock.run(label, expected, lambda s=spec: run_child("kernels.py", s, threads)))


def compare_all(results: Results, compared: Sequence[str], threads: int, clock: Clock) -> None:
    for text in compared:
        name, length = text.rsplit(":", 1)
        expected = compare_seconds(int(length), threads)
        key = ("compare", f"{checkpoints.label(name)}:{length}")
        if results.find(key):
            clock.skip(expected)
            continue
        model, tokens = checkpoints.prepare(name, int(length), 1, WORK)
        spec = {"what": "compare", "model": str(model), "tokens": str(tokens)}
        label = f"ties of {key[1]}"
        results.add(key, clock.run(label, expected, lambda s=spec: run_child("kernels.py", s, threads)))


def compare_seconds(length: int, threads: int) -> float:
    return 5 * expected_seconds("stock", length, threads)  # stable sorts are slow


def summarise(results: Results, lengths: Sequence[int]) -> Json:
    """Of all lines: spreads of seconds and memory, paired ratios, the comparisons, and the goals."""
    rows = [row for length in lengths if (row := _row(results, length))]
    compared = [
        {"name": line["key"][1], "losses": line["losses"], "selections": line["selections"]}
        for line in results.lines
        if line["key"][0] == "compare"
    ]
    document = {"format": FORMAT, **results.origin()}
    return {**document, "lengths": rows, "compared": compared, "goals": goals(rows)}


def _row(results: Results, length: int) -> Json | None:
    found = {
        arithmetic: [line for line in results.lines if line["key"][:3] == ["time", length, arithmetic]]
        for arithmetic in ("stock", "ours")
    }
    row: Json = {"length": length}
    for arithmetic, lines in found.items():
        if lines:
            row[arithmetic] = {
                "seconds": spread([line["seconds"] for line in lines]),
                "peak_bytes": max(line["peak_bytes"] for line in lines),
                "peak_above_loaded_bytes": max(line["peak_above_loaded_bytes"] for line in lines),
                "memory_method": lines[0]["memory_method"],
            }
    if "ours" not in row:
        return None
    pairs = min(len(found["stock"]), len(found["ours"]))
    if pairs:
        stock, ours = ([line["seconds"] for line in found[name][:pairs]] for name in ("stock", "ours"))
        row["speedup"] = ratios(stock, ours)
        for field in ("peak_bytes", "peak_above_loaded_bytes"):
            row[f"{field}_share"] = row["ours"][field] / max(1, row["stock"][field])
    return row


def goals(rows: Sequence[Json]) -> list[Json]:
    """The goals of issue 4, each with what was measured; those whose length was not run are left out."""
    by_length = {row["length"]: row for row in rows}
    found = []
    for length, factor in ((2048, 5), (8192, 8)):
        if "speedup" in by_length.get(length, {}):
            measured = by_length[length]["speedup"]["median"]
            found.append(_goal(f"{length} tokens: at least {factor} times as fast", measured, measured >= factor))
    if "speedup" in by_length.get(8192, {}):
        share = by_length[8192]["peak_above_loaded_bytes_share"]
        found.append(_goal("8192 tokens: peak above the loaded model at most 1/5", share, share <= 1 / 5))
        share = by_length[8192]["peak_bytes_share"]
        found.append(_goal("8192 tokens: peak of the whole process at most 1/5", share, share <= 1 / 5))
    if 32768 in by_length:
        peak = by_length[32768]["ours"]["peak_bytes"]
        found.append(_goal("32768 tokens: whole process under 1.5 GB", peak / 1e9, peak < 1.5e9))
    return found


def _goal(text: str, measured: float, reached: bool) -> Json:
    return {"goal": text, "measured": measured, "reached": reached}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compare", nargs="*", default=list(COMPARED), metavar="MODEL:LENGTH")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.jsonl")
    parser.add_argument("--fresh", action="store_true", help="discard what --out holds")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    lengths, threads = [int(length) for length in arguments.lengths.split(",")], arguments.threads
    results = Results.open(arguments.out, machine(threads), arguments.fresh)
    timed = sum(
        expected_seconds(arithmetic, length, threads)
        for length in lengths
        for arithmetic in (("stock", "ours") if length <= STOCK_UP_TO else ("ours",))
    )
    clock = Clock(
        arguments.repeats * timed
        + sum(compare_seconds(int(text.rsplit(":", 1)[1]), threads) for text in arguments.compare)
    )
    time_forwards(results, lengths, arguments.repeats, threads, clock)
    compare_all(results, arguments.compare, threads, clock)
    document = summarise(results, lengths)
    write_json(arguments.out.with_suffix(".json"), document)
    from tables import kernels_table

    print(kernels_table(document))


if __name__ == "__main__":
    main()
