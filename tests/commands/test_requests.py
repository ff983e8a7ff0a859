"""Options as typed, checked before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from icsearch.commands.requests import CalibrationRequest, GreedyRequest, read_layers
from icsearch.core.errors import IcsearchError


def test_lists_of_layers() -> None:
    assert read_layers("0, 5,9,") == {0, 5, 9}
    assert read_layers("") == frozenset()


@pytest.mark.parametrize("text", ["1,x", "-1", "1.5", "²", "0," + "9" * 5000])
def test_bad_lists_of_layers(text: str) -> None:
    with pytest.raises(IcsearchError, match="--keep-full has .*expected layer numbers") as caught:
        read_layers(text)
    assert len(str(caught.value)) < 200


def greedy(**more: Any) -> GreedyRequest:
    return GreedyRequest(CalibrationRequest("demo", "demo"), Path("out"), **more)


def test_a_run_records_what_its_race_was_told_and_nothing_where_there_is_none() -> None:
    assert greedy().race_options == {}
    assert greedy(strategy="lazy").race_options == {}
    assert greedy(strategy="race").race_options == {"confidence": 0.95}
    assert greedy(strategy="lazy", tie_margin=0.001).race_options == {"tie_margin": 0.001}
    told = greedy(strategy="race+lazy", confidence=0.9, tie_margin=0.001).race_options
    assert told == {"confidence": 0.9, "tie_margin": 0.001}


@pytest.mark.parametrize("confidence", [0.5, 1.0, 0.0, -1.0, 95.0, math.nan, math.inf])
def test_confidence_out_of_range(confidence: float) -> None:
    with pytest.raises(IcsearchError, match="between 0.5 and 1"):
        greedy(strategy="race", confidence=confidence)


@pytest.mark.parametrize("margin", [0.0, -0.1, math.nan, math.inf])
def test_tie_margin_out_of_range(margin: float) -> None:
    with pytest.raises(IcsearchError, match="nats per token above 0"):
        greedy(strategy="race", tie_margin=margin)


@pytest.mark.parametrize("strategy", ["exact", "lazy"])
def test_a_confidence_without_a_race(strategy: str) -> None:
    with pytest.raises(IcsearchError, match="belongs to a race"):
        greedy(strategy=strategy, confidence=0.9)


def test_exact_leaves_no_near_ties_to_settle() -> None:
    with pytest.raises(IcsearchError, match="exact leaves none open"):
        greedy(tie_margin=0.9)
