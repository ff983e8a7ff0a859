"""Freq and offset: each engine's rule, the pair that gives a pattern, and the nearest pattern that a pair can give."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icsearch.engines.engine import ASCEND_V4, ATOM, MEGATRON, MINIMAX_M3, nearest_numbers
from icsearch.model.config import COMMON, Schedule

RULES = [COMMON, ATOM, MEGATRON, ASCEND_V4]
patterns = st.text("FS", max_size=20).map(lambda tail: "F" + tail)
schedules = st.builds(COMMON.letters, st.integers(1, 20), st.integers(1, 6), st.integers(1, 6))


def megatron(num_layers: int, freq: int, offset: int) -> str:
    """Megatron's own rule, over layer numbers from 1."""
    return "".join("S" if max(n - max(offset, 1), 0) % freq else "F" for n in range(1, num_layers + 1))


def test_each_engine_counts_in_its_own_way() -> None:
    assert COMMON.letters(7, 4) == "FFSSSFS"
    assert COMMON.letters(7, 4, 3) == "FFFSSSF"  # GLM-5.2
    assert ATOM.letters(7, 4) == "FFSSSFS"  # the same without an offset
    assert ATOM.letters(7, 4, 3) == "FFFFSSS"  # one layer later with one
    assert MEGATRON.letters(7, 4) == "FSSSFSS"  # offset 0 counts as 1
    assert MEGATRON.letters(7, 4, 3) == megatron(7, 4, 3) == "FFFSSSF"
    assert ASCEND_V4.letters(7, 4, 5) == "FFSSSFS"  # an offset is not read


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 8))
def test_megatron_from_one_and_from_zero(num_layers: int, freq: int, offset: int) -> None:
    assert MEGATRON.letters(num_layers, freq, offset) == megatron(num_layers, freq, offset)


@pytest.mark.parametrize("rule", [COMMON, ATOM, MEGATRON, MINIMAX_M3])
@given(letters=patterns | schedules)
def test_freq_and_offset_reproduce_the_pattern_or_do_not_exist(rule: Schedule, letters: str) -> None:
    pair = rule.fit(letters)
    if pair:
        assert rule.letters(len(letters), *pair) == letters
    else:
        assert letters not in expressible(rule, len(letters))


def expressible(rule: Schedule, num_layers: int) -> dict[str, tuple[int, int]]:
    """Every pattern that two numbers can give, first letter F, by the slow way: all numbers."""
    numbers = [(freq, offset) for freq in range(1, num_layers + 2) for offset in range(num_layers + 2)]
    found = {rule.letters(num_layers, *pair): pair for pair in numbers}
    return {letters: pair for letters, pair in found.items() if letters[0] == "F"}


@pytest.mark.parametrize("rule", [COMMON, ATOM, MEGATRON, MINIMAX_M3])
@given(letters=patterns)
def test_the_nearest_pattern_is_that_of_a_search_through_all(rule: Schedule, letters: str) -> None:
    nearest = rule.letters(len(letters), *nearest_numbers(rule, letters))
    distance = {
        other: sum(a != b for a, b in zip(letters, other, strict=True)) for other in expressible(rule, len(letters))
    }
    least = min(distance.values())
    assert distance[nearest] == least
    assert nearest.count("F") == max(other.count("F") for other in distance if distance[other] == least)


def test_the_default_offset_is_preferred() -> None:
    assert COMMON.fit("FFSSSFSSSF") == (4, 2)
    assert COMMON.fit("FSSSFSSSF") == (4, 1)
    assert COMMON.fit("FFFF") == (1, 2)
    assert MEGATRON.fit("FFFF") == (1, 1)
    assert ATOM.fit("FFSSSFSSSF") == (4, 1)
