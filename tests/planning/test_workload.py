"""What a search will run, counted: against the plan of a run, sweep by sweep, whatever is looked at at once."""

from __future__ import annotations

import pytest

from icsearch.core.pattern import Pattern
from icsearch.planning.rehearsal import preview, rehearse
from icsearch.planning.workload import MEASURED_SHARES, Plays, Workload, layer_evaluations
from icsearch.search.protocol import Task, looks_of
from icsearch.search.registry import STRATEGIES, Options, make_strategy
from icsearch.sweep.states import Rehearsal

LAYERS, FLIPS, SEQUENCES = 10, 6, 6


def workload(stages: int = 1) -> Workload:
    first = range(0, LAYERS, LAYERS // stages)
    return Workload(Pattern.full(LAYERS), frozenset(range(LAYERS)) - set(first), FLIPS, stages, SEQUENCES)


def strategy(name: str, stages: int, batch_size: int = 1):  # type: ignore[no-untyped-def]
    tokens = (7,) * SEQUENCES
    task = Task(Pattern.full(LAYERS), frozenset(), FLIPS, stages, tokens, looks_of(SEQUENCES, batch_size))
    return make_strategy(task, Options(name))


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("stride", [0, 1, 3])
def test_exact_takes_what_a_run_is_planned_with(stages: int, stride: int) -> None:
    work = workload(stages)
    likely = work.likely(4, work.keeping(stride))
    planned = rehearse(
        lambda: strategy("exact", stages), (7,) * SEQUENCES, work.references, work.keeping(stride), per_sweep=4
    )
    assert layer_evaluations(likely) == planned
    assert max(sweep.patterns for sweep in likely) == 4
    evaluations = preview(strategy("exact", stages), (7,) * SEQUENCES, lambda patterns: 0)[0]
    assert sum(sweep.patterns for sweep in likely) == evaluations + 1 + len(work.references)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("name", STRATEGIES)
def test_bounds_are_those_of_a_run_however_often_a_race_looks(name: str, stages: int) -> None:
    work = workload(stages)
    rehearsal = Rehearsal(work.keeping(), work.start)

    def count(patterns: list[Pattern]) -> int:
        return rehearsal.sweep(patterns, [0])

    start = count([work.start, *work.references])
    for batch_size in (1, 4):
        options = Options(name)
        bound = preview(strategy(name, stages, batch_size), (7,) * SEQUENCES, count, options.is_lazy)[1]
        assert layer_evaluations(work.most(name, 100)) == bound + start
        assert layer_evaluations(Plays(work).most(name, 100)) == bound + start


def test_fewer_patterns_at_once_take_more_sweeps_and_more_layers() -> None:
    work = workload()
    few, many = work.likely(2, work.keeping()), work.likely(100, work.keeping())
    assert len(few) > len(many)
    assert layer_evaluations(few) > layer_evaluations(many)
    assert sum(sweep.patterns for sweep in few) == sum(sweep.patterns for sweep in many)


def test_runs_move_from_full_to_shared_as_flips_are_made() -> None:
    sweeps = workload().likely(100, workload().keeping())
    shares = [sum(sweep.runs.shared) / sweep.runs.total for sweep in sweeps[1:]]
    assert shares[0] < shares[-1]


def test_every_strategy_has_a_measured_share() -> None:
    assert set(MEASURED_SHARES) == set(STRATEGIES)
    assert MEASURED_SHARES["exact"] == 1 and all(0 < share <= 1 for share in MEASURED_SHARES.values())
