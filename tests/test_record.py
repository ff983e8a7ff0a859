"""Journals of released versions, committed as they were written, must load for ever."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from icsearch.errors import JournalError
from icsearch.journal import Journal
from icsearch.record import RunRecord, load_run
from icsearch.report import write_results

DATA = Path(__file__).parent / "data"


def test_journal_of_version_0_1_0_loads() -> None:
    record = load_run(DATA / "journal-0.1.0")
    assert record.finished
    assert record.pattern.letters == "FSSFSS"
    assert [commit.layer for commit in record.commits] == [2, 5, 1, 4]
    assert record.loss("FFFFFF") == 7.373036933556581
    assert record.steps()[-1].loss == 7.342184239167434
    assert record.steps()[-1].std_err == 0.11383308029822703
    assert [candidate.layer for candidate in record.candidates(3)] == [1]
    assert record.cost()["candidate_evaluations"] == 6


def test_results_follow_from_the_journal_alone(tmp_path: Path) -> None:
    run = Path(shutil.copytree(DATA / "journal-0.1.0", tmp_path / "run"))
    written = write_results(run, load_run(run))
    assert {path.name for path in written} == {"pattern.json", "curve.csv", "curve.png", "report.html"}
    assert (run / "curve.csv").read_text().splitlines()[-1].startswith("4,4,4,2,")


def test_a_part_of_a_journal_is_a_run_at_work(tmp_path: Path) -> None:
    events = Journal(DATA / "journal-0.1.0" / "journal.jsonl").events()
    for length in range(1, len(events)):
        record = RunRecord.replay(events[:length])
        assert not record.finished
        assert len(record.steps()) == len(record.commits)


@pytest.mark.parametrize(
    "damage", [{"event": "dream"}, {"event": "commit"}, {"event": "losses", "sequences": [0, 2], "patterns": ["FFFFFF"]}]
)
def test_damaged_events_name_their_line(damage: dict[str, object]) -> None:
    events = Journal(DATA / "journal-0.1.0" / "journal.jsonl").events()
    with pytest.raises(JournalError, match="journal line 2 is damaged"):
        RunRecord.replay([events[0], damage])


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"holds no journal\.jsonl"):
        load_run(tmp_path)
