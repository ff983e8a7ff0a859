"""A made-up search on a second-order table: the loop's own journal, over losses and a table from formulas. No model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import run_fixtures
from icsearch.core.pattern import Pattern
from icsearch.runs.journal import Event, Journal
from icsearch.runs.record import JOURNAL_NAME, RunRecord
from icsearch.search.loop import Progress, Scores, Scoring, run_proposals, run_refinement
from run_fixtures import MadeUpRun, nll_sums

DRAWS, TOKENS = 2, 2047
OPTIONS = {"method": "fisher", "strategy": "second-order", "draws": DRAWS, "seed": 0, "finalists": 4, "rounds": 3}


def fisher_events(made_up: MadeUpRun, heldout: bool = False, refined: bool = False, **options: Any) -> list[Event]:
    """The journal's events in order: start, table, references, single flips, nested path, rounds, what was chosen.

    `heldout` sequences choose among the best, or confirm swaps where it is to be `refined`.
    """
    start = run_fixtures.events(made_up)[0]
    start["options"] |= {**OPTIONS, **options}
    start["exact"] = {"candidate_evaluations": 100, "layer_evaluations": 2000}
    if heldout or refined:
        start["refine_on"] = {"tokens": start["tokens"][:3]}
    with TemporaryDirectory() as directory:
        journal = Journal(Path(directory) / JOURNAL_NAME)
        journal.append(start)
        journal.append(_table(made_up, start["start_pattern"]))
        record = RunRecord.replay(journal.events())
        scorer, other = _Losses(made_up, len(start["tokens"])), _Losses(made_up, 3)
        scoring = Scoring(journal, record, scorer, Progress())
        if refined:
            run_proposals(scoring, then=lambda: run_refinement(scoring, other))
        else:
            run_proposals(scoring, other if heldout else None)
        return journal.events()


def fisher_record(made_up: MadeUpRun, **more: Any) -> RunRecord:
    return RunRecord.replay(fisher_events(made_up, **more))


class _Losses:
    """The made-up run's losses, and a KL that is a little more than they rise."""

    patterns_per_sweep = 100

    def __init__(self, made_up: MadeUpRun, sequences: int) -> None:
        self._made_up = made_up
        self.waves = [(0, sequences)]

    def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Callable[[int], None]) -> Scores:
        last = wave[1]
        start = nll_sums(self._made_up, _start(self._made_up))[:last]
        nll = {p.letters: nll_sums(self._made_up, p.letters)[:last] for p in patterns}
        kl = {p: [1.1 * abs(a - b) for a, b in zip(sums, start, strict=True)] for p, sums in nll.items()}
        return Scores(nll, len(patterns) * self._made_up.num_layers * last // 2, kl=kl)

    def expected(self, work: object) -> int:
        return 1

    def retain(self, base: Pattern) -> None: ...

    def announce(self, work: object) -> None: ...

    def shrink(self, patterns: int) -> bool:
        return False


def _start(made_up: MadeUpRun) -> str:
    return str(run_fixtures.events(made_up)[0]["start_pattern"])


def _table(made_up: MadeUpRun, start: str) -> Event:
    """Drawn sums whose squares are what each layer's flip costs, more or less."""
    pattern, layers = Pattern(start), range(made_up.num_layers)
    base = sum(nll_sums(made_up, start))
    tokens = TOKENS * made_up.num_sequences
    costs = [
        max(sum(nll_sums(made_up, pattern.flip(i).letters)) - base, 1.0) / tokens if i and pattern.is_full(i) else 1e-4
        for i in layers
    ]
    chance = random.Random(f"{made_up.seed}/table")

    def triangle(width: Callable[[float], float]) -> list[list[float]]:
        return [[chance.gauss(0, 1) * width(costs[i] * (i - j)) for j in range(i)] for i in layers]

    sequences = range(made_up.num_sequences)
    return {
        "event": "fisher",
        "sequences": [0, made_up.num_sequences],
        "drawn": [[triangle(lambda cost: math.sqrt(TOKENS * cost)) for _ in range(DRAWS)] for _ in sequences],
        "true": [triangle(lambda cost: 0.3 * TOKENS * cost) for _ in sequences],
        "layer_sequences": made_up.num_layers * (3 + DRAWS) * made_up.num_sequences,
        "seconds": 3.0,
    }
