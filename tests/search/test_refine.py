"""The refinement loop with made-up scorers: journal, resume and refusal, without a model."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_record import change, places

from icsearch.commands.progress import Quiet
from icsearch.core.errors import JournalError, PatternError
from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import PatternFile, load_pattern_file
from icsearch.report.terminal import summary_table
from icsearch.report.write import write_results
from icsearch.runs.journal import JOURNAL_FORMAT, Event, Journal
from icsearch.runs.record import RunRecord
from icsearch.runs.results import cost, pattern_file
from icsearch.search.loop import Scores, Scoring, make_swaps, run_refinement, run_search
from icsearch.search.protocol import SearchTask, Strategy
from icsearch.search.registry import make_strategy

LAYERS, TOKENS, HELDOUT, FLIPS = 8, [10] * 5, [10, 12, 9], 5


class Killed(Exception):
    """Stands for the end of the process."""


class Process:
    """How many sweeps it has left to live over all its scorers, how many patterns fit in one, and what they measure.

    With `kl`, the KL is what the loss would be, and the loss goes the other way.
    """

    def __init__(self, sweeps: int = 10**9, patterns_per_sweep: int = 3, kl: bool = False) -> None:
        self.left = sweeps
        self.kl = kl
        self.patterns_per_sweep = patterns_per_sweep


class MadeUp:
    """Losses fixed by seed, pattern and sequence; those of held-out sequences agree with the others in part."""

    def __init__(self, sequences: int, heldout: bool, process: Process, seed: int) -> None:
        self.waves: Sequence[tuple[int, int]] = [(i, min(i + 2, sequences)) for i in range(0, sequences, 2)]
        self.scored: list[tuple[str, int]] = []
        self._heldout, self._process, self._seed = heldout, process, seed
        self.patterns_per_sweep = process.patterns_per_sweep
        self._kl = process.kl

    def retain(self, base: Pattern) -> None: ...

    def shrink(self, patterns: int) -> bool:
        return False

    def expected(self, work: Sequence[tuple[Sequence[Pattern], tuple[int, int]]]) -> int:
        return len(work)

    def announce(self, work: Sequence[tuple[Sequence[Pattern], tuple[int, int]]]) -> None:
        """Nothing is begun before it is asked for."""

    def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Callable[[int], None]) -> Scores:
        if not self._process.left:
            raise Killed
        self._process.left -= 1
        self.scored += [(p.letters, s) for p in patterns for s in range(*wave)]
        objective = {p.letters: [self._nll(p, s) for s in range(*wave)] for p in patterns}
        other = {letters: [100.0 - value for value in sums] for letters, sums in objective.items()}
        return Scores(*((other, len(patterns), (), objective) if self._kl else (objective, len(patterns))))

    def _nll(self, pattern: Pattern, sequence: int) -> float:
        common = random.Random(f"{self._seed}/{pattern}").random() + len(pattern.shared_layers) / 8
        apart = random.Random(f"{self._seed}/{pattern}/{self._heldout}").random()
        own = random.Random(f"{self._seed}/{pattern}/{self._heldout}/{sequence}").gauss(0, 0.02)
        tokens = HELDOUT[sequence] if self._heldout else TOKENS[0]
        return tokens * (2 + 0.5 * common + 0.5 * apart + own)


def start_event(stages: int = 1, keep_full: tuple[int, ...] = (), native: tuple[int, ...] = ()) -> Event:
    start = Pattern.from_full_layers(set(range(LAYERS)) - set(native), LAYERS)
    size = LAYERS // stages
    return {
        "event": "start",
        "format": JOURNAL_FORMAT,
        "icsearch_version": "0",
        "options": {
            "method": "greedy",
            "strategy": "exact",
            "objective": "lm-loss",
            "refine": "swaps",
            "num_shared": FLIPS - len(native),
            "stages": stages,
            "keep_full": list(keep_full),
        },
        "model": {"native_shared": list(native), "num_hidden_layers": LAYERS},
        "calibration": {"fingerprint": "c", "sequences": ["a", "b"]},
        "refine_on": {
            "fingerprint": "h",
            "num_sequences": 3,
            "seq_len": 13,
            "source": "text",
            "sequences": ["x", "y", "z"],
            "tokens": HELDOUT,
        },
        "decoder_layers": LAYERS,
        "layer_indices": list(range(LAYERS)),
        "start_pattern": start.letters,
        "blocks": [[first, first + size] for first in range(0, LAYERS, size)],
        "references": {},
        "tokens": TOKENS,
    }


def strategy(start: Event) -> Strategy:
    options = start["options"]
    return make_strategy(
        SearchTask(
            start=Pattern(start["start_pattern"]),
            keep_full=frozenset(options["keep_full"]),
            num_shared=options["num_shared"],
            stages=options["stages"],
            tokens=tuple(start["tokens"]),
        ),
        options["strategy"],
    )


def run(path: Path, start: Event, process: Process | None = None, seed: int = 0) -> tuple[RunRecord, int]:
    """The record, and how many losses were asked for in this process."""
    journal = Journal(path)
    if not journal.exists():
        journal.append(start)
    record = RunRecord.replay(journal.events())
    process = process or Process()
    calibration, heldout = MadeUp(len(start["tokens"]), False, process, seed), MadeUp(len(HELDOUT), True, process, seed)
    scoring = Scoring(journal, record, calibration, Quiet())
    try:
        run_search(scoring, strategy(start), lambda: run_refinement(scoring, heldout))
    finally:
        process.left = len(calibration.scored) + len(heldout.scored)
    return record, process.left


def outcome(record: RunRecord) -> dict[str, Any]:
    """Everything but time."""
    assert record.heldout is not None and record.refinement is not None
    document = pattern_file(record).to_json()
    document["cost"].pop("seconds")
    return {
        "file": document,
        "nll": record.nll,
        "heldout": record.heldout.nll,
        "outcomes": record.refinement.outcomes,
        "finished": record.finished,
    }


FOUND: dict[Callable[[RunRecord], bool], list[int]] = {}


def interesting(tmp_path: Path, wanted: Callable[[RunRecord], bool], **options: Any) -> tuple[RunRecord, int]:
    """A finished run of the first seed that shows what is wanted."""
    for seed in [*FOUND.get(wanted, []), *range(60)]:
        record, _ = run(tmp_path / f"seed{seed}", start_event(**options), seed=seed)
        if wanted(record):
            FOUND[wanted] = [seed]
            return record, seed
    raise AssertionError("no seed shows this")


def swapped_and_refused(record: RunRecord) -> bool:
    assert record.refinement is not None
    made = len(record.refinement.swaps)
    return made >= 1 and len(record.refinement.trials) > made


def test_stopped_after_any_event_and_resumed(tmp_path: Path) -> None:
    whole, seed = interesting(tmp_path, swapped_and_refused)
    path = tmp_path / f"seed{seed}"
    lines = path.read_bytes().splitlines(keepends=True)
    kinds = [json.loads(line)["event"] for line in lines]
    assert {"start", "losses", "commit", "refine", "judged", "swap", "refused", "finish"} == set(kinds)
    total = sum(len(losses) for losses in (*whole.nll.values(), *outcome(whole)["heldout"].values()))
    for count in range(1, len(lines) + 1):
        part = tmp_path / "part"
        part.write_bytes(b"".join(lines[:count]))
        before = RunRecord.replay(Journal(part).events())
        known = sum(len(x) for x in before.nll.values()) + sum(len(x) for x in before.heldout.nll.values())  # type: ignore[union-attr]
        record, scored = run(part, start_event(), seed=seed)
        assert outcome(record) == outcome(whole)
        assert scored + known == total  # nothing is scored twice
        again = part.read_bytes().splitlines()
        assert [_without_time(line) for line in again] == [_without_time(line) for line in lines]


def _without_time(line: bytes) -> Event:
    return {**json.loads(line), "seconds": 0}


def test_killed_in_any_sweep_and_resumed(tmp_path: Path) -> None:
    whole, seed = interesting(tmp_path, swapped_and_refused)
    sweeps = sum(event["event"] == "losses" for event in Journal(tmp_path / f"seed{seed}").events())
    for live in range(sweeps):
        path = tmp_path / f"killed{live}"
        with pytest.raises(Killed):
            run(path, start_event(), Process(live), seed)
        assert outcome(run(path, start_event(), seed=seed)[0]) == outcome(whole)


@pytest.mark.parametrize("patterns", [1, 100])
def test_how_many_patterns_fit_in_memory_does_not_change_the_outcome(tmp_path: Path, patterns: int) -> None:
    whole, seed = interesting(tmp_path, swapped_and_refused)
    found = outcome(run(tmp_path / "other", start_event(), Process(patterns_per_sweep=patterns), seed)[0])
    expected = outcome(whole)
    for one in (found, expected):
        one["file"].pop("cost")
    assert found == expected


@pytest.mark.parametrize(
    "options", [{}, {"stages": 2}, {"keep_full": (3,)}, {"native": (2, 5)}, {"stages": 2, "native": (1,)}]
)
def test_never_worse_and_kept_layers_stay(tmp_path: Path, options: dict[str, Any]) -> None:
    swaps = 0
    for seed in range(8):
        record, _ = run(tmp_path / f"{seed}", start_event(**options), seed=seed)
        refinement, heldout = record.refinement, record.heldout
        assert refinement is not None and heldout is not None
        start, end = refinement.start.letters, record.pattern.letters
        assert record.loss(end) <= record.loss(start)
        assert heldout.loss(end) <= heldout.loss(start)
        assert end.count("F") == start.count("F")
        assert record.searched.letters == start == record.commits[-1].pattern
        scored = {letters for event in refinement.outcomes for letters in [event["pattern"]]} | set(heldout.nll)
        kept = {0, *options.get("keep_full", ()), *([4] if "stages" in options else [])}
        for letters in scored:
            assert all(letters[layer] == "F" for layer in kept)
            assert all(letters[layer] == "S" for layer in options.get("native", ()))
        swaps += len(refinement.swaps)
    assert swaps > 0


def test_moves_that_the_search_has_scored_are_not_scored_again(tmp_path: Path) -> None:
    record, _ = run(tmp_path / "j", start_event())
    events = Journal(tmp_path / "j").events()
    refined = [p for e in events if e.get("set") == "refine" for p in e["patterns"]]
    searched = {p for e in events if e["event"] == "losses" and "set" not in e for p in e["patterns"]}
    assert refined and not searched & set(refined)
    first = next(event for event in events if event["event"] == "judged")
    assert len(first["moves"]) > len(set(refined) & {_moved(first["pattern"], *move) for move in first["moves"]})
    assert cost(record)["refinement_evaluations"] == len(set(refined)) + len(record.heldout.nll)  # type: ignore[union-attr]
    assert cost(record)["candidate_evaluations"] == sum(range(3, 8)) + cost(record)["refinement_evaluations"]


def test_where_the_kl_is_the_objective_swaps_go_by_it(tmp_path: Path) -> None:
    start = start_event()
    start["options"]["objective"] = "kl"
    _, seed = interesting(tmp_path, swapped_and_refused)
    record, _ = run(tmp_path / "kl", start, Process(kl=True), seed)
    by_loss = RunRecord.replay(Journal(tmp_path / f"seed{seed}").events())
    assert record.refinement is not None and by_loss.refinement is not None
    assert record.refinement.outcomes == by_loss.refinement.outcomes
    refinement = pattern_file(record).to_json()["refinement"]
    assert refinement["kl_delta"] < 0 and refinement["heldout"]["kl_delta"] < 0
    assert all(swap["kl_delta"] < 0 < swap["delta"] and swap["heldout_kl_delta"] < 0 for swap in refinement["swaps"])
    pattern_file(record).save(tmp_path / "pattern.json")
    assert load_pattern_file(tmp_path / "pattern.json") == pattern_file(record)


def _moved(letters: str, from_layer: int, to_layer: int) -> str:
    full = set(Pattern(letters).full_layers) - {from_layer} | {to_layer}
    return Pattern.from_full_layers(full, len(letters)).letters


def test_heldout_losses_stay_apart(tmp_path: Path) -> None:
    record, _ = interesting(tmp_path, swapped_and_refused)
    events = Journal(tmp_path / f"seed{_}").events()
    heldout = [e for e in events if e.get("set") == "refine-on"]
    asked = {(p, s) for e in heldout for p in e["patterns"] for s in range(*e["sequences"])}
    assert asked == {(p, s) for p, known in record.heldout.nll.items() for s in known}  # type: ignore[union-attr]
    calibrated = [e for e in events if e["event"] == "losses" and e.get("set") != "refine-on"]
    assert {p for e in calibrated for p in e["patterns"]} == set(record.nll)
    assert {trial.before for trial in record.refinement.trials} <= set(record.heldout.nll)  # type: ignore[union-attr]


# --- what is damaged is noticed -------------------------------------------------------------------------------------


def damaged(tmp_path: Path, kind: str, change: Callable[[Event], None]) -> Path:
    _, seed = interesting(tmp_path, swapped_and_refused)
    events = Journal(tmp_path / f"seed{seed}").events()
    found = next(event for event in events if event["event"] == kind or event.get("set") == kind)
    change(found)
    path = tmp_path / "damaged"
    path.write_text("".join(json.dumps(event) + "\n" for event in events if event["event"] != "finish"))
    return path


DAMAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "another start": ("refine", {"pattern": "FSSSSSSS"}),
    "costs of other layers": ("refine", {"costs": [0.1]}),
    "a move from layer 0": ("judged", {"moves": [[0, 1]], "qualified": []}),
    "a move onto an F layer": ("swap", {"to_layer": 0}),
    "qualified but not scored": ("judged", {"moves": [], "qualified": [[1, 2]]}),
    "a swap to another pattern": ("swap", {"pattern": "FSSSSSSS"}),
    "a swap from another pattern": ("swap", {"before": "FSSSSSSS"}),
    "a refused swap made": ("refused", {"event": "swap"}),
    "nan": ("swap", {"delta": None}),
    "another set": ("refine-on", {"set": "training"}),
    "sequences beyond the held-out ones": ("refine-on", {"sequences": [0, 5]}),
    "one sum too few": ("refine-on", {"nll": [[1.0]]}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_events_name_their_line(tmp_path: Path, case: str) -> None:
    kind, change = DAMAGE[case]
    path = damaged(tmp_path, kind, lambda event: event.update(change))
    with pytest.raises(JournalError, match=r"journal line \d+ is damaged"):
        RunRecord.replay(Journal(path).events())


def test_outcomes_that_do_not_follow_from_the_losses_are_refused(tmp_path: Path) -> None:
    path = damaged(tmp_path, "swap", lambda event: event.update(delta=event["delta"] - 1))
    _, seed = interesting(tmp_path, swapped_and_refused)
    with pytest.raises(JournalError, match="its losses say"):
        run(path, start_event(), seed=seed)


@pytest.mark.parametrize("seed", range(80))
def test_random_edits_are_replayed_or_refused(tmp_path: Path, seed: int) -> None:
    _, found = interesting(tmp_path, swapped_and_refused)
    events, rng = Journal(tmp_path / f"seed{found}").events(), random.Random(seed)
    late = [event for event in events if event.get("set") or event["event"] in ("refine", "judged", "swap", "refused")]
    holder, key = rng.choice(list(places(rng.choice([events[0]["refine_on"], *late]))))
    change(holder, key, rng)
    path = tmp_path / "edited"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    try:
        record = RunRecord.replay(Journal(path).events())
        pattern_file(record).save(tmp_path / "pattern.json")
        load_pattern_file(tmp_path / "pattern.json")
        summary_table(record)
    except (JournalError, PatternError) as error:
        assert re.search(r"line \d+|no complete loss|lacks losses|pattern.json is damaged", str(error))


@pytest.mark.parametrize(
    "refine_on", [{}, {"tokens": []}, {"tokens": [0]}, {"tokens": "10"}, [], {"tokens": [1], "num_sequences": "3"}]
)
def test_damaged_start(refine_on: Any) -> None:
    with pytest.raises(JournalError, match="line 1 is damaged"):
        RunRecord.replay([{**start_event(), "refine_on": refine_on}])


def test_a_refinement_without_heldout_sequences_is_refused(tmp_path: Path) -> None:
    start = start_event()
    del start["refine_on"]
    with pytest.raises((JournalError, ValueError), match="refinement|held-out"):
        run(tmp_path / "j", start)


# --- results --------------------------------------------------------------------------------------------------------


def test_the_pattern_file(tmp_path: Path) -> None:
    record, _ = interesting(tmp_path, swapped_and_refused)
    assert record.refinement is not None and record.heldout is not None
    file = pattern_file(record)
    file.save(tmp_path / "pattern.json")
    document = json.loads((tmp_path / "pattern.json").read_text())
    refined, swaps = document["refinement"], record.refinement.swaps
    assert document["pattern"] == refined["pattern"] == record.pattern.letters != document["steps"][-1]["pattern"]
    assert document["loss"] == refined["loss"] == record.loss(document["pattern"]) < refined["start_loss"]
    assert refined["start_pattern"] == document["steps"][-1]["pattern"]
    heldout = refined["heldout"]
    assert heldout["delta"] == heldout["loss"] - heldout["start_loss"] < 0
    assert (heldout["source"], heldout["fingerprint"], heldout["num_sequences"]) == ("text", "h", 3)
    assert [(s["from_layer"], s["to_layer"]) for s in refined["swaps"]] == [(t.from_layer, t.to_layer) for t in swaps]
    assert all(s["delta"] < -2 * s["std_err"] and s["heldout_delta"] < -s["heldout_std_err"] for s in refined["swaps"])
    assert load_pattern_file(tmp_path / "pattern.json") == file
    assert file.at_retention(Fraction(3, 8)) == record.pattern
    assert file.at_retention(Fraction(4, 8)).letters == document["steps"][-2]["pattern"]


FILE_DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no start": lambda r: r.pop("start_pattern"),
    "another pattern": lambda r: r.update(pattern="F" * LAYERS),
    "no held-out losses": lambda r: r.pop("heldout"),
    "a held-out loss in words": lambda r: r["heldout"].update(loss="low"),
    "a swap too few": lambda r: r["swaps"].pop(),
    "another layer": lambda r: r["swaps"][0].update(from_layer=LAYERS),
    "swaps a text": lambda r: r.update(swaps="none"),
    "a swap of layer 0": lambda r: r["swaps"][0].update(from_layer=0),
}


@pytest.mark.parametrize("case", FILE_DAMAGE)
def test_a_damaged_refinement_in_a_pattern_file_is_refused(tmp_path: Path, case: str) -> None:
    record, _ = interesting(tmp_path, swapped_and_refused)
    document = json.loads(json.dumps(pattern_file(record).to_json()))
    FILE_DAMAGE[case](document["refinement"])
    (tmp_path / "pattern.json").write_text(json.dumps(document))
    with pytest.raises(PatternError, match="is damaged"):
        load_pattern_file(tmp_path / "pattern.json")


def test_a_file_without_refinement_has_no_word_of_it() -> None:
    file = PatternFile(Pattern("FS"), (0, 1), "greedy")
    assert "refinement" not in file.to_json()


@pytest.mark.parametrize("wanted", [swapped_and_refused, lambda record: not record.refinement.trials])
def test_the_report_says_what_was_tried(tmp_path: Path, wanted: Callable[[RunRecord], bool]) -> None:
    record, _ = interesting(tmp_path, wanted)
    assert record.refinement is not None
    (tmp_path / "run").mkdir()
    write_results(tmp_path / "run", record)
    page = " ".join((tmp_path / "run" / "report.html").read_text().split())
    written = io.StringIO()
    Console(width=100, file=written).print(summary_table(record))
    terminal = written.getvalue()
    for text in (page, " ".join(terminal.split())):
        assert f"{record.refinement.moves_scored} moves scored" in text
        assert "held out" in text
    if record.refinement.swaps:
        assert f"best first: {len(record.refinement.swaps)} made, " in page
        assert "Refused on the held-out sequences" in page
        assert "searched, then swaps" in terminal
        assert page.count(record.pattern.letters) >= 3
    else:
        assert "so the pattern is the search's" in page.replace("&#39;", "'")


@pytest.mark.slow
def test_an_unfinished_refinement_can_be_reported(tmp_path: Path) -> None:
    _, seed = interesting(tmp_path, swapped_and_refused)
    events = Journal(tmp_path / f"seed{seed}").events()
    for count in range(2, len(events)):
        record = RunRecord.replay(events[:count])
        if not record.nll.is_complete(record.start_pattern.letters):
            continue
        (tmp_path / "run").mkdir(exist_ok=True)
        summary_table(record)
        if record.refinement is not None:
            write_results(tmp_path / "run", record)
            assert load_pattern_file(tmp_path / "run" / "pattern.json").refinement is not None


def test_the_swaps_of_a_run_keep_what_the_search_kept(tmp_path: Path) -> None:
    record, _ = run(tmp_path / "j", start_event(stages=2, native=(1,)))
    assert record.refinement is not None
    swaps = make_swaps(record, record.refinement)
    question = swaps.ask()
    assert question is not None
    for pattern in question.patterns:
        assert pattern.is_full(0) and pattern.is_full(4) and not pattern.is_full(1)
