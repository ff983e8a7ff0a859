"""Losses and paired errors against textbook formulas."""

from __future__ import annotations

import math
import statistics

import pytest

from icsearch.core.statistics import (
    Difference,
    mean_loss,
    paired_difference,
    rank_correlation,
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


def test_wilsons_interval_against_published_values() -> None:
    """Newcombe 1998, Table I: 81 of 263, 15 of 148, 0 of 20."""
    for hits, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson_interval(hits, total) == pytest.approx((low, high), abs=5e-5)


def test_rank_correlation_against_a_textbook_example() -> None:
    """Ten people's IQ and hours of television: 1 - 6 * 194 / 990; the order alone counts, whatever its scale."""
    iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    assert rank_correlation(iq, hours) == pytest.approx(1 - 6 * 194 / 990)
    assert rank_correlation(iq, [math.exp(value) for value in hours]) == rank_correlation(iq, hours)
    assert rank_correlation(iq, iq) == pytest.approx(1) and rank_correlation(iq, [-x for x in iq]) == pytest.approx(-1)


def test_equal_values_share_their_ranks() -> None:
    """Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5."""
    assert rank_correlation([0, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3])) and math.isnan(rank_correlation([1], [1]))
