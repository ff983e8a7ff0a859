"""Lazy greedy on made-up losses: what it leaves out, what it cannot know, and how it finds out."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import mean_loss
from icsearch.search.lazy import POOL_SIZE, RESCAN_EVERY
from icsearch.search.protocol import Task
from icsearch.search.registry import Options
from made_up_tables import Played, Table, additive, arbitrary, make_task, noisy_table, play

EXACT, LAZY, BOTH = Options("exact"), Options("lazy"), Options("race+lazy")


def same_on_all(cost: Table | object, sequences: int = 6) -> Table:
    """A table without noise."""
    return lambda pattern: [20 + cost(pattern)] * sequences  # type: ignore[operator]


def crowded(seed: int, layers: int) -> object:
    """Costs over orders of magnitude that rise with the distance to the source, as real ones mostly do."""
    chance = random.Random(seed)
    weights = [10 ** chance.uniform(-3, 0) for _ in range(layers)]

    def cost(pattern: Pattern) -> float:
        return sum(weights[layer] * (layer - source) ** 1.5 for layer, source in enumerate(pattern.sources()))

    return cost


@pytest.mark.parametrize("options", [LAZY, BOTH])
@pytest.mark.parametrize("seed", range(10))
def test_costs_that_never_fall_need_few_evaluations(seed: int, options: Options) -> None:
    """There the bounds hold, and the choices are exact's."""
    task = make_task(24, 18, 6)
    table = same_on_all(crowded(seed, 24))
    lazy, exact = play(task, options, table), play(task, EXACT, table)
    assert lazy.layers == exact.layers
    assert lazy.evaluations < 0.6 * exact.evaluations
    assert not any(choice.violations or choice.missed for choice in lazy.choices)
    assert any(choice.stale for choice in lazy.choices)


def test_the_first_step_and_every_so_many_score_everyone() -> None:
    task = make_task(24, 20, 6)
    lazy = play(task, LAZY, same_on_all(crowded(0, 24)))
    whole = [step for step, choice in enumerate(lazy.choices) if not choice.stale]
    assert {0, RESCAN_EVERY, 2 * RESCAN_EVERY} <= set(whole)


def test_the_layers_around_the_last_flip_are_always_scored() -> None:
    task = make_task(24, 18, 6)
    lazy = play(task, LAZY, same_on_all(crowded(3, 24)))
    pattern = task.start
    for before, after in zip(lazy.choices, lazy.choices[1:], strict=False):
        full = pattern.full_layers
        place = full.index(before.layer)
        around = {full[place - 1], *full[place + 1 : place + 2]} - {0}
        assert around <= set(after.scored)
        pattern = pattern.flip(before.layer)


def test_a_stage_rescans_by_its_own_turns() -> None:
    """Were steps counted, five stages with a rescan every fifth step would rescan one of them only."""
    task = make_task(40, 20, 6, stages=2)
    lazy = play(task, LAZY, same_on_all(crowded(1, 40)))
    whole = [step for step, choice in enumerate(lazy.choices) if not choice.stale]
    assert {0, 1, 2 * RESCAN_EVERY, 2 * RESCAN_EVERY + 1} <= set(whole)
    assert lazy.layers == play(task, EXACT, same_on_all(crowded(1, 40))).layers


def falling(pattern: Pattern) -> float:
    """Layer 20 is dear alone, and each flip below makes it cheaper than the bound by more than was seen before."""
    others = sum(1 for layer in pattern.shared_layers if layer != 20)
    weights = sum(0.01 * layer for layer in pattern.shared_layers if layer != 20)
    return weights + (0 if pattern.is_full(20) else 2.0 - 0.6 * others)


def test_costs_that_fall_are_found_by_the_rescan_and_counted() -> None:
    task = make_task(24, 16, 6)
    lazy, exact = play(task, LAZY, same_on_all(falling)), play(task, EXACT, same_on_all(falling))
    late, early = lazy.layers.index(20), exact.layers.index(20)
    assert early < late == RESCAN_EVERY
    assert lazy.choices[late].missed
    assert lazy.choices[late].violations == (20,)
    assert sum(choice.missed for choice in lazy.choices) == 1


@given(st.integers(0, 9999), st.integers(3, 14), st.sampled_from([LAZY, BOTH]))
@settings(max_examples=80, deadline=None)
def test_arbitrary_costs_are_searched_to_the_end(seed: int, layers: int, options: Options) -> None:
    task = make_task(layers, layers - 1, 8)
    table = noisy_table(task, seed, arbitrary(seed), lambda chance: chance.gauss(0, 0.01))
    lazy, exact = play(task, options, table), play(task, EXACT, table)
    assert lazy.evaluations <= exact.evaluations
    assert lazy.layers[0] == exact.layers[0] or options is BOTH
    assert set(lazy.layers) == set(exact.layers)


@given(st.integers(0, 9999), st.integers(2, 2 + POOL_SIZE))
@settings(max_examples=40, deadline=None)
def test_a_pool_that_holds_everyone_is_exact(seed: int, layers: int) -> None:
    """Layer 0 is none, one is flipped in the first step, and the rest fits into one pool."""
    task = make_task(layers, layers - 1, 3)
    table = noisy_table(task, seed, arbitrary(seed), lambda chance: 0.0)
    lazy, exact = play(task, LAZY, table), play(task, EXACT, table)
    assert (lazy.layers, lazy.evaluations) == (exact.layers, exact.evaluations)


def test_the_slack_grows_with_what_bounds_were_off_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a slack that is large enough, everyone is scored: exact."""
    monkeypatch.setattr("icsearch.search.lazy.SLACK_FACTOR", 1e12)
    task = make_task(12, 8, 6)
    table = noisy_table(task, 1, arbitrary(1), lambda chance: 0.0)
    lazy, exact = play(task, LAZY, table), play(task, EXACT, table)
    assert lazy.layers == exact.layers
    assert lazy.evaluations == exact.evaluations


def test_rescanning_every_time_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icsearch.search.lazy.RESCAN_EVERY", 1)
    task = make_task(12, 8, 6)
    table = noisy_table(task, 3, arbitrary(3), lambda chance: 0.0)
    lazy, exact = play(task, LAZY, table), play(task, EXACT, table)
    assert (lazy.layers, lazy.evaluations) == (exact.layers, exact.evaluations)
    assert any(choice.missed for choice in lazy.choices)  # and it says what it would have missed


def test_race_and_lazy_together_take_less_than_either() -> None:
    task = make_task(24, 18, 24)
    chance = random.Random(0)
    weights = [10 ** chance.uniform(-3, 0) for _ in range(24)]
    table = noisy_table(task, 0, additive(weights), lambda chance: chance.gauss(0, 0.001))
    taken = {name: play(task, Options(name), table) for name in ("exact", "race", "lazy", "race+lazy")}
    assert len({tuple(played.layers) for played in taken.values()}) == 1
    assert taken["race+lazy"].evaluations < min(taken["race"].evaluations, taken["lazy"].evaluations)
    assert any(choice.dropped and choice.stale for choice in taken["race+lazy"].choices)


NEAR = 0.002  # nats per token, between the cheap layers of `nearly_tied`


def nearly_tied(seed: int) -> Table:
    """Most layers cost nearly the same, and their order changes from pattern to pattern; three cost much more."""
    chance = random.Random(seed)
    weights = [chance.uniform(0, NEAR / 4) for _ in range(24)]
    weights[1] = weights[9] = weights[16] = 0.5
    restless = arbitrary(seed, NEAR / 4)
    return same_on_all(lambda pattern: additive(weights)(pattern) + restless(pattern))


@pytest.mark.parametrize("seed", range(6))
def test_a_tie_margin_lets_old_scores_settle_near_ties(seed: int) -> None:
    """Fewer evaluations; each settled near-tie is named, and what is lost in a step is within margin and slack."""
    task, table = make_task(24, 18, 6), nearly_tied(seed)
    plain, told = play(task, LAZY, table), play(task, Options("lazy", tie_margin=NEAR), table)
    assert told.evaluations < 0.8 * plain.evaluations
    assert any(choice.spared for choice in told.choices)
    assert not any(choice.spared for choice in plain.choices)
    assert {1, 9, 16} & set(told.layers) == set()
    assert_losses_within(task, told, table, NEAR)


def assert_losses_within(task: Task, played: Played, table: Table, margin: float) -> None:
    """In every step without a violation, the committed flip is no more than the margin dearer than the best one."""
    pattern = task.start
    for choice in played.choices:
        losses = {c: mean_loss(table(pattern.flip(c)), task.tokens) for c in (*choice.scored, *choice.stale)}
        if not choice.violations:
            assert losses[choice.layer] <= min(losses.values()) + margin
        pattern = pattern.flip(choice.layer)


def test_spared_are_those_that_lazy_alone_would_have_gone_on_to() -> None:
    """In the first step that is settled: up to there, both searches know the same."""
    task, table = make_task(24, 18, 6), nearly_tied(0)
    plain, told = play(task, LAZY, table), play(task, Options("lazy", tie_margin=NEAR), table)
    step = next(i for i, choice in enumerate(told.choices) if choice.spared)
    assert plain.layers[:step] == told.layers[:step]
    more = set(plain.choices[step].scored) - set(told.choices[step].scored)
    assert more & set(told.choices[step].spared)


@pytest.mark.parametrize("options", [LAZY, BOTH])
def test_a_margin_below_every_difference_changes_nothing(options: Options) -> None:
    task, table = make_task(24, 18, 6), same_on_all(crowded(5, 24))
    tiny_margin = Options(options.name, tie_margin=1e-15)
    assert play(task, tiny_margin, table).choices == play(task, options, table).choices
