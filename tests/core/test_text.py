"""Sizes as typed, and for people."""

from __future__ import annotations

import pytest

from icsearch.core.errors import IcsearchError
from icsearch.core.text import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("1000", 1000), ("2K", 2000), ("3B", 3)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "8 apples", "0", "1e9", "8GBB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(IcsearchError, match="is not a size"):
        parse_bytes(text)


def test_sizes_for_people() -> None:
    assert [format_bytes(n) for n in (5, 1234, 2_500_000, 18 * 10**9, 7 * 10**12)] == [
        "5 B",
        "1.2 kB",
        "2.5 MB",
        "18.0 GB",
        "7.0 TB",
    ]
