"""The similarity baseline's dynamic program, against brute force and against the published recurrence."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icsearch.core.errors import PatternError
from icsearch.core.pattern import Pattern
from icsearch.search.dynamic_program import solve
from icsearch.search.greedy import split_stages

Matrix = list[list[float]]

coarse = st.integers(-2, 2).map(lambda n: n / 64)  # many ties, and all sums exact
fine = st.integers(-64, 64).map(lambda n: n / 64)
any_float = st.floats(-1, 1)  # down to subnormal numbers


@st.composite
def matrices(draw: st.DrawFn, entries: st.SearchStrategy[float], max_layers: int = 8) -> Matrix:
    num_layers = draw(st.integers(1, max_layers))
    return [draw(st.lists(entries, min_size=i + 1, max_size=i + 1)) for i in range(num_layers)]


@st.composite
def constraints(draw: st.DrawFn, num_layers: int) -> tuple[frozenset[int], frozenset[int]]:
    roles = draw(st.lists(st.sampled_from("FS.."), min_size=num_layers, max_size=num_layers))
    full = frozenset(layer for layer, role in enumerate(roles) if role == "F")
    shared = frozenset(layer for layer, role in enumerate(roles) if role == "S" and layer > 0)
    return full, shared


def random_matrix(num_layers: int, seed: int, ties: bool) -> Matrix:
    rng = random.Random(seed)
    return [[rng.randint(-2, 2) / 64 if ties else rng.uniform(-1, 1) for _ in range(i + 1)] for i in range(num_layers)]


def terms(similarity: Matrix, pattern: Pattern) -> list[float]:
    sources = pattern.sources()
    return [similarity[layer][sources[layer]] for layer in pattern.shared_layers]


def brute_force(
    similarity: Matrix, num_full: int, must_be_full: frozenset[int], must_be_shared: frozenset[int]
) -> Pattern | None:
    """The best pattern by trying all: F layers in lexicographic order, a later one must be better to win."""
    best: tuple[Fraction, Pattern] | None = None
    for rest in combinations(range(1, len(similarity)), num_full - 1):
        full_layers = {0, *rest}
        if must_be_full <= full_layers and not must_be_shared & full_layers:
            pattern = Pattern.from_full_layers(full_layers, len(similarity))
            value = sum(map(Fraction, terms(similarity, pattern)), Fraction(0))
            if best is None or value > best[0]:
                best = (value, pattern)
    return best and best[1]


def check_all_budgets(similarity: Matrix, must_be_full: frozenset[int], must_be_shared: frozenset[int]) -> None:
    solutions = solve(similarity, must_be_full=must_be_full, must_be_shared=must_be_shared)
    for num_full in range(1, len(similarity) + 1):
        expected = brute_force(similarity, num_full, must_be_full, must_be_shared)
        assert (expected is not None) == (num_full in solutions.budgets)
        if expected is None:
            with pytest.raises(PatternError):
                solutions.pattern(num_full)
        else:
            assert solutions.pattern(num_full) == expected
            assert solutions.objective(num_full) == math.fsum(terms(similarity, expected))


def published(similarity: Matrix, num_full: int, must_be_full: frozenset[int], must_be_shared: frozenset[int]) -> float:
    """The recurrence as FACTS.md and the paper have it; an F layer N after the last closes the last run."""
    num_layers = len(similarity)
    dp = {(0, 1): 0.0}
    for i in range(1, num_layers + 1):
        for k in range(2, num_full + 2):
            ways = [
                dp[j, k - 1] + sum(similarity[m][j] for m in range(j + 1, i))
                for j in range(i)
                if (j, k - 1) in dp and not must_be_full & set(range(j + 1, i))
            ]
            if ways and i not in must_be_shared:
                dp[i, k] = max(ways)
    return dp[num_layers, num_full + 1]


@given(st.one_of(matrices(coarse), matrices(fine), matrices(any_float)), st.data())
@settings(deadline=None)
def test_equals_brute_force(similarity: Matrix, data: st.DataObject) -> None:
    check_all_budgets(similarity, *data.draw(constraints(len(similarity))))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("num_layers", range(1, 13))
def test_equals_brute_force_at_every_size(num_layers: int, ties: bool) -> None:
    similarity = random_matrix(num_layers, num_layers, ties)
    check_all_budgets(similarity, frozenset(), frozenset())
    rng = random.Random(num_layers)
    constrained = rng.sample(range(1, num_layers), min(3, num_layers - 1))
    check_all_budgets(similarity, frozenset(constrained[:1]), frozenset(constrained[1:]))


@given(matrices(fine, max_layers=14), st.data())
@settings(max_examples=50, deadline=None)
def test_equals_the_published_recurrence(similarity: Matrix, data: st.DataObject) -> None:
    full, shared = data.draw(constraints(len(similarity)))
    solutions = solve(similarity, must_be_full=full, must_be_shared=shared)
    for num_full in solutions.budgets:
        assert solutions.objective(num_full) == published(similarity, num_full, full, shared)


def test_ties_go_to_the_first_f_layers() -> None:
    solutions = solve([[0.5] * (i + 1) for i in range(6)])
    assert [solutions.pattern(k).letters for k in (1, 3, 6)] == ["FSSSSS", "FFFSSS", "FFFFFF"]
    # F at {0, 1, 4} and at {0, 2, 3} are both worth 2, all others less: the first F layer that differs decides
    similarity = [[0.0] * 5 for _ in range(5)]
    similarity[2][1], similarity[3][1] = 0.5, 1.5
    similarity[1][0], similarity[4][3] = 1.0, 1.0
    solutions = solve(similarity)
    assert solutions.objective(3) == 2.0
    assert solutions.pattern(3).full_layers == (0, 1, 4)
    assert solve(similarity, must_be_shared=frozenset({1})).pattern(3).full_layers == (0, 2, 3)


def test_rounding_does_not_break_a_tie() -> None:
    # F at {0, 1} and at {0, 2} sum the same three terms in other orders, which floats round to other sums.
    for a, b, c in permutations((0.1, 0.2, 0.3)):
        similarity = [[0.0] * 5 for _ in range(5)]
        similarity[2][1], similarity[3][1], similarity[4][1] = a, b, c
        similarity[1][0], similarity[3][2], similarity[4][2] = c, a, b
        assert solve(similarity).pattern(2).full_layers == (0, 1)


def test_rounding_does_not_make_a_tie() -> None:
    # F at {0, 2} is worth 1 + 2**-60 - 1, all others 0; in floats all would be 0, and {0, 1} the first of them.
    similarity = [[0.0] * 6 for _ in range(6)]
    similarity[3][2], similarity[4][2], similarity[5][2] = 1.0, 2.0**-60, -1.0
    solutions = solve(similarity)
    assert solutions.pattern(2).full_layers == (0, 2)
    assert solutions.objective(2) == 2.0**-60


@given(matrices(any_float, max_layers=20), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_first_layers_of_stages_stay_full(similarity: Matrix, stages: int) -> None:
    first_layers = frozenset(block.start for block in split_stages(len(similarity), min(stages, len(similarity))))
    solutions = solve(similarity, must_be_full=first_layers)
    assert solutions.budgets == range(len(first_layers), len(similarity) + 1)
    for num_full in solutions.budgets:
        assert first_layers <= set(solutions.pattern(num_full).full_layers)


def test_a_large_model() -> None:
    similarity = random_matrix(128, 0, ties=False)
    solutions = solve(similarity, must_be_full=frozenset({32, 64, 96}), must_be_shared=frozenset({5, 7}))
    assert solutions.budgets == range(4, 127)
    for num_full in solutions.budgets:
        pattern = solutions.pattern(num_full)
        assert len(pattern.full_layers) == num_full
        assert all(map(pattern.is_full, (0, 32, 64, 96))) and not any(map(pattern.is_full, (5, 7)))
        assert solutions.objective(num_full) == math.fsum(terms(similarity, pattern))


def test_square_and_triangular_matrices_are_the_same() -> None:
    triangular = random_matrix(7, 3, ties=False)
    square = [[*row[:-1], *[math.nan] * (7 - i)] for i, row in enumerate(triangular)]
    assert solve(square) == solve(triangular)


@pytest.mark.parametrize("num_full", [-1, 0, 2, 9, 99])
def test_an_impossible_number_of_full_layers_says_what_is_possible(num_full: int) -> None:
    solutions = solve(random_matrix(10, 0, False), must_be_full=frozenset({3, 6}), must_be_shared=frozenset({7, 8}))
    for ask in (solutions.pattern, solutions.objective):
        with pytest.raises(PatternError, match=rf"has {num_full} F layers .* ask for 3 to 8 F layers"):
            ask(num_full)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_entry_that_is_not_finite_is_named(value: float) -> None:
    similarity = random_matrix(5, 0, False)
    similarity[4][2] = value
    with pytest.raises(PatternError, match=rf"similarity\[4\]\[2\] is {value}"):
        solve(similarity)


def test_a_wrong_shape_is_named() -> None:
    with pytest.raises(PatternError, match="empty"):
        solve([])
    with pytest.raises(PatternError, match=r"similarity\[2\] has 2 entries, expected 3"):
        solve([[1.0], [0.5, 1.0], [0.5, 0.5]])
    with pytest.raises(PatternError, match=r"similarity\[1\] has 4 entries, expected 3"):
        solve([[1.0] * 3, [1.0] * 4, [1.0] * 3])
    with pytest.raises(PatternError, match=r"similarity\[0\] has 0 entries, expected 1"):
        solve([[], [0.5]])


def test_impossible_constraints_are_refused() -> None:
    similarity = random_matrix(4, 0, False)
    with pytest.raises(PatternError, match=r"no layers -1, 4: there are 4 DSA layers"):
        solve(similarity, must_be_full=frozenset({4, 2}), must_be_shared=frozenset({-1}))
    with pytest.raises(PatternError, match=r"layer 0 cannot be S"):
        solve(similarity, must_be_shared=frozenset({0}))
    with pytest.raises(PatternError, match=r"layer 2 must be F and S at once"):
        solve(similarity, must_be_full=frozenset({1, 2}), must_be_shared=frozenset({2, 3}))
