"""How the processes of a run live and end together: signs of life, and one reason to end that all of them hear.

Each process tells the others twice a second that it lives, and what it waits for, through the launcher's store. The
first that has a reason to end writes it there: a failure of its own, a process that gave no sign of life for the
time-out, or that all have waited for one another for as long. All the others end for that reason, whatever they are
at: a thread of its own raises it in the main thread, and ends the process where that is not heard. So a process that
is killed, stopped, or cut off leaves no other one behind.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from torch.distributed import DistError

from icsearch.core.endings import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_TERMINATED
from icsearch.core.errors import IcsearchError
from icsearch.core.signals import ENDING, Insistent, Interrupted, Terminated
from icsearch.core.text import first_line

BEAT = 0.5  # seconds between two signs of life
SILENT = 4 * BEAT  # from here on a process is taken for dead, where a launcher tells all others to end
GRACE = 5.0  # seconds that the main thread has for an orderly end
DEFAULT_TIMEOUT = 60.0  # seconds without a sign of life


@dataclass(frozen=True)
class End:
    """How the processes of a run ended: the exit status, the rank that says so, and why."""

    status: int
    rank: int
    text: str


class Ended(IcsearchError):
    """The run of several processes has ended, for a reason that one of them gave."""

    def __init__(self, end: End, rank: int) -> None:
        super().__init__(f"rank {rank}: {end.text}; the same command continues, also with other numbers of processes")
        self.exit_status = end.status


@dataclass
class _Life:
    """What is known of another process: its last sign of life, and when that was new."""

    beat: int
    waits_for: str
    moves: int
    told: bool
    seen: float


class Heartbeat:
    """The life of this process among `size`, and what it knows of the others.

    `store` is a connection of its own to the store that all share, `where` names it. `leave` ends the process at once.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Any,  # a torch.distributed.Store
        where: str,
        timeout: float = DEFAULT_TIMEOUT,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.rank = rank
        self.timeout = timeout
        self.end: End | None = None
        self._store = store
        self._where = where
        self._leave = leave
        self._others = [other for other in range(size) if other != rank]
        self._lives: dict[int, _Life] = {}
        self._proposed: tuple[End, float] | None = None
        self._waits_for, self._moves, self._beats = "", 0, 0
        self._told_at: float | None = None
        self._interrupted_at: float | None = None
        self._standing_since: tuple[tuple[int, ...], float] | None = None
        self._looked = time.monotonic()
        self._unwinding = False
        self.signalled = 0  # the exit status by the first signal that this process was sent
        self._insistent = Insistent(self.reason, give_up=lambda: None)  # the guard does
        self._closed = threading.Event()
        self._changed = threading.Event()
        self._wakeup, self._signals = socket.socketpair()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._live, self._guard)]

    # --- the main thread ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to live; signals of this process are its business from here on. All others must have announced it."""
        for end in (self._wakeup, self._signals):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in ENDING:
            signal.signal(number, self._on_signal)
        for thread in self._threads:
            thread.start()

    def announce(self) -> None:
        """The first sign of life, before the others are looked at."""
        self._store.compare_set("end", "", "")
        self._store.compare_set("timeout", "", json.dumps(self.timeout))
        self._beat()

    def close(self) -> None:
        """Stop watching: the process is at its end."""
        self.unwind()
        self._closed.set()
        self._changed.set()
        signal.set_wakeup_fd(-1)

    @contextlib.contextmanager
    def waiting(self, for_what: str) -> Iterator[None]:
        """Within the block the others see what this process waits for."""
        self._waits_for, self._moves = for_what, self._moves + 1
        try:
            yield
        finally:
            self._waits_for, self._moves = "", self._moves + 1

    def check(self) -> None:
        """Raise what ends this process, if there is something."""
        if self.end is not None:
            self.unwind()
            raise self.reason()

    def unwind(self) -> None:
        """The main thread is on its way to the end: from here on no signal raises anything in it."""
        self._unwinding = True
        self._insistent.heard()

    def reason(self) -> BaseException:
        """The reason to end as an exception: Ended, or what a signal would have raised here."""
        if self.end is None or self.end.status == EXIT_INTERRUPTED:
            return Interrupted()
        return Terminated() if self.end.status == EXIT_TERMINATED else Ended(self.end, self.rank)

    def declare(self, status: int, text: str) -> End:
        """End the run for this reason, unless there is one already; returns the reason that counts."""
        own = End(status, self.rank, text)
        if self.end is None:
            self.unwind()
            try:
                self._write(own)
            except DistError:  # nobody can be told; they will miss this process
                self.end = self.end or own
        return self.end or own

    def lost(self, rank: int, why: str) -> BaseException:
        """What to raise where a message to or from another process failed: its own reason to end, if it gave one."""
        deadline = time.monotonic() + SILENT
        while self.end is None and time.monotonic() < deadline:
            time.sleep(BEAT / 5)
        self.declare(EXIT_FAILURE, f"rank {rank} is gone ({why})")
        return self.reason()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """In the main thread. Why SIGTERM came, the guard finds out first."""
        if self.end is None:  # else it can be the guard's
            self.signalled = self.signalled or 128 + number
        if self._unwinding or (number == signal.SIGTERM and self.end is None):
            return
        self._unwinding = True
        self._insistent.throw()

    # --- the thread that talks to the others ----------------------------------------------------------------------

    def _live(self) -> None:
        while not self._closed.is_set():
            try:
                self._beat()
                if self._proposed is not None and self.end is None:
                    self._write(self._proposed[0])
                self._look()
            except DistError as error:
                self._learn(End(EXIT_FAILURE, self.rank, f"{self._where} is gone ({first_line(error)})"))
                return
            except MemoryError:  # this thread must live for as long as it takes to tell the others
                self._propose(EXIT_FAILURE, f"rank {self.rank} failed: out of memory", time.monotonic())
            self._changed.wait(BEAT)
            self._changed.clear()

    def _beat(self) -> None:
        self._beats += 1
        sign = [self._beats, self._waits_for, self._moves, self._told_at is not None]
        self._store.set(f"beat/{self.rank}", json.dumps(sign))

    def _write(self, end: End) -> None:
        """Make this the reason to end, unless another process was faster."""
        written = self._store.compare_set("end", "", json.dumps(asdict(end)))
        self._learn(End(**json.loads(written)))

    def _learn(self, end: End) -> None:
        if self.end is None:
            self.end = end

    def _look(self) -> None:
        """Read the reason to end, the time-out, and the signs of life of all others."""
        end, timeout, *beats = self._store.multi_get(["end", "timeout", *(f"beat/{other}" for other in self._others)])
        now = time.monotonic()
        if end:
            self._learn(End(**json.loads(end)))
        self.timeout = json.loads(timeout)
        for other, sign in zip(self._others, beats, strict=True):
            beat, waits_for, moves, told = json.loads(sign)
            known = self._lives.get(other)
            if known is None or beat != known.beat:
                self._lives[other] = _Life(beat, waits_for, moves, told, now)
        self._looked = now

    # --- the thread that judges, and ends the process where the main thread does not -------------------------------

    def _guard(self) -> None:
        deadline = None
        while not self._closed.is_set():
            if select.select([self._signals], [], [], BEAT)[0]:  # a signal, or one beat
                for number in self._signals.recv(64):
                    if number == signal.SIGTERM:
                        self._told_at = self._told_at or time.monotonic()
                    elif number == signal.SIGINT:
                        self._interrupted_at = self._interrupted_at or time.monotonic()
            now = time.monotonic()
            if self.end is None:
                self._judge(now)
            elif deadline is None:
                deadline = now + GRACE
                _thread.interrupt_main()
            elif now > deadline:
                self._end_now(self.end)

    def _judge(self, now: float) -> None:
        """Is there a reason to end?"""
        if self._proposed is not None:
            if now - self._proposed[1] > SILENT:  # it could not be written
                self._learn(self._proposed[0])
        elif (told := self._told_to_end(now)) is not None:
            self._propose(*told, now)
        elif now - self._looked > self.timeout:
            self._learn(End(EXIT_FAILURE, self.rank, f"{self._where} has not answered for {self.timeout:.0f} s"))
        elif silent := self._silent(now, self.timeout):
            gone = f"{_ranks(silent)} gave no sign of life for {self.timeout:.0f} s: ended, stopped or out of reach"
            self._propose(EXIT_FAILURE, gone, now)
        elif self._stands_still(now):
            waits = {self.rank: self._waits_for, **{other: life.waits_for for other, life in self._lives.items()}}
            what = ", ".join(f"rank {rank} for {waits[rank]}" for rank in sorted(waits))
            still = f"nothing has moved for {self.timeout:.0f} s, all wait: {what}; is the network down?"
            self._propose(EXIT_FAILURE, still, now)

    def _propose(self, status: int, text: str, now: float) -> None:
        """Have the other thread write this reason to end."""
        self._proposed = End(status, self.rank, text), now
        self._changed.set()

    def _told_to_end(self, now: float) -> tuple[int, str] | None:
        """What a signal means: SIGTERM is also what a launcher sends to all when a process of the run has died."""
        if self._interrupted_at is not None and now - self._interrupted_at > 2 * BEAT:
            return EXIT_INTERRUPTED, "interrupted"
        if self._told_at is None or now - self._told_at < SILENT + BEAT:
            return None
        # one that was told too ends without a word, and has its own reason
        if silent := [other for other in self._silent(now, SILENT) if not self._lives[other].told]:
            return EXIT_FAILURE, f"{_ranks(silent)} is gone: killed, or ended without a word"
        return EXIT_TERMINATED, "told to end (SIGTERM)"

    def _silent(self, now: float, limit: float) -> list[int]:
        """The others without a sign of life for so many seconds."""
        return [other for other, life in self._lives.items() if now - life.seen > limit]

    def _stands_still(self, now: float) -> bool:
        """True where all wait for one another, and have for the time-out: messages are lost."""
        lives = self._lives.values()
        moves = (self._moves, *(life.moves for life in lives))
        if not self._waits_for or not all(life.waits_for for life in lives):
            self._standing_since = None
        elif self._standing_since is None or self._standing_since[0] != moves:
            self._standing_since = moves, now
        return self._standing_since is not None and now - self._standing_since[1] > self.timeout

    def _end_now(self, end: End) -> None:
        """The main thread has not heard: say why, and end the process."""
        if self._closed.is_set():
            return
        if end.status == EXIT_FAILURE or (self.rank == 0 and end.status > EXIT_FAILURE):
            sys.stderr.write(f"icsearch: {Ended(end, self.rank)}\n")
            sys.stderr.flush()
        self._leave(end.status)


def _ranks(ranks: list[int]) -> str:
    return f"rank {', '.join(map(str, sorted(ranks)))}"
