"""Trackers of accelerate beside a real search: TensorBoard's own files read back, resumed runs, trackers that fail."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import several
import tiny
from icsearch.cli import app
from icsearch.commands.greedy import greedy
from icsearch.commands.progress import Quiet
from icsearch.commands.requests import TRACKERS, CalibrationRequest, GreedyRequest
from icsearch.runs.record import RunRecord
from icsearch.tracking.listener import Tracked, tracked
from icsearch.tracking.trackers import STATE_NAME

Steps = list[tuple[int, Any]]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tokens(tmp_path_factory.mktemp("few"), sequences=2, length=24)


def search(checkpoint: Path, tokens: Path, out: Path, *more: object) -> int:
    command = ["greedy", checkpoint, "--calibration", tokens, "--num-shared", 3, "--out", out, "--quiet", *more]
    return app._run([str(part) for part in command], debug=False)


def logged(out: Path) -> dict[str, Steps]:
    """What TensorBoard shows of a run: tag to (step, value), whatever files it is in, in the order of steps."""
    found: dict[str, Steps] = {}
    for folder in sorted({path.parent for path in out.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((one.step, one.value) for one in events.Scalars(tag))
        for tag in events.Tags()["tensors"]:
            texts = [(one.step, one.tensor_proto.string_val[0].decode()) for one in events.Tensors(tag)]
            found.setdefault(tag, []).extend(texts)
    # Files of one second are read by a number in their names as text: 10 before 9.
    return {tag: sorted(values, key=itemgetter(0)) for tag, values in found.items()}


def document(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "pattern.json").read_text())
    return content


def check_whole(out: Path) -> None:
    """Every step of pattern.json is logged once, with its figures, and each with its table."""
    shown, steps = logged(out), document(out)["steps"]
    losses = [document(out)["baseline_loss"], *(step["loss"] for step in steps)]
    assert [step for step, _ in shown["loss"]] == [0, 1, 2, 3]
    assert [value for _, value in shown["loss"]] == pytest.approx(losses, rel=1e-6)  # written as float32
    for name in ("delta", "std_err"):
        assert [value for _, value in shown[name]][1:] == pytest.approx([step[name] for step in steps], rel=1e-6)
    assert [value for _, value in shown["retention"]] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6])
    tables = shown["candidates/text_summary"]
    assert [step for step, _ in tables] == [1, 2, 3]
    assert [text.count("\n") - 1 for _, text in tables] == [5, 4, 3]


def test_names_are_accelerates() -> None:
    assert set(TRACKERS) == set(LoggerType.list()) - {"all"}


def test_a_search_in_tensorboard(glm_checkpoint: Path, few: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert search(glm_checkpoint, few, out, "--tracker", "tensorboard", "--tracker", "tensorboard") == 0
    check_whole(out)


def test_a_finished_run_is_told_afterwards_and_only_once(glm_checkpoint: Path, few: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert search(glm_checkpoint, few, out) == 0
    assert not (out / STATE_NAME).exists()
    for _ in range(2):
        assert search(glm_checkpoint, few, out, "--tracker", "tensorboard") == 0
        check_whole(out)


class EndsAt(Quiet):
    """Ends the run behind the commit of a step, as a signal does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def committed(self, record: RunRecord) -> None:
        if len(record.commits) == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("told_first", [True, False], ids=["told", "a gap"])
def test_a_resumed_run_is_told_what_is_missing(
    glm_checkpoint: Path, few: Path, tmp_path: Path, told_first: bool
) -> None:
    """Interrupted before or behind the moment in which the tracker hears of a step."""
    request = GreedyRequest(CalibrationRequest(str(glm_checkpoint), str(few)), out=tmp_path / "run", num_shared=3)
    said: list[str] = []
    ends = EndsAt(2)
    with pytest.raises(KeyboardInterrupt):
        if told_first:
            with tracked(Quiet(), ["tensorboard"], request.out, said.append) as heard:
                greedy(request, Behind(heard, ends))
        else:
            with tracked(ends, ["tensorboard"], request.out, said.append) as heard:
                greedy(request, heard)
    expected = [0, 1, 2] if told_first else [0, 1]
    assert [step for step, _ in logged(request.out)["loss"]] == expected
    assert search(glm_checkpoint, few, request.out, "--tracker", "tensorboard") == 0
    check_whole(request.out)
    assert said == []


class Behind(Tracked):
    """Passes on to trackers first, to the other listener then."""

    def __init__(self, heard: Tracked, then: Quiet) -> None:
        self.__dict__.update(heard.__dict__)
        self._then = then

    def committed(self, record: RunRecord) -> None:
        super().committed(record)
        self._then.committed(record)


def test_a_fresh_run_is_another_one(glm_checkpoint: Path, few: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert search(glm_checkpoint, few, out, "--tracker", "tensorboard") == 0
    first = {path.name for path in (out / "tracking").iterdir()}
    journal = out / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    start = {**json.loads(lines[0]), "time": "2026-01-01T00:00:00+00:00"}  # a search begun at another time
    journal.write_text("".join([json.dumps(start) + "\n", *lines[1:]]))
    assert search(glm_checkpoint, few, out, "--tracker", "tensorboard") == 0
    second = {path.name for path in (out / "tracking").iterdir()} - first
    assert len(second) == 1
    assert [step for step, _ in logged(out / "tracking" / second.pop())["loss"]] == [0, 1, 2, 3]


def test_an_evaluation_in_tensorboard(glm_checkpoint: Path, few: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    arguments = ["eval", glm_checkpoint, "--calibration", few, "--pattern", "uniform:1/2", "--out", out, "--quiet"]
    for _ in range(2):
        assert app._run([*map(str, arguments), "--tracker", "tensorboard"], debug=False) == 0
    rows = json.loads((out / "eval.json").read_text())["rows"]
    shown = logged(out)
    for row in rows:
        assert shown[f"{row['name']}/loss"] == [(0, pytest.approx(row["loss"], rel=1e-6))]
    (step, table), *rest = shown["patterns/text_summary"]
    assert (step, rest) == (0, [])
    assert all(row["pattern"] in table for row in rows)


# --- other trackers -----------------------------------------------------------------------------------------------


class Lines(tracking.GeneralTracker):
    """A tracker of numbers alone, as most are: one JSON line for each call, in a file of its own for each process."""

    name = "lines"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: Path) -> None:
        super().__init__()
        self.folder = Path(logging_dir)

    @property
    def tracker(self) -> Path:
        return self.file

    def start(self) -> None:
        self.file = self.folder / f"{len(list(self.folder.iterdir()))}.jsonl"

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._write({"configuration": values})

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        self._write({"step": step, **values})

    def finish(self) -> None:
        self._write({"finished": True})

    def _write(self, values: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(values) + "\n")


class Unreachable(Lines):
    """Fails from the second step on, as a server that goes away does."""

    name = "unreachable"

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        if step == 2:
            raise ConnectionError("the server\nwent away")
        super().log(values, step)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for kind in (Lines, Unreachable):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, kind.name, kind)
    yield


def lines_of(out: Path) -> list[list[dict[str, Any]]]:
    files = sorted((out / "tracking").rglob("*.jsonl"), key=os.path.getmtime)
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in files]


@pytest.mark.usefixtures("registered")
def test_a_tracker_of_numbers_begins_anew_and_is_told_all(glm_checkpoint: Path, few: Path, tmp_path: Path) -> None:
    request = GreedyRequest(CalibrationRequest(str(glm_checkpoint), str(few)), out=tmp_path / "run", num_shared=3)
    with pytest.raises(KeyboardInterrupt), tracked(EndsAt(2), ["lines"], request.out, print) as heard:
        greedy(request, heard)
    for _ in range(2):  # the second time nothing is new
        assert search(glm_checkpoint, few, request.out, "--tracker", "lines") == 0
    first, second = lines_of(request.out)
    assert [line.get("step") for line in first] == [None, 0, 1, None]
    assert [line.get("step") for line in second] == [None, 0, 1, 2, 3, None]
    assert second[0]["configuration"]["num_shared"] == 3
    assert second[-1] == {"finished": True}
    assert sum(name.startswith("candidates/layer_") for name in second[2]) == 5


@pytest.mark.usefixtures("registered")
def test_a_tracker_that_fails_costs_a_note_and_nothing_else(
    glm_checkpoint: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, without = tmp_path / "run", tmp_path / "without"
    assert search(glm_checkpoint, few, without) == 0
    capsys.readouterr()
    assert search(glm_checkpoint, few, out, "--tracker", "unreachable", "--tracker", "tensorboard") == 0
    err = capsys.readouterr().err
    assert err.count("tracker unreachable failed (ConnectionError: the server): the run goes on") == 1
    assert err.count("\n") == 1
    check_whole(out)
    cost = {"cost": None}
    assert {**document(out), **cost} == {**document(without), **cost}


def test_a_tracker_that_cannot_begin_costs_a_note(
    glm_checkpoint: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "tracking").write_text("in the way")
    assert search(glm_checkpoint, few, out, "--tracker", "tensorboard") == 0
    assert capsys.readouterr().err.count("tracker tensorboard failed") == 1
    assert document(out)["steps"]


def test_a_damaged_state_is_said_and_costs_nothing(
    glm_checkpoint: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for content in ("{}", '{"format": "icsearch.tracking/1", "run": "x", "rows": {"tensorboard": -1}}'):
        (out / STATE_NAME).write_text(content)
        assert search(glm_checkpoint, few, out, "--tracker", "tensorboard") == 0
        assert "remove it, and all rows are logged again" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.alone
def test_of_several_processes_the_first_one_logs(glm_checkpoint: Path, few: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["greedy", glm_checkpoint, "--calibration", few, "--num-shared", 3, "--out", out]
    result = several.launched(several.torchrun(2), [*command, "--tracker", "tensorboard"])
    assert result.returncode == 0, result.stderr
    check_whole(out)


def test_a_search_by_kl_logs_it(glm_checkpoint: Path, few: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert search(glm_checkpoint, few, out, "--tracker", "tensorboard", "--objective", "kl") == 0
    steps = document(out)["steps"]
    assert [value for _, value in logged(out)["kl"]] == pytest.approx([0, *(step["kl"] for step in steps)], rel=1e-6)


@pytest.mark.parametrize("name", ["abacus", next(n for n in TRACKERS if n not in tracking.get_available_trackers())])
def test_what_cannot_be_used_is_refused_before_anything_is_made(
    glm_checkpoint: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert search(glm_checkpoint, few, tmp_path / "run", "--tracker", name) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert ("pip install" in line) == (name in TRACKERS)
    assert not (tmp_path / "run").exists()
