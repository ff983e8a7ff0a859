"""The swaps refinement on made-up losses: it sees sums per sequence, never a model."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import Difference, mean_loss, paired_difference
from icsearch.search.swaps import (
    MAX_SWAPS,
    Decided,
    Judged,
    Outcome,
    Question,
    Swaps,
    confirms,
    in_order,
    moves_of,
    qualifies,
)

TOKENS = [10, 12, 9, 11, 10, 13]
HELDOUT = [11, 10, 12, 9, 14]

# Summed loss of one sequence: (letters, set, sequence, tokens).
Table = Callable[[str, bool, int, int], float]


def sums_of(table: Table, letters: str, heldout: bool) -> list[float]:
    tokens = HELDOUT if heldout else TOKENS
    return [table(letters, heldout, sequence, count) for sequence, count in enumerate(tokens)]


def loss_of(table: Table, letters: str, heldout: bool) -> float:
    return mean_loss(sums_of(table, letters, heldout), HELDOUT if heldout else TOKENS)


def by_pattern(calibration: dict[str, float], heldout: dict[str, float] | None = None, noise: float = 1e-3) -> Table:
    """A loss for each pattern, with noise that every pattern has its own of; a pattern not named costs 9."""

    def table(letters: str, on_heldout: bool, sequence: int, tokens: int) -> float:
        losses = heldout if on_heldout and heldout is not None else calibration
        own = random.Random(f"{letters}/{on_heldout}/{sequence}").gauss(0, noise)
        return (losses.get(letters, 9.0) + own) * tokens

    return table


def swaps(
    start: str, fixed: frozenset[int] = frozenset(), native: frozenset[int] = frozenset(), **costs: float
) -> Swaps:
    return Swaps(Pattern(start), fixed, native, TOKENS, HELDOUT, {int(k[1:]): v for k, v in costs.items()})


def play(refiner: Swaps, table: Table) -> list[tuple[Question, Outcome]]:
    found = []
    while question := refiner.ask():
        sums = {p.letters: sums_of(table, p.letters, question.heldout) for p in question.patterns}
        found.append((question, refiner.tell(sums)))
    return found


def greedy(num_layers: int, flips: int, table: Table) -> Pattern:
    """Algorithm 1 of the paper."""
    pattern = Pattern.full(num_layers)
    for _ in range(flips):
        candidates = [pattern.flip(layer) for layer in pattern.full_layers[1:]]
        pattern = min(candidates, key=lambda candidate: loss_of(table, candidate.letters, False))
    return pattern


# The cheapest single flip, of layer 1, is in no good pair: greedy cannot take it back, one exchange can.
STUCK = {"FFFF": 1.0, "FSFF": 1.01, "FFSF": 1.02, "FFFS": 1.03, "FSSF": 1.5, "FSFS": 1.5, "FFSS": 1.05}


def test_one_swap_mends_where_greedy_is_stuck() -> None:
    table = by_pattern(STUCK)
    start = greedy(4, 2, table)
    assert start.letters in ("FSSF", "FSFS")
    refiner = swaps(start.letters)
    told = play(refiner, table)
    assert refiner.pattern.letters == "FFSS" == min((p for p in STUCK if p.count("S") == 2), key=STUCK.__getitem__)
    made = [outcome for _, outcome in told if isinstance(outcome, Decided) and outcome.made]
    assert [(one.before, one.move.letters) for one in made] == [(start.letters, "FFSS")]


def test_a_swap_that_overfits_is_refused() -> None:
    """Better on the calibration sequences, worse on the held-out ones."""
    refiner = swaps("FSSF")
    told = play(refiner, by_pattern(STUCK, {**STUCK, "FFSS": 1.6, "FSFS": 1.7}))
    assert refiner.pattern.letters == "FSSF"
    decided = [outcome for _, outcome in told if isinstance(outcome, Decided)]
    assert [(one.move.letters, one.made) for one in decided] == [("FFSS", False)]
    assert decided[0].difference.delta < 0 < decided[0].heldout.delta


def test_the_next_best_move_is_tried_where_the_best_is_refused() -> None:
    calibration = {"FFSSS": 1.5, "FSFSS": 1.1, "FSSFS": 1.2, "FSSSF": 1.3}
    table = by_pattern(calibration, {**calibration, "FSFSS": 1.6, "FSSFS": 1.4})
    refiner = swaps("FFSSS")
    decided = [outcome for _, outcome in play(refiner, table) if isinstance(outcome, Decided)]
    assert [(one.before, one.move.letters, one.made) for one in decided] == [
        ("FFSSS", "FSFSS", False),
        ("FFSSS", "FSSFS", True),
        ("FSSFS", "FSFSS", False),
    ]
    assert refiner.pattern.letters == "FSSFS"


def test_within_the_noise_nothing_is_made() -> None:
    """A gain of one standard error on the calibration sequences does not qualify, whatever the held-out ones say."""
    refiner = swaps("FFSS")

    def noisy(letters: str, heldout: bool, sequence: int, tokens: int) -> float:
        start, sign = letters == "FFSS", (-1) ** sequence
        return tokens * (1.0 if start else 0.5 if heldout else 0.98 + 0.1 * sign)

    told = play(refiner, noisy)
    assert refiner.pattern.letters == "FFSS"
    assert not any(question.heldout for question, _ in told)


def test_shifts_come_first_and_exchanges_only_where_none_is_made() -> None:
    table = by_pattern({"FFSSSSSS": 1.5, "FSSFSSSS": 1.2, "FSSSSSSF": 1.0, "FSSFSSSF": 0.5})
    refiner = swaps("FFSSSSSS")
    told = play(refiner, table)
    asked = [[p.letters for p in question.patterns] for question, _ in told]
    assert asked[0] == ["FFSSSSSS", "FSFSSSSS", "FSSFSSSS"]
    assert asked[1] == ["FFSSSSSS", "FSSFSSSS"]
    assert refiner.pattern.letters == "FSSSSSSF"
    assert [outcome.before for _, outcome in told if isinstance(outcome, Decided)] == ["FFSSSSSS", "FSSFSSSS"]


def test_order_by_promise() -> None:
    """Behind the shifts: the F layer that is missed least goes to the S layer that is missed most."""
    moves = moves_of(Pattern("FFSSSSSFS"), frozenset(), frozenset())
    groups = in_order(moves, {1: 0.5, 7: 0.1, 4: 0.2, 5: 0.9, 2: 0.3, 3: 0.0, 6: 0.0}, 4)
    shifts = [(1, 2), (7, 6), (7, 8), (1, 3), (7, 5)]
    assert [(move.from_layer, move.to_layer) for move in groups[0]] == shifts
    assert [(move.from_layer, move.to_layer) for move in groups[1]] == [(1, 5), (7, 2), (7, 4), (7, 3)]
    assert [len(group) for group in groups] == [5, 4, 3]
    assert sorted(m.letters for g in groups for m in g) == sorted(m.letters for m in moves)


@given(st.integers(0, 10**6), st.integers(2, 9), st.data())
def test_moves_are_all_exchanges_that_may_be(seed: int, num_layers: int, data: st.DataObject) -> None:
    rng = random.Random(seed)
    pattern = Pattern("F" + "".join(rng.choice("FS") for _ in range(num_layers - 1)))
    fixed = frozenset(data.draw(st.sets(st.sampled_from(pattern.full_layers))))
    native = frozenset(data.draw(st.sets(st.sampled_from(pattern.shared_layers)))) if "S" in pattern.letters else fixed
    found = {move.letters for move in moves_of(pattern, fixed, native - fixed)}
    expected = set()
    for letters in range(2**num_layers):
        other = f"{letters:0{num_layers}b}".replace("1", "F").replace("0", "S")
        changed = [i for i in range(num_layers) if other[i] != pattern.letters[i]]
        gone = [i for i in changed if pattern.is_full(i)]
        new = [i for i in changed if not pattern.is_full(i)]
        if len(gone) == len(new) == 1 and gone[0] not in fixed | {0} and new[0] not in native - fixed:
            expected.add(other)
    assert found == expected


def test_layers_that_stay() -> None:
    """Layer 0, kept layers and stages' first layers keep their indexer; native S layers have none to give them."""

    def table(letters: str, heldout: bool, sequence: int, tokens: int) -> float:
        return tokens * random.Random(letters).random()

    for start in ("FFSFSSFSSF", "FSSFSSFSFS"):
        refiner = swaps(start, fixed=frozenset({3, 6}), native=frozenset({4, 5}))
        told = play(refiner, table)
        asked = {p for question, _ in told for p in question.patterns}
        assert len(asked) >= 5
        assert all(p.is_full(0) and p.is_full(3) and p.is_full(6) for p in asked)
        assert not any(p.is_full(4) or p.is_full(5) for p in asked)
        assert {len(p.full_layers) for p in asked} == {start.count("F")}


@pytest.mark.parametrize("start", ["F", "FSSS", "FFFF"])
def test_nothing_to_move(start: str) -> None:
    assert swaps(start).ask() is None


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.0, 0.3), st.floats(0.0, 1.0))
def test_never_worse_on_either_set_and_it_ends(seed: int, noise: float, agreement: float) -> None:
    """Over random tables, with held-out losses that agree with the others a lot, a little, or not at all."""

    def table(letters: str, heldout: bool, sequence: int, tokens: int) -> float:
        shared = random.Random(f"{seed}/{letters}").random()
        other = random.Random(f"{seed}/{letters}/{heldout}").random()
        own = random.Random(f"{seed}/{letters}/{heldout}/{sequence}").gauss(0, noise)
        return tokens * (2 + agreement * shared + (1 - agreement) * other + own)

    rng = random.Random(seed)
    start = Pattern("F" + "".join(rng.sample("FF" + "SSSSS", 7)))
    refiner = Swaps(start, frozenset(), frozenset(), TOKENS, HELDOUT, {})
    told = play(refiner, table)
    path = [start.letters, *(o.move.letters for _, o in told if isinstance(o, Decided) and o.made)]
    assert path[-1] == refiner.pattern.letters
    assert len(set(path)) == len(path) == refiner.swaps + 1
    for heldout in (False, True):
        losses = [loss_of(table, letters, heldout) for letters in path]
        assert losses == sorted(losses, reverse=True)
        assert len(set(losses)) == len(losses)
        tokens = HELDOUT if heldout else TOKENS
        whole = paired_difference(sums_of(table, path[-1], heldout), sums_of(table, path[0], heldout), tokens)
        assert whole.delta < 0 or len(path) == 1
    last = [move for _, outcome in told for move in _tried_of(outcome) if outcome.before == path[-1]]
    if refiner.swaps < MAX_SWAPS:  # every move of the last pattern was scored, once
        assert sorted(last) == sorted(m.letters for m in moves_of(refiner.pattern, frozenset(), frozenset()))


def _tried_of(outcome: Outcome) -> list[str]:
    return [move.letters for move in outcome.moves] if isinstance(outcome, Judged) else []


def test_it_ends_after_so_many_swaps() -> None:
    """A table in which every move of the one free F layer to the right gains."""

    def table(letters: str, heldout: bool, sequence: int, tokens: int) -> float:
        return tokens * (1000.0 - letters.rindex("F"))

    refiner = swaps("FF" + "S" * 3 * MAX_SWAPS)
    play(refiner, table)
    assert refiner.swaps == MAX_SWAPS
    assert refiner.ask() is None


def test_the_tests_of_a_move() -> None:
    nan = float("nan")
    assert qualifies(Difference(-0.21, 0.1)) and not qualifies(Difference(-0.2, 0.1))
    assert confirms(Difference(-0.11, 0.1)) and not confirms(Difference(-0.1, 0.1))
    assert not any(test(Difference(delta, nan)) for test in (qualifies, confirms) for delta in (-1.0, 0.0, 1.0))
    assert not any(test(Difference(0.0, 0.0)) for test in (qualifies, confirms))
