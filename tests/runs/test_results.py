"""What a run cost, from its record."""

from __future__ import annotations

from icsearch.runs.record import RunRecord
from icsearch.runs.results import cost
from run_fixtures import MadeUpRun, events


def test_layers_are_counted_in_whole_numbers() -> None:
    """Also where an interrupted run has begun some sequences anew, and not the others."""
    told = events(MadeUpRun())
    whole = cost(RunRecord.replay(told))
    losses = [event for event in told if event["event"] == "losses"]
    assert whole["layer_sequences"] == sum(event["layer_sequences"] for event in losses)
    losses[-1]["layer_sequences"] += 1
    again = cost(RunRecord.replay(told))
    assert isinstance(again["layer_evaluations"], int)
    assert again["layer_sequences"] == whole["layer_sequences"] + 1
    assert again["layer_evaluations"] == whole["layer_evaluations"]
