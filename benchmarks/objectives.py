"""Which objective needs how many sequences for a stable ranking of the layers?

Usage: python benchmarks/objectives.py RUN [--subsets N]

RUN is a greedy run of `--objective kl`, whose journal has the sums of both objectives for each sequence: no model is
needed. The single flips (step 1) are ranked on n sequences, in many random subsets for each n, and compared with the
ranking on all of them by Kendall's tau-b. The whole set is part of the comparison: at n near all sequences tau is near
1 by construction. `disjoint` sets two random subsets that share no sequence against each other, which is free of that.
`same first`: how often the flip that the whole set ranks first is first.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from icsearch.runs.record import RunRecord, load_run
from stability import kendall_tau

SUBSETS = 200
SIZES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
SEED = 0

# Sums of each sequence by pattern, as a record keeps them.
Table = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Row:
    """One n: taus against the whole set (mean, and the 5th of 100), between disjoint subsets, and first places."""

    sequences: int
    mean: float
    low: float
    disjoint: float | None
    same_first: float


def rankings(record: RunRecord, table: Table) -> Callable[[Sequence[int]], list[float]]:
    """The score of each single flip on some sequences: summed objective / counted tokens."""
    flips = [candidate.pattern for candidate in record.candidates(1)]

    def scores(sequences: Sequence[int]) -> list[float]:
        tokens = sum(record.tokens[s] for s in sequences)
        return [sum(table[flip][s] for s in sequences) / tokens for flip in flips]

    return scores


def rows(record: RunRecord, table: Table, subsets: int) -> list[Row]:
    """A row for each n that is not more than there are sequences."""
    scores, chance = rankings(record, table), random.Random(SEED)
    everything = range(len(record.tokens))
    whole = scores(everything)
    found = []
    for n in (size for size in SIZES if size < len(everything)):
        drawn = [scores(chance.sample(everything, n)) for _ in range(subsets)]
        taus = sorted(kendall_tau(one, whole) for one in drawn)
        firsts = sum(one.index(min(one)) == whole.index(min(whole)) for one in drawn)
        disjoint = _disjoint(scores, everything, n, subsets, chance) if 2 * n <= len(everything) else None
        found.append(Row(n, statistics.fmean(taus), taus[subsets // 20], disjoint, firsts / subsets))
    return found


def _disjoint(
    scores: Callable[[Sequence[int]], list[float]], everything: range, n: int, subsets: int, chance: random.Random
) -> float:
    """Mean tau between two subsets of n without a sequence in common."""
    taus = []
    for _ in range(subsets):
        both = chance.sample(everything, 2 * n)
        taus.append(kendall_tau(scores(both[:n]), scores(both[n:])))
    return statistics.fmean(taus)


def table_of(record: RunRecord, subsets: int) -> str:
    """Both objectives side by side, as lines of text."""
    lines = [
        f"Kendall's tau-b of {len(record.candidates(1))} single flips, {subsets} random subsets for each n, "
        f"against all {len(record.tokens)} sequences",
        f"{'n':>4}"
        + "".join(f" | {name + ': mean':>13} {'5%':>6} {'disjoint':>8} {'same first':>10}" for name in NAMES),
    ]
    columns = [rows(record, table, subsets) for table in (record.nll, record.kl)]
    for pair in zip(*columns, strict=True):
        lines.append(f"{pair[0].sequences:4d}" + "".join(f" | {_cells(row)}" for row in pair))
    between = kendall_tau(*(rankings(record, table)(range(len(record.tokens))) for table in (record.nll, record.kl)))
    return "\n".join([*lines, f"tau-b between the two objectives on all sequences: {between:.3f}"])


NAMES = ("lm-loss", "kl")


def _cells(row: Row) -> str:
    disjoint = f"{row.disjoint:.3f}" if row.disjoint is not None else "–"
    return f"{row.mean:13.3f} {row.low:6.3f} {disjoint:>8} {row.same_first:10.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--subsets", type=int, default=SUBSETS)
    arguments = parser.parse_args()
    record = load_run(arguments.run)
    if not record.by_kl:
        raise SystemExit(f"{arguments.run} went by the loss and has no KL: give a run of --objective kl")
    print(table_of(record, arguments.subsets))


if __name__ == "__main__":
    main()
