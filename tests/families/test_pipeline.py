"""Two processes, each with half of the layers: the bits of one."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_batches import Made
from test_commands import fixed, pattern_of

import tiny_families
from icsearch.cli import app
from several import launched, torchrun

pytestmark = pytest.mark.alone


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(tiny_families.CONFIGS))
def test_a_pipeline_of_two(made: Made, tokens: Path, tmp_path: Path, family: str) -> None:
    """Hidden states of several streams, selections of every form, and token ids go, or come, where they are needed."""
    options = ["--num-shared", 2, "--stages", 1]
    alone = ["greedy", *fixed(made(family), tokens, tmp_path / "alone", *options)]
    assert app._run([str(one) for one in alone], debug=False) == 0
    result = launched(torchrun(2), ["greedy", *fixed(made(family), tokens, tmp_path / "two", *options, "--pp", 2)])
    assert result.returncode == 0, result.stderr
    found, expected = pattern_of(tmp_path / "two"), pattern_of(tmp_path / "alone")
    assert found["steps"] == expected["steps"]
    assert found["baseline_loss"] == expected["baseline_loss"]
