"""The table of summed losses: what is known of a pattern, its mean, and paired differences."""

from __future__ import annotations

import pytest

from icsearch.core.errors import JournalError
from icsearch.core.statistics import mean_loss, paired_difference
from icsearch.runs.record import LossTable

TOKENS = [10, 20, 10]


@pytest.fixture
def table() -> LossTable:
    """FFF and FSF on all three sequences, FFS on the first two, FSS on the last alone."""
    table = LossTable(TOKENS)
    table.add("FFF", 0, [10.0, 30.0])
    table.add("FFF", 2, [12.0])
    table.add("FSF", 0, [11.0, 33.0, 11.0])
    table.add("FFS", 0, [12.0, 31.0])
    table.add("FSS", 2, [13.0])
    return table


def test_it_is_a_mapping(table: LossTable) -> None:
    assert table == {
        "FFF": {0: 10.0, 1: 30.0, 2: 12.0},
        "FSF": {0: 11.0, 1: 33.0, 2: 11.0},
        "FFS": {0: 12.0, 1: 31.0},
        "FSS": {2: 13.0},
    }
    assert LossTable(TOKENS) == {}


def test_what_is_known(table: LossTable) -> None:
    assert [table.is_complete(letters) for letters in ("FFF", "FFS", "FSS", "SSS")] == [True, False, False, False]
    assert table.sums("FFF") == [10.0, 30.0, 12.0]


def test_of_all_sequences(table: LossTable) -> None:
    assert table.loss("FFF") == mean_loss([10.0, 30.0, 12.0], TOKENS)
    assert table.mean("FFF") == paired_difference([10.0, 30.0, 12.0], [0.0] * 3, TOKENS)
    assert table.difference("FSF", "FFF") == paired_difference([11.0, 33.0, 11.0], [10.0, 30.0, 12.0], TOKENS)


def test_what_is_missing_is_named(table: LossTable) -> None:
    for ask in (table.loss, table.mean, table.sums, lambda letters: table.difference("FFF", letters)):
        with pytest.raises(JournalError, match="no complete loss of FFS: continue the run first"):
            ask("FFS")
