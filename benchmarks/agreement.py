"""How often a strategy finds exact's pattern, over checkpoints and calibration draws, and at what cost.

For each checkpoint and draw (a seed of the built-in corpus) the exact search is run once. Strategies are then played
on losses that are kept on disk: what exact has journaled is known, what a strategy asks for beyond that is computed
by the sweep once and kept, so that the next strategy or option costs little. A loss is the same number whoever asks
for it. Layer evaluations are counted as a search would take them, with states kept between steps and without the
references that a run scores for its report; for exact likewise.

Usage: python benchmarks/agreement.py --model demo --model PATH ... [--draws 5] [--length 256] [--sequences 24]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import checkpoints
from icsearch.calibration.cache import load as load_tokens
from icsearch.commands import greedy
from icsearch.commands.progress import Quiet
from icsearch.commands.requests import CalibrationRequest, GreedyRequest
from icsearch.core.pattern import Pattern
from icsearch.core.statistics import mean_loss, paired_difference, wilson_interval
from icsearch.model import checkpoint, loading
from icsearch.model.layout import Layout, inspect
from icsearch.model.model import DsaModel
from icsearch.model.shape import BLOCK_ELEMENTS, default_batch_size
from icsearch.runs.record import RunRecord, load_run
from icsearch.search.protocol import Task, looks_of
from icsearch.search.registry import Options, make_strategy
from icsearch.sweep.branches import Batch
from icsearch.sweep.distributed.startup import device_batches
from icsearch.sweep.states import Keeping, Rehearsal
from icsearch.sweep.sweep import Sweeper
from measuring import RESULTS, WORK, Clock, Json, Results, machine, read_lines, write_json
from search import SHARES, layer_seconds
from stock import forwards

FORMAT = "icsearch.bench.agreement/1"
DEFAULT = ("race", "lazy", "race+lazy", "race+lazy:margin=0.001", "race+lazy:margin=0.003")


def parse_options(text: str) -> Options:
    """Such as `race`, `race:confidence=0.9`, `race+lazy:margin=0.001`."""
    name, _, rest = text.partition(":")
    given = dict(part.split("=") for part in rest.split(",") if part)
    renamed = {{"margin": "tie_margin"}.get(key, key): float(value) for key, value in given.items()}
    return Options(name, **renamed)


@dataclass
class KnownLosses:
    """NLL sums by pattern and sequence: from exact's journal, from `path`, or computed now and written there."""

    path: Path
    sweeper: Sweeper
    batches: Sequence[Batch]
    sums: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for line in read_lines(self.path):
            self.sums.update(line)

    def of(self, patterns: Sequence[Pattern]) -> dict[str, list[float]]:
        missing = [pattern for pattern in patterns if pattern.letters not in self.sums]
        if missing:
            self._compute(missing)
        return {pattern.letters: self.sums[pattern.letters] for pattern in patterns}

    def _compute(self, patterns: Sequence[Pattern]) -> None:
        found: dict[str, list[float]] = {pattern.letters: [] for pattern in patterns}
        for batch in self.batches:
            for letters, sums in self.sweeper.sweep(patterns, [batch]).nll.items():
                found[letters] += sums
        with self.path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        self.sums |= found


@dataclass
class Played:
    """One strategy played to the end. `layer_evaluations`: one layer over all sequences."""

    path: list[int] = field(default_factory=list)
    pattern: str = ""
    layer_evaluations: float = 0.0
    candidate_evaluations: float = 0.0
    violations: int = 0
    settled: int = 0


def play(task: Task, options: Options, known: KnownLosses, keeping: Keeping) -> Played:
    """Play a strategy on known losses, and count what a search with kept states would take."""
    strategy, played = make_strategy(task, options), Played()
    rehearsal = Rehearsal(keeping, task.start)
    strategy.begin(known.of([task.start])[task.start.letters])
    sequences = len(task.tokens)
    layer_sequences = sum(_sweep(rehearsal, [task.start], batch) for batch in known.batches)
    while ask := strategy.ask():
        rehearsal.retain(strategy.pattern)
        flips = {layer: strategy.pattern.flip(layer) for layer in ask.layers}
        asked = [batch for batch in known.batches if batch.first < ask.last and batch.last > ask.first]
        layer_sequences += sum(_sweep(rehearsal, list(flips.values()), batch) for batch in asked)
        played.candidate_evaluations += len(flips) * (ask.last - ask.first) / sequences
        sums = known.of(list(flips.values()))
        told = {layer: sums[pattern.letters][ask.first : ask.last] for layer, pattern in flips.items()}
        if choice := strategy.tell(told):
            played.path.append(choice.layer)
            played.violations += len(choice.violations)
            played.settled += choice.settled is not None or bool(choice.spared)
    played.pattern, played.layer_evaluations = strategy.pattern.letters, layer_sequences / sequences
    return played


def _sweep(rehearsal: Rehearsal, patterns: Sequence[Pattern], batch: Batch) -> int:
    return rehearsal.sweep(patterns, [batch.first]) * (batch.last - batch.first)


@dataclass(frozen=True)
class Draw:
    """One checkpoint with one draw of sequences, and where its exact search and losses are kept."""

    name: str
    seed: int
    length: int
    sequences: int
    flips: int | None

    @property
    def label(self) -> str:
        return checkpoints.label(self.name)

    @property
    def folder(self) -> Path:
        flips = "" if self.flips is None else f"-{self.flips}"
        name = self.label.replace("/", "_").replace(":", "-")
        return WORK / "agreement" / f"{name}-{self.length}-{self.sequences}-{self.seed}{flips}"


@dataclass
class Bench:
    """A draw with its model in memory, its exact search done, and all that strategies are played on."""

    task: Task
    known: KnownLosses
    keeping: Keeping
    record: RunRecord
    exact: Played


def exact_run(draw: Draw, directory: Path, tokens: Path, threads: int) -> RunRecord:
    """The exact search of a draw by the product; the finished one, if there is one."""
    request = GreedyRequest(
        CalibrationRequest(str(directory), str(tokens)),
        out=draw.folder,
        device="cpu",
        num_shared=draw.flips,
        threads=threads,
        batch_size=default_batch_size(draw.length, draw.sequences),
    )
    greedy.greedy(request, Quiet())
    return load_run(draw.folder)


def prepare(draw: Draw, threads: int) -> Bench:
    directory, tokens = checkpoints.prepare(draw.name, draw.length, draw.sequences, WORK, draw.seed)
    record = exact_run(draw, directory, tokens, threads)
    source = checkpoint.open_checkpoint(str(directory))
    layout = inspect(source)
    options = record.start["options"]
    dsa = loading.load(source, device="cpu", block_elements=options.get("block_elements", BLOCK_ELEMENTS["cpu"]))
    return bench_of(record, layout, dsa, device_batches(dsa, load_tokens(tokens), options["batch_size"]), draw.folder)


def bench_of(record: RunRecord, layout: Layout, dsa: DsaModel, batches: Sequence[Batch], folder: Path) -> Bench:
    task = Task(
        start=record.start_pattern,
        keep_full=frozenset(),
        num_shared=record.start["options"]["num_shared"],
        stages=1,
        tokens=tuple(record.tokens),
        looks=looks_of(len(record.tokens), batches[0].last),
    )
    flippable = frozenset(layer for layer in task.start.full_layers if layer)
    keeping = Keeping(layout.num_layers, layout.layer_indices, flippable, stride=1)
    known = KnownLosses(folder / "more-losses.jsonl", Sweeper(dsa), batches)
    known.sums |= {letters: record.nll.sums(letters) for letters in record.nll if record.nll.is_complete(letters)}
    exact = play(task, Options("exact"), known, keeping)
    if exact.path != [commit.layer for commit in record.commits]:
        raise SystemExit(f"exact, played on the journal in {folder}, is not the search that wrote it: a bug")
    return Bench(task, known, keeping, record, exact)


def judge(bench: Bench, options: Options) -> Json:
    """A strategy beside exact: pattern, path, loss in the sample, and cost."""
    played = play(bench.task, options, bench.known, bench.keeping)
    exact, sums = bench.exact, bench.known.sums
    difference = paired_difference(sums[played.pattern], sums[exact.pattern], bench.task.tokens)
    return {
        "same_pattern": played.pattern == exact.pattern,
        "same_path": played.path == exact.path,
        "pattern": played.pattern,
        "exact_pattern": exact.pattern,
        "exact_loss": mean_loss(sums[exact.pattern], bench.task.tokens),
        "loss_minus_exact": difference.delta,
        "std_err": difference.std_err,
        "layer_evaluations": played.layer_evaluations,
        "exact_layer_evaluations": exact.layer_evaluations,
        "layer_evaluations_share": played.layer_evaluations / exact.layer_evaluations,
        "candidate_evaluations": played.candidate_evaluations,
        "exact_candidate_evaluations": exact.candidate_evaluations,
        "violations": played.violations,
        "settled_steps": played.settled,
    }


def summarise(results: Results) -> Json:
    """Per strategy: rate of equal patterns with its 95% interval, losses where not, and cost."""
    document: Json = {"format": FORMAT, **results.origin()}
    strategies = dict.fromkeys(line["key"][-1] for line in results.lines)
    document["strategies"] = [_summary(name, [s for s in results.lines if s["key"][-1] == name]) for name in strategies]
    return document


def _summary(name: str, lines: Sequence[Json]) -> Json:
    same = sum(line["same_pattern"] for line in lines)
    low, high = wilson_interval(same, len(lines))
    others = [line["loss_minus_exact"] for line in lines if not line["same_pattern"]]
    shares = [line["layer_evaluations_share"] for line in lines]
    return {
        "strategy": name,
        "runs": len(lines),
        "checkpoints": len({line["key"][0] for line in lines}),
        "same_pattern": same,
        "interval": [low, high],
        "same_path": sum(line["same_path"] for line in lines),
        "loss_minus_exact": None if not others else _spread(others),
        "beyond_one_std_err": sum(
            abs(line["loss_minus_exact"]) > line["std_err"] for line in lines if not line["same_pattern"]
        ),
        "layer_evaluations_share": _spread(shares),
        "violations": sum(line["violations"] for line in lines),
    }


def _spread(values: Sequence[float]) -> Json:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def run(draws: Sequence[Draw], strategies: Sequence[str], results: Results, threads: int) -> None:
    expected = {draw: expected_seconds(draw) for draw in draws}
    clock = Clock(sum(expected.values()))
    for draw in draws:
        keys = {text: (draw.label, draw.length, draw.sequences, draw.flips, draw.seed, text) for text in strategies}
        left = {text: key for text, key in keys.items() if not results.find(key)}
        if not left:
            clock.skip(expected[draw])
            continue
        bench = clock.run(f"{draw.label} draw {draw.seed}: exact", expected[draw], lambda d=draw: prepare(d, threads))
        for text, key in left.items():
            started = time.monotonic()
            line = results.add(key, judge(bench, parse_options(text)))
            same = "same pattern" if line["same_pattern"] else f"loss {line['loss_minus_exact']:+.2e}"
            share = line["layer_evaluations_share"]
            print(f"  {text}: {same}, {share:.2f} of exact's layers, {time.monotonic() - started:.0f} s", flush=True)


def expected_seconds(draw: Draw) -> float:
    """Of the exact search; strategies add what exact has not scored, mostly nothing."""
    layers = layers_of(draw)
    flips = draw.flips or layers - -(-layers // 4)
    runs = SHARES["exact"] * layers * forwards(layers, flips) * draw.sequences
    return 3.0 + runs * layer_seconds("ours", draw.length)


def layers_of(draw: Draw) -> int:
    if draw.name.startswith("random:"):
        return int(draw.name.removeprefix("random:").split("/")[0])
    directory = checkpoint.open_checkpoint(draw.name).directory
    return int(json.loads((directory / "config.json").read_text())["num_hidden_layers"])


def parse_arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="demo, random:LAYERS[/SEED] or a directory")
    parser.add_argument("--draws", type=int, default=5, help="calibration draws (seeds 0, 1, ...) per checkpoint")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--flips", type=int, help="by default to 1/4 of the layers")
    parser.add_argument("--strategies", default=";".join(DEFAULT), help="with ; between, such as race:confidence=0.9")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "agreement.jsonl")
    parser.add_argument("--fresh", action="store_true", help="discard what --out holds; exact searches are kept")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    loading.quiet_transformers()
    names = arguments.model or ["demo"]
    checkpoints.check_labels(names)
    draws = [
        Draw(name, seed, arguments.length, arguments.sequences, arguments.flips)
        for name in names
        for seed in range(arguments.draws)
    ]
    results = Results.open(arguments.out, machine(arguments.threads), arguments.fresh)
    run(draws, arguments.strategies.split(";"), results, arguments.threads)
    document = summarise(results)
    write_json(arguments.out.with_suffix(".json"), document)
    from tables import agreement_table

    print(agreement_table(document))


if __name__ == "__main__":
    main()
