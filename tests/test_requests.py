"""Options as typed, checked before anything is loaded."""

from __future__ import annotations

import pytest

from icsearch.errors import IcsearchError
from icsearch.requests import parse_layers


def test_lists_of_layers() -> None:
    assert parse_layers("0, 5,9,", "--keep-full") == {0, 5, 9}
    assert parse_layers("", "--keep-full") == frozenset()


@pytest.mark.parametrize("text", ["1,x", "-1", "1.5", "²", "0," + "9" * 5000])
def test_bad_lists_of_layers(text: str) -> None:
    with pytest.raises(IcsearchError, match="--keep-full has .*expected layer numbers") as caught:
        parse_layers(text, "--keep-full")
    assert len(str(caught.value)) < 200
