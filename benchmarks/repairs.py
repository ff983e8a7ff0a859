"""How far off the estimated losses of repaired patterns are: a finished run's, each one evaluated on its own sequences.

    icsearch greedy demo --calibration demo --retention 1/8 --out runs/repairs
    python benchmarks/repairs.py runs/repairs

Takes every pattern of the run with some layers shared, cuts the model into 2 and into 4 pipeline stages, repairs in
both ways, by the journal's losses and by pattern.json's alone, and evaluates what the repairs give.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import load_pattern_file
from icsearch.engines.pipeline import (
    Losses,
    Repair,
    add_full,
    losses_of_file,
    losses_of_run,
    move_full,
    split_front,
    stage_starts,
    stages_on_shared,
)
from icsearch.runs.record import RunRecord, load_run


def repairs(record: RunRecord, losses: Losses) -> Iterator[Repair]:
    """Of every committed pattern, for 2 and 4 stages, with more F and with as many."""
    for step in record.steps():
        pattern = Pattern(step.pattern)
        for stages in (2, 4):
            layers, sizes = range(len(pattern)), split_front(len(pattern), stages)
            if stages_on_shared(pattern, layers, sizes):
                must = stage_starts(layers, sizes)
                found = (add_full(pattern, must, losses), move_full(pattern, must, losses))
                yield from (one for one in found if one is not None and one.loss is not None)


def evaluate(patterns: set[str], model: str, calibration: Path, out: Path) -> dict[str, float]:
    """Measured losses by letters."""
    options = [word for letters in sorted(patterns) for word in ("--pattern", letters)]
    command = [sys.executable, "-m", "icsearch", "eval", model, "--calibration", str(calibration), "--quiet"]
    subprocess.run([*command, "--out", str(out), *options], check=True, stdout=subprocess.DEVNULL)
    rows = json.loads((out / "eval.json").read_text(encoding="utf-8"))["rows"]
    return {row["pattern"]: row["loss"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    record = load_run(options.run)
    known = {
        "journal": losses_of_run(record, len(record.pattern)),
        "pattern.json": losses_of_file(load_pattern_file(options.run / "pattern.json")),
    }
    found = {name: list(repairs(record, losses)) for name, losses in known.items()}
    estimated = {one.pattern.letters for some in found.values() for one in some if not one.measured}
    measured = evaluate(estimated, options.model, options.run / "calibration", options.run / "repairs")
    for name, some in found.items():
        for kind, chosen in (("add", False), ("same", True)):
            misses = [
                abs(one.loss - measured[one.pattern.letters])
                for one in some
                if one.loss is not None and not one.measured and bool(one.made_shared) == chosen
            ]
            exact = sum(one.measured and bool(one.made_shared) == chosen for one in some)
            print(
                f"{name}, --repair {kind}: {exact} measured in the run; {len(misses)} estimated, off by "
                f"{statistics.median(misses):.4f} nats in the median, {max(misses):.4f} at most"
            )


if __name__ == "__main__":
    main()
