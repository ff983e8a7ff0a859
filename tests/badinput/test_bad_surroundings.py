"""Files that may not be read, places that may not be written, and odd surroundings: no HOME, no terminal, no stdout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from bad_input import Good, Place, Row, Words
from icsearch.cli import app

# --- permissions ---


@pytest.fixture
def open_place(good: Good, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A place that every user can reach, with copies of what is good that every user can read."""
    root = Path(tempfile.mkdtemp())
    try:
        copies = [Path(shutil.copytree(path, root / "good" / name)) for name, path in vars(good).items()]
        (root / "here").mkdir()
        for path in (root, *root.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        monkeypatch.chdir(root / "here")
        yield Place(root / "here", Good(*copies))
    finally:
        for path in (root, *root.rglob("*")):
            path.chmod(0o700)
        shutil.rmtree(root)


def locked(path: Path, mode: int = 0) -> Path:
    path.chmod(mode)
    return path


def with_locked(name: str, mode: int = 0) -> Callable[[Place], Words]:
    """greedy on a checkpoint of which one file is locked."""
    return lambda p: p.greedy(model=locked(p.checkpoint() / name, mode).parent)


def locked_in(directory: str, command: str = "greedy") -> Callable[[Place], Words]:
    """A command that writes to a directory which may only be read."""

    def words(place: Place) -> Words:
        (place.root / directory).mkdir()
        locked(place.root / directory, 0o555)
        given = list(place.on(command, place.good.checkpoint))
        given[given.index("out")] = Path(directory) / "run"
        return given

    return words


def own_journal(place: Place) -> Words:
    locked(place.run().rename(place.root / "out") / "journal.jsonl")
    return place.greedy("--num-shared", 3)


DENIED = "Permission denied"
LOCKED: dict[str, tuple[Callable[[Place], Words], str, str]] = {
    "a checkpoint": (lambda p: p.greedy(model=locked(p.checkpoint())), "model", "give another"),
    "its config": (with_locked("config.json"), "config.json", DENIED),
    "its weights": (with_locked("model.safetensors"), "model.safetensors", DENIED),
    "its generation config": (with_locked("generation_config.json"), "generation_config.json", ""),
    "its tokenizer": (
        lambda p: p.calibrate("demo", model=locked(p.checkpoint() / "tokenizer.json").parent), "tokenizer", "ready"
    ),
    "a config to plan for": (lambda p: ("plan", locked(p.checkpoint() / "config.json")), "config.json", DENIED),
    "a text": (lambda p: p.calibrate(locked(p.file("t.txt", "x" * 99))), "t.txt", DENIED),
    "lines": (lambda p: p.calibrate(locked(p.file("t.jsonl", "{}"))), "t.jsonl", DENIED),
    "a directory of texts": (lambda p: p.calibrate(locked(p.file("d/t.txt").parent) / "t.txt"), "t.txt", DENIED),
    "tokens": (
        lambda p: p.greedy(tokens=locked(Path(shutil.copytree(p.good.tokens, "t")) / "calibration.safetensors").parent),
        "calibration.safetensors", DENIED,
    ),
    "a directory of tokens": (
        lambda p: p.greedy(tokens=locked(Path(shutil.copytree(p.good.tokens, "t")))), "t", DENIED
    ),
    "a pattern": (lambda p: p.export(locked(p.pattern())), "pattern.json", DENIED),
    "a pattern to evaluate": (lambda p: p.eval(locked(p.pattern())), "pattern.json", DENIED),
    "a run to report": (lambda p: p.report(locked(p.run())), "finished", DENIED),
    "a run to export": (lambda p: p.export(locked(p.run())), "finished", DENIED),
    "a run to evaluate": (lambda p: p.eval(locked(p.run())), "finished", DENIED),
    "a journal": (lambda p: p.report(locked(p.run() / "journal.jsonl").parent), "journal.jsonl", DENIED),
    "an evaluation": (lambda p: p.report(locked(p.run("evaluation") / "eval.json").parent), "eval.json", DENIED),
    "a journal to continue": (own_journal, "journal.jsonl", DENIED),
    "a similarity": (
        lambda p: p.baseline("--similarity", locked(p.run("baseline") / "similarity.npz")), "similarity.npz", DENIED
    ),
    "its description": (
        lambda p: p.baseline("--similarity", locked(p.run("baseline") / "similarity.json").with_suffix(".npz")),
        "similarity.json", DENIED,
    ),
    "a config file": (lambda p: p.greedy("--config", locked(p.file("own.toml"))), "own.toml", DENIED),
    "a place for batches": (locked_in("ro", "calibrate"), "ro", DENIED),
    "a place for a search": (locked_in("ro"), "ro", DENIED),
    "a place for a baseline": (locked_in("ro", "dp-baseline"), "ro", DENIED),
    "a place for an evaluation": (locked_in("ro", "eval"), "ro", DENIED),
    "a place for a page": (
        lambda p: ("report", p.good.greedy, "--out", locked(p.file("ro/x").parent, 0o555) / "p.html"), "p.html", DENIED
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOCKED)
def test_permissions(open_place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    """By a user whom they bind: root sets its effective user id to another's for the command."""
    make, found, todo = LOCKED[case]
    words = [str(word) for word in make(open_place)]
    owned = [path for path in (open_place.root, *open_place.root.rglob("*")) if not path.is_symlink()]
    open_place.refuses_words(words, Row(lambda p: words, found, todo), capfd, *owned, nobody=True)


# --- the process's surroundings, in processes of their own ---


def icsearch(
    *words: object, environment: Mapping[str, str | None] | None = None, shell: str | None = None, **more: object
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; None takes a variable away. `shell`, such as `"$@" >&-`, runs it."""
    changes = {"PYTHONPATH": str(Path(app.__file__).parents[2]), **(environment or {})}
    variables = {**os.environ, **{name: value for name, value in changes.items() if value is not None}}
    for name, value in changes.items():
        if value is None:
            variables.pop(name, None)
    command = [sys.executable, "-m", "icsearch", *map(str, words)]
    if shell is not None:
        command = ["sh", "-c", shell, "sh", *command]
    return subprocess.run(command, env=variables, capture_output=True, text=True, errors="replace", **more)  # type: ignore[call-overload]


BARE: dict[str, str | None] = {"HOME": None, "TERM": None, "COLUMNS": "20"}
SEVEN_BITS: dict[str, str | None] = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SLOW = pytest.mark.slow
ODD = {
    "no HOME, no TERM, 20 columns": BARE,
    "a HOME that is not there, no columns, 7 bits": {"HOME": "/nowhere", "COLUMNS": "0", "LINES": "0", **SEVEN_BITS},
    "columns of words": {"COLUMNS": "many", "TERM": "dumb"},
    "a language that is not there": {"LC_ALL": "tlh_QO.UTF-8", "LANG": "tlh_QO"},
    "an encoding of 7 bits": {"PYTHONIOENCODING": "ascii"},
}


@pytest.mark.parametrize(
    "case", [case if number < 2 else pytest.param(case, marks=SLOW) for number, case in enumerate(ODD)]
)
def test_odd_surroundings(place: Place, case: str) -> None:
    """A refusal is the same line, and what works goes on working."""
    run = shutil.copytree(place.good.greedy, place.root / "größer")
    row = Row(lambda p: (), "no file", "give its path, a RUN directory")
    refused = icsearch("export", "keine-größe.json", "--engine", "vllm", environment=ODD[case])
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.count("\n") == 1 and row.found in refused.stderr and row.todo in refused.stderr
    worked = icsearch("report", run, "--out", place.root / "größe.html", environment=ODD[case])
    assert worked.returncode == 0, worked.stderr
    assert "Traceback" not in worked.stderr
    assert (place.root / "größe.html").stat().st_size > 1000


@pytest.mark.parametrize("environment", [{"COLUMNS": "20", "TERM": None}, {"HOME": None, "COLUMNS": "1"}], ids=str)
def test_tables_in_odd_terminals(
    place: Place,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str | None],
) -> None:
    """Finished runs print their tables, however little room there is; a plan too."""
    for name, value in environment.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    searched = ("greedy", place.good.checkpoint, "--calibration", place.good.tokens, "--num-shared", 3)
    fixed = ("--out", place.good.greedy, "--batch-size", 2, "--threads", 1)
    for words in ((*searched, *fixed), ("plan", "demo"), ("--help",), ("greedy", "--help")):
        assert app._run([str(word) for word in words], debug=False) == 0, capfd.readouterr().err


STREAMS: dict[str, tuple[str, str, int]] = {
    "no stdin": ('"$@" <&-', "pattern.json", 0),
    "no stdout": ('"$@" >&-', "pattern.json", 0),
    "no stderr": ('"$@" 2>&-', "none.json", 2),
    "no stdout, and a refusal": ('"$@" >&-', "none.json", 2),
    "nothing at all": ('"$@" <&- >&- 2>&-', "none.json", 2),
}


@pytest.mark.parametrize("case", STREAMS)
def test_streams_that_are_closed(place: Place, case: str) -> None:
    """The status says what no line can; nothing is printed into a file that took the number of a stream."""
    shell, name, status = STREAMS[case]
    file = place.pattern()
    before = file.read_bytes()
    ended = icsearch("export", file.with_name(name), "--engine", "vllm", shell=shell)
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr and "Exception" not in ended.stderr
    assert file.read_bytes() == before


def test_a_page_written_without_stdout(place: Place) -> None:
    """The first file that is opened must not become stdout: what is printed would lie in the page."""
    ended = icsearch("report", place.good.greedy, "--out", place.root / "page.html", shell='"$@" >&- 2>&- <&-')
    assert ended.returncode == 0
    page = (place.root / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")


@pytest.mark.slow
def test_a_search_in_surroundings_that_are_bare(place: Place) -> None:
    """No HOME, no TERM, no stdin, 20 columns, 7 bits: the same pattern."""
    bare = {**BARE, **SEVEN_BITS}
    words = ("greedy", place.good.checkpoint, "--calibration", place.good.tokens, "--num-shared", 3)
    ended = icsearch(*words, "--out", place.root / "läuft", "--batch-size", 2, environment=bare, shell='"$@" <&-')
    assert ended.returncode == 0, ended.stderr
    found, expected = (path / "curve.csv" for path in (place.root / "läuft", place.good.greedy))
    assert found.read_bytes() == expected.read_bytes()
