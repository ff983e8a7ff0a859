"""The second-order table: prices against a slow sum, corrections that measured patterns ask for, the search on it."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from icsearch.core.pattern import Pattern
from icsearch.search.protocol import KL, LOSS
from icsearch.search.second_order import (
    SMALLEST,
    PatternSearch,
    SecondOrderTable,
    correction,
    full_of,
    patterns_of,
    sources_of,
    summed,
)

LAYERS, SEQUENCES, DRAWS = 8, 5, 3
TOKENS = [31, 40, 17, 40, 22]
ALL_F = Pattern.full(LAYERS)
NOTHING = np.zeros((2, LAYERS, LAYERS))


def made_up(seed: int = 0, layers: int = LAYERS) -> SecondOrderTable:
    chance = np.random.default_rng(seed)
    weight = np.exp(chance.normal(size=(layers, 1)))
    drawn = np.tril(chance.normal(size=(SEQUENCES, DRAWS, layers, layers)) * weight, -1)
    true = np.tril(chance.normal(size=(SEQUENCES, layers, layers)) * weight / 4, -1)
    return SecondOrderTable(drawn, true, TOKENS)


def all_patterns(kept: int | None = None, layers: int = LAYERS) -> list[Pattern]:
    counts = range(layers) if kept is None else [kept - 1]
    return [
        Pattern.from_full_layers({0, *more}, layers)
        for count in counts
        for more in combinations(range(1, layers), count)
    ]


def slow_price(table: SecondOrderTable, pattern: Pattern) -> tuple[float, float]:
    """The formula, one sequence, draw and layer after another."""
    first_order = kl = 0.0
    for s in range(SEQUENCES):
        first_order += sum(table.true[s, layer, source] for layer, source in enumerate(pattern.sources()))
        for r in range(DRAWS):
            total = sum(table.drawn[s, r, layer, source] for layer, source in enumerate(pattern.sources()))
            kl += total**2 / 2 / DRAWS
    return (first_order + kl) / sum(TOKENS), kl / sum(TOKENS)


def test_prices_are_those_of_the_formula() -> None:
    table, patterns = made_up(), all_patterns()
    prices = table.predict(full_of(patterns))
    for number, pattern in enumerate(patterns):
        loss, kl = slow_price(table, pattern)
        assert prices[LOSS, number] == pytest.approx(loss, rel=1e-12, abs=1e-15)
        assert prices[KL, number] == pytest.approx(kl, rel=1e-12, abs=1e-15)
    assert patterns_of(full_of(patterns)) == patterns
    assert [tuple(row) for row in sources_of(full_of(patterns))] == [pattern.sources() for pattern in patterns]


def test_the_unmodified_model_costs_nothing() -> None:
    assert not made_up().predict(full_of([Pattern.full(LAYERS)])).any()


def test_pair_costs_are_the_prices_of_one_layer_alone() -> None:
    table = made_up()
    singles = [Pattern.full(LAYERS).flip(layer) for layer in range(1, LAYERS)]
    prices = table.predict(full_of(singles))
    costs = table.pair_costs()
    for number, layer in enumerate(range(1, LAYERS)):
        assert costs[:, layer, layer - 1] == pytest.approx(prices[:, number])


def test_nothing_measured_corrects_nothing() -> None:
    assert not correction(made_up(), ALL_F, {}).any()


def a_world(table: SecondOrderTable, seed: int = 1) -> Any:
    """[2, N, N]: what the table is off by in a made-up world, of layers and sources."""
    chance = np.random.default_rng(seed)
    return np.tril(chance.normal(size=(2, LAYERS, LAYERS)) * 0.01 + 0.05, -1)


def measured_in(table: SecondOrderTable, off: Any, patterns: list[Pattern]) -> dict[Pattern, tuple[float, float]]:
    full = full_of(patterns)
    loss, kl = table.predict(full) + summed(off, sources_of(full))
    return {pattern: (float(loss[n]), float(kl[n])) for n, pattern in enumerate(patterns)}


def test_a_corrected_table_gives_back_the_single_flips() -> None:
    table = made_up()
    singles = [Pattern.full(LAYERS).flip(layer) for layer in range(1, LAYERS)]
    known = measured_in(table, a_world(table), singles)
    again = table.predict(full_of(singles), correction(table, ALL_F, known))
    assert pytest.approx(np.array(list(known.values())), abs=10 * SMALLEST) == again.T


def test_corrections_foretell_patterns_that_were_not_measured() -> None:
    table = made_up()
    off = a_world(table)
    singles = [Pattern.full(LAYERS).flip(layer) for layer in range(1, LAYERS)]
    others = all_patterns(4)[::3]
    truth = np.array(list(measured_in(table, off, others).values())).T
    raw = np.abs(table.predict(full_of(others)) - truth).mean()
    by_flips = correction(table, ALL_F, measured_in(table, off, singles))
    with_more = correction(table, ALL_F, measured_in(table, off, [*singles, *all_patterns(5)[::2]]))
    errors = [np.abs(table.predict(full_of(others), each) - truth).mean() for each in (by_flips, with_more)]
    assert errors[1] < errors[0] < raw / 4


def test_corrections_of_the_loss_and_of_the_kl_are_apart() -> None:
    table = made_up()
    off = a_world(table)
    off[KL] = 0.0
    numbers = correction(table, ALL_F, measured_in(table, off, [*all_patterns(7), *all_patterns(6)]))
    assert np.abs(numbers[LOSS]).max() > 0.01
    assert np.abs(numbers[KL]).max() < 1e-9


@pytest.mark.parametrize("objective", [LOSS, KL])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_are_those_of_an_exhaustive_search(objective: int, seed: int) -> None:
    layers = 13
    table, numbers = (
        made_up(seed, layers),
        np.tril(np.random.default_rng(seed).normal(size=(2, layers, layers)), -1) / 9,
    )
    search = PatternSearch(table, Pattern.full(layers), frozenset(), objective, numbers)
    looked_at = 0
    for kept in range(2, layers):
        patterns = all_patterns(kept, layers)
        prices = table.predict(full_of(patterns), numbers)[objective]
        found = search.best(kept)
        assert found[0][1] == patterns[int(prices.argmin())]
        assert found[0][0] == pytest.approx(prices.min(), rel=1e-9)
        looked_at += len(found) < len(patterns)
    assert looked_at >= 5  # not because it has looked at all of them


def test_local_optima_come_first() -> None:
    layers = 13
    table, numbers = made_up(5, layers), np.zeros((2, layers, layers))
    search = PatternSearch(table, Pattern.full(layers), frozenset(), KL, numbers)
    ranked = search.best(6)
    at_an_optimum = [not (search.exchanges(full_of([p])[0])[1] < price).any() for price, p in ranked]
    distinct = at_an_optimum.index(False)
    assert distinct >= 1 and not any(at_an_optimum[distinct:])
    for part in (ranked[:distinct], ranked[distinct:]):
        assert [price for price, _ in part] == sorted(price for price, _ in part)


def test_flips_are_learned_where_the_checkpoint_shares_layers_itself() -> None:
    """The layer behind a flip, which has no indexer, moves with it."""
    table, start = made_up(), Pattern("FFFSFFSF")
    table.drawn[:, :, 3, 2] = table.true[:, 3, 2] = 0.0  # what a layer uses in the unmodified model costs nothing
    table.drawn[:, :, 6, 5] = table.true[:, 6, 5] = 0.0
    flips = [start.flip(layer) for layer in start.full_layers[1:]]
    loss, kl = table.predict(full_of(flips)) + 0.5
    known = dict(zip(flips, zip(loss.tolist(), kl.tolist(), strict=True), strict=True))
    numbers = correction(table, start, known)
    assert np.abs(table.predict(full_of(flips), numbers) - np.array([loss, kl])).max() < 10 * SMALLEST
    assert not table.predict(full_of([start]), numbers).any()
    assert numbers[KL, 3, 1] > 0.1  # sharing layer 2 hands layer 3 the selection of layer 1


def test_dear_sources_may_be_further_off_than_cheap_ones() -> None:
    """What a pattern is off by is laid on the layer whose source is dearer than that of its single flip."""
    drawn = np.tril(np.ones((SEQUENCES, DRAWS, LAYERS, LAYERS)), -1)
    drawn[:, :, 5, 2] = 3.0
    table = SecondOrderTable(drawn, np.zeros((SEQUENCES, LAYERS, LAYERS)), TOKENS)
    singles = [Pattern.full(LAYERS).flip(layer) for layer in range(1, LAYERS)]
    odd = Pattern("FFFSSSSF")
    loss, kl = table.predict(full_of([odd]))[:, 0]
    numbers = correction(
        table, ALL_F, {**measured_in(table, np.zeros((2, LAYERS, LAYERS)), singles), odd: (loss + 1, kl + 1)}
    )
    assert numbers[KL, 5, 2] > 20 * numbers[KL, 6, 2] > 0
    assert numbers[KL, 6, 2] == pytest.approx(numbers[KL, 4, 2])


def test_what_a_sum_cannot_say_is_not_learned_by_heart() -> None:
    """One pattern that is off by an interaction moves the others less than it is off itself."""
    table = made_up()
    singles = measured_in(
        table, np.zeros((2, LAYERS, LAYERS)), [Pattern.full(LAYERS).flip(i) for i in range(1, LAYERS)]
    )
    odd = Pattern("FFSSFSSF")
    loss, kl = table.predict(full_of([odd]))[:, 0]
    numbers = correction(table, ALL_F, {**singles, odd: (loss + 0.5, kl + 0.5)})
    off = float(summed(numbers, sources_of(full_of([odd])))[LOSS, 0])
    assert 0.01 < off < 0.5
    again = table.predict(full_of(singles), numbers) - np.array(list(singles.values())).T
    assert np.abs(again).max() < off / 2


def test_all_budgets_of_a_large_model_in_seconds() -> None:
    """78 layers, 64 sequences of 4 draws: a path through all budgets, and what is best at one of them."""
    chance, layers = np.random.default_rng(0), 78
    drawn = np.tril(chance.normal(size=(64, 4, layers, layers)), -1)
    table = SecondOrderTable(drawn, np.tril(chance.normal(size=(64, layers, layers)), -1), [1000] * 64)
    search = PatternSearch(table, Pattern.full(layers), frozenset(), KL, np.zeros((2, layers, layers)))
    path = search.path(layers - 1)
    assert [len(pattern.full_layers) for pattern in path] == list(range(layers - 1, 0, -1))
    (price, pattern), *_ = search.best(70, [path[7]])
    assert len(pattern.full_layers) == 70
    assert price <= float(table.predict(full_of([path[7]]))[KL, 0])


def test_exchanges_are_priced_as_whole_patterns_are() -> None:
    table, numbers = made_up(5, 13), np.tril(np.random.default_rng(2).normal(size=(2, 13, 13)), -1)
    for objective in (LOSS, KL):
        search = PatternSearch(table, Pattern("FFSFFFSFFSFFF"), frozenset({3}), objective, numbers)
        for letters in ("FFSFSSSFFSFSF", "FSSFSSSSSSSSF", "FFSFFFSFFSFFF", "FSSFSSSSSSSSS"):
            after, prices = search.exchanges(full_of([Pattern(letters)])[0])
            assert prices == pytest.approx(table.predict(after, numbers)[objective], rel=1e-9, abs=1e-9)
            assert {tuple(np.flatnonzero(row)) for row in after} == {
                tuple(sorted({*Pattern(letters).full_layers} - {giver} | {taker}))
                for giver in Pattern(letters).full_layers
                for taker in Pattern(letters).shared_layers
                if giver not in (0, 3) and taker not in (2, 6, 9)
            }


def test_constraints_are_kept() -> None:
    table = made_up(3)
    start, kept_full = Pattern("FFSFFFSF"), frozenset({4})
    search = PatternSearch(table, start, kept_full, LOSS, NOTHING)
    for _, pattern in search.best(4):
        assert {0, 4} <= set(pattern.full_layers) <= set(start.full_layers)
        assert len(pattern.full_layers) == 4
    possible = [p for p in all_patterns(4) if {0, 4} <= set(p.full_layers) <= set(start.full_layers)]
    prices = table.predict(full_of(possible))[LOSS]
    assert search.best(4)[0][1] == possible[int(prices.argmin())]
    for pattern in search.path(4):
        assert {0, 4} <= set(pattern.full_layers) <= set(start.full_layers)


def test_the_path_shares_the_cheapest_layer_in_each_step() -> None:
    table = made_up(2)
    path = PatternSearch(table, Pattern.full(LAYERS), frozenset(), KL, NOTHING).path(LAYERS - 1)
    before = Pattern.full(LAYERS)
    for pattern in path:
        possible = [before.flip(layer) for layer in before.full_layers if layer]
        prices = [slow_price(table, each)[1] for each in possible]
        assert pattern == possible[int(np.argmin(prices))]
        before = pattern
    assert before.full_layers == (0,)


def test_equal_prices_go_to_the_smaller_layer() -> None:
    nothing = SecondOrderTable(np.zeros((2, 1, 5, 5)), np.zeros((2, 5, 5)), [3, 3])
    search = PatternSearch(nothing, Pattern.full(5), frozenset(), LOSS, np.zeros((2, 5, 5)))
    assert [pattern.letters for pattern in search.path(3)] == ["FSFFF", "FSSFF", "FSSSF"]
    assert search.best(3)[0][1].letters == "FFFSS"


def test_a_start_that_is_known_to_be_good_is_looked_at() -> None:
    table = made_up(7)
    search = PatternSearch(table, Pattern.full(LAYERS), frozenset(), LOSS, NOTHING)
    also = Pattern("FSSSFSSF")
    assert also in [pattern for _, pattern in search.best(3, [also])]
