"""What rank 0 works out without computing is what sweeps do: where branches begin, and the layer runs they take."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from test_sweep import random_batches

from icsearch.core.pattern import Pattern
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.model import DsaModel
from icsearch.sweep.branches import Batch, BranchState
from icsearch.sweep.distributed.coordinator import Schedule
from icsearch.sweep.states import Keeping, StateStore
from icsearch.sweep.sweep import KlSweeper, Sweeper

LAYERS = 6


@pytest.fixture(scope="module")
def dsa(glm_checkpoint: Path) -> DsaModel:
    return loading.load(open_checkpoint(str(glm_checkpoint)))


@pytest.mark.parametrize("stride", [0, 1, 2])
@pytest.mark.parametrize("kl", [None, False, True])
def test_a_search_takes_the_layer_runs_that_the_schedule_says(dsa: DsaModel, stride: int, kl: bool | None) -> None:
    """`kl`: whether the final states of the unmodified model are kept; None: no KL."""
    keeping = Keeping(LAYERS, tuple(range(LAYERS)), frozenset(range(1, LAYERS)), stride)
    base, full = Pattern.full(LAYERS), None if kl is None else dsa.start_pattern
    store: StateStore[BranchState] = StateStore(keeping, base, 2**40)
    sweeper = Sweeper(dsa, store) if kl is None else KlSweeper(dsa, store, kl)
    schedule, chance = Schedule(keeping, base, full, bool(kl)), random.Random(stride)
    batches = random_batches(sequences=4)
    for _ in range(3):
        sweeper.kept.retain(base)
        schedule.retain(base)
        flips = [base.flip(layer) for layer in base.full_layers[1:]]
        for batch in batches:
            _compare(schedule, sweeper, chance.sample(flips, 2), batch)
        base = chance.choice(flips)


def _compare(schedule: Schedule, sweeper: Sweeper, patterns: list[Pattern], batch: Batch) -> None:
    ahead = schedule.copy().sweep(patterns, [batch.first])
    start = schedule.sweep(patterns, [batch.first])
    assert ahead == start  # looking ahead has changed nothing
    assert sweeper.sweep(patterns, [batch]).layer_sequences == start.layer_runs * len(batch.input_ids)


def test_the_unmodified_model_runs_along_until_its_states_are_known() -> None:
    keeping, base = Keeping(LAYERS, tuple(range(LAYERS))), Pattern.full(LAYERS)
    flip = base.flip(3)
    kept = Schedule(keeping, base, base, keep_full_states=True)
    assert [list(kept.sweep([flip], [batch]).entries) for batch in (0, 2, 0)] == [
        [flip.letters, base.letters], [flip.letters, base.letters], [flip.letters],
    ]  # fmt: skip
    unkept = Schedule(keeping, base, base)
    assert [len(unkept.sweep([flip], [0]).entries) for _ in range(2)] == [2, 2]
