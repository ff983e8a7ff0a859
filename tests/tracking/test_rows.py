"""What trackers are told: every committed flip once, by the figures of pattern.json and the journal."""

from __future__ import annotations

from pathlib import Path

from icsearch.core.pattern import Pattern
from icsearch.runs import results
from icsearch.runs.record import RunRecord
from icsearch.tracking.rows import Table, configuration, run_rows
from run_fixtures import MadeUpRun, events, write_run
from test_search import ManySequences, long_run


def test_the_rows_are_the_steps_of_the_pattern_file(tmp_path: Path) -> None:
    record = write_run(tmp_path, MadeUpRun(num_layers=8, num_shared=5))
    file = results.pattern_file(record)
    baseline, *rows = [make() for make in run_rows(record)]
    assert (baseline.step, baseline.values["loss"], baseline.values["delta"]) == (0, file.baseline_loss, 0.0)
    assert [row.step for row in rows] == [1, 2, 3, 4, 5]
    for row, step in zip(rows, file.steps, strict=True):
        expected = {"loss": step.loss, "delta": step.delta, "std_err": step.std_err, "layer": step.layer}
        pattern = Pattern(step.pattern)
        assert row.values == {**expected, "retention": pattern.retention, "full_layers": len(pattern.full_layers)}


def test_the_table_of_a_step_holds_all_its_candidates(tmp_path: Path) -> None:
    record = write_run(tmp_path, MadeUpRun(num_layers=8, num_shared=2))
    for number, make in enumerate(run_rows(record)[1:], start=1):
        table = make().table
        assert table is not None
        commit = record.commits[number - 1]
        assert [line[0] for line in table.data] == sorted(commit.candidates)
        assert [line[0] for line in table.data if line[-1] == "shared"] == [commit.layer]
        assert {line[0] for line in table.data if line[-1] == "tied"} == set(commit.ties)
        deltas = {f"candidates/layer_{line[0]}": line[3] for line in table.data}
        assert table.numbers == deltas


def test_what_a_race_gave_up_is_there_too(tmp_path: Path) -> None:
    record = long_run(tmp_path / "j", "race", ManySequences())
    dropped = [commit for commit in record.commits if commit.dropped]
    assert dropped
    for commit in dropped:
        table = run_rows(record)[commit.step]().table
        assert table is not None
        outcomes = {line[0]: line[-1] for line in table.data}
        sequences = {line[0]: line[-2] for line in table.data}
        assert {layer for layer, outcome in outcomes.items() if outcome == "dropped"} == set(commit.dropped)
        assert all(sequences[layer] < len(record.tokens) for layer in commit.dropped)


def test_a_run_without_a_baseline_has_no_rows() -> None:
    assert run_rows(RunRecord.replay(events(MadeUpRun(num_layers=6, num_shared=2))[:1])) == []


def test_markdown_of_unknown_numbers_and_bars() -> None:
    table = Table("t", ("a", "b"), (("x|y", None), ("z", 0.125)), {})
    assert table.markdown() == "| a | b |\n| --- | --- |\n| x\\|y |  |\n| z | 0.125 |"


def test_the_configuration_is_flat(tmp_path: Path) -> None:
    found = configuration(write_run(tmp_path, MadeUpRun(keep_full=(2, 3))).start)
    assert found["model_name_or_path"] == "made-up/model"
    assert all(isinstance(value, (str, int, float, bool)) for value in found.values())
    assert found["keep_full"] == "2 3"
