"""The plan: counts against brute force, memory by its formula, sizes as typed."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from icsearch.core.errors import IcsearchError
from icsearch.core.pattern import Pattern
from icsearch.core.text import format_bytes, parse_bytes
from icsearch.planning.plan import HEAP_SHARE, BatchShape, Kept, SearchPlan, patterns_per_sweep
from icsearch.planning.rehearsal import preview
from icsearch.search.protocol import Task, looks_of
from icsearch.search.registry import Options, make_strategy
from icsearch.sweep.states import Keeping

TOKENS = (30, 31, 29)
SHAPE = BatchShape(
    batch_size=2,
    seq_len=100,
    hidden_size=32,
    dtype_bytes=2,
    index_topk=16,
    index_heads=4,
    index_head_dim=8,
    attention_heads=2,
    vocab_size=50,
)


def task(num_layers: int, flips: int, stages: int = 1) -> Task:
    return Task(Pattern.full(num_layers), frozenset(), flips, stages, TOKENS, looks_of(len(TOKENS), 2))


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
        strategy.begin([0.0] * len(TOKENS))
        evaluations = runs = 0
        while ask := strategy.ask():
            evaluations += len(ask.layers)
            runs += tree_nodes([strategy.pattern.flip(layer) for layer in ask.layers])
            strategy.tell({layer: [chance.random() for _ in TOKENS[ask.first : ask.last]] for layer in ask.layers})
        assert evaluations == most[0]
        assert runs <= most[1]


@pytest.mark.parametrize("name", ["race", "lazy", "race+lazy"])
@pytest.mark.parametrize("stages", [1, 2])
def test_preview_bounds_the_other_strategies_too(name: str, stages: int) -> None:
    """Whatever the losses are: layer runs count by sequence."""
    num_layers, flips, tokens = 14, 9, tuple(range(20, 32))
    task = Task(Pattern.full(num_layers), frozenset(), flips, stages, tokens, looks_of(len(tokens), 2))
    options = Options(name)
    most = preview(make_strategy(task, options), tokens, tree_nodes, options.is_lazy)
    assert most[0] == preview(make_strategy(task), tokens, tree_nodes)[0]  # at worst everyone, on all sequences
    for seed in range(100):
        chance = random.Random(seed)
        strategy = make_strategy(task, options)
        strategy.begin([0.0] * len(tokens))
        evaluations = runs = 0
        while ask := strategy.ask():
            length = ask.last - ask.first
            evaluations += len(ask.layers) * length
            runs += tree_nodes([strategy.pattern.flip(layer) for layer in ask.layers]) * length
            strategy.tell({layer: [chance.gauss(layer % 3, 1) for _ in range(length)] for layer in ask.layers})
        assert evaluations <= most[0] * len(tokens)
        assert runs <= most[1] * len(tokens)


def test_branch_and_layer_bytes() -> None:
    assert SHAPE.branch_bytes == 2 * 100 * (32 * 2 + 16 * 4)
    assert SHAPE.layer_bytes == 2 * 100**2 * (2 * 4 + 8 + 3 + 2) * 4


def test_budget_decides_how_many_live() -> None:
    fixed = SHAPE.layer_bytes
    assert patterns_per_sweep(SHAPE, 500, 500 + fixed + 10 * SHAPE.branch_bytes) == 8
    assert patterns_per_sweep(SHAPE, 500, 500 + fixed + 3 * SHAPE.branch_bytes) == 1
    with pytest.raises(IcsearchError, match=r"memory budget .* 500 B of weights .* raise --memory"):
        patterns_per_sweep(SHAPE, 500, 500 + fixed + 2 * SHAPE.branch_bytes)


def test_a_large_vocabulary_can_be_what_counts() -> None:
    wide = replace(SHAPE, vocab_size=10**6)
    states = 2 * 100 * 32 * 2  # normed
    assert wide.layer_bytes == states + 2 * 100 * 10**6 * (2 + 8)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("1000", 1000), ("2K", 2000), ("3B", 3)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "8 apples", "0", "1e9", "8GBB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(IcsearchError, match="is not a size"):
        parse_bytes(text)


def test_sizes_for_people() -> None:
    assert [format_bytes(n) for n in (5, 1234, 2_500_000, 18 * 10**9, 7 * 10**12)] == [
        "5 B",
        "1.2 kB",
        "2.5 MB",
        "18.0 GB",
        "7.0 TB",
    ]


def search_plan(**changes: object) -> SearchPlan:
    """A plan of made-up numbers: 3 candidates, states of 10 bytes, 1000 in a layer."""
    numbers = {
        "strategy": Options(), "num_layers": 4, "candidates": 3, "num_shared": 1, "candidate_evaluations": 3,
        "layer_evaluations": 9, "expected_layer_evaluations": 9, "naive_layer_evaluations": 12,
        "branches_per_sweep": 2, "branch_bytes": 10, "layer_bytes": 1000, "weight_bytes": 500, "memory_bytes": 10**6,
        "full_state_bytes": 0, "kept": Kept(Keeping(4, (0, 1, 2, 3)), 0, 70),
    }  # fmt: skip
    return SearchPlan(**{**numbers, **changes})  # type: ignore[arg-type]


def test_the_peak_is_what_lives_at_once() -> None:
    assert search_plan().peak_bytes == 500 + 1000 + 4 * 10 + 70  # two candidates, the trunk, an output
    assert search_plan(packets=3).peak_bytes == 500 + 1000 + (3 * 4 + 1) * 10 + 70
    on_cpu = search_plan(program_bytes=300, tensor_bytes=2**20)
    assert on_cpu.heap_bytes == int(HEAP_SHARE * 31 / 32 * 1110)
    assert on_cpu.peak_bytes == 300 + 500 + 1110 + on_cpu.heap_bytes
    assert search_plan(program_bytes=300, tensor_bytes=2**25).heap_bytes == 0  # tensors with pages of their own


def test_states_that_rest_in_cpu_memory_leave_three_on_the_device() -> None:
    """Of one batch, as they are there; what rests is of a whole wave, and rounded up."""
    assert search_plan(resting=10**5, branch_bytes=64, state_bytes=10).peak_bytes == 500 + 1000 + 3 * 10
