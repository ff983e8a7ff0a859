"""What another library's error says, within a line of ours."""

from __future__ import annotations

import pytest

from icsearch.errors import MAX_SAID, first_line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no such file", "no such file"),
        ("\n  first \nsecond", "first"),
        ("Class validation error:\n    layers do not fit\nmore", "Class validation error: layers do not fit"),
        ("ends in a colon:", "ends in a colon:"),
        ("", "ValueError"),
        ("x" * 500, "x" * (MAX_SAID - 3) + "..."),
    ],
)
def test_the_first_line_that_says_something(text: str, said: str) -> None:
    assert first_line(ValueError(text)) == said
