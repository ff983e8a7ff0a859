"""An append-only journal of JSON lines. State changes only by writing an event and replaying it.

Each event is one line, written with a single call and fsynced before it counts. A process can die at any
byte: a torn last line is cut off before the next event is appended, and everything before it is kept. After a
power cut, a last line may have its full length and zeros for what never came to the disk: that is torn too.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from icsearch.core.errors import JournalError, PatternError
from icsearch.core.files import naming
from icsearch.core.jsonfile import unambiguous

JOURNAL_FORMAT = "icsearch.journal/1"
Event = dict[str, Any]
RecordT = TypeVar("RecordT", bound="Record")


class Journal:
    """The events of one run, in `path`. Read it with `events`, add with `append`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        """True once a whole first event is on disk; raises JournalError where the path cannot be read."""
        try:
            with open(self.path, "rb") as file:
                return _is_whole(file.readline())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, ValueError) as error:  # a directory, a name too long, a NUL byte
            raise _unreadable(self.path, error) from None

    def events(self) -> list[Event]:
        """All whole events. A torn tail is ignored; damage before it is an error that names the line."""
        try:
            data = self.path.read_bytes()
        except (OSError, ValueError) as error:
            raise _unreadable(self.path, error) from None
        *lines, _ = data.split(b"\n")  # what follows the last newline is torn
        if lines and not _is_whole(lines[-1] + b"\n"):
            lines.pop()
        return [self._parse(line, number) for number, line in enumerate(lines, start=1)]

    def append(self, event: Event) -> None:
        """Write one event durably. The event counts once this returns."""
        line = json.dumps(event, allow_nan=False, separators=(",", ":")) + "\n"
        with naming(self.path):
            self._cut_torn_tail()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                data = line.encode()
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _parse(self, line: bytes, number: int) -> Event:
        try:
            event = json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=unambiguous)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict) or "event" not in event:
            raise JournalError(
                f"{self.path} is damaged at line {number}: expected a JSON event; "
                "restore the file, or start over with --fresh"
            )
        if number == 1 and event.get("format") != JOURNAL_FORMAT:
            raise JournalError(
                f"{self.path} has format {event.get('format')!r}: expected {JOURNAL_FORMAT!r}; "
                "continue it with the version that wrote it, or start over with --fresh"
            )
        return event

    def _cut_torn_tail(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb+") as file:
            size = file.seek(0, os.SEEK_END)
            end = _end_of_last_line(file, size)
            start = _end_of_last_line(file, end - 1)
            file.seek(start)
            if not _is_whole(file.read(end - start)):
                end = start
            if end < size:
                file.truncate(end)
                os.fsync(file.fileno())


def apply_all(events: Iterable[Event], apply: Callable[[Event], None]) -> None:
    """Hand events to `apply`, of a record or a check; raises JournalError, with the line, where one does not fit."""
    for number, event in enumerate(events, start=1):
        try:
            apply(event)
        except (ValueError, PatternError) as error:
            raise JournalError(
                f"journal line {number} is damaged ({error}): restore the file, or start over with --fresh"
            ) from None


class Record(ABC):
    """What a journal says, replayed. It changes by `apply` alone, so that live and resumed runs share one path."""

    start: Event
    notes: list[str]

    @classmethod
    def replay(cls: type[RecordT], events: Iterable[Event]) -> RecordT:
        """The state behind these events; raises JournalError, with the line, where one does not fit."""
        record = cls()
        apply_all(events, record.apply)
        return record

    @abstractmethod
    def check(self, event: Event) -> None:
        """Raise ValueError or PatternError where the event does not fit what is before it."""

    @abstractmethod
    def apply(self, event: Event) -> None:
        """Take one event in; raises as `check` does, and then changes nothing."""

    @property
    def tokens(self) -> list[int]:
        """Counted tokens of each sequence."""
        return list(self.start["tokens"])


def _unreadable(path: Path, error: OSError | ValueError) -> JournalError:
    reason = getattr(error, "strerror", None) or error
    shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:196]}..."
    if "\0" in shown:
        shown = repr(shown)
    return JournalError(f"cannot read {shown}: {reason}; give the RUN directory of a search")


def _refuse_constant(name: str) -> None:
    """NaN and Infinity, which Python's reader takes and the journal never holds."""
    raise ValueError(name)


def _is_whole(line: bytes) -> bool:
    """Whether a last line was written to its end. JSON has no zero bytes: they stand where nothing came to the disk."""
    return line.endswith(b"\n") and b"\0" not in line


def _end_of_last_line(file: Any, size: int, block: int = 65536) -> int:
    """Byte offset just behind the last newline, 0 if there is none."""
    position = size
    while position > 0:
        start = max(0, position - block)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + int(found) + 1
        position = start
    return 0
