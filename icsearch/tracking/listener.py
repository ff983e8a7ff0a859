"""Hears a run as its display does, passes everything on, and tells trackers what is new. Nothing of it costs a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from icsearch.commands.progress import Passing
from icsearch.core.text import first_line
from icsearch.runs.record import RunRecord
from icsearch.search.loop import Progress
from icsearch.tracking.rows import MakeRow, eval_rows, run_rows
from icsearch.tracking.trackers import RunTracker, check_trackers


class Tracked(Passing):
    """A display with trackers beside it. What one of them raises is said once, and that one is left out from then."""

    def __init__(self, inner: Progress, names: Sequence[str], out: Path, say: Callable[[str], None]) -> None:
        super().__init__(inner)
        self._names = list(dict.fromkeys(names))
        self._out = out
        self._say = say
        self._trackers: dict[str, RunTracker] = {}

    def losses_known(self, record: RunRecord, step: int | str) -> None:
        super().losses_known(record, step)
        if step == 0:
            self.tell_run(record)

    def committed(self, record: RunRecord) -> None:
        super().committed(record)
        self.tell_run(record)

    def tried(self, record: RunRecord) -> None:
        super().tried(record)
        self.tell_run(record)

    def tell_run(self, record: RunRecord) -> None:
        """Log what trackers lack of a run, as far as it has come."""
        self._tell(record.start, run_rows(record))

    def tell_evaluation(self, document: Mapping[str, Any]) -> None:
        """Log an evaluation, the content of eval.json."""
        self._tell(document, eval_rows(document))

    def close(self) -> None:
        """End the trackers' runs."""
        for name in list(self._names):
            if name in self._trackers:
                self._guarded(name, self._trackers[name].close)

    def _tell(self, start: Mapping[str, Any], rows: Sequence[MakeRow]) -> None:
        for name in list(self._names):
            if name not in self._trackers:
                self._trackers[name] = RunTracker(name, self._out, start)
            self._guarded(name, partial(self._trackers[name].tell, rows))

    def _guarded(self, name: str, call: Callable[[], object]) -> None:
        """A tracker is another's code, and often a network: whatever it raises must not cost the run."""
        try:
            call()
        except Exception as error:
            self._names.remove(name)
            what = f"{type(error).__name__}: {first_line(error)}"
            self._say(f"tracker {name} failed ({what}): the run goes on without it; repeat the command to fill the gap")


@contextlib.contextmanager
def tracked(listener: Progress, names: Sequence[str], out: Path, say: Callable[[str], None]) -> Iterator[Tracked]:
    """The listener with these trackers beside it, closed at the end. Raises TrackerError for one that cannot be."""
    if names:
        check_trackers(names)
    heard = Tracked(listener, names, out, say)
    try:
        yield heard
    finally:
        heard.close()
