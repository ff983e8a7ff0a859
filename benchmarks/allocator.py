"""What `keep_freed_memory` gives: the demo model's forward with and without it, each in a process of its own.

Usage: python benchmarks/allocator.py

Prints the ratio of the two times (without / with) of each of several pairs, for an all-F and an all-S forward over
16 x 256 tokens, 4 sequences a call.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

PAIRS = 5


def forward_seconds(keep: bool, pattern: str) -> float:
    """Seconds of one pass over the tokens, in this process."""
    import torch

    from icsearch import model
    from icsearch.checkpoint import open_checkpoint
    from icsearch.memory import keep_freed_memory
    from icsearch.pattern import Pattern
    from icsearch.sweep import Sweeper, cut_batches

    model.quiet_transformers()
    if keep:
        keep_freed_memory()
    dsa = model.load(open_checkpoint("demo"))
    ids = torch.randint(0, 1000, (16, 256), generator=torch.Generator().manual_seed(0))
    batches = cut_batches(ids, torch.ones_like(ids, dtype=torch.bool), 4)
    sweeper = Sweeper(dsa)
    sweeper.sweep([Pattern(pattern)], batches[:1])
    started = time.perf_counter()
    for batch in batches:
        sweeper.sweep([Pattern(pattern)], [batch])
    return time.perf_counter() - started


def in_own_process(keep: bool, pattern: str) -> float:
    command = [sys.executable, __file__, "keep" if keep else "free", pattern]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    for pattern in ("F" * 16, "F" + "S" * 15):
        ratios = [in_own_process(False, pattern) / in_own_process(True, pattern) for _ in range(PAIRS)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"{pattern}: {middle:.2f} times as fast (min {low:.2f}, max {high:.2f}, {PAIRS} pairs)")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(forward_seconds(sys.argv[1] == "keep", sys.argv[2]))
    else:
        main()
