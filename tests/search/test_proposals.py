"""The search on the second-order table in the loop: made-up table and losses, killed anywhere, resumed to the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_search import LAYERS, SEQUENCES, START, Killed, MadeUp

from icsearch.commands.progress import Quiet
from icsearch.core.errors import JournalError
from icsearch.core.pattern import Pattern
from icsearch.runs.journal import Event, Journal
from icsearch.runs.record import RunRecord
from icsearch.search.loop import MUCH, PATIENCE, Scores, Scoring, run_proposals

DRAWS, FLIPS = 2, 3
OPTIONS = {
    "method": "fisher",
    "strategy": "second-order",
    "objective": "lm-loss",
    "num_shared": FLIPS,
    "draws": DRAWS,
    "seed": 0,
    "finalists": 2,
    "rounds": 3,
}


def triangle(seed: str) -> list[list[float]]:
    chance = random.Random(seed)
    return [[chance.gauss(0, 1) for _ in range(layer)] for layer in range(LAYERS)]


def table(sequences: range) -> Event:
    return {
        "event": "fisher",
        "sequences": [sequences.start, sequences.stop],
        "drawn": [[triangle(f"{s} {r}") for r in range(DRAWS)] for s in sequences],
        "true": [triangle(f"{s}") for s in sequences],
        "layer_sequences": 7,
        "seconds": 0.1,
    }


class WithKl(MadeUp):
    """Losses that follow a hidden cost of each layer and source, and a KL beside them."""

    def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Any) -> Scores:
        scores = super().score(patterns, wave, on_layer)
        nll = {p.letters: [20 + hidden(p) + s / 100 for s in range(*wave)] for p in patterns}
        kl = {p.letters: [0.9 * hidden(p)] * len(range(*wave)) for p in patterns}
        return Scores(nll, scores.layer_sequences, kl=kl)


def hidden(pattern: Pattern) -> float:
    chance = random.Random("hidden")
    costs = [[chance.random() for _ in range(LAYERS)] for _ in range(LAYERS)]
    return sum(costs[i][j] * (i != j) for i, j in enumerate(pattern.sources()))


def run(path: Path, scorer: MadeUp, heldout: MadeUp | None = None, **options: Any) -> RunRecord:
    journal = Journal(path)
    if not journal.exists():
        start = {**START, "options": {**OPTIONS, **options}}
        if heldout is not None:
            start["refine_on"] = {"tokens": [10] * SEQUENCES}
        journal.append(start)
        journal.append(table(range(3)))
        journal.append(table(range(3, SEQUENCES)))
    record = RunRecord.replay(journal.events())
    run_proposals(Scoring(journal, record, scorer, Quiet()), heldout)
    return record


def outcome(record: RunRecord) -> tuple[object, ...]:
    return record.nll, record.kl, record.commits, record.proposals, record.chosen, record.pattern, record.finished


def test_the_best_measured_pattern_is_reported(tmp_path: Path) -> None:
    record = run(tmp_path / "j", WithKl())
    kept = [p for p in map(Pattern, record.nll) if len(p.full_layers) == LAYERS - FLIPS]
    assert record.finished
    assert record.pattern == min(kept, key=hidden)
    assert record.frontier()[LAYERS - FLIPS] == record.pattern


def test_it_is_the_best_of_all_patterns_though_few_are_measured(tmp_path: Path) -> None:
    """The hidden costs are a sum over layers and sources, which is what a correction can learn."""
    record = run(tmp_path / "j", WithKl(), finalists=2, rounds=4)
    others = combinations(range(1, LAYERS), LAYERS - FLIPS - 1)
    every = [Pattern.from_full_layers({0, *more}, LAYERS) for more in others]
    looked_at = [letters for letters in record.nll if letters.count("S") == FLIPS]
    assert record.pattern == min(every, key=hidden)
    assert len(looked_at) < len(every)


def test_the_steps_are_the_nested_path(tmp_path: Path) -> None:
    record = run(tmp_path / "j", WithKl())
    assert [commit.pattern for commit in record.commits] == record.proposals[0]
    assert record.commits[0].candidates == tuple(range(1, LAYERS))
    assert [len(Pattern(letters).full_layers) for letters in record.proposals[0]] == [5, 4, 3]
    assert [candidate.layer for candidate in record.candidates(1)] == list(range(1, LAYERS))


class Odd(WithKl):
    """Losses that no sum over layers can say."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world = world

    def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Any) -> Scores:
        scores = super().score(patterns, wave, on_layer)
        for pattern in patterns:
            if len(pattern.shared_layers) > 1:
                odd = random.Random(f"{self.world} {pattern.letters}").uniform(-1, 1)
                scores.nll[pattern.letters] = [loss + odd for loss in scores.nll[pattern.letters]]
        return scores


def test_rounds_end_when_two_in_a_row_find_nothing_much_better(tmp_path: Path) -> None:
    went_on, ended, rounds = 0, 0, 4
    for world in range(20):
        record = run(tmp_path / f"{world}", Odd(world), rounds=rounds, finalists=1)
        start = record.loss(record.start_pattern.letters)
        best = [min(record.loss(x) for x in record.nll if x.count("S") == FLIPS and [x] not in record.proposals[1:])]
        best += [min(best[0], record.loss(letters)) for (letters,) in record.proposals[1:]]
        best = list(accumulate(best, min))
        in_vain = [
            before - after < MUCH * (before - start) for before, after in zip(best, best[PATIENCE:], strict=False)
        ]
        assert not any(in_vain[:-1])
        assert in_vain[-1] or len(record.proposals) - 1 == rounds
        went_on += best[1] == best[0] > best[2]
        ended += len(record.proposals) - 1 < rounds
    assert went_on > 1 and ended > 1
    assert len(run(tmp_path / "one", WithKl(), rounds=1, finalists=1).proposals) == 2


class Steady(WithKl):
    """Losses in which patterns of this budget are alike but for noise, and a KL that says which one is best."""

    def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Any) -> Scores:
        scores = super().score(patterns, wave, on_layer)
        for pattern in patterns:
            if len(pattern.shared_layers) == FLIPS:
                chance = random.Random(pattern.letters)
                scores.nll[pattern.letters] = [25 + chance.gauss(0, 3) for _ in range(*wave)]
        return scores


@pytest.mark.parametrize("objective", ["lm-loss", "kl"])
def test_of_patterns_that_no_standard_error_parts_the_one_of_lowest_kl_is_taken(tmp_path: Path, objective: str) -> None:
    record = run(tmp_path / "j", Steady(), finalists=8, objective=objective)
    of_budget = [p for p in map(Pattern, record.nll) if len(p.full_layers) == LAYERS - FLIPS]
    lowest = min(of_budget, key=lambda p: record.objective.loss(p.letters))
    alike = [p for p in of_budget if record.objective.difference(p.letters, lowest.letters).is_tie]
    if objective == "kl":
        assert record.pattern == lowest
    else:
        assert len(alike) > 1 and record.pattern != lowest
        assert (
            record.pattern == min(alike, key=lambda p: record.kl.loss(p.letters)) == record.frontier()[LAYERS - FLIPS]
        )


@pytest.mark.parametrize("heldout", [False, True])
def test_killed_after_any_sweep_and_resumed(tmp_path: Path, heldout: bool) -> None:
    whole = WithKl()
    expected = outcome(run(tmp_path / "whole", whole, WithKl() if heldout else None))
    events = len(Journal(tmp_path / "whole").events())
    kills = 0
    for sweeps in range(events):
        path, again = tmp_path / f"killed{sweeps}", WithKl()
        first = WithKl(sweeps_to_live=sweeps // 2 if heldout else sweeps)
        other = WithKl(sweeps_to_live=sweeps // 8) if heldout else None
        try:
            run(path, first, other)
        except Killed:
            kills += 1
            assert outcome(run(path, again, WithKl() if heldout else None)) == expected
            assert len(first.scored) + len(again.scored) == len(whole.scored)
    assert kills >= 8


def test_killed_after_any_event_and_resumed(tmp_path: Path) -> None:
    expected = outcome(run(tmp_path / "whole", WithKl()))
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    for kept in range(3, len(lines)):  # the table comes from elsewhere here
        path = tmp_path / f"cut{kept}"
        path.write_bytes(b"".join(lines[:kept]) + lines[kept][:10])
        assert outcome(run(path, WithKl())) == expected


def test_held_out_sequences_choose_among_the_best(tmp_path: Path) -> None:
    class Contrary(WithKl):
        def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Any) -> Scores:
            scores = super().score(patterns, wave, on_layer)
            return Scores({letters: [40 - x for x in nll] for letters, nll in scores.nll.items()}, 1, kl=scores.kl)

    record = run(tmp_path / "j", WithKl(), Contrary())
    kept = [p for p in map(Pattern, record.nll) if len(p.full_layers) == LAYERS - FLIPS]
    assert record.pattern == sorted(kept, key=hidden)[3]
    assert record.heldout is not None
    assert record.heldout.nll.is_complete(record.pattern.letters)


def test_what_must_stay_full_stays(tmp_path: Path) -> None:
    record = run(tmp_path / "j", WithKl(), keep_full=[2, 4], num_shared=2)
    assert {0, 2, 4} <= set(record.pattern.full_layers)
    assert all({0, 2, 4} <= set(Pattern(letters).full_layers) for some in record.proposals for letters in some)
    assert all({0, 2, 4} <= set(pattern.full_layers) for pattern in record.frontier().values())


def test_stages_that_begin_without_an_indexer(tmp_path: Path) -> None:
    """A block whose first layer is native S: the search runs all the same, and leaves that layer as it is."""
    journal = Journal(tmp_path / "j")
    options = {**OPTIONS, "num_shared": 2, "stages": 2}
    native = {"start_pattern": "FFFSFF", "model": {"native_shared": [3]}, "references": {}}
    journal.append({**START, **native, "options": options, "blocks": [[0, 3], [3, 6]]})
    journal.append(table(range(SEQUENCES)))
    record = run(tmp_path / "j", WithKl())
    assert record.finished
    assert record.pattern.letters[3] == "S"
    assert len(record.pattern.full_layers) == 3


def test_by_kl(tmp_path: Path) -> None:
    record = run(tmp_path / "j", WithKl(), objective="kl")
    assert record.by_kl
    assert record.has_kl
    assert record.chosen is not None
    assert record.chosen["objective"] == pytest.approx(record.kl.loss(record.pattern.letters))


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({**table(range(4, 5))}, "behind 0 sequences"),
        ({**table(range(2)), "true": []}, "behind 0 sequences"),
        ({"event": "proposed", "round": 3, "patterns": []}, "round 3 behind 0 rounds"),
        ({**table(range(1)), "drawn": [[[[0.0]]]]}, "drawn is"),
        ({"event": "proposed", "round": 0, "patterns": ["FSFFFF", "FFSSFF", "FSSSFF"]}, "cannot"),  # not nested
        ({"event": "proposed", "round": 0, "patterns": ["FSFFFF", "FSSFFF"]}, "cannot"),  # too short
        ({"event": "chosen", "pattern": "FSSSFF", "objective": 1.0}, "was not measured"),
    ],
)
def test_a_damaged_journal_is_refused(tmp_path: Path, event: Event, words: str) -> None:
    start = {**START, "options": OPTIONS}
    with pytest.raises(JournalError, match=words):
        RunRecord.replay([start, event])


def test_the_table_of_a_record(tmp_path: Path) -> None:
    from icsearch.search.proposals import table_of

    found = table_of(RunRecord.replay([{**START, "options": OPTIONS}, table(range(SEQUENCES))]))
    assert found.drawn.shape == (SEQUENCES, DRAWS, LAYERS, LAYERS)
    assert found.drawn[1, 1, 3, 2] == table(range(SEQUENCES))["drawn"][1][1][3][2]
    assert not np.triu(found.true).any()
