"""Patterns, and the JSON files that hold them, journals and results that cannot be used: one line each."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bad_input import Place, Row


def unfinished(place: Place) -> Path:
    """What a search leaves that was killed."""
    journal = (place.good.greedy / "journal.jsonl").read_bytes().splitlines(keepends=True)
    return place.file("killed/journal.jsonl", b"".join(journal[:3])).parent


SPECS: dict[str, tuple[Callable[[Place], object], str, str]] = {
    "empty": (lambda p: "", "unknown pattern ''", "expected full, uniform:1/4"),
    "other letters": (lambda p: "FSXFSF", "'X' at position 2", "only the letters F and S"),
    "a first S": (lambda p: "SFFFFF", "starts with S", "use F"),
    "too short": (lambda p: "FSS", "3 letters, the model has 6", "one letter per layer"),
    "too long": (lambda p: "FSSFSSFSS", "9 letters, the model has 6", "one letter per layer"),
    "very long": (lambda p: "F" * 5000, "5000 letters, the model has 6", "one letter per layer"),
    "both cases": (lambda p: "FsSFsF", "unknown pattern 'FsSFsF'", "expected full, uniform:1/4"),
    "lowercase, too short": (lambda p: "fss", "3 letters, the model has 6", "one letter per layer"),
    "digits": (lambda p: "100100", "unknown pattern '100100'", "expected full"),
    "a line break": (lambda p: "FSS\nFSS", "unknown pattern", "expected full"),
    "other signs": (lambda p: "ＦＳＦＦＦＦ", "unknown pattern", "expected full"),
    "a word": (lambda p: "sideways", "unknown pattern 'sideways'", "expected full"),
    "a long word": (lambda p: "sideways" * 99, "File name too long", "give another one"),
    "a long path": (lambda p: "x/" * 3000, "File name too long", "give another one"),
    "a user who is not there": (lambda p: "~nobody-of-this-name/run", "home directory", "give another one"),
    "uniform of nothing": (lambda p: "uniform:", "retention '' is not a number", "give a fraction"),
    "uniform of none": (lambda p: "uniform:0", "retention 0 is out of range", "above 0 and at most 1"),
    "uniform of too much": (lambda p: "uniform:3/2", "retention 3/2 is out of range", "above 0 and at most 1"),
    "uniform by nought": (lambda p: "uniform:1/0", "retention '1/0' is not a number", "give a fraction"),
    "published by nobody": (lambda p: "published:nobody", "no published pattern 'nobody'", "known are"),
    "published, with a slip": (lambda p: "published:demo-gredy", "did you mean demo-greedy?", "known are"),
    "uniform, with a slip": (lambda p: "unifrom:1/4", "did you mean uniform? expected full", "published:NAME"),
    "published elsewhere": (lambda p: "published:../README", "no published pattern '../README'", "known are"),
    "published, and long": (lambda p: "published:" + "x" * 300, "no published pattern", "known are"),
    "published of another model": (lambda p: "published:glm-5-1-4", "belongs to another model", "cannot be run here"),
    "a run that is none": (lambda p: p.file("empty/x").parent, "unknown pattern", "expected full"),
    "a run that is not finished": (unfinished, "is a run that is not finished", "repeat its command"),
    "an evaluation": (lambda p: p.good.evaluation, "which has no pattern of its own", "give the RUN of a search"),
    "a retention not reached": (lambda p: f"{p.good.greedy}@1/6", "holds 3 to 6 of 6", "a smaller --retention"),
    "a retention of nothing": (lambda p: f"{p.good.greedy}@half", "'half' is not a number", "give a fraction"),
    "of another kind": (
        lambda p: p.pattern(model={"model_type": "deepseek_v32"}), "model type deepseek_v32", "use --force"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPECS)
def test_specs(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, found, todo = SPECS[case]
    place.refuses(Row(lambda p: p.eval(make(p)), found, todo), capfd)


NATIVE = ["full", "full", "shared", "full", "full", "shared"]


def test_a_pattern_that_wants_an_indexer_where_there_is_none(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    model = place.config(indexer_types=NATIVE)
    found = "asks F of layer 2, which this checkpoint shares natively"
    row = Row(lambda p: p.search("eval", "--pattern", "FFFFFF", model=model), found, "write S there")
    place.refuses(row, capfd)
    found = "--keep-full names layer 2, which the checkpoint itself shares"
    place.refuses(Row(lambda p: p.greedy("--keep-full", 2, model=model), found, "leave it out"), capfd)


# --- pattern.json ---

WRITE = "write it"
STEP = {"step": 1, "layer": 1, "loss": 2.0, "delta": 0.0, "std_err": 0.1, "pattern": "FSFFFF"}
PATTERN_FILES: dict[str, tuple[Callable[[Place], object], str, str]] = {
    "nothing": (lambda p: "pattern.json", "no file pattern.json", "give its path"),
    "a directory without one": (lambda p: p.file("run/x").parent, "no file", "give its path"),
    "a run that is not finished": (unfinished, "is a run that is not finished", "repeat its command"),
    "an evaluation": (lambda p: p.good.evaluation, "which has no pattern of its own", "give the RUN of a search"),
    "letters": (lambda p: "fss", "letters alone", "icsearch import FSS --out pattern.json"),
    "a retention of no run": (lambda p: "nowhere@1/2", "no file nowhere@1/2", "a RUN directory"),
    "a retention of nothing": (lambda p: f"{p.good.greedy}@half", "'half' is not a number", "give a fraction"),
    "a retention not reached": (lambda p: f"{p.good.greedy}@1/6", "holds 3 to 6 of 6", "a smaller --retention"),
    "a long name": (lambda p: "x" * 300, "File name too long", "give another one"),
    "a device without end": (lambda p: "/dev/zero", "File too large", WRITE),
    "cut": (lambda p: p.changed(p.pattern(), lambda b: b[:99]), "is not JSON", WRITE),
    "empty": (lambda p: p.file("pattern.json"), "is not JSON", WRITE),
    "not UTF-8": (lambda p: p.file("pattern.json", b"\xff\xfe"), "is not JSON", WRITE),
    "a list": (lambda p: p.json("pattern.json", []), "holds a list", WRITE),
    "deep": (lambda p: p.file("pattern.json", '{"a":' * 50_000), "nested too deeply", WRITE),
    "of another version": (lambda p: p.pattern(format="icsearch.pattern/2"), "'icsearch.pattern/2'", WRITE),
    "of no version": (lambda p: p.pattern("format"), "has format None", WRITE),
    "another document": (lambda p: p.good.evaluation / "eval.json", "'icsearch.eval/1'", WRITE),
    "a thing twice": (
        lambda p: p.changed(p.pattern(), lambda b: b[:-1] + b', "pattern": "FFFFFF"}'), "'pattern' twice", WRITE
    ),
    "no pattern": (lambda p: p.pattern("pattern"), "pattern is missing", WRITE),
    "a pattern of numbers": (lambda p: p.pattern(pattern=[1, 0]), "pattern is a list", WRITE),
    "a first S": (lambda p: p.pattern(pattern="SFFFFF"), "starts with S", WRITE),
    "another length": (lambda p: p.pattern(num_layers=7), "pattern has 6 letters", WRITE),
    "a huge length": (lambda p: p.pattern(num_layers=10**30), "num_layers is a huge integer", WRITE),
    "a negative length": (lambda p: p.pattern(num_layers=-6), "num_layers is -6", WRITE),
    "a loss that is none": (lambda p: p.pattern(loss=float("nan")), "loss is nan", WRITE),
    "an infinite loss": (
        lambda p: p.changed(p.pattern(loss=123456), lambda b: b.replace(b"123456", b"1e400")), "loss is inf", WRITE
    ),
    "another retention": (lambda p: p.pattern(retention=0.9), "retention is 0.9: expected a number above", WRITE),
    "retention in words": (lambda p: p.pattern(retention="half"), "retention is 'half'", WRITE),
    "other full layers": (
        lambda p: p.pattern(full_layers=[0]), "full_layers is a list: expected the F layers of the pattern", WRITE
    ),
    "layers that do not rise": (lambda p: p.pattern(layer_indices=[0, 1, 2, 3, 5, 4]), "layer_indices", WRITE),
    "too few layers": (
        lambda p: p.pattern(layer_indices=[0, 1]), "layer_indices is a list: expected 6 ascending layer numbers", WRITE
    ),
    "layers beyond the model": (
        lambda p: p.pattern(layer_indices=[0, 1, 2, 3, 4, 99]), "layer_indices reach 99", "write the file again"
    ),
    "steps of text": (lambda p: p.pattern(steps=["F"]), "steps is a list", WRITE),
    "a step of no layer": (lambda p: p.pattern(steps=[{**STEP, "layer": 6}]), "layer is 6", WRITE),
    "a step that shares nothing": (
        lambda p: p.pattern(steps=[{**STEP, "layer": 2}]), "its pattern has F there", WRITE
    ),
    "a model of text": (lambda p: p.pattern(model="glm"), "model is 'glm'", WRITE),
    "a revision of a number": (lambda p: p.pattern(model={"revision": 5}), "revision is 5", WRITE),
    "a negative model": (lambda p: p.pattern(model={"num_hidden_layers": -1}), "num_hidden_layers is -1", WRITE),
}  # fmt: skip


@pytest.mark.parametrize("case", PATTERN_FILES)
def test_pattern_files(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, found, todo = PATTERN_FILES[case]
    place.refuses(Row(lambda p: p.export(make(p)), found, todo), capfd)


def test_an_evaluation_reads_them_in_the_same_way(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.refuses(Row(lambda p: p.eval(p.pattern(loss="low")), "loss is 'low'", WRITE), capfd)


EXPORTS: dict[str, tuple[tuple[object, ...], str, str]] = {
    "an engine of nobody": (("--engine", "tgi"), "unknown engine 'tgi'", "expected one of"),
    "an engine with a slip": (("--engine", "vlm"), "did you mean vllm?", "expected one of"),
    "no engine": (("--engine", ""), "needs one of", "--engine NAME and --checkpoint OUT"),
    "a retention not reached": (("--engine", "vllm", "--retention", "1/6"), "holds 3 to 6 of 6", "a smaller"),
    "a retention of text": (("--engine", "vllm", "--retention", "half"), "'half' is not a number", "give a fraction"),
    "a retention of nothing": (("--engine", "vllm", "--retention", ""), "'' is not a number", "give a fraction"),
    "a retention of nothing in a copy": (("--checkpoint", "out", "--retention", ""), "'' is not a number", "give a"),
    "a model of nothing": (("--checkpoint", "out", "--model", ""), "MODEL is empty", "expected a directory"),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_exports(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    options, found, todo = EXPORTS[case]
    place.refuses(Row(lambda p: ("export", p.good.greedy, *options), found, todo), capfd)


# --- runs ---


def journal(edit: Callable[[list[bytes]], list[bytes]], of: str = "greedy") -> Callable[[Place], Path]:
    """A finished run whose journal has other lines."""

    def make(place: Place) -> Path:
        run = place.run(of)
        place.changed(run / "journal.jsonl", lambda content: b"".join(edit(content.splitlines(keepends=True))))
        return run

    return make


def without_first(kind: str) -> Callable[[list[bytes]], list[bytes]]:
    """The lines without the first event of a kind."""

    def edit(lines: list[bytes]) -> list[bytes]:
        gone = next(number for number, line in enumerate(lines) if json.loads(line)["event"] == kind)
        return [*lines[:gone], *lines[gone + 1 :]]

    return edit


def first(kind: str, of: str = "greedy", **changes: Any) -> Callable[[Place], Path]:
    """A finished run with other values in the first event of a kind."""

    def make(place: Place) -> Path:
        lines = (getattr(place.good, of) / "journal.jsonl").read_bytes().splitlines()
        return event([json.loads(line)["event"] for line in lines].index(kind), of, **changes)(place)

    return make


def event(number: int, of: str = "greedy", **changes: Any) -> Callable[[Place], Path]:
    """A finished run with other values in one event."""

    def edit(lines: list[bytes]) -> list[bytes]:
        changed = json.dumps({**json.loads(lines[number]), **changes}).encode() + b"\n"
        return [*lines[:number], changed, *lines[number + 1 :]]

    return journal(edit, of)


def evaluated(**changes: Any) -> Callable[[Place], Path]:
    """A finished evaluation with other values in its eval.json."""

    def make(place: Place) -> Path:
        run = place.run("evaluation")
        document = json.loads((run / "eval.json").read_text())
        (run / "eval.json").write_text(json.dumps({**document, **changes}))
        return run

    return make


def eval_file(content: str) -> Callable[[Place], Path]:
    return lambda place: place.file("evaluated/eval.json", content).parent


RESTORE, AGAIN = "restore the file, or start over with --fresh", "evaluate again"
RUNS: dict[str, tuple[Callable[[Place], object], str, str]] = {
    "nothing": (lambda p: "nowhere", "nowhere holds no journal.jsonl", "expected the RUN directory"),
    "a file": (lambda p: p.file("run", "x"), "holds no journal.jsonl", "expected the RUN directory"),
    "an empty directory": (lambda p: p.file("run/x").parent, "holds no journal.jsonl", "expected the RUN directory"),
    "a long name": (lambda p: "x" * 300, "File name too long", "give"),
    "a journal is a directory": (lambda p: p.file("run/journal.jsonl/x").parent.parent, "Is a directory", "give the"),
    "an empty journal": (lambda p: p.file("run/journal.jsonl").parent, "holds no journal.jsonl", "expected the RUN"),
    "of another version": (event(0, format="icsearch.journal/2"), "'icsearch.journal/2'", "start over with --fresh"),
    "of no version": (event(0, format=None), "has format None", "start over with --fresh"),
    "garbage in the middle": (journal(lambda ls: [*ls[:2], b"\xff\n", *ls[2:]]), "is damaged at line 3", RESTORE),
    "a list in the middle": (journal(lambda ls: [*ls[:2], b"[]\n", *ls[2:]]), "is damaged at line 3", RESTORE),
    "a number that is none": (journal(lambda ls: [*ls[:1], b'{"event":"note","x":NaN}\n', *ls[1:]]), "line 2", RESTORE),
    "deep": (journal(lambda ls: [*ls[:1], b"[" * 100_000 + b"\n", *ls[1:]]), "is damaged at line 2", RESTORE),
    "said twice": (
        journal(lambda ls: [*ls[:1], b'{"event":"note","event":"note","text":"x"}\n', *ls[1:]]), "line 2", RESTORE
    ),
    "without its beginning": (journal(lambda ls: ls[1:]), "has format None", "start over with --fresh"),
    "without a commit": (journal(without_first("commit")), "line", RESTORE),
    "a pattern of another length": (event(0, start_pattern="FFF"), "line 1", RESTORE),
    "no tokens": (event(0, tokens=[]), "tokens", RESTORE),
    "a huge number of layers": (event(0, decoder_layers=10**30), "decoder_layers", RESTORE),
    "losses of text": (first("losses", nll=[["low"] * 5] * 4), "nll", RESTORE),
    "losses of too few": (first("losses", nll=[[1.0]]), "nll", RESTORE),
    "sequences that are not there": (first("losses", sequences=[0, 99]), "sequences", RESTORE),
    "an event of nobody": (event(1, event="dream"), "event is 'dream'", RESTORE),
    "an evaluation cut": (eval_file('{"format": "icsearch.eval/1"'), "is not JSON", AGAIN),
    "an evaluation of another version": (eval_file('{"format": "icsearch.eval/3"}'), "'icsearch.eval/3'", AGAIN),
    "an evaluation of nothing": (eval_file('{"format": "icsearch.eval/1"}'), "is damaged", AGAIN),
    "an evaluation without rows": (evaluated(rows=[]), "is damaged", AGAIN),
    "an evaluation of rows of text": (evaluated(rows=["full"]), "is damaged", AGAIN),
    "an evaluation of a model of text": (evaluated(model="glm"), "is damaged", AGAIN),
    "an evaluation with notes by number": (evaluated(notes=3), "notes is 3", AGAIN),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_runs_to_report(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, found, todo = RUNS[case]
    place.refuses(Row(lambda p: p.report(make(p)), found, todo), capfd)


CONTINUED: dict[str, tuple[Callable[[Place], Path], str, str]] = {
    "of another version": (event(0, format="icsearch.journal/2"), "'icsearch.journal/2'", "--fresh"),
    "garbage in the middle": (journal(lambda ls: [*ls[:2], b"\xff\n", *ls[2:]]), "is damaged at line 3", RESTORE),
    "a commit of another layer": (first("commit", layer=99), "layer is 99", RESTORE),
    "options of text": (event(0, options="x"), "options is 'x'", RESTORE),
}


@pytest.mark.parametrize("case", CONTINUED)
def test_runs_to_continue(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, found, todo = CONTINUED[case]
    make(place).rename(place.root / "out")
    place.refuses(Row(lambda p: p.greedy("--num-shared", 3), found, todo), capfd)


EVALUATIONS_CONTINUED: dict[str, tuple[dict[str, Any], str]] = {
    "measures of text": ({"patterns": "x"}, "patterns is 'x'"),
    "measures of other letters": ({"patterns": {"FXFFFF": {}}}, "patterns has 'FXFFFF'"),
    "no sequences": ({"sequences": None}, "sequences is None"),
    "sequences of text": ({"sequences": "05"}, "sequences is '05'"),
}


@pytest.mark.parametrize("case", EVALUATIONS_CONTINUED)
def test_evaluations_to_continue(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    changes, found = EVALUATIONS_CONTINUED[case]
    first("measures", "evaluation", **changes)(place).rename(place.root / "out")
    place.refuses(Row(lambda p: p.eval("uniform:1/2"), found, "--fresh"), capfd)


def test_another_command_s_run(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.run("baseline").rename(place.root / "out")
    place.refuses(Row(lambda p: p.greedy("--num-shared", 3), "holds a run with other settings", "another --out"), capfd)
    place.refuses(Row(lambda p: p.eval("full"), "holds a run with other settings", "another --out"), capfd)


# --- similarities ---


def similarity(manifest: dict[str, Any] | str | None = None, **arrays: Any) -> Callable[[Place], Path]:
    """The similarity of the finished baseline with other arrays, or other values in the JSON beside it."""

    def make(place: Place) -> Path:
        for name in ("similarity.npz", "similarity.json"):
            shutil.copy(place.good.baseline / name, place.root / name)
        path = place.root / "similarity.npz"
        if arrays:
            np.savez(path, **{**dict(np.load(path)), **arrays})
        described = path.with_suffix(".json")
        if isinstance(manifest, dict):
            described.write_text(json.dumps({**json.loads(described.read_text()), **manifest}))
        elif manifest is not None:
            described.write_text(manifest)
        return path

    return make


def npz(edit: Callable[[bytes], bytes]) -> Callable[[Place], Path]:
    return lambda place: place.changed(similarity()(place), edit)


def bare_array(place: Place) -> Path:
    path = similarity()(place)
    with path.open("wb") as file:
        np.save(file, np.eye(6))
    return path


def without_overlap(place: Place) -> Path:
    path = similarity()(place)
    with zipfile.ZipFile(path) as archive:
        cosine = archive.read("cosine.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cosine.npy", cosine)
    return path


def half_nan() -> Any:
    return np.where(np.arange(36).reshape(6, 6) % 2, np.nan, 0.5)


LEAVE = "leave --similarity out"
SIMILARITIES: dict[str, tuple[Callable[[Place], object], str, str]] = {
    "nothing": (lambda p: "nowhere.npz", "no file nowhere.json", LEAVE),
    "no name": (lambda p: "", "similarity", LEAVE),
    "cut": (npz(lambda b: b[: len(b) // 2]), "cannot use", LEAVE),
    "empty": (npz(lambda b: b""), "cannot use", LEAVE),
    "garbage": (npz(lambda b: b"PK\x03\x04" + bytes(99)), "cannot use", LEAVE),
    "a bit that fell over": (npz(lambda b: b[:120] + bytes([b[120] ^ 255]) + b[121:]), "cannot use", LEAVE),
    "one array": (bare_array, "cannot use", LEAVE),
    "without the overlap": (without_overlap, "cannot use", LEAVE),
    "objects": (similarity(cosine=np.array([[{"a": 1}] * 6] * 6, dtype=object)), "cannot use", LEAVE),
    "text": (similarity(cosine=np.full((6, 6), "x")), "cosine", LEAVE),
    "complex": (similarity(cosine=np.full((6, 6), 1j)), "cosine", LEAVE),
    "another size": (similarity(cosine=np.eye(5)), "is not 6 x 6", LEAVE),
    "numbers that are none": (similarity(cosine=half_nan()), "cosine", LEAVE),
    "a score that is none": (similarity(kascade=half_nan()), "kascade", LEAVE),
    "a score beyond its importance": (similarity(kascade=np.tri(6)[::-1]), "kascade", LEAVE),
    "a score of another size": (similarity(kascade=np.eye(5)), "is not 6 x 6", LEAVE),
    "described by a list": (similarity("[]"), "holds a list", LEAVE),
    "of another model": (similarity({"model": "0"}), "belongs to another model", LEAVE),
    "of another version": (similarity({"format": "icsearch.similarity/2"}), "another format", LEAVE),
    "of no queries": (similarity({"queries": 0}), "queries", LEAVE),
    "of infinite queries": (similarity({"queries": float("inf")}), "queries", LEAVE),
    "of queries by text": (similarity({"queries": "many"}), "queries", LEAVE),
}  # fmt: skip


@pytest.mark.parametrize("case", SIMILARITIES)
def test_similarities(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, found, todo = SIMILARITIES[case]
    place.refuses(Row(lambda p: p.baseline("--num-shared", 3, "--similarity", make(p)), found, todo), capfd)
