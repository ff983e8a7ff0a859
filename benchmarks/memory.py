"""Peak memory of whole searches, as planned and as measured: greedy on random checkpoints, each in its own process.

Measured is the peak of the process's resident memory over its whole life, the program itself and its results included.
Planned is the plan's `peak` row, printed before the weights are read.

Usage: python benchmarks/memory.py [--case SHAPE:LENGTH:SEQUENCES[:BATCH] ...] [--threads 1]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import checkpoints
from measuring import WORK, Clock, Json, Results, high_water, run_cases, run_child, write_json

FORMAT = "icsearch.bench.memory/1"
LAYERS = 4
# By name: what differs from the model of the other benchmarks.
SHAPES: dict[str, Json] = {
    "small": {},
    "wide": {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8},
    "experts": {
        "hidden_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 16, "num_experts_per_tok": 8,
    },
    "latents": {
        "hidden_size": 256, "kv_lora_rank": 256, "qk_rope_head_dim": 64, "index_head_dim": 96, "index_topk": 256,
    },
    "words": {"hidden_size": 256, "vocab_size": 65536},
    "heavy": {"hidden_size": 768, "intermediate_size": 16384, "vocab_size": 32768, "first_k_dense_replace": 4},
}  # fmt: skip
CASES = (
    "small:2048:4", "small:8192:2", "small:32768:1", "wide:2048:4", "wide:8192:2", "wide:32768:1", "experts:2048:4",
    "experts:8192:2", "experts:16384:1", "latents:2048:4", "latents:8192:2", "latents:16384:1", "words:2048:4",
    "words:8192:1", "heavy:2048:2", "heavy:8192:1", "small:512:32:16", "experts:512:16:8",
)  # fmt: skip


def child(spec: Json) -> Json:
    """One search: its planned and its measured peak."""
    import torch

    from icsearch.commands.greedy import greedy
    from icsearch.commands.progress import Quiet
    from icsearch.commands.requests import CalibrationRequest, GreedyRequest

    class Listener(Quiet):
        rows: dict[str, str] = {}  # noqa: RUF012

        def planned(self, rows: Sequence[tuple[str, str]], layer_sequences: int, done: int) -> None:
            self.rows = dict(rows)

    torch.set_num_threads(spec["threads"])
    listener = Listener()
    request = GreedyRequest(
        CalibrationRequest(spec["model"], spec["tokens"]),
        out=Path(spec["out"]),
        num_shared=1,
        batch_size=spec["batch_size"],
        threads=spec["threads"],
        fresh=True,
        memory=spec["memory"],
    )
    greedy(request, listener)
    return {"measured_bytes": high_water(), **planned_bytes(listener.rows)}


def planned_bytes(rows: dict[str, str]) -> Json:
    """The numbers of the plan's memory rows."""
    from icsearch.core.text import parse_bytes

    sizes = re.findall(r"[\d.]+ [kMGT]?B", rows["peak"])
    found = {"planned_bytes": parse_bytes(sizes[0]), "program_bytes": parse_bytes(sizes[1])}
    return {**found, "memory": rows["memory"], "kept": rows["kept between steps"]}


def measure(results: Results, case: str, memory: int | None, threads: int, clock: Clock) -> None:
    key = ("peak", case, memory)
    expected = 30.0
    if results.find(key):
        clock.skip(expected)
        return
    name, length, sequences, *batch = case.split(":")
    changes = SHAPES[name]
    model = checkpoints.random_checkpoint(WORK / f"memory-{name}", LAYERS, **changes)
    vocabulary = changes.get("vocab_size", checkpoints.SIZES["vocab_size"])
    tokens = checkpoints.random_tokens(WORK / f"memory-tokens-{case}", int(sequences), int(length), vocabulary)
    spec = {
        "model": str(model),
        "tokens": str(tokens),
        "out": str(WORK / f"memory-run-{case}"),
        "batch_size": int(batch[0]) if batch else 1,
        "memory": memory,
    }
    results.add(key, clock.run(case, expected, lambda: run_child("memory.py", spec, threads)))


def summarise(results: Results) -> Json:
    rows: list[Json] = [
        {
            "case": line["key"][1],
            "memory": line["key"][2],
            "planned_bytes": line["planned_bytes"],
            "measured_bytes": line["measured_bytes"],
            "program_bytes": line["program_bytes"],
            "error": line["planned_bytes"] / line["measured_bytes"] - 1,
            "error_above_program": (line["planned_bytes"] - line["program_bytes"])
            / (line["measured_bytes"] - line["program_bytes"])
            - 1,
        }
        for line in results.lines
    ]
    return {"format": FORMAT, **results.origin(), "rows": rows, "worst": max(abs(row["error"]) for row in rows)}


def table(document: Json) -> str:
    """Markdown."""
    head = "| case (shape:tokens:sequences:batch) | planned | measured | of it the program | error | without program |"
    lines = [head, "|---|---|---|---|---|---|"]
    for row in document["rows"]:
        sizes = (f"{row[name] / 1e6:.0f} MB" for name in ("planned_bytes", "measured_bytes", "program_bytes"))
        errors = (f"{row[name]:+.0%}" for name in ("error", "error_above_program"))
        lines.append(f"| {row['case']} | {' | '.join((*sizes, *errors))} |")
    return "\n".join(lines)


def main() -> None:
    done = run_cases(__doc__, "SHAPE:LENGTH:SEQUENCES[:BATCH]", CASES, "memory.jsonl", child, measure, 30.0)
    if done is None:
        return
    out, results = done
    document = summarise(results)
    write_json(out.with_suffix(".json"), document)
    print(table(document))


if __name__ == "__main__":
    main()
