"""A strategy that is registered is known everywhere: asked for, searched by, journaled, reported and planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from test_search import LAYERS, START, MadeUp

from icsearch.commands.plan import plan
from icsearch.commands.progress import Quiet
from icsearch.commands.requests import CalibrationRequest, GreedyRequest
from icsearch.core.errors import IcsearchError
from icsearch.core.pattern import Pattern
from icsearch.report.page import render_page
from icsearch.report.view import view_run
from icsearch.runs.journal import Journal
from icsearch.runs.record import Choice, load_run
from icsearch.search.loop import Scoring, run_search
from icsearch.search.protocol import SearchTask
from icsearch.search.registry import STRATEGIES, make_strategy
from plan_fixtures import plan_request
from run_fixtures import MadeUpRun, events


class LastFirst:
    """Flips the last layers, whatever they cost: two are scored in each step."""

    def __init__(self, task: SearchTask) -> None:
        self.pattern = task.start
        self._left, self._step = task.num_shared, 0

    def ask(self) -> tuple[int, ...]:
        return self.pattern.full_layers[-2:] if self._step < self._left else ()

    def tell(self, sums: Mapping[int, Sequence[float]]) -> Choice:
        layer, self._step = max(sums), self._step + 1
        self.pattern = self.pattern.flip(layer)
        return Choice(self._step, layer, self.pattern.letters, tuple(sorted(sums)), ())


@pytest.fixture
def last_first(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(STRATEGIES, "last-first", LastFirst)
    return "last-first"


def test_it_is_searched_by_journaled_and_reported(last_first: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    start = {**events(MadeUpRun())[0], **START, "options": {**START["options"], "strategy": last_first}}
    journal.append({**start, "num_layers": LAYERS, "blocks": [[0, LAYERS]]})
    task = SearchTask(Pattern.full(LAYERS), frozenset(), 3, 1, tuple(START["tokens"]))
    run_search(Scoring(journal, load_run(tmp_path), MadeUp(), Quiet()), make_strategy(task, last_first))
    record = load_run(tmp_path)
    assert record.finished
    assert [commit.layer for commit in record.commits] == [5, 4, 3]
    assert "last-first" in render_page([view_run(record)])


def test_it_can_be_asked_for_and_is_planned(last_first: str) -> None:
    request = GreedyRequest(CalibrationRequest("demo", "demo"), Path("out"), strategy=last_first)
    assert request.strategy == last_first
    for forecasts in plan(plan_request("demo", "1xH200", sequences=4, seq_len=None)).forecasts.values():
        assert [forecast.strategy for forecast in forecasts] == ["fisher", "exact", last_first]
        assert forecasts[2].layer_evaluations < forecasts[1].layer_evaluations


def test_others_are_refused() -> None:
    with pytest.raises(IcsearchError, match="--strategy 'last-first' is unknown: give exact"):
        GreedyRequest(CalibrationRequest("demo", "demo"), Path("out"), strategy="last-first")
