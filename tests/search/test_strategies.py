"""Strategies on made-up losses: they see numbers, never a model."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icsearch.core.pattern import Pattern
from icsearch.search.greedy import split_stages
from icsearch.search.protocol import SearchTask, Strategy
from icsearch.search.registry import make_strategy

Loss = Callable[[Pattern], float]


def made_up(seed: int) -> Loss:
    """A loss with interactions: every pattern has its own, fixed by the seed."""
    return lambda pattern: random.Random(f"{seed}:{pattern}").random() + 0.1 * len(pattern.shared_layers)


def task(
    start: Pattern, flips: int, *, stages: int = 1, keep: frozenset[int] = frozenset(), sequences: int = 3
) -> SearchTask:
    return SearchTask(start, keep, flips, stages, (10,) * sequences)


def play(strategy: Strategy, loss: Loss) -> list[Pattern]:
    """The committed patterns, with the same loss on every sequence."""
    path = []
    while layers := strategy.ask():
        assert strategy.ask() == layers
        choice = strategy.tell({layer: [loss(strategy.pattern.flip(layer))] * 3 for layer in layers})
        path.append(strategy.pattern)
        assert (choice.step, choice.pattern, choice.candidates) == (len(path), strategy.pattern.letters, layers)
    return path


def reference_greedy(num_layers: int, keep: set[int], flips: int, loss: Loss) -> list[Pattern]:
    """Algorithm 1 of the paper, as plainly as it can be written."""
    full, path = set(range(num_layers)), []
    for _ in range(flips):
        best = None
        for layer in sorted(full - keep - {0}):
            pattern = Pattern.from_full_layers(full - {layer}, num_layers)
            if best is None or loss(pattern) < best[0]:
                best = (loss(pattern), layer)
        assert best is not None
        full.remove(best[1])
        path.append(Pattern.from_full_layers(full, num_layers))
    return path


def reference_stages(num_layers: int, bounds: list[int], keep: set[int], flips: int, loss: Loss) -> list[Pattern]:
    """The pipeline split: rounds over the blocks, one commit per block, each block's first layer kept F."""
    full, path = set(range(num_layers)), []
    while len(path) < flips:
        for first, last in itertools.pairwise(bounds):
            candidates = [layer for layer in range(first + 1, last) if layer in full and layer not in keep]
            if not candidates or len(path) == flips:
                continue
            losses = [(loss(Pattern.from_full_layers(full - {layer}, num_layers)), layer) for layer in candidates]
            full.remove(min(losses)[1])
            path.append(Pattern.from_full_layers(full, num_layers))
    return path


@given(st.integers(0, 999), st.integers(2, 9), st.data())
def test_exact_is_algorithm_1(seed: int, num_layers: int, data: st.DataObject) -> None:
    keep = data.draw(st.sets(st.integers(1, num_layers - 1), max_size=num_layers - 2))
    flips = data.draw(st.integers(1, num_layers - 1 - len(keep)))
    strategy = make_strategy(task(Pattern.full(num_layers), flips, keep=frozenset(keep)))
    assert play(strategy, made_up(seed)) == reference_greedy(num_layers, keep, flips, made_up(seed))


@given(st.integers(0, 999), st.integers(2, 5), st.data())
def test_stages_are_the_papers(seed: int, stages: int, data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(stages * 2, 16))
    bounds = [block.start for block in split_stages(num_layers, stages)] + [num_layers]
    flips = data.draw(st.integers(1, num_layers - len(bounds) + 1))
    strategy = make_strategy(task(Pattern.full(num_layers), flips, stages=stages))
    path = play(strategy, made_up(seed))
    assert path == reference_stages(num_layers, bounds, set(), flips, made_up(seed))
    assert all(path[-1].is_full(first) for first in bounds[:-1])


def test_a_round_costs_one_evaluation_per_candidate() -> None:
    strategy = make_strategy(task(Pattern.full(12), 3, stages=3))
    asked = []
    while layers := strategy.ask():
        asked.append(layers)
        strategy.tell(dict.fromkeys(layers, [1.0] * 3))
    assert asked == [(1, 2, 3), (5, 6, 7), (9, 10, 11)]


@given(st.integers(1, 100), st.data())
def test_blocks_cover_all_layers(num_layers: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, num_layers))
    blocks = split_stages(num_layers, stages)
    assert [layer for block in blocks for layer in block] == list(range(num_layers))
    assert {len(block) for block in blocks[:-1]} <= {math.ceil(num_layers / stages)}
    assert 0 < len(blocks[-1]) <= math.ceil(num_layers / stages)


def test_blocks_are_those_of_the_published_glm5_search() -> None:
    assert [(block.start, block.stop) for block in split_stages(78, 4)] == [(0, 20), (20, 40), (40, 60), (60, 78)]


def test_equal_losses_go_to_the_smaller_layer() -> None:
    strategy = make_strategy(task(Pattern.full(5), 4))
    assert [p.letters for p in play(strategy, lambda _: 1.0)] == ["FSFFF", "FSSFF", "FSSSF", "FSSSS"]


def test_native_shared_layers_stay() -> None:
    strategy = make_strategy(task(Pattern("FFSFS"), 1, keep=frozenset({1})))
    assert strategy.ask() == (3,)


def test_a_stage_without_candidates_is_passed_over() -> None:
    strategy = make_strategy(task(Pattern("FSSFFF"), 2, stages=2))
    assert strategy.ask() == (4, 5)
    strategy.tell({4: [1.0] * 3, 5: [2.0] * 3})
    assert strategy.ask() == (5,)
    strategy.tell({5: [2.0] * 3})
    assert strategy.ask() == ()


@pytest.mark.parametrize("stages", [1, 4])
def test_make_strategy(stages: int) -> None:
    strategy = make_strategy(task(Pattern.full(8), 3, stages=stages))
    assert len(play(strategy, made_up(0))) == 3
