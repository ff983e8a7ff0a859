"""Memory that runs out over one branch too many: the plan shrinks, once, and the bits stay the same.

The limit that really bites is RLIMIT_AS, on the address space of a process, set just above what the same command
takes with fewer patterns at once.
"""

from __future__ import annotations

import ctypes
import resource
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_search import SEQUENCES, START, MadeUp, run, task
from test_search import outcome as record_outcome

import tiny
from fault_harness import Case, Commands, command, outcome, scored_twice
from icsearch.cli import app
from icsearch.commands.progress import Quiet
from icsearch.commands.requests import CalibrationRequest
from icsearch.commands.setup import batch_shape, open_model
from icsearch.core.errors import OutOfMemoryError
from icsearch.core.pattern import Pattern
from icsearch.model import loading, model
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.machine import is_out_of_memory, out_of_memory
from icsearch.runs.journal import Journal
from icsearch.runs.record import RunRecord
from icsearch.search.loop import Scores, Scoring, run_search
from icsearch.search.registry import make_strategy
from icsearch.sweep import measures
from icsearch.sweep.branches import Batch, BranchState, cut_batches
from icsearch.sweep.states import Keeping, StateStore
from icsearch.sweep.sweep import Sweeper, SweepScorer

pytestmark = pytest.mark.alone

GUESSING = "that of guessing among"  # what a random model is told of its loss
GONE = "memory ran out in a sweep of {} patterns; from there on at most {} at once"


# --- the loop, with made-up losses ------------------------------------------------------------------------------------


class Scarce(MadeUp):
    """Has memory for `most` patterns at once, and shrinks its plan so many times."""

    def __init__(self, most: int, shrinks: int = 1, patterns_per_sweep: int = 5) -> None:
        super().__init__(patterns_per_sweep)
        self.most, self.shrinks = most, shrinks

    def shrink(self, patterns: int) -> bool:
        self.patterns_per_sweep = max(1, patterns // 2)
        self.shrinks -= 1
        return self.shrinks >= 0

    def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Callable[[int], None]) -> Scores:
        if len(patterns) > self.most:
            raise out_of_memory(MemoryError("made up"))
        return super().score(patterns, wave, on_layer)


def notes(path: Path) -> list[str]:
    return [event["text"] for event in Journal(path).events() if event["event"] == "note"]


def test_the_plan_shrinks_and_the_search_goes_on(tmp_path: Path) -> None:
    expected = record_outcome(run(tmp_path / "whole", MadeUp()))
    scorer = Scarce(most=4)
    assert record_outcome(run(tmp_path / "j", scorer)) == expected
    assert len(scorer.scored) == len(set(scorer.scored))  # what was journaled before is not scored again
    assert [text.split(":")[0] for text in notes(tmp_path / "j")] == [GONE.format(5, 2)]


def test_only_once_then_the_run_ends_and_goes_on_later(tmp_path: Path) -> None:
    expected = record_outcome(run(tmp_path / "whole", MadeUp()))
    with pytest.raises(OutOfMemoryError, match="lower --memory .*the run continues where it stopped"):
        run(tmp_path / "j", Scarce(most=0))
    assert record_outcome(run(tmp_path / "j", Scarce(most=4))) == expected
    assert [text.split(":")[0] for text in notes(tmp_path / "j")] == [GONE.format(2, 1), GONE.format(5, 2)]


# --- the layer sweep's scorer -----------------------------------------------------------------------------------------


class Cramped(Sweeper):
    """Out of memory over more than `most` patterns at once, or with more than `most_kept` states kept beside."""

    most, most_kept = 10**9, 10**9

    def advance(self, starts: Mapping[Pattern, int], *more: Any, **others: Any) -> Any:
        self._allocate(len(starts))
        return super().advance(starts, *more, **others)

    def run(self, patterns: Sequence[Pattern], *more: Any, **others: Any) -> int:
        self._allocate(len(patterns))
        return super().run(patterns, *more, **others)

    def _allocate(self, patterns: int) -> None:
        if patterns > self.most or len(self.kept) > self.most_kept:
            raise out_of_memory(torch.OutOfMemoryError("made up"))


@pytest.fixture(scope="module")
def dsa(glm_checkpoint: Path) -> model.DsaModel:
    return loading.load(open_checkpoint(str(glm_checkpoint)), dtype="float32")


def search(dsa: model.DsaModel, path: Path, most: int, most_kept: int, budget: int = 10**9) -> tuple[RunRecord, Any]:
    """A whole search; and the store of the states that it kept."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, tiny.VOCABULARY, (SEQUENCES, 24), generator=generator)
    keeping = Keeping(len(dsa.layers), tuple(dsa.layer_indices), frozenset(range(1, 6)), 1)
    store: StateStore[BranchState] = StateStore(keeping, dsa.start_pattern, budget)
    sweeper = Cramped(dsa, store)
    sweeper.most, sweeper.most_kept = most, most_kept
    journal = Journal(path)
    journal.append({**START, "tokens": [23] * SEQUENCES})
    record = RunRecord.replay(journal.events())
    scorer = SweepScorer(sweeper, cut_batches(ids, torch.ones_like(ids, dtype=torch.bool), 2), 100)
    run_search(Scoring(journal, record, scorer, Quiet()), make_strategy(task()))
    return record, store


@pytest.mark.parametrize(("most", "most_kept"), [(4, 10**9), (10**9, 30), (2, 30)])
def test_the_sweep_shrinks_with_its_kept_states(dsa: model.DsaModel, tmp_path: Path, most: int, most_kept: int) -> None:
    expected, _ = search(dsa, tmp_path / "whole", 10**9, 10**9)
    found, store = search(dsa, tmp_path / "j", most, most_kept)
    assert record_outcome(found) == record_outcome(expected)
    assert len(notes(tmp_path / "j")) == 1
    assert store.budget < 10**6


def test_a_lone_pattern_cannot_be_halved(dsa: model.DsaModel) -> None:
    keeping = Keeping(len(dsa.layers), tuple(dsa.layer_indices), frozenset(), 1)
    store: StateStore[BranchState] = StateStore(keeping, dsa.start_pattern, 10**9)
    batch = Batch(0, torch.zeros(1, 24, dtype=torch.int64), torch.ones(1, 24, dtype=torch.bool))
    sweeper = Sweeper(dsa, store)
    sweeper.sweep([dsa.start_pattern], [batch])
    assert store.bytes
    scorer = SweepScorer(sweeper, [batch], 100)
    assert scorer.shrink(1)  # what is kept can be let go of
    assert (len(store), store.bytes) == (0, 0)
    assert not scorer.shrink(10)  # a second time
    assert not SweepScorer(Sweeper(dsa, store), [batch], 100).shrink(1)


def test_an_evaluation_shrinks_too(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case, out = cases["eval"], tmp_path / "run"
    monkeypatch.setattr(Cramped, "most", 2)
    monkeypatch.setattr(measures, "Sweeper", Cramped)
    assert app._run([*map(str, case.into(out))], debug=True) == 0
    note = f"{GONE.format(2, 1)}: the losses are the same, the run takes longer"
    told = [text for text in notes(out / "journal.jsonl") if GUESSING not in text]
    assert [text for text in told if not text.startswith("only uniform patterns")] == [note]
    assert note in " ".join(capsys.readouterr().err.split())
    found = outcome(out)
    found["eval.json"]["notes"].remove(note)
    assert found == case.outcome


def test_what_running_out_of_memory_looks_like() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


# --- a real limit -----------------------------------------------------------------------------------------------------


WIDE = {"hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 6, "first_k_dense_replace": 6}
BATCH, LENGTH = 16, 128
BRANCH = BATCH * LENGTH * WIDE["hidden_size"] * 4  # bytes of its hidden states


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A search whose branches hold 4 MB each, and little else; without --memory and --out."""
    checkpoint = tiny.save_checkpoint(tmp_path_factory.mktemp("wide"), **WIDE)
    tokens = tiny.save_tokens(tmp_path_factory.mktemp("wide-tokens"), BATCH, LENGTH)
    fixed = ["--batch-size", BATCH, "--threads", 1, "--num-shared", 1, "--quiet", "--block-elements", 2**17]
    return ["greedy", checkpoint, "--calibration", tokens, *fixed]


def memory_for(command: Sequence[object], patterns: int) -> int:
    """--memory that has room for so many patterns beside the trunk, and for no kept states."""
    _, layout = open_model(CalibrationRequest(str(command[1]), ""))
    options = {"batch_size": BATCH, "dtype": "float32", "block_elements": 2**17}
    shape = batch_shape(layout, options, LENGTH)
    assert shape.branch_bytes >= BRANCH >= 4 * 2**20
    return layout.num_parameters * 4 + shape.layer_bytes + (patterns + 2) * shape.branch_bytes


def steady_allocator() -> None:
    """The address space follows from what is alive: large tensors are given back at once, threads have small stacks."""
    threading.stack_size(2**18)
    libc = ctypes.CDLL(None)
    mmap_threshold, arena_max = -3, -8  # M_MMAP_THRESHOLD, M_ARENA_MAX
    assert libc.mallopt(mmap_threshold, 2**21)
    assert libc.mallopt(arena_max, 1)


def limited(size: int) -> None:
    """No more address space than that for this process."""
    steady_allocator()
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def with_peak(arguments: Sequence[str], into: Path) -> None:
    """The command in this process; then the largest address space that it had goes into a file."""
    try:
        command(arguments, steady_allocator)
    finally:
        status = Path("/proc/self/status").read_text().splitlines()
        (kilobytes,) = (line.split()[1] for line in status if line.startswith("VmPeak"))
        into.write_text(str(int(kilobytes) * 1024))


@pytest.fixture(scope="module")
def roomy(wide: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The search with room for 2 patterns at once, and the largest address space that it had."""
    folder = tmp_path_factory.mktemp("roomy")
    arguments = [*map(str, [*wide, "--memory", memory_for(wide, 2), "--out", folder / "run"])]
    ended = Commands(folder / "output").call(partial(with_peak, arguments, folder / "peak")).end()
    assert ended.status == 0, ended.err
    return folder / "run", int((folder / "peak").read_text())


def test_a_real_limit_on_memory(
    wide: list[object], roomy: tuple[Path, int], commands: Commands, tmp_path: Path
) -> None:
    """The plan has room for 5 patterns at once, the process for 3."""
    arguments, out = [*wide, "--memory", memory_for(wide, 5), "--out", tmp_path / "run"], tmp_path / "run"
    ended = commands.run(arguments, partial(limited, roomy[1] + 3 * BRANCH // 2))
    assert ended.status == 0, ended.err
    said = {text.split(":")[0] for text in notes(out / "journal.jsonl") if GUESSING not in text}
    assert len(said) == 1
    assert said <= {GONE.format(patterns, patterns // 2) for patterns in (4, 5)}
    assert outcome(out) == outcome(roomy[0])
    assert not scored_twice(out)


@pytest.mark.slow
def test_a_limit_that_half_does_not_fit_under_either(
    wide: list[object], roomy: tuple[Path, int], commands: Commands, tmp_path: Path
) -> None:
    arguments, out = [*wide, "--memory", memory_for(wide, 5), "--out", tmp_path / "run"], tmp_path / "run"
    ended = commands.run(arguments, partial(limited, roomy[1] - BRANCH))
    assert ended.status == 1, ended.err
    assert ended.last_line.startswith("icsearch: out of memory (")
    assert "the run continues where it stopped" in ended.last_line
    assert len([text for text in notes(out / "journal.jsonl") if GUESSING not in text]) == 1
    assert commands.run(arguments).status == 0
    assert outcome(out) == outcome(roomy[0])
