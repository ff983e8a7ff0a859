"""Journals of released versions, committed as they were written, must load for ever."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from icsearch.commands.requests import KERNELS, MIN_BLOCK_ELEMENTS, MOST_THREADS, OBJECTIVES, REFINEMENTS
from icsearch.core.errors import JournalError
from icsearch.core.pattern_file import load_pattern_file
from icsearch.report.write import write_results
from icsearch.runs.directory import RunDirectory
from icsearch.runs.journal import Event, Journal
from icsearch.runs.record import RunRecord, load_run
from icsearch.runs.results import cost, pattern_file
from icsearch.runs.schema import OPTION_FIELDS
from icsearch.search.registry import STRATEGIES

DATA = Path(__file__).parent.parent / "data"


def test_journal_of_version_0_1_0_loads() -> None:
    record = load_run(DATA / "journal-0.1.0")
    assert record.finished
    assert record.pattern.letters == "FSSFSS"
    assert [commit.layer for commit in record.commits] == [2, 5, 1, 4]
    assert record.loss("FFFFFF") == 7.373036933556581
    assert record.steps()[-1].loss == 7.342184239167434
    assert record.steps()[-1].std_err == 0.11383308029822703
    assert [candidate.layer for candidate in record.candidates(3)] == [1]
    assert cost(record)["candidate_evaluations"] == 6


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
    "damage",
    [{"event": "dream"}, {"event": "commit"}, {"event": "losses", "sequences": [0, 2], "patterns": ["FFFFFF"]}],
)
def test_damaged_events_name_their_line(damage: dict[str, object]) -> None:
    events = Journal(DATA / "journal-0.1.0" / "journal.jsonl").events()
    with pytest.raises(JournalError, match="journal line 2 is damaged"):
        RunRecord.replay([events[0], damage])


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"holds no journal\.jsonl"):
        load_run(tmp_path)


@pytest.mark.parametrize("name", ["none", "x" * 300, "nul\0byte", "journal-0.1.0/journal.jsonl"])
def test_paths_that_hold_no_run(name: str) -> None:
    with pytest.raises(JournalError) as caught:
        load_run(DATA / name)
    assert len(str(caught.value).splitlines()) == 1


def test_one_sequence_has_no_error_and_its_pattern_file_is_strict_json(tmp_path: Path) -> None:
    events = Journal(DATA / "journal-0.1.0" / "journal.jsonl").events()
    one = [event for event in events if event.get("sequences", [0, 2])[0] == 0]
    for event in one:
        if event["event"] == "losses":
            event |= {"sequences": [0, 1], "nll": [sums[:1] for sums in event["nll"]]}
    one[0]["tokens"] = [39]
    pattern_file(RunRecord.replay(one)).save(tmp_path / "pattern.json")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    document = json.loads((tmp_path / "pattern.json").read_text(), parse_constant=refuse)
    assert [step["std_err"] for step in document["steps"]] == [None] * 4
    assert all(math.isnan(step.std_err) for step in load_pattern_file(tmp_path / "pattern.json").steps)


# --- damaged journals: a fine replay or a JournalError that names the line -------------------------------------------


def fixture_events() -> list[Event]:
    return Journal(DATA / "journal-0.1.0" / "journal.jsonl").events()


def dp_events() -> list[Event]:
    """The fixture's start and first losses as those of a similarity baseline, with a triangle and a choice."""
    start, *losses = fixture_events()[:4]
    triangle = [[0.5 + i / 10 + j / 100 for j in range(i)] for i in range(6)]
    sums = {"cosine": triangle, "overlap": triangle, "queries": 90, "layer_sequences": 30, "seconds": 0.1}
    return [
        start,
        {"event": "similarity", "sequences": [0, 3], **sums},
        {"event": "similarity", "sequences": [3, 5], **sums},
        {"event": "chosen", "pattern": "FSSFSS", "objective": 2.5},
        *losses,
        {"event": "note", "text": "a note"},
        {"event": "finish", "pattern": "FSSFSS"},
    ]


def kascade_events() -> list[Event]:
    """The same with Kascade's score, of which the layers keep a half of layer 1's attention, and all of others'."""
    start, first, second, *rest = dp_events()
    kept = [[3 / (1 + (layer == 1))] * layer for layer in range(6)]
    more = {"kept": kept, "importance": [0.3 * layer for layer in range(6)]}
    other = {"event": "compared", "by": "kascade", "pattern": "FFFSSS", "objective": -0.5}
    return [start, {**first, **more}, {**second, **more}, rest[0], other, *rest[1:]]


def use(events: list[Event]) -> RunRecord:
    """Everything that a reader of a run asks for."""
    record = RunRecord.replay(events)
    record.steps(), cost(record), pattern_file(record), record.similarity, record.references
    for step in range(1, len(record.commits) + 2):
        record.candidates(step)
    return record


START_DAMAGE: dict[str, dict[str, Any]] = {
    "no version": {"icsearch_version": None},
    "options a list": {"options": []},
    "an option of another type": {"options": {"method": 3, "strategy": "exact", "objective": "lm-loss"}},
    "model a text": {"model": "tiny"},
    "native layers beyond the pattern": {"model": {"native_shared": [6]}},
    "calibration missing": {"calibration": None},
    "no tokens": {"tokens": []},
    "a sequence without tokens": {"tokens": [39, 39, 0, 39, 39]},
    "tokens true": {"tokens": [True] * 5},
    "tokens a number": {"tokens": 39},
    "layer indices too few": {"layer_indices": [0, 1]},
    "layer indices backwards": {"layer_indices": [5, 4, 3, 2, 1, 0]},
    "layer indices beyond the model": {"layer_indices": [0, 1, 2, 3, 4, 6]},
    "start pattern of another length": {"start_pattern": "FFFFF"},
    "start pattern begins with S": {"start_pattern": "SFFFFF"},
    "num_layers of another length": {"num_layers": 7},
    "references a list": {"references": ["FSFSFS"]},
    "a reference of another length": {"references": {"uniform:1/2": "FSFS"}},
    "decoder_layers a text": {"decoder_layers": "6"},
    "fewer decoder layers than letters": {"decoder_layers": 5},
    "blocks with a gap": {"blocks": [[0, 3], [4, 6]]},
    "blocks that end early": {"blocks": [[0, 3]]},
    "blocks numbers": {"blocks": [0, 3, 6]},
}


@pytest.mark.parametrize("case", START_DAMAGE)
def test_damaged_start_event(case: str) -> None:
    first, *rest = fixture_events()
    with pytest.raises(JournalError, match="journal line 1 is damaged"):
        RunRecord.replay([{**first, **START_DAMAGE[case]}, *rest])


EVENT_DAMAGE: dict[str, tuple[int, dict[str, Any]]] = {
    "a second start": (2, {"event": "start"}),
    "nan": (2, {"nll": [[math.nan, 1.0]] * 4}),
    "infinity": (2, {"nll": [[math.inf, 1.0]] * 4}),
    "null": (2, {"nll": [[None, 1.0]] * 4}),
    "a text": (2, {"nll": [["300.0", 1.0]] * 4}),
    "a huge integer": (2, {"nll": [[10**400, 1.0]] * 4}),
    "one sum too few": (2, {"nll": [[1.0]] * 4}),
    "one pattern too few": (2, {"nll": [[1.0, 2.0]] * 3}),
    "sequences beyond the batches": (2, {"sequences": [4, 6]}),
    "sequences backwards": (2, {"sequences": [2, 0]}),
    "negative sequences": (2, {"sequences": [-2, 0]}),
    "one number for sequences": (2, {"sequences": [2]}),
    "a pattern of another length": (2, {"patterns": ["FFFFFF", "FSFSFS", "FSSFSS", "FS"]}),
    "a later step": (2, {"step": 2}),
    "seconds a text": (2, {"seconds": "1"}),
    "weights read below zero": (2, {"weight_bytes": -1}),
    "a step out of turn": (8, {"step": 2}),
    "a layer out of range": (8, {"layer": 6}),
    "layer 0": (8, {"layer": 0}),
    "a layer that was no candidate": (8, {"layer": 5}),
    "a candidate out of range": (8, {"candidates": [1, 2, 99]}),
    "the pattern of another flip": (8, {"pattern": "FSFFFF"}),
    "a tie that was no candidate": (8, {"ties": [5]}),
}


@pytest.mark.parametrize("case", EVENT_DAMAGE)
def test_damaged_later_event(case: str) -> None:
    line, change = EVENT_DAMAGE[case]
    events = fixture_events()
    events[line - 1] = {**events[line - 1], **change}
    with pytest.raises(JournalError, match=f"journal line {line} is damaged"):
        RunRecord.replay(events)


def test_other_waves_overlap_and_weights_read_are_counted() -> None:
    """Losses of a wave that another run began in parts: the sums are those of either, the reading is that of both."""
    events = fixture_events()
    expected = RunRecord.replay(events)
    assert expected.weight_bytes.get(0, 0) == 0 and "weight_bytes" not in cost(expected)
    first, second = events[1], events[2]
    assert first["sequences"] == [0, 2] and second["sequences"] == [2, 4] and first["patterns"] == second["patterns"]
    nll = [[*one, *other] for one, other in zip(first["nll"], second["nll"], strict=True)]
    both = {**first, "sequences": [0, 4], "nll": nll, "weight_bytes": 1000}
    found = RunRecord.replay([events[0], first, both, *events[3:]])
    assert (found.nll, found.pattern, found.steps()) == (expected.nll, expected.pattern, expected.steps())
    assert found.weight_bytes[0] == 1000 and cost(found)["weight_bytes"] == 1000


def test_kascade_is_a_mean_over_sequences_times_a_mean_over_sequences() -> None:
    """The events stand for 3 and 2 sequences, but hold the same sums."""
    similarity = RunRecord.replay(kascade_events()).similarity
    assert similarity is not None
    kascade = similarity["kascade"]
    assert [len(row) for row in kascade] == [1, 2, 3, 4, 5, 6]
    assert [row[-1] for row in kascade] == pytest.approx([0.6 * layer / 5 for layer in range(6)])
    assert kascade[1][0] == pytest.approx(3 / 5 * 0.6 / 5)
    assert kascade[5][:5] == pytest.approx([6 / 5 * 0.6] * 5)


@pytest.mark.parametrize("without", [1, 2])
def test_without_the_score_of_some_sequences_there_is_none(without: int) -> None:
    """As of a run that an earlier version began."""
    events = [event for event in kascade_events() if event["event"] != "compared"]
    for name in ("kept", "importance"):
        del events[without][name]
    similarity = RunRecord.replay(events).similarity
    assert similarity is not None and "kascade" not in similarity
    events[without]["kept"] = [[0.5] * layer for layer in range(6)]
    with pytest.raises(JournalError, match=f"journal line {without + 1} is damaged .*kept and importance"):
        RunRecord.replay(events)


@pytest.mark.parametrize(("by", "words"), [("fisher", "of which nothing is known"), ("luck", "by is 'luck'")])
def test_a_pattern_by_a_measure_that_is_not_there(by: str, words: str) -> None:
    events = kascade_events()
    assert list(RunRecord.replay(events).compared) == ["kascade"]
    (at,) = (number for number, event in enumerate(events) if event["event"] == "compared")
    events[at] = {**events[at], "by": by}
    with pytest.raises(JournalError, match=f"journal line {at + 1} is damaged .*{words}"):
        RunRecord.replay(events)


def test_a_journal_that_does_not_begin_with_start() -> None:
    with pytest.raises(JournalError, match="line 1 is damaged .*expected start"):
        RunRecord.replay(fixture_events()[1:])


@pytest.mark.parametrize("make", [fixture_events, dp_events, kascade_events])
@pytest.mark.parametrize("seed", range(110))
def test_random_edits_are_replayed_or_refused(make: Callable[[], list[Event]], seed: int, tmp_path: Path) -> None:
    events, rng = make(), random.Random(seed)
    for _ in range(rng.choice([1, 1, 1, 3])):
        holder, key = rng.choice(list(places(events)))
        change(holder, key, rng)
    path = tmp_path / "journal.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    try:
        use(Journal(path).events())
    except JournalError as error:
        assert re.search(r"line \d+|no complete loss|has format", str(error))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from places(item)


def change(holder: Any, key: Any, rng: random.Random) -> None:
    """Remove a value, double it, make it one of another type, or another one of its own type."""
    others: list[Any] = [None, True, "", "FSFSFS", "x" * 50, -1, 0, 7, 10**30, 10**400, 1.5, 1e308, math.nan, [], {}]
    same: dict[type, list[Any]] = {
        int: [-1, 0, 1, 2, 99, 10**12],
        float: [-1.0, 0.0, 1e300, math.inf, -math.inf, math.nan],
        str: ["", "FSF", "SFFFFF", "FFFFFF", "FSSSSS", "\ud800", "\0"],
        list: [[], [0], [[0]], [0, 10**12], ["F"]],
        dict: [{}, {"": None}, {"uniform:1/2": 3}],
    }
    way = rng.randrange(4)
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif way == 2:
        holder[key] = rng.choice(others)
    else:
        holder[key] = rng.choice(same.get(type(holder[key]), others))


def test_the_schema_knows_every_option_that_can_be_asked_for() -> None:
    for option, values in (("strategy", STRATEGIES), ("objective", OBJECTIVES), ("refine", REFINEMENTS)):
        assert all(OPTION_FIELDS[option].fits(value) for value in values)
    assert all(OPTION_FIELDS["kernels"].fits(value) for value in KERNELS if value != "auto")
    assert OPTION_FIELDS["threads"].fits(MOST_THREADS)
    least = OPTION_FIELDS["block_elements"]
    assert least.fits(MIN_BLOCK_ELEMENTS) and not least.fits(MIN_BLOCK_ELEMENTS - 1)


@pytest.mark.parametrize("name", ["race", "lazy", "race+lazy"])
def test_a_run_of_a_strategy_that_is_no_more_is_refused_with_who_can_read_it(tmp_path: Path, name: str) -> None:
    """By a report, and by a search that would go on with it: one line that names the version."""
    start = {**fixture_events()[0], "options": {**fixture_events()[0]["options"], "strategy": name, "confidence": 0.95}}
    Journal(tmp_path / "journal.jsonl").append(start)
    for read in (lambda: load_run(tmp_path), RunDirectory(tmp_path).existing):
        with pytest.raises(JournalError) as caught:
            read()
        line = str(caught.value)
        assert f"a search with --strategy {name}" in line and "icsearch 0.1.0" in line and str(tmp_path) in line
        assert "\n" not in line and caught.value.exit_status == 2
