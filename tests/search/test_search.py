"""The search loop with a made-up scorer: journal, resume and refusal, without a model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from icsearch.commands.progress import Quiet
from icsearch.core.errors import JournalError
from icsearch.core.pattern import Pattern
from icsearch.runs.journal import JOURNAL_FORMAT, Event, Journal
from icsearch.runs.record import RunRecord
from icsearch.runs.results import cost, pattern_file
from icsearch.search.loop import Progress, Scores, Scoring, run_search
from icsearch.search.protocol import SearchTask, Strategy
from icsearch.search.registry import make_strategy

LAYERS, SEQUENCES, FLIPS = 6, 5, 3
START: Event = {
    "event": "start",
    "format": JOURNAL_FORMAT,
    "icsearch_version": "0",
    "options": {"method": "greedy", "strategy": "exact", "objective": "lm-loss", "num_shared": FLIPS},
    "model": {},
    "calibration": {},
    "decoder_layers": LAYERS,
    "layer_indices": list(range(LAYERS)),
    "start_pattern": "F" * LAYERS,
    "references": {"uniform:1/2": "FSFSFS"},
    "tokens": [10] * SEQUENCES,
}


class Killed(Exception):
    """Stands for the end of the process."""


class MadeUp:
    """Random losses fixed by pattern and sequence; counts what it is asked, and dies when told to."""

    def __init__(self, patterns_per_sweep: int = 3, wave: int = 2, sweeps_to_live: int = 10**9) -> None:
        self.patterns_per_sweep = patterns_per_sweep
        self.waves: Sequence[tuple[int, int]] = [
            (first, min(first + wave, SEQUENCES)) for first in range(0, SEQUENCES, wave)
        ]
        self.scored: list[tuple[str, int]] = []
        self._left = sweeps_to_live

    def retain(self, base: Pattern) -> None:
        """Nothing is kept."""

    def shrink(self, patterns: int) -> bool:
        """The plan is as small as it can be."""
        return False

    def expected(self, work: Sequence[tuple[Sequence[Pattern], tuple[int, int]]]) -> int:
        return len(work)

    def announce(self, work: Sequence[tuple[Sequence[Pattern], tuple[int, int]]]) -> None:
        """Nothing is begun before it is asked for."""

    def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Callable[[int], None]) -> Scores:
        if self._left == 0:
            raise Killed
        self._left -= 1
        self.scored += [(p.letters, s) for p in patterns for s in range(*wave)]
        return Scores({p.letters: [made_up_nll(p, s) for s in range(*wave)] for p in patterns}, 1)


def made_up_nll(pattern: Pattern, sequence: int) -> float:
    return 20 + random.Random(f"{pattern}:{sequence}").random() + len(pattern.shared_layers)


def task(stages: int = 1) -> SearchTask:
    tokens = tuple(START["tokens"])
    return SearchTask(Pattern.full(LAYERS), frozenset(), FLIPS, stages, tokens)


def exact() -> Strategy:
    return make_strategy(task())


def staged() -> Strategy:
    return make_strategy(task(stages=2))


def run(path: Path, scorer: MadeUp, strategy: Callable[[], Strategy] = exact) -> RunRecord:
    journal = Journal(path)
    if not journal.exists():
        journal.append(START)
    record = RunRecord.replay(journal.events())
    return run_search(Scoring(journal, record, scorer, Quiet()), strategy())


def outcome(record: RunRecord) -> tuple[object, ...]:
    """Everything but time: losses to the last bit, commits, ties."""
    return record.nll, record.commits, record.pattern, record.finished


@pytest.mark.parametrize("strategy", [exact, staged])
def test_killed_after_any_sweep_and_resumed(tmp_path: Path, strategy: Callable[[], Strategy]) -> None:
    whole = MadeUp()
    expected = outcome(run(tmp_path / "whole", whole, strategy))
    total = len(whole.scored)
    for sweeps in range(12):
        path = tmp_path / f"killed{sweeps}"
        first, second = MadeUp(sweeps_to_live=sweeps), MadeUp()
        with pytest.raises(Killed):
            run(path, first, strategy)
        assert outcome(run(path, second, strategy)) == expected
        assert len(first.scored) + len(second.scored) == total  # nothing is scored twice


@pytest.mark.parametrize(("patterns", "wave"), [(1, 1), (2, 3), (100, 5)])
def test_splits_do_not_change_the_outcome(tmp_path: Path, patterns: int, wave: int) -> None:
    expected = run(tmp_path / "a", MadeUp())
    found = run(tmp_path / "b", MadeUp(patterns, wave))
    assert outcome(found) == outcome(expected)


def test_finished_run_scores_nothing(tmp_path: Path) -> None:
    run(tmp_path / "j", MadeUp())
    again = MadeUp()
    assert run(tmp_path / "j", again).finished
    assert again.scored == []


def test_torn_tail_costs_one_sweep_at_most(tmp_path: Path) -> None:
    path = tmp_path / "j"
    expected = outcome(run(path, MadeUp()))
    data = path.read_bytes()
    start = data.index(b"\n") + 1
    for cut in random.Random(0).sample(range(start, len(data)), 40):
        path.write_bytes(data[:cut])
        assert outcome(run(path, MadeUp())) == expected


def test_ties_by_the_paired_error(tmp_path: Path) -> None:
    record = run(tmp_path / "j", MadeUp())
    for commit in record.commits:
        for candidate in record.candidates(commit.step):
            if candidate.layer != commit.layer:
                difference = record.difference(candidate.pattern, commit.pattern)
                assert (candidate.layer in commit.ties) == (abs(difference.delta) <= difference.std_err)


def test_changed_losses_are_noticed(tmp_path: Path) -> None:
    """A journal whose commits do not follow from its losses is refused, not continued."""
    path = tmp_path / "j"
    run(path, MadeUp())
    lines = path.read_text().splitlines(keepends=True)
    commit = next(i for i, line in enumerate(lines) if '"commit"' in line)
    layer = Journal(path).events()[commit]["layer"]
    lines[commit] = lines[commit].replace(f'"layer":{layer}', f'"layer":{layer % 5 + 1}')
    path.write_text("".join(lines[:-1]))
    with pytest.raises(JournalError, match="do not follow|its losses say"):
        run(path, MadeUp())


def test_candidates_and_steps(tmp_path: Path) -> None:
    record = run(tmp_path / "j", MadeUp())
    assert [c.layer for c in record.candidates(1)] == [1, 2, 3, 4, 5]
    steps = record.steps()
    for step in steps:
        best = min(record.candidates(step.step), key=lambda c: (c.loss, c.layer))
        assert (step.layer, step.loss) == (best.layer, best.loss)
    assert cost(record)["candidate_evaluations"] == 5 + 4 + 3
    assert cost(record)["naive_layer_evaluations"] == (5 + 4 + 3 + 2) * LAYERS


# --- a longer search -------------------------------------------------------------------------------------

MANY, DEEP, FAR = 24, 12, 9
LONG_START: Event = {
    **START,
    "options": {**START["options"], "num_shared": FAR},
    "decoder_layers": DEEP,
    "layer_indices": list(range(DEEP)),
    "start_pattern": "F" * DEEP,
    "references": {"uniform:1/2": "FS" * (DEEP // 2)},
    "tokens": [7 + sequence % 4 for sequence in range(MANY)],
}
WEIGHTS = [random.Random(f"weight{layer}").choice([0.01, 0.03, 0.1, 0.3, 1.0]) for layer in range(DEEP)]


class ManySequences(MadeUp):
    """Costs over orders of magnitude on 24 sequences."""

    def __init__(self, sweeps_to_live: int = 10**9, wave: int = 4, patterns_per_sweep: int = 5) -> None:
        super().__init__(patterns_per_sweep, sweeps_to_live=sweeps_to_live)
        self.waves = [(first, min(first + wave, MANY)) for first in range(0, MANY, wave)]

    def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Callable[[int], None]) -> Scores:
        super().score(patterns, wave, on_layer)
        return Scores({p.letters: [weighed_nll(p, s) for s in range(*wave)] for p in patterns}, wave[1] - wave[0])


def weighed_nll(pattern: Pattern, sequence: int) -> float:
    chance = random.Random(f"{pattern}:{sequence}")
    cost = sum(WEIGHTS[layer] * (layer - source) for layer, source in enumerate(pattern.sources()))
    return (3 + cost + chance.gauss(0, 0.05)) * LONG_START["tokens"][sequence]


def long_run(
    path: Path,
    scorer: ManySequences,
    stages: int = 1,
    listener: Progress | None = None,
) -> RunRecord:
    journal = Journal(path)
    if not journal.exists():
        journal.append(LONG_START)
    record = RunRecord.replay(journal.events())
    tokens = tuple(LONG_START["tokens"])
    task = SearchTask(Pattern.full(DEEP), frozenset(), FAR, stages, tokens)
    strategy = make_strategy(task)
    return run_search(Scoring(journal, record, scorer, listener or Quiet()), strategy)


@pytest.mark.parametrize("stages", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_killed_after_any_event_and_resumed(tmp_path: Path, stages: int) -> None:
    """The journal continues as if nothing had been: the same events but for the seconds."""
    whole = ManySequences()
    long_run(tmp_path / "whole", whole, stages)
    events = Journal(tmp_path / "whole").events()
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    for length in range(1, len(lines)):
        path = tmp_path / "cut"
        path.write_bytes(b"".join(lines[:length]))
        rest = ManySequences()
        long_run(path, rest, stages)
        assert untimed(Journal(path).events()) == untimed(events)
        assert whole.scored[len(whole.scored) - len(rest.scored) :] == rest.scored


def untimed(events: list[Event]) -> list[Event]:
    return [{key: value for key, value in event.items() if key != "seconds"} for event in events]


@pytest.mark.parametrize("stages", [1, 3])
def test_waves_change_no_choice(tmp_path: Path, stages: int) -> None:
    whole = long_run(tmp_path / "a", ManySequences(), stages)
    for number, wave in enumerate((1, 6, 24)):
        found = long_run(tmp_path / str(number), ManySequences(wave=wave, patterns_per_sweep=2), stages)
        assert found.commits == whole.commits


def test_the_costs_are_what_was_scored(tmp_path: Path) -> None:
    scorer = ManySequences()
    record = long_run(tmp_path / "j", scorer)
    references = 2 * MANY
    evaluations = cost(record)["candidate_evaluations"]
    assert evaluations == (len(scorer.scored) - references) / MANY == sum(range(DEEP - FAR, DEEP))
    assert pattern_file(record).to_json()["cost"]["candidate_evaluations"] == evaluations


def test_a_commit_that_is_not_the_strategys_is_refused(tmp_path: Path) -> None:
    """One that could be, so that a replay alone does not notice."""
    long_run(tmp_path / "j", ManySequences())
    events = Journal(tmp_path / "j").events()
    commit = next(event for event in events if event["event"] == "commit")
    commit["candidates"] = commit["candidates"][::-1]
    path = tmp_path / "changed"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    with pytest.raises(JournalError, match="says candidates .* in step 1, but its losses say"):
        long_run(path, ManySequences())


def test_an_event_that_does_not_fit_is_never_on_disk(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append(START)
    record = RunRecord.replay(journal.events())
    scoring = Scoring(journal, record, MadeUp(), Quiet())
    for event in (
        {"event": "commit", "step": 2, "layer": 1, "pattern": "FSFFFF", "candidates": [1], "ties": []},
        {"event": "losses", "step": 0, "sequences": [0, 1], "patterns": ["FFFFFF"], "nll": [[float("nan")]]},
        {"event": "swap"},
    ):
        with pytest.raises(JournalError, match="cannot take its next event"):
            scoring.append(event)
    assert journal.events() == [START]
    assert (record.commits, record.nll, record.asked, record.refinement) == ([], {}, {}, None)


def test_a_journal_of_version_0_1_0_is_continued(tmp_path: Path) -> None:
    """Cut behind any event, it ends with the same commits: the strategy is what it was."""
    from icsearch.commands.greedy import strategy_of

    old = Path(__file__).parent.parent / "data" / "journal-0.1.0" / "journal.jsonl"
    whole = RunRecord.replay(Journal(old).events())

    class Again(MadeUp):
        def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Callable[[int], None]) -> Scores:
            return Scores({p.letters: whole.objective.sums(p.letters)[slice(*wave)] for p in patterns}, 1)

    lines = old.read_bytes().splitlines(keepends=True)
    for length in range(1, len(lines) + 1):
        path = tmp_path / "journal.jsonl"
        path.write_bytes(b"".join(lines[:length]))
        journal, scorer = Journal(path), Again()
        scorer.waves = [(0, len(whole.tokens))]
        record = RunRecord.replay(journal.events())
        found = run_search(Scoring(journal, record, scorer, Quiet()), strategy_of(record))
        assert (found.nll, found.commits, found.finished) == (whole.nll, whole.commits, True)
