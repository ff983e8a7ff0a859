"""The real command in processes of its own, what can be done to them, and what must be left when they end.

A process is forked off a server that has imported everything once: a fresh interpreter needs seconds for that.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from icsearch import __main__ as entry
from icsearch.runs.journal import Event, Journal
from icsearch.runs.record import load_run

PRELOAD = (
    "icsearch.cli.app",
    "icsearch.commands.fisher",
    "icsearch.commands.greedy",
    "icsearch.commands.baseline",
    "icsearch.commands.evaluate",
    "icsearch.report.figures",
    "icsearch.sweep.distributed.startup",
    "jinja2",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "PIL.PngImagePlugin",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.glm_moe_dsa.modeling_glm_moe_dsa",
)
PATIENCE = 300.0  # seconds that a process may take, on a machine that is busy
FILE_OPERATIONS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir")

# Done in a process before its command runs there.
Before = Callable[[], object]


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, or minus the number of the signal that killed it; stdout and stderr."""

    status: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """What it said last on stderr; there must be no traceback."""
        assert "Traceback" not in self.err, self.err
        return self.err.splitlines()[-1]


class Running:
    """A process at work; `log` begins the names of the files that its output goes to."""

    def __init__(self, target: Callable[[], object], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        self._log = log
        self._process = context.Process(target=_with_output, args=(log, target))
        self._process.start()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def until(self, condition: Callable[[], bool]) -> Running:
        """Wait for something that the process does; also for its end."""
        deadline = time.monotonic() + PATIENCE
        while self.alive and not condition():
            assert time.monotonic() < deadline, "the command takes too long"
            time.sleep(0.0005)
        return self

    def send(self, *numbers: int) -> Running:
        """Send signals. One that is stopped hears of all but SIGKILL once it goes on."""
        for number in numbers:
            os.kill(self.pid, number)
        return self

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def said(self) -> str:
        """Its stdout so far, then its stderr."""
        return "".join(_output(self._log))

    def end(self) -> Ended:
        """Wait for the end."""
        self._process.join(PATIENCE)
        assert self._process.exitcode is not None, "the command takes too long"
        return Ended(self._process.exitcode, *_output(self._log))


class Commands:
    """Starts commands, and keeps their output in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started = 0
        folder.mkdir(exist_ok=True)

    def start(self, arguments: Sequence[object], before: Before | None = None) -> Running:
        """Start `icsearch` with these arguments; `before` is what is done in its process first."""
        return self.call(partial(command, tuple(map(str, arguments)), before))

    def stopped(self, arguments: Sequence[object], run: Path, events: int) -> Running:
        """Start a command that stops itself (SIGSTOP) once its RUN's journal has so many events; wait for that."""
        running = self.start(arguments, partial(_stop_at_event, run, events))
        process = psutil.Process(running.pid)
        running.until(lambda: process.status() == psutil.STATUS_STOPPED)
        assert running.alive, running.said
        return running

    def call(self, target: Callable[[], object]) -> Running:
        """Start a function in a process of its own."""
        self._started += 1
        return Running(target, self._folder / str(self._started))

    def run(self, arguments: Sequence[object], before: Before | None = None) -> Ended:
        return self.start(arguments, before).end()


@dataclass(frozen=True)
class Case:
    """A command without its --out, and a finished run of it."""

    arguments: tuple[object, ...]
    finished: Path

    def into(self, out: Path) -> list[object]:
        """The command for a RUN."""
        return [*self.arguments, "--out", out]

    @property
    def outcome(self) -> dict[str, Any]:
        return outcome(self.finished)


def command(arguments: Sequence[str], before: Before | None = None) -> None:
    """The command in this process; it ends with SystemExit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    sys.argv = ["icsearch", *arguments]
    if before is not None:
        before()
    entry.main()


def command_in_fork(arguments: Sequence[str], log: Path) -> Ended:
    """The command in a fork of this process, so that it has this process's mounts."""
    process = os.fork()
    if not process:
        status = 70
        try:
            _with_output(log, partial(command, arguments))
        except SystemExit as ending:
            status = int(ending.code or 0)
        finally:
            os._exit(status)
    _, status = os.waitpid(process, 0)
    return Ended(os.waitstatus_to_exitcode(status), *_output(log))


def _with_output(log: Path, target: Callable[[], object]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    target()


def _output(log: Path) -> list[str]:
    paths = [Path(f"{log}.{name}") for name in ("out", "err")]
    return [path.read_text() if path.exists() else "" for path in paths]


# --- moments -------------------------------------------------------------------------------------------------------


def lines(run: Path) -> int:
    """Whole events in a run's journal."""
    return whole_lines(run).count(b"\n")


def whole_lines(run: Path) -> bytes:
    """The journal up to its last newline; empty where there is none."""
    try:
        data = (run / "journal.jsonl").read_bytes()
    except FileNotFoundError:
        return b""
    return data[: data.rfind(b"\n") + 1]


def _stop_at_event(run: Path, events: int) -> None:
    """In this process; whoever sends SIGCONT lets it go on, and it does not stop again."""
    append = Journal.append

    def append_and_stop(journal: Journal, event: Event) -> None:
        append(journal, event)
        if lines(run) == events:
            os.kill(os.getpid(), signal.SIGSTOP)

    Journal.append = append_and_stop  # type: ignore[method-assign]


def kill_at_operation(number: int, folder: Path) -> Before:
    """SIGKILL, just before the process opens, makes, renames or removes something in `folder` for that many-th time."""
    return partial(_count_operations, folder, partial(_kill_at, number))


def count_operations(folder: Path, into: Path) -> Before:
    """Keep the number of such operations in a file."""
    return partial(_count_operations, folder, partial(_write_number, into))


def _count_operations(folder: Path, hear: Callable[[int], object]) -> None:
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in FILE_OPERATIONS and str(arguments[0]).startswith(str(folder)):
            count += 1
            hear(count)

    sys.addaudithook(hook)


def _kill_at(number: int, count: int) -> None:
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)


def _write_number(into: Path, count: int) -> None:
    into.write_text(str(count))


# --- what is left ----------------------------------------------------------------------------------------------------


def outcome(run: Path) -> dict[str, Any]:
    """What a run ends with, to the last bit, but for its cost: its documents, and every loss that its journal holds."""
    if (run / "eval.json").exists():
        return {"eval.json": _document(run / "eval.json"), "eval.csv": (run / "eval.csv").read_text()}
    record = load_run(run)
    return {
        "pattern.json": _document(run / "pattern.json"),
        "curve.csv": (run / "curve.csv").read_text(),
        "nll": record.nll,
        "heldout": record.heldout and record.heldout.nll,
        "commits": record.commits,
        "proposals": record.proposals,
        "fisher": (record.fisher.drawn, record.fisher.true),
        "similarity": record.similarity,
    }


def _document(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    del document["cost"]
    return document


def scored_twice(run: Path) -> list[tuple[str, int]]:
    """(pattern, sequence) pairs that a search's journal holds more than once: nothing on disk is scored again."""
    seen, twice = set(), []
    for event in _losses(run):
        for letters in event["patterns"]:
            for sequence in range(*event["sequences"]):
                pair = (letters, sequence, event.get("set"))
                twice += [pair[:2]] if pair in seen else []
                seen.add(pair)
    return twice


def _losses(run: Path) -> list[Event]:
    return [event for event in Journal(run / "journal.jsonl").events() if event["event"] == "losses"]
