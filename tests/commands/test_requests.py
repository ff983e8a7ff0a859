"""Options as typed, checked before anything is loaded."""

from __future__ import annotations

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
