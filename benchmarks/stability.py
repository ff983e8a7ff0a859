"""Split-half stability: do two disjoint calibration sets rank the layers alike?

Usage: python benchmarks/stability.py RUN RUN

Prints Kendall's tau-b between the losses of all single flips (step 1 of a greedy search) of the two runs, and how
many of their committed flips the two searches have in common at each step.
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

from icsearch.runs.record import RunRecord, load_run


def kendall_tau(first: list[float], second: list[float]) -> float:
    """Kendall's tau-b of two score lists over the same items: 1 for the same order, -1 for the reverse."""
    signs = [
        (_sign(first[i] - first[j]), _sign(second[i] - second[j]))
        for i, j in itertools.combinations(range(len(first)), 2)
    ]
    concordant = sum(a * b for a, b in signs)
    untied = [sum(1 for pair in signs if pair[side]) for side in (0, 1)]
    return concordant / math.sqrt(untied[0] * untied[1])


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def compare(first: RunRecord, second: RunRecord) -> str:
    """The two runs side by side, as lines of text."""
    flips = [{c.layer: c.loss for c in record.candidates(1)} for record in (first, second)]
    layers = sorted(flips[0])
    tau = kendall_tau([flips[0][layer] for layer in layers], [flips[1][layer] for layer in layers])
    lines = [f"Kendall's tau-b of {len(layers)} single flips: {tau:.3f}"]
    for step, (a, b) in enumerate(zip(first.commits, second.commits, strict=False), start=1):
        shared = [set(_shared(commit.pattern)) for commit in (a, b)]
        lines.append(f"step {step:2d}: {len(shared[0] & shared[1])} of {step} shared layers in common")
    return "\n".join(lines)


def _shared(letters: str) -> list[int]:
    return [layer for layer, letter in enumerate(letters) if letter == "S"]


if __name__ == "__main__":
    print(compare(*(load_run(Path(argument)) for argument in sys.argv[1:3])))
