"""Racing on made-up losses: what it drops, how often it errs, and when it is exact."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icsearch.core.pattern import Pattern
from icsearch.search.protocol import Task, looks_of
from icsearch.search.registry import Options
from made_up_tables import Table, additive, arbitrary, final_loss, make_task, noisy_table, play

EXACT, RACE = Options("exact"), Options("race")


def normal(scale: float) -> Callable[[random.Random], float]:
    return lambda chance: chance.gauss(0, scale)


def spread(layers: int, least: float = 0.001, most: float = 1.0) -> list[float]:
    """Costs over orders of magnitude, in an order that has nothing to do with the layers'."""
    costs = [least * (most / least) ** (i / (layers - 1)) for i in range(layers)]
    random.Random(1).shuffle(costs)
    return costs


def test_clear_losers_are_dropped_and_the_path_is_that_of_exact() -> None:
    task = make_task(16, 12)
    table = noisy_table(task, 0, additive(spread(16)), normal(0.002))
    race, exact = play(task, RACE, table), play(task, EXACT, table)
    assert race.layers == exact.layers
    assert race.evaluations < 0.6 * exact.evaluations
    assert any(choice.dropped for choice in race.choices)
    assert not any(choice.settled or choice.stale or choice.violations for choice in race.choices)


@pytest.mark.parametrize("seed", range(20))
def test_near_ties_everywhere_make_it_exact(seed: int) -> None:
    """Where no candidate can be told from another, all are scored on all sequences, as exact does."""
    task = make_task(10, 6)
    table = noisy_table(task, seed, additive([1e-6] * 10), normal(0.1))
    race, exact = play(task, Options("race", 0.9999), table), play(task, EXACT, table)
    assert race.layers == exact.layers
    assert race.evaluations > 0.95 * exact.evaluations


def test_equal_flips_are_never_dropped() -> None:
    """A difference of zero on every sequence so far has an error of zero, which is no certainty."""
    task = make_task(8, 3)
    late = {5: -5.0, 3: -1.0}

    def table(pattern: Pattern) -> list[float]:
        gain = sum(late.get(layer, 0.0) for layer in pattern.shared_layers)
        return [20.0] * 20 + [20.0 + gain] * 4

    race = play(task, RACE, table)
    assert race.layers == play(task, EXACT, table).layers == [5, 3, 1]
    assert not any(choice.dropped for choice in race.choices)


def test_constant_differences_are_not_taken_for_certain() -> None:
    """Twenty sequences say that layer 2 is dearer by exactly as much on each; the last four turn it round."""
    task = make_task(4, 1)

    def table(pattern: Pattern) -> list[float]:
        dearer = 1.0 if not pattern.is_full(2) else 0.0
        return [20.0 + dearer] * 20 + [20.0 - 10 * dearer] * 4

    assert play(task, RACE, table).layers == play(task, EXACT, table).layers == [2]


def test_a_leader_that_changes_late() -> None:
    """Layer 3 leads up to the last batch, within the noise: both go to the end, and layer 2 wins."""
    task = make_task(5, 1)
    chance = random.Random(0)
    noise = {layer: [chance.gauss(0, 4) for _ in range(24)] for layer in range(1, 5)}
    lead = {2: [1.0] * 20 + [-12.0] * 4, 3: [0.0] * 24}

    def table(pattern: Pattern) -> list[float]:
        (layer,) = pattern.shared_layers or (0,)
        extra = lead.get(layer, [50.0] * 24)
        return [20 + extra[i] + noise.get(layer, [0.0] * 24)[i] for i in range(24)]

    race = play(task, RACE, table)
    assert race.layers == play(task, EXACT, table).layers == [2]
    assert race.choices[0].dropped == (1, 4)


def miss_rate(
    confidence: float, noise: Callable[[random.Random], float], tables: int, gap: float, tokens: Sequence[int] = ()
) -> tuple[float, float]:
    """(share of tables whose first step race decides otherwise than exact, share of evaluations that it needs)."""
    misses = evaluations = whole = 0
    for seed in range(tables):
        task = make_task(9, 1, 24, batch_size=1, tokens=tokens or None)
        weights = [gap * layer for layer in range(9)]
        table = noisy_table(task, seed, additive(weights), noise)
        race, exact = play(task, Options("race", confidence), table), play(task, EXACT, table)
        misses += race.layers != exact.layers
        evaluations += race.evaluations
        whole += exact.evaluations
    return misses / tables, evaluations / whole


UNEVEN = tuple(random.Random(4).choices([3, 10, 40, 90], k=24))


@pytest.mark.parametrize("gap", [0.0, 0.002, 0.02])
@pytest.mark.parametrize("tokens", [(), UNEVEN])
def test_it_misses_no_more_often_than_stated(gap: float, tokens: tuple[int, ...]) -> None:
    """Looking after every sequence, with the lowest confidence that makes sense, where errors are most frequent."""
    rate, share = miss_rate(0.8, normal(0.01), 150, gap, tokens)
    assert rate <= 0.2 / 2  # Bonferroni is on the safe side, by far
    assert share < 1


@pytest.mark.parametrize("tail", ["student", "outliers"])
def test_heavy_tails_are_missed_no_more_often_than_stated(tail: str) -> None:
    """Noise with three degrees of freedom; and noise of which one sequence in twenty has ten times as much."""

    def student(chance: random.Random) -> float:
        return 0.01 * chance.gauss(0, 1) / (sum(chance.gauss(0, 1) ** 2 for _ in range(3)) / 3) ** 0.5

    def outliers(chance: random.Random) -> float:
        return chance.gauss(0, 0.1 if chance.random() < 0.05 else 0.01)

    rate, _ = miss_rate(0.95, {"student": student, "outliers": outliers}[tail], 200, 0.01)
    assert rate <= 0.05


def test_one_sided_outliers_are_what_it_cannot_see() -> None:
    """The stated limit: a flip that helps one late sequence by much, and hurts all before, is dropped."""
    task = make_task(3, 1)
    chance = random.Random(0)
    small = [chance.gauss(0, 0.1) for _ in range(24)]

    def table(pattern: Pattern) -> list[float]:
        if pattern.is_full(2):
            return [20.0] * 24
        return [21.0 + x for x in small[:23]] + [-40.0]

    assert play(task, EXACT, table).layers == [2]
    assert play(task, RACE, table).choices[0].dropped == (2,)


@given(
    st.integers(0, 999),
    st.integers(3, 9),
    st.integers(1, 4),
    st.lists(st.integers(1, 50), min_size=1, max_size=12),
    st.integers(1, 12),
    st.sampled_from([0.0, 1e-3, 0.1]),
    st.sampled_from(["race", "race+lazy"]),
)
@settings(max_examples=150, deadline=None)
def test_any_search_comes_to_its_end(
    seed: int, layers: int, stages: int, tokens: list[int], batch: int, scale: float, name: str
) -> None:
    """`play` checks what is asked and said; the number of flips is that of exact's whatever the sequences are."""
    flips = max(1, (layers - stages) // 2)
    if len(range(0, layers, -(-layers // stages))) != stages or layers - stages < flips:
        return
    task = make_task(layers, flips, batch_size=batch, stages=stages, tokens=tokens)
    table = noisy_table(task, seed, arbitrary(seed, scale), normal(0.01))
    for margin in (None, 0.01):
        race = play(task, Options(name, 0.6, margin), table)
        assert race.evaluations <= play(task, EXACT, table).evaluations


@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_up_to_five_sequences_it_is_exact(seed: int, sequences: int, batch: int) -> None:
    task = make_task(6, 4, sequences, batch_size=batch)
    table = noisy_table(task, seed, arbitrary(seed), normal(0.3))
    race, exact = play(task, Options("race", 0.51, 9.0), table), play(task, EXACT, table)
    assert (race.layers, race.evaluations) == (exact.layers, exact.evaluations)


def test_one_batch_of_all_sequences_is_exact() -> None:
    task = make_task(8, 5, 24, batch_size=24)
    table = noisy_table(task, 3, arbitrary(3), normal(0.3))
    race, exact = play(task, Options("race", 0.51), table), play(task, EXACT, table)
    assert (race.layers, race.asks) == (exact.layers, exact.asks)


def test_the_first_look_is_after_five_sequences() -> None:
    task = make_task(8, 1, 24, batch_size=2)
    seen: list[tuple[int, int]] = []

    def table(pattern: Pattern) -> list[float]:
        return [20.0 + sum(pattern.shared_layers) + i % 3 for i in range(24)]

    class Spy(list[float]):
        def __getitem__(self, key: object) -> object:  # type: ignore[override]
            assert isinstance(key, slice)
            seen.append((key.start, key.stop))
            return list(self)[key]

    play(task, RACE, lambda pattern: Spy(table(pattern)))
    assert min(last for _, last in seen) == 6


def test_looks_are_after_whole_batches() -> None:
    assert looks_of(24, 4) == (4, 8, 12, 16, 20, 24)
    assert looks_of(10, 4) == (4, 8, 10)
    assert looks_of(3, 4) == (3,)


# --- the tie margin ---------------------------------------------------------------------------------------------------


def near_ties(task: Task, seed: int) -> Table:
    return noisy_table(task, seed, additive([1e-4 * layer for layer in range(16)]), normal(0.001))


def test_near_ties_are_settled_within_the_margin() -> None:
    task = make_task(16, 12)
    table = near_ties(task, 0)
    plain, settled = play(task, RACE, table), play(task, Options("race", 0.95, 0.01), table)
    assert settled.evaluations < 0.7 * plain.evaluations
    assert {choice.settled for choice in settled.choices[:-1]} == {8}
    assert not any(choice.settled for choice in plain.choices)


@pytest.mark.parametrize("seed", range(30))
def test_a_settled_step_costs_no_more_than_the_margin(seed: int) -> None:
    margin, task = 0.002, make_task(16, 1)
    table = near_ties(task, seed)
    settled, exact = play(task, Options("race", 0.95, margin), table), play(task, EXACT, table)
    assert final_loss(task, settled, table) <= final_loss(task, exact, table) + margin


def test_a_margin_below_what_can_be_known_settles_nothing() -> None:
    task = make_task(16, 4)
    table = near_ties(task, 0)
    plain, tiny = play(task, RACE, table), play(task, Options("race", 0.95, 1e-9), table)
    assert tiny == plain
