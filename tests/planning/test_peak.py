"""The plan's peak against what a search really takes, in a process of its own. No time is measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import checkpoints  # noqa: E402
import fisher_memory  # noqa: E402
from measuring import run_child  # noqa: E402

pytestmark = pytest.mark.alone


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read as Linux counts it")
def test_the_peak_is_predicted_within_a_fifth(tmp_path: Path) -> None:
    """Mostly a layer call with wide experts, so that it is the plan's formula that is tested and not the program."""
    sizes = {"hidden_size": 768, "moe_intermediate_size": 512, "n_routed_experts": 8, "num_experts_per_tok": 8}
    model = checkpoints.random_checkpoint(tmp_path / "model", layers=2, **sizes)
    tokens = checkpoints.random_tokens(tmp_path / "tokens", 1, 4096, checkpoints.SIZES["vocab_size"])
    spec = {"model": str(model), "tokens": str(tokens), "out": str(tmp_path / "run"), "batch_size": 1, "memory": None}
    found = run_child("memory.py", spec, threads=1)
    above = [found[name] - found["program_bytes"] for name in ("planned_bytes", "measured_bytes")]
    assert above[1] > 300e6  # it is no empty statement
    assert found["planned_bytes"] == pytest.approx(found["measured_bytes"], rel=0.2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read as Linux counts it")
@pytest.mark.parametrize("place", ["device", "disk"])
def test_the_peak_of_a_table_is_predicted_within_a_fifth(tmp_path: Path, place: str) -> None:
    """Of few layers on a long sequence; with so little memory that the entries are on disk, too."""
    spec = fisher_memory.spec_of("16384:1:1:32:4", None, tmp_path)
    found = run_child("fisher_memory.py", spec, threads=1)
    if place == "disk":
        working = int(found["table_bytes"])
        found = run_child("fisher_memory.py", {**spec, "memory": working}, threads=1)
    assert found["place"] == place
    assert found["measured_bytes"] - found["loaded_bytes"] > 100e6  # it is no empty statement
    assert found["planned_bytes"] == pytest.approx(found["measured_bytes"], rel=0.2)
