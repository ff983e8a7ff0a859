"""The journal: whole events or none, whatever byte a process dies at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icsearch.core.errors import JournalError
from icsearch.runs.journal import JOURNAL_FORMAT, Event, Journal

START: Event = {"event": "start", "format": JOURNAL_FORMAT}


def written(path: Path, events: list[Event]) -> Journal:
    journal = Journal(path)
    for event in events:
        journal.append(event)
    return journal


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-308, 302.57669830322266, -0.0, 5e-324]
    events = [START, {"event": "losses", "nll": [values], "text": "ünïcode \n newline"}]
    found = written(tmp_path / "j", events).events()
    assert found == events
    assert [value.hex() for value in found[1]["nll"][0]] == [value.hex() for value in values]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400), extra=st.integers(1, 3))
def test_cut_at_any_byte_then_continued(tmp_path_factory: pytest.TempPathFactory, cut: int, extra: int) -> None:
    events = [START, *({"event": "note", "text": "x" * 20 * i} for i in range(5))]
    path = tmp_path_factory.mktemp("cut") / "journal.jsonl"
    journal = written(path, events)
    data = path.read_bytes()
    kept = data[: min(cut, len(data))]
    path.write_bytes(kept)
    whole = kept.count(b"\n")
    assert journal.events() == events[:whole]
    assert journal.exists() == (whole > 0)
    if whole == 0:
        journal.append(START)
        whole = 1
    for number in range(extra):
        journal.append({"event": "note", "text": str(number)})
    assert len(journal.events()) == whole + extra


def test_torn_tail_longer_than_a_block(tmp_path: Path) -> None:
    journal = written(tmp_path / "j", [START])
    with open(tmp_path / "j", "ab") as file:
        file.write(b'{"event":"note","text":"' + b"y" * 200_000)
    journal.append({"event": "note", "text": "z"})
    assert journal.events() == [START, {"event": "note", "text": "z"}]


@settings(max_examples=60, deadline=None)
@given(first=st.integers(0, 400), size=st.integers(1, 60), ended=st.booleans())
def test_zeros_in_the_last_event(tmp_path_factory: pytest.TempPathFactory, first: int, size: int, ended: bool) -> None:
    """What some file systems leave of an event in flight after a power cut: its length, and zeros for a part of it."""
    events = [START, {"event": "note", "text": "x" * 30}, {"event": "note", "text": "y" * 200}]
    path = tmp_path_factory.mktemp("zeros") / "journal.jsonl"
    journal = written(path, events)
    data = bytearray(path.read_bytes())
    begin = data.index(b"y" * 200) - len('{"event":"note","text":"')
    place = min(begin + first, len(data) - 1 - size)
    data[place : place + size] = bytes(size)
    path.write_bytes(data if ended else data[:-1])
    assert journal.events() == events[:2]
    journal.append({"event": "note", "text": "z"})
    assert journal.events() == [*events[:2], {"event": "note", "text": "z"}]
    assert b"\0" not in path.read_bytes()


def test_zeros_in_the_first_event_are_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(bytes(50) + b'"}\n')
    assert not Journal(path).exists()
    Journal(path).append(START)
    assert Journal(path).events() == [START]


def test_zeros_before_the_last_event_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = written(path, [START, {"event": "note", "text": "x"}, {"event": "note", "text": "y"}])
    path.write_bytes(path.read_bytes().replace(b"x", b"\0"))
    with pytest.raises(JournalError, match="damaged at line 2"):
        journal.events()


def test_nan_is_never_written(tmp_path: Path) -> None:
    journal = written(tmp_path / "j", [START])
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.append({"event": "losses", "nll": [float("nan")]})
    assert journal.events() == [START]


@pytest.mark.parametrize("line", [b"garbage", b"[]", b'{"no": "event"}', b"\xff"])
def test_damage_in_the_middle_names_the_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "j"
    written(path, [START])
    with open(path, "ab") as file:
        file.write(line + b"\n" + json.dumps({"event": "note", "text": ""}).encode() + b"\n")
    with pytest.raises(JournalError, match="damaged at line 2"):
        Journal(path).events()


def test_unknown_version_is_refused(tmp_path: Path) -> None:
    journal = written(tmp_path / "j", [{**START, "format": "icsearch.journal/2"}])
    with pytest.raises(JournalError, match="icsearch.journal/2"):
        journal.events()


def test_no_journal(tmp_path: Path) -> None:
    assert not Journal(tmp_path / "none").exists()
    with pytest.raises(JournalError, match="cannot read"):
        Journal(tmp_path / "none").events()


def test_a_first_event_of_any_length_counts(tmp_path: Path) -> None:
    journal = written(tmp_path / "j", [{**START, "tokens": [2047] * 300_000}])
    assert (tmp_path / "j").stat().st_size > 1_000_000
    assert journal.exists()


def test_a_directory_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").mkdir()
    for use in (Journal.exists, Journal.events):
        with pytest.raises(JournalError, match=r"journal\.jsonl: Is a directory"):
            use(Journal(tmp_path / "journal.jsonl"))


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"event":"losses","nll":[NaN]}', b'{"event":' + b"1" * 5000 + b"}"])
def test_what_python_reads_or_fails_on_is_damage_too(tmp_path: Path, line: bytes) -> None:
    journal = written(tmp_path / "j", [START])
    with open(tmp_path / "j", "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(JournalError, match="damaged at line 2"):
        journal.events()
