"""The KL to the unmodified model: measured as the definition says, the loss beside it unchanged, and searched by."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_memory import SHAPE
from test_search import START, MadeUp
from test_states import keeping

import tiny
from icsearch.commands.progress import Quiet, commit_line
from icsearch.core.errors import JournalError, NonFiniteLossError, PatternError
from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import load_pattern_file
from icsearch.model import loading, model
from icsearch.model.checkpoint import open_checkpoint
from icsearch.planning.memory import Memory
from icsearch.report.page import render_page
from icsearch.report.terminal import summary_table
from icsearch.report.view import view_run
from icsearch.report.write import curve_csv
from icsearch.runs.journal import Event, Journal
from icsearch.runs.record import RunRecord
from icsearch.runs.results import pattern_file
from icsearch.search.loop import Scoring, run_search
from icsearch.search.protocol import SearchTask
from icsearch.search.registry import make_strategy
from icsearch.sweep.branches import Batch, BranchState, cut_batches
from icsearch.sweep.measures import naive_measures
from icsearch.sweep.states import StateStore
from icsearch.sweep.sweep import KlSweeper, Sweeper, SweepScorer

LENGTH, SEQUENCES = 24, 5
PATTERNS = [Pattern(letters) for letters in ("FFFFFF", "FSFFFF", "FFFSFF", "FSSFSS")]


@pytest.fixture(scope="module")
def dsa(family_checkpoint: Path) -> model.DsaModel:
    return loading.load(open_checkpoint(str(family_checkpoint)))


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, tiny.VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    counted = torch.rand(ids.shape, generator=generator) < 0.8
    counted[:, 1] = True
    return cut_batches(ids, counted, 2)


def test_kl_is_what_the_definition_says(dsa: model.DsaModel, batches: list[Batch]) -> None:
    sweeper = KlSweeper(dsa, None, keep_full_states=True)
    swept = sweeper.sweep(PATTERNS, batches)
    for pattern in PATTERNS:
        naive = [row for batch in batches for row in naive_measures(dsa, pattern, batch)]
        assert swept.kl[str(pattern)] == pytest.approx([kl for _, kl, _ in naive], rel=1e-4, abs=1e-5)
    assert swept.kl["FFFFFF"] == [0.0] * SEQUENCES
    assert all(kl > 0 for pattern in PATTERNS[1:] for kl in swept.kl[str(pattern)])


def test_the_loss_has_the_bits_of_a_sweep_without_kl(dsa: model.DsaModel, batches: list[Batch]) -> None:
    plain = Sweeper(dsa).sweep(PATTERNS, batches)
    swept = KlSweeper(dsa, None, keep_full_states=True).sweep(PATTERNS, batches)
    assert swept.nll == plain.nll
    assert swept.layer_sequences == plain.layer_sequences  # the unmodified model was asked for anyway
    assert plain.kl == {}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("with_store", [True, False])
def test_however_it_is_split_the_bits_are_the_same(
    dsa: model.DsaModel, batches: list[Batch], keep: bool, with_store: bool
) -> None:
    """The unmodified model runs along where its states are not kept; what is expected is what it takes."""
    whole = KlSweeper(dsa, None, keep_full_states=True).sweep(PATTERNS, batches)
    store: StateStore[BranchState] | None = StateStore(keeping(), PATTERNS[0], 10**9) if with_store else None
    sweeper = KlSweeper(dsa, store, keep_full_states=keep)
    work = [([pattern], [batch]) for batch in batches for pattern in reversed(PATTERNS)]
    expected, taken = sweeper.expected(work), 0
    found: dict[str, list[float]] = {}
    for patterns, wave in work:
        result = sweeper.sweep(patterns, wave)
        taken += result.layer_sequences
        assert result.kl.keys() == result.nll.keys() == {str(p) for p in patterns}
        for letters, sums in result.kl.items():
            found.setdefault(letters, []).extend(sums)
    assert found == whole.kl
    assert taken == expected


def test_bfloat16(family_checkpoint: Path, batches: list[Batch]) -> None:
    dsa = loading.load(open_checkpoint(str(family_checkpoint)), dtype="bfloat16")
    swept = KlSweeper(dsa, None, keep_full_states=True).sweep(PATTERNS, batches)
    assert swept.nll == Sweeper(dsa).sweep(PATTERNS, batches).nll
    assert swept.kl["FFFFFF"] == [0.0] * SEQUENCES


def test_a_kl_that_is_not_finite_is_named(
    dsa: model.DsaModel, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target's logit is finite, another is -inf: the loss is a number, the KL is not."""
    head = dsa.lm_head

    class Masked(torch.nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            logits = head(states)
            logits[..., 0] = -math.inf
            return logits

    monkeypatch.setattr(dsa, "lm_head", Masked())
    ids = batches[0].input_ids.clamp(min=1)
    with pytest.raises(NonFiniteLossError, match="sequence 0 under FSFFFF is nan"):
        KlSweeper(dsa, None, True).sweep([PATTERNS[1]], [Batch(0, ids, batches[0].counted)])


def test_memory_keeps_the_final_states_where_one_candidate_fits_beside_them() -> None:
    fixed = 500 + SHAPE.layer_bytes + 2 * SHAPE.branch_bytes
    memory = Memory(fixed + 5 * SHAPE.branch_bytes, 500, SHAPE, 5)
    fits = memory.for_kl(4 * SHAPE.branch_bytes)
    assert (fits.full_states, fits.patterns_per_sweep, fits.spare) == (4 * SHAPE.branch_bytes, 1, SHAPE.branch_bytes)
    too_much = memory.for_kl(4 * SHAPE.branch_bytes + 1)
    assert (too_much.full_states, too_much.patterns_per_sweep, too_much.along) == (0, 4, 1)  # it runs in each sweep
    assert too_much.beside(4) == 0 == memory.beside(5)
    offloaded = replace(too_much, patterns_per_sweep=1).offload_states(6 * SHAPE.pinned_bytes, patterns=4, batches=1)
    assert (offloaded.patterns_per_sweep, offloaded.beside(2)) == (
        2,
        SHAPE.pinned_bytes,
    )  # of 3 there is no room beside it


# --- the search that goes by it --------------------------------------------------------------------------------------


def start_event(flips: int = 3) -> Event:
    options = {**START["options"], "objective": "kl", "num_shared": flips}
    return {**START, "options": options, "tokens": [LENGTH - 1] * SEQUENCES}


def search(path: Path, scorer: Any, strategy: str = "exact") -> RunRecord:
    journal = Journal(path)
    if not journal.exists():
        journal.append(start_event())
    record = RunRecord.replay(journal.events())
    task = SearchTask(Pattern.full(6), frozenset(), 3, 1, tuple(record.tokens))
    return run_search(Scoring(journal, record, scorer, Quiet()), make_strategy(task))


@pytest.fixture(scope="module")
def searched(dsa: model.DsaModel, batches: list[Batch], tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    store: StateStore[BranchState] = StateStore(keeping(), Pattern.full(6), 10**9)
    scorer = SweepScorer(KlSweeper(dsa, store, keep_full_states=True), batches, 100)
    return search(tmp_path_factory.mktemp("kl") / "journal.jsonl", scorer)


def test_flips_are_chosen_by_kl_and_losses_stay_losses(searched: RunRecord) -> None:
    assert searched.finished
    for commit, step in zip(searched.commits, searched.steps(), strict=True):
        scored = {c.layer: searched.mean_kl(c.pattern) for c in searched.candidates(commit.step)}
        kl = {layer: value.delta for layer, value in scored.items() if value}
        assert commit.layer == min(kl, key=lambda layer: (kl[layer], layer))
        assert step.kl == kl[commit.layer] > 0
        assert step.loss == searched.loss(commit.pattern)
        assert step.kl_std_err is not None and step.kl_std_err > 0
        for candidate in searched.candidates(commit.step):
            if candidate.layer != commit.layer:
                tied = searched.objective.difference(candidate.pattern, commit.pattern).is_tie
                assert (candidate.layer in commit.ties) == tied


def test_the_journal_replays_to_the_same_run(searched: RunRecord, dsa: model.DsaModel, tmp_path: Path) -> None:
    events = [searched.start, *_losses(searched)]
    again = RunRecord.replay(events)
    assert (again.kl, again.nll) == (searched.kl, searched.nll)


def _losses(record: RunRecord) -> list[Event]:
    """The sums of a record as one losses event of step 0."""
    letters = sorted(record.nll)
    event = {"event": "losses", "step": 0, "sequences": [0, SEQUENCES], "patterns": letters}
    tables = {
        name: [list(table[p].values()) for p in letters] for name, table in (("nll", record.nll), ("kl", record.kl))
    }
    return [{**event, **tables, "layer_sequences": 1, "seconds": 0.1}]


@pytest.mark.parametrize("damage", [None, [], [[0.1]], [["x"] * SEQUENCES], 3, "absent"])
def test_losses_without_their_kl_are_damaged(searched: RunRecord, damage: Any) -> None:
    (event,) = _losses(searched)
    event["kl"] = damage
    if damage == "absent":
        del event["kl"]
    with pytest.raises(JournalError, match="journal line 2 is damaged"):
        RunRecord.replay([searched.start, event])


def test_a_search_by_loss_has_no_kl(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append(START)
    record = RunRecord.replay([START])
    task = SearchTask(Pattern.full(6), frozenset(), 3, 1, tuple(record.tokens))
    run_search(Scoring(journal, record, MadeUp(), Quiet()), make_strategy(task))
    assert record.kl == {}
    assert record.mean_kl(record.pattern.letters) is None
    assert all("kl" not in step for step in pattern_file(record).to_json()["steps"])
    assert curve_csv(view_run(record)).splitlines()[0].endswith("std_err,pattern")


def test_the_results_say_what_chose(searched: RunRecord, tmp_path: Path) -> None:
    from rich.console import Console

    view = view_run(searched)
    header, baseline, *rows = (line.split(",") for line in curve_csv(view).splitlines())
    assert header[-3:] == ["kl", "kl_std_err", "pattern"]
    assert baseline[-3:] == ["0.0", "0.0", "FFFFFF"]
    assert [float(row[-3]) for row in rows] == [step.kl for step in searched.steps()]
    page = render_page([view])
    assert "Chosen by the KL to the all-F baseline" in page
    assert "KL of this flip" in page
    assert ", KL 0." in commit_line(searched)
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    console.print(summary_table(searched))
    table = console.export_text()
    assert " KL " in table
    assert max(map(len, table.splitlines())) <= 80


def test_the_pattern_file_keeps_the_kl(searched: RunRecord, tmp_path: Path) -> None:
    pattern_file(searched).save(tmp_path / "pattern.json")
    loaded = load_pattern_file(tmp_path / "pattern.json")
    assert loaded.objective == "kl"
    assert loaded.steps == searched.steps()
    document = json.loads((tmp_path / "pattern.json").read_text())
    document["steps"][0]["kl"] = "much"
    (tmp_path / "pattern.json").write_text(json.dumps(document))
    with pytest.raises(PatternError, match="kl is 'much'"):
        load_pattern_file(tmp_path / "pattern.json")


def test_one_sequence_has_a_kl_without_an_error(tmp_path: Path) -> None:
    chance = random.Random(0)
    start = {**start_event(), "tokens": [10]}
    events: list[Event] = [start]
    full = Pattern.full(6)
    flips = {layer: full.flip(layer).letters for layer in range(1, 6)}
    for step, patterns in ((0, ["FFFFFF"]), (1, list(flips.values()))):
        sums = [[chance.random()] for _ in patterns]
        more = {"patterns": patterns, "nll": sums, "kl": sums, "layer_sequences": 1, "seconds": 0.1}
        events.append({"event": "losses", "step": step, "sequences": [0, 1], **more})
    commit = {"layer": 2, "pattern": flips[2], "candidates": list(flips), "ties": []}
    record = RunRecord.replay([*events, {"event": "commit", "step": 1, **commit}])
    pattern_file(record).save(tmp_path / "pattern.json")
    (step,) = load_pattern_file(tmp_path / "pattern.json").steps
    assert step.kl == record.steps()[0].kl
    assert step.kl_std_err is not None and math.isnan(step.kl_std_err)
