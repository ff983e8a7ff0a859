"""Whole searches: the stock naive one, the sweep on stock modules and on ours, with states kept between steps.

Every search runs in a process of its own, so that its memory peak is its own; the variants of a case run in turns,
repeat by repeat, and ratios are taken within a repeat. Times start when the model is in memory; ours include
everything that the product does from there on: the plan, the journal, and the uniform patterns that it scores for the
report, which the stock search does not. In searches of few flips those weigh a lot, so a second ratio leaves them out.

The stock search at length takes hours. With --stock-candidates n it is not run: n whole forwards are timed, half with
all layers F and half with as few F layers as the search ends with, and the rest is an ESTIMATE, marked as such:
batches x sum over steps j of (N - j) x seconds of a forward with N - j layers F, linear between the two.

What is the same is checked against the stock search with ties broken by our rule: all of it where it is run whole,
else the committed patterns --judge-commits of exact's path, and all candidates of the first --judge-steps steps.

A case is MODEL:LENGTH:SEQUENCES:FLIPS, where MODEL is demo, random:LAYERS[/SEED], or a checkpoint's directory.
Stopped runs go on where they were.

Usage: python benchmarks/search.py [--case demo:2048:8:12 ...] [--variants 'stock;exact'] [--plan]
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import variants
from checkpoints import check_labels, label, prepare
from measuring import RESULTS, WORK, Clock, Json, Results, machine, minutes, ratios, run_child, spread, write_json
from stock import estimate_seconds, flip, forwards
from variants import PLAIN, STOCK, Variant, parse_variant

FORMAT = "icsearch.bench.search/1"
ALL = (STOCK, *PLAIN)
WHOLE = -1  # as a number of stock candidates: the whole search
BATCH_TOKENS = 1024  # per forward, as in the product; stock is fastest with few as well
START = 6.0  # seconds for a process to import torch and load
# Seconds of one layer on one sequence of 2048 tokens on two cores, for the expected duration alone.
LAYER_SECONDS = {"stock": 0.15, "ours": 0.02}
# Layer runs per candidate, as a share of a forward.
SHARES = {"sweep-reference": 0.5, "sweep": 0.5, "exact": 0.35}


Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Case:
    """What is searched, and how much of it. `reference_flips`: steps of the sweep on stock modules, which is slow."""

    model: str
    length: int
    sequences: int
    flips: int
    variants: tuple[str, ...] = ALL
    repeats: int = 1
    stock_candidates: int = 4
    reference_flips: int = 1
    judge_steps: int = 0
    judge_commits: int = 2

    @property
    def name(self) -> str:
        return f"{label(self.model)}:{self.length}:{self.sequences}:{self.flips}"

    @property
    def batch_size(self) -> int:
        return max(1, min(BATCH_TOKENS // self.length, self.sequences))

    def flips_of(self, variant: str) -> int:
        return min(self.flips, self.reference_flips) if variant == "sweep-reference" else self.flips

    def key(self, variant: str, repeat: int) -> Key:
        """By which a run is found again: with the options that it hangs on, so that others are other runs."""
        if variant == STOCK:
            part = "whole" if self.stock_candidates == WHOLE else self.stock_candidates
            return (self.name, variant, repeat, f"candidates={part}")
        if variant == "sweep-reference":
            return (self.name, variant, repeat, f"flips={self.flips_of(variant)}")
        return (self.name, variant, repeat)

    def judge_key(self, rule: str) -> Key:
        if self.stock_candidates == WHOLE:
            return (self.name, "judge", rule, "whole")
        return (self.name, "judge", rule, f"steps={self.judge_steps}", f"commits={self.judge_commits}")


ONLY_TIME = (STOCK, "sweep", "exact")
DEFAULT = (
    Case("demo", 256, 12, 8, repeats=1, stock_candidates=WHOLE),
    Case("demo", 2048, 1, 4, repeats=3),
    Case("random:24", 2048, 1, 2, repeats=3),
    Case("random:24", 4096, 1, 1, ONLY_TIME, judge_commits=1),
    Case("random:24", 8192, 1, 1, ONLY_TIME, stock_candidates=2, judge_commits=1),
)


def parse_case(text: str, arguments: argparse.Namespace) -> Case:
    parts = text.rsplit(":", 3)
    if len(parts) != 4 or not all(part.isdecimal() for part in parts[1:]):
        raise SystemExit(f"case {text!r}: expected MODEL:LENGTH:SEQUENCES:FLIPS")
    length, sequences, flips = (int(part) for part in parts[1:])
    return Case(
        parts[0],
        length,
        sequences,
        flips,
        variants=tuple(arguments.variants.split(";")) if arguments.variants else ALL,
        repeats=arguments.repeats,
        stock_candidates=WHOLE if arguments.stock_candidates == "whole" else int(arguments.stock_candidates),
        reference_flips=arguments.reference_flips,
        judge_steps=arguments.judge_steps,
        judge_commits=arguments.judge_commits,
    )


def layers_of(case: Case) -> int:
    """Read from the model's name or its config."""
    if case.model.startswith("random:"):
        return int(case.model.removeprefix("random:").split("/")[0])
    directory = Path(__file__).parent.parent / "icsearch" / "demo" if case.model == "demo" else Path(case.model)
    return int(json.loads((directory / "config.json").read_text())["num_hidden_layers"])


# --- what a run consists of ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One process: its key in the results, what it is called, how long it should take, what it is told."""

    key: Key
    expected: float
    spec: Json


def layer_seconds(arithmetic: str, length: int) -> float:
    powers = {"stock": 1.5, "ours": 1.2} if length < 2048 else {"stock": 2.0, "ours": 1.6}
    return LAYER_SECONDS[arithmetic] * (length / 2048) ** powers[arithmetic]


def expected_seconds(case: Case, variant: str, threads: int) -> float:
    layers, flips = layers_of(case), case.flips_of(variant)
    slower = 2 / min(threads, 2)
    if variant == STOCK:
        one = layers * layer_seconds("stock", case.length) * slower
        if case.stock_candidates == WHOLE:
            return START + one * forwards(layers, flips) * case.sequences
        return START + one * case.stock_candidates * case.batch_size
    base = variant.partition(":")[0]
    arithmetic = "stock" if base == "sweep-reference" else "ours"
    runs = SHARES[base] * layers * forwards(layers, flips) * case.sequences
    return START + runs * layer_seconds(arithmetic, case.length) * slower


def jobs_of(case: Case, threads: int) -> Iterator[Job]:
    for repeat in range(case.repeats):
        for variant in case.variants:
            spec: Json = {"what": "stock"} if variant == STOCK else {"what": "ours"}
            if variant == STOCK:
                spec["candidates"] = None if case.stock_candidates == WHOLE else case.stock_candidates
            else:
                spec["variant"] = variants.describe(parse_variant(variant))
            spec["flips"] = case.flips_of(variant)
            yield Job(case.key(variant, repeat), expected_seconds(case, variant, threads), spec)


def judge_seconds(case: Case, threads: int) -> float:
    """The stable sorts make a forward about half as slow again; losses are taken with and without them."""
    layers, slower = layers_of(case), 2 / min(threads, 2)
    one = layers * layer_seconds("stock", case.length) * slower * case.sequences
    if case.stock_candidates == WHOLE:
        return START + 1.5 * one * forwards(layers, case.flips)
    judged = case.judge_commits + forwards(layers, case.judge_steps)
    return 2 * START + 2.5 * one * judged if judged else 0.0


def run_case(case: Case, results: Results, threads: int, clock: Clock) -> None:
    model, tokens = prepare(case.model, case.length, case.sequences, WORK)
    common: Json = {"model": str(model), "tokens": str(tokens), "batch_size": case.batch_size}
    common["out"] = str(WORK / "run")
    for job in jobs_of(case, threads):
        _run(job, common, results, threads, clock)
    for job in judge_jobs(case, results, threads):
        _run(job, common, results, threads, clock)


def _run(job: Job, common: Json, results: Results, threads: int, clock: Clock) -> None:
    if results.find(job.key):
        clock.skip(job.expected)
        return
    label = " ".join(str(part) for part in job.key)
    spec = {**common, **job.spec}
    results.add(job.key, clock.run(label, job.expected, lambda: run_child("search.py", spec, threads)))


def judge_jobs(case: Case, results: Results, threads: int) -> Iterator[Job]:
    """The stock search with ties by our rule, or stock losses of patterns on exact's way with and without it."""
    expected = judge_seconds(case, threads)
    if case.stock_candidates == WHOLE:
        spec = {"what": "stock", "candidates": None, "flips": case.flips, "earliest": True}
        yield Job(case.judge_key("earliest"), expected, spec)
        return
    found = next((line for name in ("exact", "sweep") if (line := results.find(case.key(name, 0)))), None)
    if found is None or not expected:
        return
    patterns = judged_patterns(found["layers"], layers_of(case), case.judge_steps, case.judge_commits)
    for rule, earliest in (("earliest", True), ("as it comes", False)):
        yield Job(case.judge_key(rule), expected / 2, {"what": "judge", "patterns": patterns, "earliest": earliest})


def judged_patterns(path: Sequence[int], num_layers: int, steps: int, commits: int) -> list[str]:
    """All candidates of the first steps of a search, and so many of its committed patterns, spread from last on."""
    committed, letters = [], "F" * num_layers
    candidates: list[str] = []
    for step, layer in enumerate(path):
        if step < steps:
            candidates += [flip(letters, other) for other in range(1, num_layers) if letters[other] == "F"]
        letters = flip(letters, layer)
        committed.append(letters)
    count = min(commits, len(committed))
    chosen = [committed[len(committed) - 1 - i * len(committed) // count] for i in range(count)]
    return list(dict.fromkeys([*candidates, *chosen]))


# --- the summary -----------------------------------------------------------------------------------------------------


def summarise(cases: Sequence[Case], results: Results) -> Json:
    """Everything that the table says, from the lines of the results."""
    document = {"format": FORMAT, **results.origin()}
    return {**document, "cases": [_case_summary(case, results) for case in cases]}


def _case_summary(case: Case, results: Results) -> Json:
    layers = layers_of(case)
    summary: Json = {"name": case.name, "model": label(case.model), "layers": layers, "length": case.length}
    summary |= {"sequences": case.sequences, "flips": case.flips, "batch_size": case.batch_size}
    rows = [row for variant in case.variants if (row := _row(case, variant, results))]
    judges = {rule: results.find(case.judge_key(rule)) for rule in ("earliest", "as it comes")}
    whole = results.find(case.key(STOCK, 0))
    return {**summary, "rows": rows, **_ties(judges["earliest"], judges["as it comes"] or whole)}


def _ties(earliest: Json | None, as_it_comes: Json | None) -> Json:
    """What the tie rule does to the stock search itself: the pattern, and the losses of patterns that both scored."""
    if earliest is None or as_it_comes is None or "sums" not in as_it_comes:
        return {}
    found: Json = {"tie_rule_moves_stock_losses_by": _largest_difference(earliest, as_it_comes)}
    if "patterns" in earliest and "patterns" in as_it_comes:
        found["tie_rule_keeps_stock_pattern"] = earliest["patterns"][-1] == as_it_comes["patterns"][-1]
    return found


def _lines(case: Case, variant: str, results: Results) -> list[Json]:
    found = (results.find(case.key(variant, repeat)) for repeat in range(case.repeats))
    return [line for line in found if line]


def _row(case: Case, variant: str, results: Results) -> Json | None:
    lines = _lines(case, variant, results)
    if not lines:
        return None
    flips, layers = case.flips_of(variant), layers_of(case)
    row: Json = {"variant": variant, "flips": flips, "estimated": lines[0].get("estimated", False)}
    row["seconds"] = spread([line["seconds"] for line in lines])
    row |= {name: max(line[name] for line in lines) for name in ("peak_bytes", "peak_above_loaded_bytes")}
    row["memory_method"] = lines[0]["memory_method"]
    if variant == STOCK:
        evaluations = forwards(layers, flips)
        return {
            **row,
            "candidate_evaluations": evaluations,
            "layer_evaluations": evaluations * layers,
            **_against_itself(lines),
        }
    for name in ("candidate_evaluations", "layer_evaluations", "reference_layer_evaluations"):
        row[name] = lines[0][name]
    row["pattern"] = lines[0]["patterns"][-1]
    stock = _lines(case, STOCK, results)[: len(lines)]
    naive = [stock_seconds(line, layers, flips) for line in stock]
    if naive:
        row["times_as_fast_as_stock"] = ratios(naive, _seconds(lines, stock))
        bare = [line["seconds"] - line["reference_seconds"] for line in lines[: len(stock)]]
        row["times_as_fast_as_stock_without_references"] = ratios(naive, bare)
    row |= _against_exact(lines, _lines(case, "exact", results), flips == case.flips)
    return {**row, **_against_judge(case, parse_variant(variant), lines[0], results)}


def _seconds(lines: Sequence[Json], others: Sequence[Json]) -> list[float]:
    return [line["seconds"] for line in lines[: len(others)]]


def _against_itself(lines: Sequence[Json]) -> Json:
    return {"pattern": lines[0]["patterns"][-1]} if "patterns" in lines[0] else {}


def stock_seconds(line: Json, layers: int, flips: int) -> float:
    """Seconds of the first flips of the stock search: measured where it was run whole, else the estimate."""
    if not line["estimated"]:
        return sum(line["step_seconds"][:flips])
    return estimate_seconds(layers, flips, line["batches"], **line["forwards"])


def _against_exact(lines: Sequence[Json], exact: Sequence[Json], same_flips: bool) -> Json:
    """Pattern, loss, cost and bits beside those of `exact` as shipped."""
    if not exact:
        return {}
    pairs = min(len(lines), len(exact))
    mine, theirs = lines[0], exact[0]
    common = set(mine["sums"]) & set(theirs["sums"])
    row: Json = {
        "committed_in_common": len(common) - 1,  # beside the start pattern
        "bit_equal_to_exact": all(mine["sums"][letters] == theirs["sums"][letters] for letters in common),
    }
    if same_flips:
        row |= {
            "times_as_fast_as_exact": ratios(_seconds(exact[:pairs], lines), _seconds(lines, exact[:pairs])),
            "layer_evaluations_share_of_exact": mine["layer_evaluations"] / theirs["layer_evaluations"],
            "same_pattern_as_exact": mine["patterns"][-1] == theirs["patterns"][-1],
            "loss_minus_exact": _final_loss(mine) - _final_loss(theirs),
        }
    return row


def _final_loss(line: Json) -> float:
    return sum(line["sums"][line["patterns"][-1]]) / line["count"]


def _against_judge(case: Case, variant: Variant, line: Json, results: Results) -> Json:
    """The committed losses, and for exact searches the choices, beside the stock search's.

    With ties by our rule; for a search on stock modules, with ties as they come.
    """
    own_ties = variant.kernels == "reference"
    judge = results.find(case.judge_key("as it comes" if own_ties else "earliest"))
    if judge is None and own_ties and case.stock_candidates == WHOLE:
        judge = results.find(case.key(STOCK, 0))
    if judge is None:
        return {}
    found: Json = {}
    if set(line["patterns"]) & set(judge["sums"]):
        found["judged_commits"] = len(set(line["patterns"]) & set(judge["sums"]))
        found["largest_relative_loss_difference"] = _largest_difference(judge, line, line["patterns"])
    if "patterns" in judge:
        found["same_pattern_as_stock"] = line["patterns"][-1] == judge["patterns"][len(line["patterns"]) - 1]
        found["same_path_as_stock"] = line["layers"] == judge["layers"][: len(line["layers"])]
    elif variant.by_loss and case.judge_steps:
        steps = min(case.judge_steps, len(line["layers"]))
        found["judged_steps"] = steps
        found["same_path_as_stock"] = line["layers"][:steps] == choices(judge["sums"], line["layers"][:steps])
    return found


def choices(sums: Json, path: Sequence[int]) -> list[int]:
    """What Algorithm 1 commits by these losses in each step, had it come as far as the path before."""
    letters, found = "F" * len(next(iter(sums))), []
    for layer in path:
        candidates = {other: flip(letters, other) for other in range(1, len(letters)) if letters[other] == "F"}
        found.append(min(candidates, key=lambda other: (sum(sums[candidates[other]]), other)))
        letters = flip(letters, layer)
    return found


def _largest_difference(first: Json, second: Json, among: Sequence[str] | None = None) -> float:
    """The largest relative difference of the losses of patterns that both have."""
    common = set(first["sums"]) & set(second["sums"]) & set(among or first["sums"])
    pairs = [(sum(first["sums"][letters]), sum(second["sums"][letters])) for letters in common]
    return max((abs(a - b) / a for a, b in pairs), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--case", action="append", default=[], metavar="MODEL:LENGTH:SEQUENCES:FLIPS")
    parser.add_argument(
        "--variants",
        help=f"with ; between: {';'.join(ALL)}, and an objective behind a colon: exact:kl",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stock-candidates", default="4", help="whole forwards to time for an estimate, or `whole`")
    parser.add_argument("--reference-flips", type=int, default=1, help="steps of the sweep on stock modules")
    parser.add_argument("--judge-steps", type=int, default=0, help="steps of which stock scores every candidate")
    parser.add_argument("--judge-commits", type=int, default=2, help="committed patterns that stock scores")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "search.jsonl")
    parser.add_argument("--fresh", action="store_true", help="discard what --out holds")
    parser.add_argument("--plan", action="store_true", help="print the cases and the expected durations, run nothing")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(variants.run(json.loads(arguments.child))))
        return
    run_all(arguments)


def run_all(arguments: argparse.Namespace) -> None:
    threads = arguments.threads
    cases = [parse_case(text, arguments) for text in arguments.case] or list(DEFAULT)
    check_labels([case.model for case in cases])
    expected = {case.name: _expected(case, threads) for case in cases}
    for name, seconds in expected.items():
        print(f"{name}: about {minutes(seconds)}")
    if arguments.plan:
        print(f"together: about {minutes(sum(expected.values()))}")
        return
    results = Results.open(arguments.out, machine(threads), arguments.fresh)
    clock = Clock(sum(expected.values()))
    from tables import search_table

    for number, case in enumerate(cases, start=1):
        run_case(case, results, threads, clock)
        document = summarise(cases[:number], results)
        write_json(arguments.out.with_suffix(".json"), document)
        print(search_table({**document, "cases": document["cases"][-1:]}))


def _expected(case: Case, threads: int) -> float:
    return sum(job.expected for job in jobs_of(case, threads)) + judge_seconds(case, threads)


if __name__ == "__main__":
    main()
