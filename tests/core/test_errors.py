"""What another library's error says, within a line of ours."""

from __future__ import annotations

import pytest

from icsearch.core.text import MAX_SAID, did_you_mean, first_line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no such file", "no such file"),
        ("\n  first \nsecond", "first"),
        ("Class validation error:\n    layers do not fit\nmore", "Class validation error: layers do not fit"),
        ("ends in a colon:", "ends in a colon:"),
        ("", "ValueError"),
        ("x" * 500, "x" * (MAX_SAID - 3) + "..."),
        ("x" * (MAX_SAID - 8) + " offline_mode", "x" * (MAX_SAID - 8) + "..."),
        ("x" * (MAX_SAID - 3) + " end", "x" * (MAX_SAID - 3) + "..."),
        ("no " + "x" * 500, "no " + "x" * (MAX_SAID - 6) + "..."),
    ],
)
def test_the_first_line_that_says_something(text: str, said: str) -> None:
    assert first_line(ValueError(text)) == said


@pytest.mark.parametrize(
    ("name", "names", "meant"),
    [
        ("exat", ("exact", "counting"), "did you mean exact? "),
        ("vlm", ("vllm", "sglang"), "did you mean vllm? "),
        ("tgi", ("vllm", "sglang"), ""),
        ("", ("vllm",), ""),
    ],
)
def test_what_was_probably_meant(name: str, names: tuple[str, ...], meant: str) -> None:
    assert did_you_mean(name, names) == meant
    assert did_you_mean(f"A_{name}", [f"A_{known}" for known in names], "A_") == meant.replace("mean ", "mean A_")
