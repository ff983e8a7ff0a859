"""Losses and paired errors against textbook formulas."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icsearch.core.statistics import (
    Difference,
    mean_loss,
    paired_difference,
    project,
    student_tail,
    wilson_interval,
)

TOKENS = [10, 10, 10, 10]


def test_equal_lengths_give_the_standard_error_of_the_mean() -> None:
    nll, reference = [25.0, 31.0, 28.0, 40.0], [24.0, 29.0, 28.5, 35.0]
    found = paired_difference(nll, reference, TOKENS)
    per_sequence = [(a - b) / 10 for a, b in zip(nll, reference, strict=True)]
    assert found.delta == pytest.approx(statistics.mean(per_sequence))
    assert found.std_err == pytest.approx(statistics.stdev(per_sequence) / math.sqrt(4))


def test_unequal_lengths_weigh_by_tokens() -> None:
    """A difference in proportion to length is the same per token everywhere, so it has no error."""
    tokens = [5, 10, 20]
    found = paired_difference([t * 1.5 for t in tokens], [t * 1.0 for t in tokens], tokens)
    assert found.delta == pytest.approx(0.5)
    assert found.std_err == pytest.approx(0.0, abs=1e-12)


def test_identical_losses() -> None:
    assert paired_difference([1.0, 2.0], [1.0, 2.0], [3, 4]) == Difference(0.0, 0.0)
    assert Difference(0.0, 0.0).is_tie


def test_one_sequence_has_no_error_and_decides_nothing() -> None:
    found = paired_difference([2.0], [1.0], [4])
    assert found.delta == 0.25
    assert math.isnan(found.std_err)
    assert found.is_tie


def test_tie_is_within_one_standard_error() -> None:
    assert Difference(0.1, 0.1).is_tie
    assert not Difference(-0.2, 0.1).is_tie


def test_mean_loss() -> None:
    assert mean_loss([10.0, 20.0], [5, 10]) == 2.0


@pytest.mark.parametrize(
    ("degrees", "t", "tail"),
    [
        (1, 12.706204736, 0.025),
        (4, 8.610301581, 0.0005),
        (5, 2.015048373, 0.05),
        (7, 4.785289629, 0.001),
        (10, 2.228138852, 0.025),
        (30, 2.457261542, 0.01),
        (120, 3.373453740, 0.0005),
    ],
)
def test_students_tail_is_that_of_the_tables(degrees: int, t: float, tail: float) -> None:
    assert student_tail(t, degrees) == pytest.approx(tail, rel=1e-6)


@given(st.floats(0, 1e6))
def test_students_tail_of_one_and_two_degrees_has_a_closed_form(t: float) -> None:
    assert student_tail(t, 1) == pytest.approx(math.atan2(1, t) / math.pi, rel=1e-9)
    root = math.sqrt(2 + t * t)
    assert student_tail(t, 2) == pytest.approx(1 / (root * (root + t)), rel=1e-9)


@given(st.floats(0.5, 500), st.floats(0, 50))
def test_students_tail_falls_with_t_and_with_the_degrees(degrees: float, t: float) -> None:
    assert student_tail(0.0, degrees) == 0.5
    assert 0.5 >= student_tail(t, degrees) >= student_tail(t + 0.1, degrees) > 0
    assert student_tail(t, degrees) >= student_tail(t, degrees + 1) * (1 - 1e-9)


def test_many_degrees_are_the_normal_distribution() -> None:
    tail = 1 - statistics.NormalDist().cdf(2.0)
    assert student_tail(2.0, 10**6) == pytest.approx(tail, rel=1e-4)


def test_a_projection_of_equal_lengths_has_the_finite_populations_error() -> None:
    differences = [1.0, 3.0, -0.5, 5.0, 2.0, 0.0]
    found = project(differences, [10] * 24)
    whole = paired_difference(differences, [0.0] * 6, [10] * 6)
    assert found.delta == pytest.approx(whole.delta)
    assert found.std_err == pytest.approx(whole.std_err * math.sqrt(1 - 6 / 24))
    assert found.degrees == pytest.approx(5)


def test_a_projection_of_everything_is_the_difference() -> None:
    differences, tokens = [1.0, 3.0, -0.5], [4, 9, 2]
    found = project(differences, tokens)
    assert found.delta == pytest.approx(sum(differences) / sum(tokens))
    assert found.std_err == 0


def test_what_is_left_counts_by_its_length() -> None:
    """The longer the sequences left are, the less is known; and one long sequence among many short is no sample."""
    differences = [10.0, 12.0, 9.0, 11.0, 8.0]
    short, long = (project(differences, [10] * 5 + [left] * 5) for left in (10, 100))
    assert long.std_err > 1.5 * short.std_err
    assert project(differences, [10, 10, 10, 10, 1000, 10]).degrees < 0.1
    assert math.isnan(project([1.0], [10, 10]).std_err)


def test_the_error_of_a_projection_is_the_one_seen() -> None:
    """Over many tables of uneven lengths, projections are off by their standard error."""
    chance = random.Random(0)
    ratios = []
    for _ in range(400):
        tokens = chance.choices([10, 20, 40], k=30)
        differences = [t * chance.gauss(1, 0.5) for t in tokens]
        found = project(differences[:15], tokens)
        ratios.append((found.delta - sum(differences) / sum(tokens)) / found.std_err)
    assert 0.9 < statistics.pstdev(ratios) < 1.25


def test_wilsons_interval_against_published_values() -> None:
    """Newcombe 1998, Table I: 81 of 263, 15 of 148, 0 of 20."""
    for hits, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson_interval(hits, total) == pytest.approx((low, high), abs=5e-5)
