"""Bad input for every command: a place to make it in, and what a refusal must be."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from icsearch.cli import app

LONGEST_LINE = 400  # characters, without the directory that the test works in
NOBODY = 65534

Words = Sequence[object]


@dataclass(frozen=True)
class Good:
    """What bad input is made from: a checkpoint, its tokens, and a finished run of each command."""

    checkpoint: Path
    tokens: Path
    greedy: Path
    baseline: Path
    evaluation: Path


@dataclass(frozen=True)
class Row:
    """One bad input: the words of the command, and what its line must say of what was found and what to do."""

    words: Callable[[Place], Words]
    found: str
    todo: str


class Place:
    """An empty directory to make bad input in, and the commands that take it."""

    def __init__(self, root: Path, good: Good) -> None:
        self.root = root
        self.good = good

    # --- files ----------------------------------------------------------------------------------------------------

    def file(self, name: str, content: str | bytes = b"") -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def json(self, name: str, document: Any) -> Path:
        return self.file(name, json.dumps(document))

    def checkpoint(self, without: str | None = None, **files: str | bytes) -> Path:
        """A copy of the checkpoint, without a file, or with other content of some (`config_json` is config.json)."""
        model = Path(shutil.copytree(self.good.checkpoint, self.root / "model"))
        if without is not None:
            (model / without).unlink()
        for name, content in files.items():
            stem, _, suffix = name.rpartition("_")
            (model / f"{stem}.{suffix}").write_bytes(content.encode() if isinstance(content, str) else content)
        return model

    def config(self, *gone: str, **changes: Any) -> Path:
        """A copy of the checkpoint with other values in its config.json, and without those that are `gone`."""
        model = self.checkpoint()
        config = json.loads((model / "config.json").read_text())
        kept = {key: value for key, value in config.items() if key not in gone}
        (model / "config.json").write_text(json.dumps({**kept, **changes}))
        return model

    def pattern(self, *gone: str, **changes: Any) -> Path:
        """The pattern.json of the finished run with other values, and without those that are `gone`."""
        document = json.loads((self.good.greedy / "pattern.json").read_text())
        kept = {key: value for key, value in document.items() if key not in gone}
        return self.json("pattern.json", {**kept, **changes})

    def run(self, of: str = "greedy") -> Path:
        """A copy of a finished run."""
        return Path(shutil.copytree(getattr(self.good, of), self.root / "finished"))

    def changed(self, path: Path, edit: Callable[[bytes], bytes]) -> Path:
        path.write_bytes(edit(path.read_bytes()))
        return path

    # --- commands -------------------------------------------------------------------------------------------------

    def calibrate(self, source: object, *more: object, model: object = None) -> Words:
        sizes = ("--seq-len", 32, "--num-sequences", 2)
        return ("calibrate", self.good.checkpoint if model is None else model, source, "--out", "out", *sizes, *more)

    def on(self, command: str, model: object) -> Words:
        """A command on a model, with all else as it should be."""
        if command == "calibrate":
            return self.calibrate("demo", model=model)
        if command == "plan":
            return ("plan", model)
        more = ("--pattern", "uniform:1/2") if command == "eval" else ()
        return self.search(command, *more, model=model)

    def search(self, command: str, *more: object, model: object = None, tokens: object = None) -> Words:
        """greedy, dp-baseline or eval."""
        model = self.good.checkpoint if model is None else model
        tokens = self.good.tokens if tokens is None else tokens
        fixed = ("--out", "out", "--batch-size", 2, "--threads", 1, "--quiet")
        return (command, model, "--calibration", tokens, *fixed, *more)

    def greedy(self, *more: object, **named: object) -> Words:
        return self.search("greedy", *more, **named)

    def baseline(self, *more: object, **named: object) -> Words:
        return self.search("dp-baseline", *more, **named)

    def eval(self, *specs: object) -> Words:
        return self.search("eval", *(word for spec in specs for word in ("--pattern", spec)))

    def export(self, file: object, *more: object) -> Words:
        return ("export", file, "--engine", "vllm", *more)

    def report(self, *runs: object) -> Words:
        return ("report", *runs, "--out", "page.html")

    # --- what must come of it ---------------------------------------------------------------------------------------

    def refuses(self, row: Row, capfd: pytest.CaptureFixture[str]) -> str:
        """The command of a row is refused: status 2, one line, and nothing changed on disk. Returns the line."""
        words = [str(word) for word in row.words(self)]
        return self.refuses_words(words, row, capfd)

    def refuses_words(
        self, words: Sequence[str], row: Row, capfd: pytest.CaptureFixture[str], *owned: Path, nobody: bool = False
    ) -> str:
        """As `refuses`; with `nobody`, by a user whom permissions bind, and who owns some paths."""
        before = tree(self.root)
        capfd.readouterr()
        with as_nobody(*owned) if nobody else contextlib.nullcontext():
            status = app._run(list(words), debug=False)
        out, err = capfd.readouterr()
        line = self.one_line(status, out, err, row)
        assert tree(self.root) == before
        return line

    def one_line(self, status: int, out: str, err: str, row: Row) -> str:
        """What a refusal says: one line with what was found and what to do, and nothing on stdout."""
        assert (status, out) == (2, ""), (status, out, err)
        assert err.count("\n") == 1, err
        assert err.startswith("icsearch: "), err
        assert row.found in err and row.todo in err, err
        assert len(err.replace(f"{self.root}/", "")) < LONGEST_LINE, err
        assert all(letter.isprintable() for letter in err.rstrip("\n")), repr(err)
        return err


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """All below a directory: kind and mode of each, of files the content and when it was written, of links the goal."""
    return {str(path.relative_to(root)): _state(path) for path in sorted(root.rglob("*"))}


def _state(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    mode = stat.filemode(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        return mode, os.readlink(path)
    if path.name == ".lock":  # of a RUN directory: opened anew by whoever looks into it, and always empty
        return mode, status.st_size
    if stat.S_ISREG(status.st_mode):
        return mode, _digest(path), status.st_mtime_ns
    return (mode,)


def _digest(path: Path) -> str:
    """Of the content; of a file that is locked against whoever runs the tests, nothing."""
    with contextlib.suppress(PermissionError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return ""


@contextlib.contextmanager
def as_nobody(*owned: Path) -> Iterator[None]:
    """Within the block, root is a user whom permissions bind; any other user stays who he is."""
    if os.geteuid() != 0:
        yield
        return
    for path in owned:
        os.chown(path, NOBODY, NOBODY)
    group = os.getegid()
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
