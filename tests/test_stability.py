"""Kendall's tau of the stability benchmark, on orders whose value is known."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "stability.py"
spec = importlib.util.spec_from_file_location("stability", SCRIPT)
assert spec is not None
assert spec.loader is not None
stability = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stability)


@pytest.mark.parametrize(
    ("second", "tau"),
    [
        ([1.0, 2.0, 3.0, 4.0], 1.0),
        ([4.0, 3.0, 2.0, 1.0], -1.0),
        ([2.0, 1.0, 4.0, 3.0], 1 / 3),  # two of six pairs reversed
        ([1.0, 1.0, 3.0, 4.0], 5 / 30**0.5),  # one tie
    ],
)
def test_kendall_tau(second: list[float], tau: float) -> None:
    assert stability.kendall_tau([1.0, 2.0, 3.0, 4.0], second) == pytest.approx(tau)
