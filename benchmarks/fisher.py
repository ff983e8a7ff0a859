"""Does `icsearch fisher` find what exact greedy finds, and for how much less?

Usage: python benchmarks/fisher.py MODEL --out DIR [--sequences 24] [--heldout 64] [--threads 1] [--no-stability]

Runs exact greedy once, to 1/8, and once more to 1/4 for the cost; fisher at 1/4 for the cost and for its table, then at
1/2 and 1/8 on that table; fisher at 1/4 on another calibration set, and on 4, 8, 16 and 32 sequences. All that they
find is measured on held-out text, with paired errors; 50 random patterns are measured where the table was made. Prints
Markdown, writes summary.json. A run that is there is not made again: what was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import Difference, paired_difference, rank_correlation
from icsearch.report.numbers import difference as shown
from icsearch.runs.evaluation import EvalRecord, load_eval
from icsearch.runs.journal import Journal
from icsearch.runs.record import RunRecord, load_run
from icsearch.search.proposals import measured_prices, table_of
from icsearch.search.protocol import KL, LOSS
from icsearch.search.second_order import correction, full_of

BUDGETS = ("1/2", "1/4", "1/8")
SIZES = (4, 8, 16, 32)
RANDOM_PATTERNS = 50


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, self.out, self.threads = arguments.model, arguments.out, arguments.threads
        self.sequences, self.heldout = arguments.sequences, arguments.heldout
        self.others = ["other half", *(f"{size} sequences" for size in SIZES)] if arguments.stability else []

    def command(self, name: str, out: str, *more: str, sequences: int | None = None, source: str = "demo") -> Path:
        """Run one command of icsearch into `out`; one that is finished returns at once."""
        words = ["--calibration", source, "--num-sequences", str(sequences or self.sequences)]
        words += ["--threads", str(self.threads), "--out", str(self.out / out), *more]
        subprocess.run([sys.executable, "-m", "icsearch", name, self.model, *words], check=True)
        return self.out / out

    def runs(self) -> dict[str, Path]:
        found = {"greedy": self.command("greedy", "greedy", "--retention", "1/8")}
        found["greedy, timed"] = self.command("greedy", "greedy-1-4", "--retention", "1/4")
        found["1/4"] = self.command("fisher", "fisher-1-4", "--retention", "1/4")
        table = ("--table", str(found["1/4"] / "fisher.npz"))
        found["1/2"] = self.command("fisher", "fisher-1-2", "--retention", "1/2", *table)
        found["1/8"] = self.command("fisher", "fisher-1-8", "--retention", "1/8", *table)
        if self.others:  # the demo's texts of another seed are others
            found["other half"] = self.command("fisher", "fisher-other", "--retention", "1/4", "--seed", "1")
        for size in SIZES if self.others else ():
            found[f"{size} sequences"] = self.command("fisher", f"fisher-{size}", "--retention", "1/4", sequences=size)
        return found


def sums(directory: Path) -> tuple[EvalRecord, dict[str, list[float]]]:
    """An evaluation's NLL sums by pattern."""
    record = EvalRecord.replay(Journal(directory / "journal.jsonl").events())
    return record, {
        letters: [measures[sequence].nll for sequence in sorted(measures)]
        for letters, measures in record.measures.items()
    }


def random_patterns(layers: int) -> list[str]:
    chance, found = random.Random(0), list[str]()
    while len(found) < RANDOM_PATTERNS:
        kept = chance.randint(max(2, layers // 8), layers - 2)
        letters = Pattern.from_full_layers({0, *chance.sample(range(1, layers), kept - 1)}, layers).letters
        if letters not in found:
            found.append(letters)
    return found


def correlations(record: RunRecord, directory: Path) -> dict[str, float]:
    """Spearman's rank correlations of predicted and measured KL and loss."""
    table = table_of(record)
    known = measured_prices(record)
    singles = {pattern: prices for pattern, prices in known.items() if len(pattern.shared_layers) == 1}
    evaluation, nll = sums(directory)
    tokens, start = evaluation.start["tokens"], evaluation.start["start_pattern"]
    chosen = {
        Pattern(letters): (
            paired_difference(nll[letters], nll[start], tokens).delta,
            sum(measures.kl for measures in evaluation.measures[letters].values()) / sum(tokens),
        )
        for letters in nll
        if letters != start
    }
    found = {}
    for name, group, numbers in (
        ("single flips, table", singles, None),
        ("random patterns, table", chosen, None),
        ("random patterns, corrected by single flips", chosen, correction(table, record.start_pattern, singles)),
    ):
        predicted = table.predict(full_of(group), numbers)
        actual = np.array(list(group.values())).T
        for price, word in ((KL, "KL"), (LOSS, "loss")):
            found[f"{name}, {word}"] = round(rank_correlation(predicted[price].tolist(), actual[price].tolist()), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--heldout", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stability", action=argparse.BooleanOptionalAction, default=True)
    bench = Bench(parser.parse_args())
    runs = bench.runs()
    records = {name: load_run(path) for name, path in runs.items()}
    layers = len(records["greedy"].start_pattern)
    by_greedy = {}
    for step in records["greedy"].steps():
        by_greedy[len(Pattern(step.pattern).full_layers)] = step.pattern
    rows = []
    for budget in BUDGETS:
        found = records[budget].pattern
        rows.append((budget, found.letters, by_greedy[len(found.full_layers)]))
    asked = {letters for _, *both in rows for letters in both}
    asked |= {records[name].pattern.letters for name in bench.others}
    specs = [word for letters in sorted(asked) for word in ("--pattern", letters)]
    specs += [word for budget in BUDGETS for word in ("--pattern", f"uniform:{budget}")]
    heldout = bench.command("eval", "heldout", *specs, sequences=bench.heldout, source="demo:heldout")
    picked = [word for letters in random_patterns(layers) for word in ("--pattern", letters)]
    randomly = bench.command("eval", "random", *picked)

    losses = {row["pattern"]: row for row in load_eval(heldout / "eval.json")["rows"]}
    evaluation, nll = sums(heldout)

    def above(letters: str, other: str | None = None) -> Difference:
        return paired_difference(
            nll[letters], nll[other or evaluation.start["start_pattern"]], evaluation.start["tokens"]
        )

    summary: dict[str, Any] = {"model": bench.model, "heldout_sequences": bench.heldout, "budgets": []}
    print("| F | fisher | above all-F | exact greedy | above all-F | fisher - greedy |\n|---|---|---|---|---|---|")
    for budget, ours, theirs in rows:
        between = above(ours, theirs)
        cells = (budget, f"`{ours}`", shown(above(ours)), f"`{theirs}`", shown(above(theirs)), shown(between))
        print(f"| {' | '.join(cells)} |")
        pair = {"fisher": losses[ours], "greedy": losses[theirs], "delta": between.delta, "std_err": between.std_err}
        summary["budgets"].append({"budget": budget, **pair})
    summary["correlations"] = correlations(records["1/4"], randomly)
    for name, value in summary["correlations"].items():
        print(f"- {name}: {value}")
    summary["stability"] = {}
    for name in ("1/4", *bench.others):
        letters = records[name].pattern.letters
        cost = above(letters)
        summary["stability"][name] = {"pattern": letters, "delta": cost.delta, "std_err": cost.std_err}
        print(f"- {name}: `{letters}` {shown(cost)}")
    ours, theirs = (json.loads((runs[name] / "pattern.json").read_text())["cost"] for name in ("1/4", "greedy, timed"))
    summary["cost"] = {"fisher": ours, "greedy": theirs, "phases": phases(records["1/4"])}
    for name, value in summary["cost"]["phases"].items():
        print(f"- {name}: {value[0]:.0f} layer evaluations, {value[1]:.1f} s")
    for word in ("layer_evaluations", "seconds"):
        print(f"- {word} at 1/4: fisher {ours[word]}, greedy {theirs[word]}, {ours[word] / theirs[word]:.2f}")
    (bench.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def phases(record: RunRecord) -> dict[str, tuple[float, float]]:
    """Layer evaluations and seconds of the table, and of what was scored in each step of a run."""
    sequences = len(record.tokens)
    rest = record.layer_sequences - record.fisher.layer_sequences
    return {
        "table": (record.fisher.layer_sequences / sequences, record.fisher.seconds),
        "references, flips, path, rounds": (rest / sequences, record.seconds - record.fisher.seconds),
    }


if __name__ == "__main__":
    main()
