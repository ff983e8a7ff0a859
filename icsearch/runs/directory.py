"""A RUN directory: one process at a time, one journal, and a refusal to continue somebody else's search."""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from icsearch.core.errors import JournalError
from icsearch.core.files import make_directory, refusing, remove_stale_temporaries, sync_directory
from icsearch.runs.journal import Event, Journal, apply_all
from icsearch.runs.record import JOURNAL_NAME
from icsearch.runs.schema import check_options

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from filelock import AcquireReturnProxy, SoftFileLock

RESULT_NAMES = (
    "pattern.json",
    "curve.csv",
    "curve.png",
    "report.html",
    "similarity.npz",
    "similarity.json",
    "fisher.npz",
    "fisher.json",
    "eval.json",
    "eval.csv",
)
_LOCK_NAME, _OWNER_NAME = ".lock", ".lock.owner"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)  # some network file systems
_MUST_AGREE = ("options", "model", "calibration")
# Names, and what follows from a fingerprint: runs of earlier versions have not all of them.
_MAY_DIFFER = ("name_or_path", "revision", "source", "source_revision", "sequences", "tokens", "count")
_WHERE_BOTH_HAVE = ("refine_on",)  # runs with a refinement and without differ in an option already
_SHORT = 24  # characters of a value that are shown whole
_BEFORE_THE_OPTION = {"kernels": "reference"}  # what runs did that do not record it yet

_held: weakref.WeakSet[TextIO] = weakref.WeakSet()  # locks of this process


def _give_up_locks() -> None:
    """In a fork: its copy of a lock would hold the directory for a run that is dead."""
    for lock in list(_held):
        lock.close()


if fcntl:
    os.register_at_fork(after_in_child=_give_up_locks)  # once: what is registered stays while the process lives


class RunDirectory:
    """The journal of one search or evaluation, and its results."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = Journal(path / JOURNAL_NAME)

    @contextlib.contextmanager
    def locked(self) -> Iterator[str]:
        """Hold the directory for this process; yields what is to be known about it, mostly nothing.

        The lock dies with its process, however that dies; where there are no such locks, a file names host and process
        instead, and whoever comes next on this host removes it. A directory that was made for a run which then never
        began is not left behind. Raises JournalError.
        """
        made_now = not self.path.exists()
        with refusing(lambda reason: JournalError(f"cannot write to {self.path} ({reason}): give another --out")):
            lock = self._take_lock()
        with lock:
            remove_stale_temporaries(self.path)
            try:
                yield "" if lock in _held else f"no locks in {self.path}: {_OWNER_NAME} there says who is at work"
            finally:
                with contextlib.suppress(OSError):  # what stands in the way is no reason to hide the run's own outcome
                    if made_now and {path.name for path in self.path.iterdir()} <= {_LOCK_NAME, _OWNER_NAME}:
                        for name in (_LOCK_NAME, _OWNER_NAME):
                            (self.path / name).unlink(missing_ok=True)
                        self.path.rmdir()

    def _take_lock(self) -> TextIO | AcquireReturnProxy[SoftFileLock]:
        """The lock, ours.

        A run that never began may have taken file and directory away since the file was opened: then again.
        """
        path = self.path / _LOCK_NAME
        while True:
            make_directory(self.path)
            lock = path.open("w")
            ours = _acquire(lock)
            if ours is None:
                lock.close()
                return self._take_soft_lock()
            if not ours:
                lock.close()
                raise self._taken("")
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    _held.add(lock)
                    return lock
            lock.close()

    def _take_soft_lock(self) -> AcquireReturnProxy[SoftFileLock]:
        """A file that names its owner, who removes it; that of a process which died here does not count."""
        from filelock import SoftFileLock, Timeout  # most runs need it not, and every command would wait for it

        try:
            return SoftFileLock(self.path / _OWNER_NAME, timeout=0).acquire()
        except Timeout:
            raise self._taken(f" (if not, remove {self.path / _OWNER_NAME})") from None

    def _taken(self, more: str) -> JournalError:
        return JournalError(f"another icsearch is running in {self.path}{more}: wait for it, or give another --out")

    def existing(self) -> list[Event]:
        """The events of the run so far; empty where none was started. Raises JournalError for damaged options."""
        events = self.journal.events() if self.journal.exists() else []
        try:
            apply_all(events[:1], check_options)
        except JournalError as error:
            raise JournalError(f"{self.journal.path}: {error}") from None
        return events

    def open(self, start: Event, existing: list[Event]) -> list[Event]:
        """Continue the existing run, or begin a new one with `start`: only now the last one's files go, no others."""
        if existing:
            return existing
        for name in (JOURNAL_NAME, *RESULT_NAMES):
            (self.path / name).unlink(missing_ok=True)
        sync_directory(self.path)  # nothing of the last run comes back behind a power cut
        self.journal.append(start)
        sync_directory(self.path)
        return [start]

    def check_same(self, existing: list[Event], wanted: Event) -> None:
        """Refuse to continue a run whose options, model or calibration are others; says which differ."""
        if not existing:
            return
        parts = [*_MUST_AGREE, *(part for part in _WHERE_BOTH_HAVE if part in wanted and part in existing[0])]
        differences = [line for part in parts for line in _differences(part, part_of(existing, part), wanted[part])]
        if differences:
            raise JournalError(
                f"{self.path} holds a run with other settings ({'; '.join(differences)}): "
                "repeat its command, give another --out, or start over with --fresh"
            )


def _acquire(file: TextIO) -> bool | None:
    """Lock an open file; False where another process has, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def part_of(existing: Sequence[Event], part: str) -> dict[str, Any]:
    """An object of a run's first event; empty where there is none or it is damaged."""
    found = existing[0].get(part) if existing else None
    return found if isinstance(found, dict) else {}


def _differences(part: str, found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Readable `key: found -> wanted` for each value that differs. Names and paths may; fingerprints may not."""
    lines = []
    if part == "options" and found.get("method") != wanted.get("method"):
        return [f"method {_short(found.get('method'))}, now {_short(wanted.get('method'))}"]  # all else follows
    if part == "options":
        found = {**{key: value for key, value in _BEFORE_THE_OPTION.items() if key in wanted}, **found}
    for key in sorted(found.keys() | wanted.keys()):
        if key in _MAY_DIFFER or found.get(key) == wanted.get(key):
            continue
        label = key if part == "options" else f"{part} {key}"
        there, now = _told(found.get(key), wanted.get(key))
        lines.append(f"{label} {there}, now {now}")
    return lines


def _told(there: Any, now: Any) -> tuple[str, str]:
    """Both values, short enough for a line: of long lists, the names of what only one of them has."""
    lists = isinstance(there, list) and isinstance(now, list)
    if not lists or max(len(str(there)), len(str(now))) <= _SHORT:
        return _short(there), _short(now)
    if sorted(map(str, there)) == sorted(map(str, now)):
        return "in one order", "in another"
    ours, theirs = _only_in(there, now), _only_in(now, there)
    if [one[:1] for one in ours] == [one[:1] for one in theirs]:  # of the same name, with other letters
        return _named(ours, 2), _named(theirs, 2)
    return _named(ours), _named(theirs)


def _only_in(some: list[Any], others: list[Any]) -> list[list[Any]]:
    """What one list has and another has not; each as a list that begins with its name."""
    return [one if isinstance(one, list) else [one] for one in some if one not in others]


def _named(some: list[list[Any]], words: int = 1) -> str:
    return ", ".join(" ".join(map(str, one[:words])) for one in some) or "no more"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHORT else f"{text[:12]}…"
