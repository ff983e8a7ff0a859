"""Several processes with one thread each against one: how much faster a search is, and whether it finds the same.

Every search runs through torchrun in processes of its own; one process and several run in turns, repeat by repeat, and
ratios are taken within a repeat. Measured are the seconds of the search itself, as its journal counts them: waiting for
all processes is in them, starting them and loading is not (that is in `whole_seconds`). Each result is compared with
that of one process: patterns, and every loss that both have journaled, bit for bit.

A layout is dp=D, pp=P, or both, with the stages that are searched in turn: dp=2, pp=2, pp=2,stages=2. Times as fast is
to be set beside the number of processes; in a pipeline also beside what its blocks of layers allow, since later blocks
run more branches than earlier ones: that bound is counted (layer runs of all blocks / those of the largest).

Usage: python benchmarks/processes.py [--layouts 'dp=2;pp=2' --case demo:2048:8:4 --repeats 3] [--quick] [--plan]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoints import prepare
from measuring import RESULTS, ROOT, WORK, Clock, Json, Results, machine, minutes, ratios, spread, write_json
from search import Case, expected_seconds

FORMAT = "icsearch.bench.processes/1"
START = 15.0  # seconds for several processes to import torch and load
DEFAULT_CASE, QUICK_CASE = "demo:2048:8:4", "demo:512:4:2"


@dataclass(frozen=True)
class Layout:
    """So many processes share the sequences, so many the layers; one of each is one process."""

    data: int = 1
    pipeline: int = 1
    stages: int = 1

    @property
    def size(self) -> int:
        return self.data * self.pipeline

    @property
    def alone(self) -> Layout:
        """One process that searches for the same."""
        return Layout(stages=self.stages)

    @property
    def name(self) -> str:
        parts = {"dp": self.data, "pp": self.pipeline, "stages": self.stages}
        return ",".join(f"{part}={value}" for part, value in parts.items() if value > 1) or "one"


def parse_layout(text: str) -> Layout:
    """Such as dp=2,pp=2,stages=2."""
    names = {"dp": "data", "pp": "pipeline", "stages": "stages"}
    parts = [part.partition("=") for part in text.split(",")]
    if not all(name in names and value.isdecimal() and int(value) for name, _, value in parts):
        raise SystemExit(f"layout {text!r}: expected such as dp=2, pp=2 or dp=2,pp=2,stages=2")
    return Layout(**{names[name]: int(value) for name, _, value in parts})


def default_layouts(cores: int) -> list[Layout]:
    """What this machine has cores for."""
    two = [Layout(data=2), Layout(pipeline=2), Layout(pipeline=2, stages=2)]
    four = [Layout(data=4), Layout(data=2, pipeline=2), Layout(pipeline=4)]
    return [*two, *(four if cores >= 4 else [])]


def parse_case(text: str) -> Case:
    """MODEL:LENGTH:SEQUENCES:FLIPS."""
    parts = text.rsplit(":", 3)
    if len(parts) != 4 or not all(part.isdecimal() for part in parts[1:]):
        raise SystemExit(f"case {text!r}: expected MODEL:LENGTH:SEQUENCES:FLIPS")
    return Case(parts[0], *(int(part) for part in parts[1:]))


def runs_of(layouts: Sequence[Layout], repeats: int) -> Iterator[tuple[Layout, int]]:
    """In turns: in every repeat each search by one process, followed by those that it is compared with."""
    alone = list(dict.fromkeys(layout.alone for layout in layouts))
    for repeat in range(repeats):
        for one in alone:
            for layout in [one, *(layout for layout in layouts if layout.alone == one)]:
                yield layout, repeat


def expected(case: Case, layout: Layout) -> float:
    """For the expected duration alone; a pipeline is taken to be half as efficient."""
    share = layout.data * (1 + layout.pipeline) / 2
    return START + expected_seconds(case, "exact", threads=1) / share


def measure(case: Case, layout: Layout, model: Path, tokens: Path) -> Json:
    """One search in processes of its own; what it took and found."""
    out = WORK / "processes"
    shutil.rmtree(out, ignore_errors=True)
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", str(layout.size)]
    search = ["greedy", str(model), "--calibration", str(tokens), "--out", str(out), "--num-shared", str(case.flips)]
    fixed = ["--threads", "1", "--batch-size", str(case.batch_size), "--stages", str(layout.stages), "--quiet"]
    grid = ["--dp", str(layout.data), "--pp", str(layout.pipeline)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    done = subprocess.run(
        [*launcher, "-m", "icsearch", *search, *fixed, *grid],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the search with {layout.name} failed:\n{done.stderr[-3000:]}")
    return {"whole_seconds": time.monotonic() - started, **read_run(out)}


def read_run(out: Path) -> Json:
    """Seconds, layer evaluations, the committed patterns, and every loss by pattern and first sequence."""
    document = json.loads((out / "pattern.json").read_text())
    events = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    sums: Json = {}
    for event in events:
        if event["event"] != "losses":
            continue
        for letters, values in zip(event["patterns"], event["nll"], strict=True):
            table = sums.setdefault(letters, {})
            table.update({str(sequence): value for sequence, value in enumerate(values, event["sequences"][0])})
    return {
        "seconds": document["cost"]["seconds"],
        "layer_evaluations": document["cost"]["layer_evaluations"],
        "patterns": [step["pattern"] for step in document["steps"]],
        "sums": sums,
    }


def key_of(case: Case, layout: Layout, repeat: int) -> tuple[str | int, ...]:
    return (case.name, layout.name, repeat)


def summarise(case: Case, layouts: Sequence[Layout], repeats: int, results: Results) -> Json:
    """Everything that the table says, from the lines of the results."""
    wanted = [*dict.fromkeys(layout.alone for layout in layouts), *layouts]
    rows = [row for layout in wanted if (row := _row(case, layout, repeats, results))]
    summary = {"name": case.name, "length": case.length, "sequences": case.sequences, "flips": case.flips}
    return {"format": FORMAT, **results.origin(), "case": summary, "rows": rows}


def _row(case: Case, layout: Layout, repeats: int, results: Results) -> Json | None:
    numbers = range(repeats)
    lines = [line for repeat in numbers if (line := results.find(key_of(case, layout, repeat)))]
    if not lines:
        return None
    row: Json = {"layout": layout.name, "processes": layout.size, "layer_evaluations": lines[0]["layer_evaluations"]}
    row |= {name: spread([line[name] for line in lines]) for name in ("seconds", "whole_seconds")}
    alone = [line for repeat in numbers if (line := results.find(key_of(case, layout.alone, repeat)))][: len(lines)]
    if layout.size == 1 or len(alone) < len(lines):
        return row
    faster = ratios([line["seconds"] for line in alone], [line["seconds"] for line in lines])
    row |= {"times_as_fast": faster, "efficiency": faster["median"] / layout.size}
    row["bound"] = layout.data * pipeline_bound(lines[0]["patterns"], layout)
    return {**row, "same_bits": all(line["sums"] == alone[0]["sums"] for line in lines)}


def pipeline_bound(committed: Sequence[str], layout: Layout) -> float:
    """How much faster a pipeline can be: the layer runs of all its blocks, by those of the largest.

    Counted for the steps of a search that committed these patterns, everything being kept between them.
    """
    from icsearch.core.pattern import Pattern
    from icsearch.search.greedy import split_stages

    num_layers, start = len(committed[0]), Pattern.full(len(committed[0]))
    blocks = split_stages(num_layers, layout.pipeline)
    stages = split_stages(num_layers, layout.stages)
    runs = [0] * num_layers
    winner = 0  # the last flip: what lies before it was kept as it is
    before = start
    for letters in committed:
        flipped = next(i for i, (a, b) in enumerate(zip(before.letters, letters, strict=True)) if a != b)
        stage = next(stage for stage in stages if flipped in stage)
        for candidate in stage[1:] if layout.stages > 1 else range(1, num_layers):
            if before.is_full(candidate):
                for layer in range(max(candidate, winner), num_layers):
                    runs[layer] += 1
        before, winner = Pattern(letters), flipped
    return sum(runs) / max(sum(runs[layer] for layer in block) for block in blocks)


def table(document: Json) -> str:
    """As Markdown."""
    lines = [
        "| processes | seconds | times as fast | of the bound | efficiency | same bits |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        seconds = f"{row['seconds']['median']:.1f}"
        if "times_as_fast" not in row:
            lines.append(f"| {row['layout']} | {seconds} | | | | |")
            continue
        faster = row["times_as_fast"]
        found = f"{faster['median']:.2f} ({faster['min']:.2f} to {faster['max']:.2f})"
        share = f"{faster['median'] / row['bound']:.0%} of {row['bound']:.2f}"
        same = "yes" if row["same_bits"] else "NO"
        lines.append(f"| {row['layout']} | {seconds} | {found} | {share} | {row['efficiency']:.0%} | {same} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", help="with ; between, by default what this machine has cores for")
    parser.add_argument("--case", metavar="MODEL:LENGTH:SEQUENCES:FLIPS", help=f"by default {DEFAULT_CASE}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_CASE}, once: does it work here?")
    parser.add_argument("--out", type=Path, help="by default results/processes.jsonl, with --quick a file beside it")
    parser.add_argument("--fresh", action="store_true", help="discard what --out holds")
    parser.add_argument("--plan", action="store_true", help="print the expected durations, run nothing")
    run_all(parser.parse_args())


def run_all(arguments: argparse.Namespace) -> None:
    case = parse_case(arguments.case or (QUICK_CASE if arguments.quick else DEFAULT_CASE))
    repeats = 1 if arguments.quick else arguments.repeats
    names = arguments.layouts.split(";") if arguments.layouts else []
    layouts = [parse_layout(name) for name in names] or default_layouts(os.cpu_count() or 1)
    runs = list(runs_of(layouts, repeats))
    clock = Clock(sum(expected(case, layout) for layout, _ in runs))
    if arguments.plan:
        for layout, repeat in runs:
            print(f"{case.name} {layout.name} {repeat}: about {minutes(expected(case, layout))}")
        return
    out = arguments.out or RESULTS / ("processes-quick.jsonl" if arguments.quick else "processes.jsonl")
    results = Results.open(out, machine(1), arguments.fresh or arguments.quick)
    model, tokens = prepare(case.model, case.length, case.sequences, WORK)
    for layout, repeat in runs:
        key, seconds = key_of(case, layout, repeat), expected(case, layout)
        if results.find(key):
            clock.skip(seconds)
            continue
        label = " ".join(str(part) for part in key)
        results.add(key, clock.run(label, seconds, lambda layout=layout: measure(case, layout, model, tokens)))
    document = summarise(case, layouts, repeats, results)
    write_json(out.with_suffix(".json"), document)
    print(table(document))


if __name__ == "__main__":
    main()
