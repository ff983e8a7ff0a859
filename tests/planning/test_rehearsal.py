"""A search played through: counts against brute force and the paper, bounds, the sweeps that it takes."""

from __future__ import annotations

import itertools
import random

import pytest

from icsearch.core.pattern import Pattern
from icsearch.planning.rehearsal import Workload, layer_evaluations, preview, rehearsed
from icsearch.search.protocol import SearchTask
from icsearch.search.registry import STRATEGIES, make_strategy
from icsearch.sweep.states import Rehearsal

LAYERS, FLIPS, SEQUENCES = 10, 6, 6
TOKENS = (30, 31, 29)


def workload(stages: int = 1) -> Workload:
    first = range(0, LAYERS, LAYERS // stages)
    return Workload(Pattern.full(LAYERS), frozenset(range(LAYERS)) - set(first), FLIPS, stages, SEQUENCES)


def strategy(name: str, stages: int):  # type: ignore[no-untyped-def]
    tokens = (7,) * SEQUENCES
    task = SearchTask(Pattern.full(LAYERS), frozenset(), FLIPS, stages, tokens)
    return make_strategy(task, name)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("stride", [0, 1, 3])
def test_exact_takes_what_a_run_is_planned_with(stages: int, stride: int) -> None:
    work = workload(stages)
    likely = work.likely("exact", 4, work.keeping(stride))
    planned = rehearsed(
        lambda: strategy("exact", stages), (7,) * SEQUENCES, work.references, work.keeping(stride), per_sweep=4
    )
    assert likely == planned
    assert max(sweep.patterns for sweep in likely) == 4
    evaluations = preview(strategy("exact", stages), (7,) * SEQUENCES, lambda patterns: 0)[0]
    assert sum(sweep.patterns for sweep in likely) == evaluations + 1 + len(work.references)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("name", STRATEGIES)
def test_bounds_are_those_of_a_run(name: str, stages: int) -> None:
    work = workload(stages)
    rehearsal = Rehearsal(work.keeping(), work.start)

    def count(patterns: list[Pattern]) -> int:
        return rehearsal.sweep(patterns, [0])

    start = count([work.start, *work.references])
    bound = preview(strategy(name, stages), (7,) * SEQUENCES, count)[1]
    assert layer_evaluations(work.most(name, 100)) == bound + start


def test_fewer_patterns_at_once_take_more_sweeps_and_more_layers() -> None:
    work = workload()
    few, many = work.likely("exact", 2, work.keeping()), work.likely("exact", 100, work.keeping())
    assert len(few) > len(many)
    assert layer_evaluations(few) > layer_evaluations(many)
    assert sum(sweep.patterns for sweep in few) == sum(sweep.patterns for sweep in many)


def test_runs_move_from_full_to_shared_as_flips_are_made() -> None:
    sweeps = workload().likely("exact", 100, workload().keeping())
    shares = [sum(sweep.runs.shared) / sweep.runs.total for sweep in sweeps[1:]]
    assert shares[0] < shares[-1]


def task(num_layers: int, flips: int, stages: int = 1) -> SearchTask:
    return SearchTask(Pattern.full(num_layers), frozenset(), flips, stages, TOKENS)


def tree_nodes(patterns: list[Pattern]) -> int:
    return len({pattern.letters[: i + 1] for pattern in patterns for i in range(len(pattern))})


@pytest.mark.parametrize("num_layers", [2, 5, 9])
def test_exact_evaluations_are_the_papers(num_layers: int) -> None:
    """A full search costs N(N-1)/2 evaluations (paper, Algorithm 1)."""
    strategy = make_strategy(task(num_layers, num_layers - 1))
    assert preview(strategy, TOKENS, tree_nodes)[0] == num_layers * (num_layers - 1) // 2


@pytest.mark.parametrize("stages", [1, 2])
def test_preview_bounds_every_search_from_above(stages: int) -> None:
    """Played through with every possible choice of commits, no search takes more layer runs than the preview says."""
    num_layers, flips = 6, 3
    most = preview(make_strategy(task(num_layers, flips, stages)), TOKENS, tree_nodes)
    chance = random.Random(0)
    for _ in itertools.repeat(None, 200):
        strategy = make_strategy(task(num_layers, flips, stages))
        evaluations = runs = 0
        while layers := strategy.ask():
            evaluations += len(layers)
            runs += tree_nodes([strategy.pattern.flip(layer) for layer in layers])
            strategy.tell({layer: [chance.random() for _ in TOKENS] for layer in layers})
        assert evaluations == most[0]
        assert runs <= most[1]
