"""The trackers of accelerate, one run of each: opened when there is something to say, continued where that works."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from icsearch.core.errors import IcsearchError
from icsearch.core.files import make_directory
from icsearch.core.jsonfile import OBJECT, TEXT, FieldError, check_fields, read_object, whole, write_object
from icsearch.tracking.rows import MakeRow, Row, configuration

TRACKING_FORMAT = "icsearch.tracking/1"
STATE_NAME = "tracking.json"
PROJECT = "icsearch"
_SHOWS_MARKDOWN = ("tensorboard",)  # the others without tables take numbers only


class TrackerError(IcsearchError):
    """A tracker that is unknown or not installed, or a tracking.json that cannot be used."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse what accelerate does not know, and trackers whose package is missing. Raises TrackerError."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    missing = set(LoggerType.list()) - {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = " or ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise TrackerError(f"--tracker {name!r} is unknown to accelerate: give {known}")
        if name in missing:
            raise TrackerError(f"--tracker {name} needs a package that is not installed: pip install {name}")


class RunTracker:
    """One tracker of one run, and how many of the run's rows it has been told.

    A tracker that can continue its own run in another process (TensorBoard, Weights & Biases) is told the rows that
    it lacks, by RUN/tracking.json, written behind each row; a process that is killed between the two tells that one
    row again. The others begin a run of their own in each process that has something new, and are told all rows.
    """

    def __init__(self, name: str, out: Path, start: Mapping[str, Any]) -> None:
        self.name = name
        self._start = start
        self._state = out / STATE_NAME
        self._run = _digest(start)
        self._folder = out / "tracking" / self._run[:8]
        self._tracker: Any = None
        self._told: int | None = None

    def tell(self, rows: Sequence[MakeRow]) -> None:
        """Log the rows that the tracker lacks of these, which begin with the run's first."""
        if self._told is None:
            before = int(_read_state(self._state, self._run).get(self.name, 0))
            if before == len(rows):
                return
            self._told = before if self._continuation() is not None else 0
        for make in rows[self._told :]:
            self._log(make())
            self._told += 1
            self._remember(self._told)

    def close(self) -> None:
        """End the tracker's run, if it was begun."""
        if self._tracker is not None:
            self._tracker.finish()

    def _log(self, row: Row) -> None:
        tracker = self._opened()
        values: dict[str, Any] = dict(row.values)
        if row.table is not None and hasattr(tracker, "log_table"):
            data = [list(line) for line in row.table.data]
            tracker.log_table(row.table.name, columns=list(row.table.columns), data=data, step=row.step)
        elif row.table is not None and self.name in _SHOWS_MARKDOWN:
            values[row.table.name] = row.table.markdown()
        elif row.table is not None:
            values |= row.table.numbers
        tracker.log(values, step=row.step)

    def _opened(self) -> Any:
        """The tracker, its run begun or continued; its options are stored when it begins."""
        if self._tracker is None:
            self._tracker = _begin(self.name, self._folder, self._continuation())
            if not self._told:
                self._tracker.store_init_configuration(configuration(self._start))
        return self._tracker

    def _continuation(self) -> dict[str, Any] | None:
        """What makes the tracker continue its run of an earlier process; None where it cannot."""
        makers: dict[str, Callable[[], dict[str, Any]]] = {
            "tensorboard": dict,
            "wandb": lambda: {
                "id": self._run[:16],
                "resume": "allow",
                "name": self._state.parent.resolve().name,
                "dir": str(self._folder),
            },
        }
        return makers[self.name]() if self.name in makers else None

    def _remember(self, told: int) -> None:
        rows = {**_read_state(self._state, self._run), self.name: told}
        write_object(self._state, {"format": TRACKING_FORMAT, "run": self._run, "rows": rows})


def _begin(name: str, folder: Path, continuation: dict[str, Any] | None) -> Any:
    """A tracker of accelerate, started. Only rank 0 comes here, so it need not ask who it is."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers write to its log, which needs this
    make_directory(folder)
    kind = LOGGER_TYPE_TO_CLASS[name]
    where = (folder,) if kind.requires_logging_directory else ()
    tracker = kind(PROJECT, *where, **(continuation or {}))
    tracker.start()
    return tracker


def _digest(start: Mapping[str, Any]) -> str:
    """Names a run: --fresh begins another one in the same directory."""
    return hashlib.sha256(json.dumps(start, sort_keys=True, default=str).encode()).hexdigest()


def _read_state(path: Path, run: str) -> dict[str, Any]:
    """How many rows each tracker has been told of this run; empty where there is no file, or it is another run's."""
    if not path.exists():
        return {}
    expected, advice = "what an earlier --tracker wrote", "remove it, and all rows are logged again"
    state = read_object(path, expected=expected, advice=advice, error=TrackerError, version=TRACKING_FORMAT)
    try:
        check_fields(state, {"run": TEXT, "rows": OBJECT})
        check_fields(state["rows"], dict.fromkeys(state["rows"], whole(0)))
    except FieldError as error:
        raise TrackerError(f"{path} is damaged ({error}): {advice}") from None
    rows: dict[str, Any] = state["rows"]
    return rows if state["run"] == run else {}
