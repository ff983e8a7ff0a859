"""States kept between steps: the same bits as without, the cost that the formula says, never more than the budget."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from test_search import START, Killed

import tiny
from icsearch.commands.progress import Quiet
from icsearch.commands.setup import batch_shape
from icsearch.core.pattern import Pattern
from icsearch.model import loading, model
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.layout import inspect
from icsearch.planning.footprint import BatchShape
from icsearch.planning.memory import plan_kept
from icsearch.planning.rehearsal import layer_evaluations, rehearsed
from icsearch.runs.journal import Event, Journal
from icsearch.runs.record import RunRecord
from icsearch.search.loop import Scores, Scoring, run_search
from icsearch.search.protocol import SearchTask
from icsearch.search.registry import make_strategy
from icsearch.sweep.branches import Batch, BranchState, cut_batches
from icsearch.sweep.states import Keeping, StateStore
from icsearch.sweep.sweep import Sweeper, SweepScorer

LENGTH, SEQUENCES, BATCH = 24, 5, 2


def keeping(num_layers: int = 6, stride: int = 1) -> Keeping:
    layers = range(num_layers)
    return Keeping(num_layers, tuple(layers), frozenset(layers) - {0}, stride)


# --- the rule and the store, on made-up states -----------------------------------------------------------------------


def test_what_is_on_the_way_to_the_base_or_to_a_flip_of_it() -> None:
    store: StateStore[str] = StateStore(keeping(), Pattern("FSFFFF"), budget=100)
    for letters in ("FS", "FSF", "FSS", "FSFSF"):
        assert store.wants(0, len(letters), letters)
    for letters in ("FF", "FFS", "FSSS", "FSFSS"):  # one F too many, two flips
        assert not store.wants(0, len(letters), letters)
    assert not store.wants(0, 6, "FSFFFF")  # behind the last layer nothing goes on
    assert not store.wants(0, 0, "")


def test_layers_that_no_candidate_flips_are_not_kept() -> None:
    store: StateStore[str] = StateStore(replace(keeping(), flippable=frozenset({3})), Pattern.full(6), budget=100)
    assert store.wants(0, 4, "FFFS")
    assert not store.wants(0, 3, "FFS")


def test_a_commit_lets_go_of_what_is_two_flips_away() -> None:
    store: StateStore[str] = StateStore(keeping(), Pattern.full(6), budget=100)
    for letters in ("FF", "FFF", "FS", "FSF", "FFFS", "FFFFS"):
        store.put(0, len(letters), letters, letters, 10)
    store.retain(Pattern("FFFSFF"))
    assert store.start(Pattern("FFFSFF"), [0]) == 4
    assert store.start(Pattern("FSFSFF"), [0]) == 3  # unchanged up to the layer just committed
    assert store.get(0, 3, "FSF") == "FSF"
    assert store.start(Pattern("FFFSSF"), [0]) == 4
    assert (len(store), store.bytes) == (5, 50)  # FFFFS has an F where the base has S


def test_a_full_store_takes_nothing_more() -> None:
    store: StateStore[str] = StateStore(keeping(), Pattern.full(6), budget=25)
    for letters in ("F", "FF", "FFF"):
        store.put(0, len(letters), letters, letters, 10)
    assert (len(store), store.bytes) == (2, 20)
    assert store.start(Pattern.full(6), [0]) == 2


def test_a_wave_starts_where_all_of_its_batches_are_kept() -> None:
    store: StateStore[str] = StateStore(keeping(), Pattern.full(6), budget=100)
    for batch, length in ((0, 1), (0, 2), (0, 4), (2, 2), (2, 3)):
        store.put(batch, length, "F" * length, "", 1)
    assert store.start(Pattern.full(6), [0]) == 4
    assert store.start(Pattern.full(6), [0, 2]) == 2
    assert store.start(Pattern.full(6), [0, 2, 4]) == 0


def test_layers_between_the_dsa_layers_follow_from_the_letters_before_them() -> None:
    mixed = Keeping(7, (1, 4, 5), frozenset({1, 2}), 1)
    pattern = Pattern("FSF")
    assert [mixed.letters_before(pattern, entry) for entry in range(7)] == ["", "", "F", "F", "F", "FS", "FSF"]
    # The base at 1 to 6, layer 1's flip at 5 and 6, layer 2's at 6.
    assert mixed.states_in(range(7)) == 6 + 2 + 1


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_the_number_of_states_is_never_exceeded(stride: int) -> None:
    """Random steps in which only some candidates are scored: no more is kept than the plan has counted."""
    for seed in range(20):
        chance, pattern = random.Random(seed), Pattern.full(9)
        rehearsal = StateStore[None](keeping(9, stride), pattern).rehearsal()
        rehearsal.sweep([pattern, Pattern.uniform(9, Fraction(1, 2))], [0])
        for _ in range(7):
            rehearsal.retain(pattern)
            flips = [pattern.flip(layer) for layer in pattern.full_layers[1:]]
            rehearsal.sweep(chance.sample(flips, chance.randrange(1, len(flips) + 1)), [0])
            assert len(rehearsal) <= keeping(9, stride).states_in(range(9))
            pattern = chance.choice(flips)


SHAPE = BatchShape(
    batch_size=2,
    seq_len=10,
    hidden_size=4,
    dtype_bytes=4,
    index_topk=4,
    index_heads=1,
    index_head_dim=1,
    attention_heads=1,
    vocab_size=10,
)


def test_the_smallest_stride_that_fits() -> None:
    sequence = SHAPE.branch_bytes // 2
    wanted = keeping(6, 0)
    needed = {stride: keeping(6, stride).states_in(range(6)) * sequence * 3 for stride in range(1, 6)}
    assert needed[1] == (5 + 4 + 3 + 2 + 1) * sequence * 3  # the base at 5 entries, flip c at those above c
    for stride in (1, 2, 3):
        kept = plan_kept(wanted, SHAPE, 3, needed[stride])
        assert (kept.keeping.stride, kept.bytes) == (stride, needed[stride])
        assert plan_kept(wanted, SHAPE, 3, needed[stride] - 1).keeping.stride > stride or stride == 3
    assert plan_kept(wanted, SHAPE, 3, 0).keeping.stride == 0
    assert plan_kept(wanted, SHAPE, 3, -5).bytes == 0


def test_the_plan_in_words() -> None:
    assert plan_kept(keeping(6, 0), SHAPE, 3, 10**9).words == "14.4 kB, every layer"
    assert plan_kept(keeping(6, 0), SHAPE, 3, 6000).words.endswith("every 2nd layer")
    assert plan_kept(keeping(6, 0), SHAPE, 3, 0).words == "nothing: there is no room"


def pair_cost(num_layers: int, first: int, second: int) -> int:
    return num_layers - max(first, second)


@pytest.mark.parametrize("seed", range(5))
def test_a_step_costs_what_the_formula_says(seed: int) -> None:
    num_layers, chance, pattern = 9, random.Random(seed), Pattern.full(9)
    rehearsal = StateStore[None](keeping(num_layers), pattern).rehearsal()
    assert rehearsal.sweep([pattern], [0]) == num_layers
    committed = 0  # before the first commit, every candidate forks off the trunk
    for _ in range(num_layers - 1):
        rehearsal.retain(pattern)
        candidates = pattern.full_layers[1:]
        expected = sum(pair_cost(num_layers, layer, committed) for layer in candidates)
        assert rehearsal.sweep([pattern.flip(layer) for layer in candidates], [0]) == expected
        committed = chance.choice(candidates)
        pattern = pattern.flip(committed)


@pytest.mark.parametrize("flips", range(1, 6))
def test_the_rehearsed_search_is_the_dearest(flips: int) -> None:
    """With everything kept, no order of commits takes more; a search to the end takes the same in any order."""

    def taken(choose: Callable[[Sequence[int]], float]) -> int:
        pattern, runs = Pattern.full(6), 0
        rehearsal = StateStore[None](keeping(), pattern).rehearsal()
        runs += rehearsal.sweep([pattern], [0])
        for _ in range(flips):
            rehearsal.retain(pattern)
            candidates = pattern.full_layers[1:]
            runs += rehearsal.sweep([pattern.flip(layer) for layer in candidates], [0])
            pattern = pattern.flip(int(choose(candidates)))
        return runs

    tokens = (10, 11)
    task = SearchTask(Pattern.full(6), frozenset(), flips, 1, tokens)
    most = layer_evaluations(rehearsed(lambda: make_strategy(task), tokens, [], keeping(), 100))
    assert most == taken(min)
    found = {taken(random.Random(seed).choice) for seed in range(100)}
    assert max(found) == most
    if flips == 5:
        assert found == {most}


# --- the sweep that uses it, against the sweep that does not ---------------------------------------------------------


@pytest.fixture(scope="module")
def dsa(family_checkpoint: Path) -> model.DsaModel:
    return loading.load(open_checkpoint(str(family_checkpoint)))


class Watched(SweepScorer):
    """A scorer that checks, at every sweep, what it took and what is kept; it dies when told to."""

    def __init__(self, dsa: model.DsaModel, batches: Sequence[Batch], per_sweep: int, stride: int, budget: int) -> None:
        rule = keeping(len(dsa.layers), stride)
        self.store: StateStore[BranchState] = StateStore(rule, dsa.start_pattern, budget)
        self.most, self.sweeps_to_live = 0, 10**9
        super().__init__(Sweeper(dsa, self.store), batches, per_sweep)

    def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Callable[[int], None]) -> Scores:
        if self.sweeps_to_live == 0:
            raise Killed
        self.sweeps_to_live -= 1
        expected = self.expected([(patterns, wave)])
        scores = super().score(patterns, wave, on_layer)
        states = [kept for kept, _ in self.store._states.values()]
        assert self.store.bytes == sum(state.bytes for state in states) <= self.store.budget
        if self.store.budget >= 10**9 or not self.store.budget:  # elsewhere a full store may have refused some
            assert scores.layer_sequences == expected
        self.most = max(self.most, self.store.bytes)
        return scores


def random_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(0, tiny.VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    return cut_batches(ids, torch.ones_like(ids, dtype=torch.bool), BATCH)


def search(path: Path, scorer: SweepScorer, stages: int = 1, flips: int = 5, references: bool = True) -> RunRecord:
    """A whole greedy search by this scorer."""
    start: Event = {
        **START,
        "options": {**START["options"], "num_shared": flips},
        "tokens": [LENGTH - 1] * SEQUENCES,
        "references": START["references"] if references else {},
    }
    journal = Journal(path)
    if not journal.exists():
        journal.append(start)
    record = RunRecord.replay(journal.events())
    task = SearchTask(Pattern.full(6), frozenset(), flips, stages, tuple(record.tokens))
    return run_search(Scoring(journal, record, scorer, Quiet()), make_strategy(task))


def outcome(record: RunRecord) -> tuple[object, ...]:
    return record.nll, record.commits, record.pattern, record.steps()


@pytest.mark.parametrize("stages", [1, 2])
def test_whole_searches_have_the_same_bits(dsa: model.DsaModel, tmp_path: Path, stages: int) -> None:
    batches, flips = random_batches(), 6 - stages
    nothing = Watched(dsa, batches, 100, 0, 0)
    expected = search(tmp_path / "none", nothing, stages, flips)
    state = Sweeper(dsa).model.config.hidden_size * 4 * LENGTH * BATCH  # about one
    for stride, budget, per_sweep in [(1, 10**9, 100), (2, 10**9, 2), (3, 10**9, 100), (1, 7 * state, 100)]:
        scorer = Watched(dsa, batches, per_sweep, stride, budget)
        found = search(tmp_path / f"{stride}-{budget}", scorer, stages, flips)
        assert outcome(found) == outcome(expected)
        assert 0 < scorer.most <= budget
        if per_sweep == 100:
            assert found.layer_sequences < expected.layer_sequences


def test_a_budget_for_nothing_is_the_search_without(dsa: model.DsaModel, tmp_path: Path) -> None:
    batches = random_batches()
    records = [
        search(tmp_path / name, Watched(dsa, batches, 100, stride, 0), flips=2)
        for name, stride in (("none", 0), ("no room", 1))
    ]
    assert outcome(records[0]) == outcome(records[1])
    assert records[0].layer_sequences == records[1].layer_sequences


@pytest.mark.parametrize("sweeps", [1, 4, 8])
def test_a_resumed_search_has_the_same_bits(dsa: model.DsaModel, tmp_path: Path, sweeps: int) -> None:
    """What was kept is lost with the process; the run goes on from the embedding, at more cost, to the same end."""
    batches = random_batches()
    expected = search(tmp_path / "whole", Watched(dsa, batches, 100, 1, 10**9), flips=3)
    first = Watched(dsa, batches, 100, 1, 10**9)
    first.sweeps_to_live = sweeps
    with pytest.raises(Killed):
        search(tmp_path / "killed", first, flips=3)
    resumed = search(tmp_path / "killed", Watched(dsa, batches, 100, 1, 10**9), flips=3)
    assert outcome(resumed) == outcome(expected)
    assert resumed.layer_sequences >= expected.layer_sequences


def test_bfloat16_has_the_same_bits(family_checkpoint: Path, tmp_path: Path) -> None:
    dsa, batches = loading.load(open_checkpoint(str(family_checkpoint)), dtype="bfloat16"), random_batches()
    records = [search(tmp_path / str(s), Watched(dsa, batches, 100, s, 10**9), flips=3) for s in (0, 1)]
    assert outcome(records[0]) == outcome(records[1])


def test_a_search_takes_the_layer_runs_of_the_formula(dsa: model.DsaModel, tmp_path: Path) -> None:
    record = search(tmp_path / "j", Watched(dsa, random_batches(), 100, 1, 10**9), references=False)
    committed, expected = 0, 6
    for commit in record.commits:
        expected += sum(pair_cost(6, layer, committed) for layer in commit.candidates)
        committed = commit.layer
    assert record.layer_sequences == expected * SEQUENCES


def test_the_planned_states_fit_what_is_really_kept(
    dsa: model.DsaModel, family_checkpoint: Path, tmp_path: Path
) -> None:
    """The plan's bytes, given as the budget, leave no state out: the cost is that of unlimited memory."""
    layout = inspect(open_checkpoint(str(family_checkpoint)))
    shape = batch_shape(layout, {"batch_size": BATCH, "dtype": "float32"}, LENGTH)
    batches = random_batches()
    for stride in (1, 2):
        kept = plan_kept(
            keeping(6, 0), shape, SEQUENCES, keeping(6, stride).states_in(range(6)) * shape.branch_bytes // BATCH * 5
        )
        assert kept.keeping.stride == stride
        planned = search(tmp_path / f"a{stride}", Watched(dsa, batches, 100, stride, kept.bytes), flips=3)
        unlimited = search(tmp_path / f"b{stride}", Watched(dsa, batches, 100, stride, 10**9), flips=3)
        assert planned.layer_sequences == unlimited.layer_sequences


@pytest.mark.parametrize("seed", range(4))
def test_only_some_patterns_and_some_batches_are_scored(dsa: model.DsaModel, seed: int) -> None:
    """What was not scored in a step may go on from an older step's states."""
    chance, batches = random.Random(seed), random_batches()
    plain, scorer = Sweeper(dsa), Watched(dsa, batches, 100, 1, 10**9)
    base = Pattern.full(6)
    for _ in range(4):
        scorer.retain(base)
        flips = [base.flip(layer) for layer in base.full_layers[1:]]
        for batch in chance.sample(batches, 2):
            some = chance.sample(flips, chance.randrange(1, len(flips) + 1))
            scores = scorer.score(some, (batch.first, batch.last), lambda _: None)
            assert scores.nll == plain.sweep(some, [batch]).nll
        base = chance.choice(flips)


def test_several_batches_in_one_wave(dsa: model.DsaModel) -> None:
    batches, base = random_batches(), Pattern.full(6)
    store: StateStore[BranchState] = StateStore(keeping(), base, 10**9)
    keeper, plain = Sweeper(dsa, store), Sweeper(dsa)
    keeper.sweep([base], batches[:2])  # the third batch is kept nowhere
    flips = [base.flip(layer) for layer in (2, 4)]
    assert keeper.sweep(flips, batches).nll == plain.sweep(flips, batches).nll
    again = keeper.sweep(flips, batches)
    assert again.nll == plain.sweep(flips, batches).nll
    assert again.layer_sequences == 2 * SEQUENCES  # each goes on at the entry of the last layer


def test_a_rehearsal_tells_the_runs_of_each_layer_by_role() -> None:
    rehearsal = StateStore(keeping(4, stride=0), Pattern("FFFF")).rehearsal()
    runs = rehearsal.runs([Pattern("FSFF"), Pattern("FFFS")], [0])
    assert runs.full == (1, 1, 2, 1)
    assert runs.shared == (0, 1, 0, 1)
    assert runs.total == rehearsal.sweep([Pattern("FSFF"), Pattern("FFFS")], [0]) == 7


def test_layers_without_an_indexer_share_or_not_they_never_run_one() -> None:
    mixed = Keeping(3, (0, 2), frozenset({1}))
    runs = StateStore(mixed, Pattern("FF")).rehearsal().runs([Pattern("FF"), Pattern("FS")], [0])
    assert (runs.full, runs.shared) == ((1, 0, 1), (0, 1, 1))
