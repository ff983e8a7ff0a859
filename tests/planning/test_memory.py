"""Memory: its formulas, where weights are, and waves that take the fewest passes over them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from icsearch.core.errors import IcsearchError
from icsearch.model.shape import CPU, DISK
from icsearch.planning.footprint import BatchShape
from icsearch.planning.memory import (
    DEVICE,
    FEWEST_BRANCHES,
    HEAP_SHARE,
    SHARE_OF_CPU,
    SHARE_OF_DISK,
    Job,
    Machine,
    Memory,
    Offload,
    TablePlan,
    WeightSizes,
    choose_offload,
    plan_memory,
    plan_waves,
)
from icsearch.planning.rows import table_rows, weight_rows
from icsearch.sweep.distributed.launch import Grid

SHAPE = BatchShape(
    batch_size=2,
    seq_len=100,
    hidden_size=32,
    dtype_bytes=2,
    index_topk=16,
    index_heads=4,
    index_head_dim=8,
    attention_heads=2,
    vocab_size=50,
)
SIZES = WeightSizes(outside=100, layers=(10, 30, 30, 30), on_disk=250)
ENOUGH, TOO_LITTLE = int(200 / SHARE_OF_CPU) + 1, int(200 / SHARE_OF_CPU) - 2


def chosen(requested: str, on_cpu: bool, room: int, cpu_free: int = ENOUGH) -> Offload:
    return choose_offload(requested, on_cpu, SIZES, lambda weights: weights <= room, cpu_free)


def test_a_model_that_fits_is_never_streamed() -> None:
    for on_cpu in (True, False):
        found = chosen("auto", on_cpu, room=200)
        assert (found.where, found.device_bytes, found.pass_bytes, found.streamed) == ("none", 200, 0, False)


@pytest.mark.parametrize(
    ("on_cpu", "cpu_free", "where", "at_once", "read"),
    [
        (True, ENOUGH, "disk", 100 + 3 * 30, 250),
        (False, ENOUGH, "cpu", 100 + 2 * 30, 100),
        (False, TOO_LITTLE, "disk", 100 + 2 * 30, 250),
    ],
)
def test_auto_takes_the_nearest_place_that_is_large_enough(
    on_cpu: bool, cpu_free: int, where: str, at_once: int, read: int
) -> None:
    found = chosen("auto", on_cpu, room=199, cpu_free=cpu_free)
    assert (found.where, found.device_bytes, found.pass_bytes) == (where, at_once, read)


def test_what_is_asked_for_is_done() -> None:
    assert chosen("none", True, room=0).where == "none"
    assert chosen("disk", True, room=1000).where == "disk"
    assert chosen("cpu", False, room=1000).where == "cpu"


def test_cpu_memory_of_a_cpu_device_is_the_device() -> None:
    found = chosen("cpu", True, room=1000)
    assert found.where == "none" and "what a CPU device does anyway" in found.why


def test_cpu_memory_that_is_too_small_is_refused() -> None:
    assert chosen("cpu", False, room=1000, cpu_free=TOO_LITTLE).missing == 2
    job = Job(SHAPE, SIZES, (0, 1, 2, 3), 4, offload="cpu")
    with pytest.raises(IcsearchError, match="needs 200 B of CPU memory .* 198 B .* --offload disk"):
        plan_memory(job, Machine(False, 10**9, TOO_LITTLE))


@pytest.mark.parametrize("beside", [2, 3])
def test_waves_take_the_fewest_passes(beside: int) -> None:
    """Against every division that has room."""
    for room, patterns, batches in itertools.product((3, 4, 7, 12, 25, 60), (1, 2, 5, 15), (1, 3, 8)):
        possible = [
            -(-patterns // together) * -(-batches // wave)
            for together, wave in itertools.product(range(1, patterns + 1), range(1, batches + 1))
            if (together + beside) * wave <= room
        ]
        together, wave = plan_waves(room, patterns, batches, beside)
        if possible:
            assert (together + beside) * wave <= room
            assert -(-patterns // together) * -(-batches // wave) == min(possible)
        else:
            assert (together, wave) == (1, 1)


def test_one_wave_where_all_of_it_fits() -> None:
    assert plan_waves(17 * 6, 15, 6) == (15, 6)


def test_rows_say_what_was_chosen_and_why() -> None:
    memory = Memory(10**9, 0, SHAPE, 3, offload=chosen("auto", True, room=199))
    streamed = dict(weight_rows(memory, 7, 2, 100.0))  # 7 patterns in 3 sweeps
    assert streamed["weights"] == (
        "streamed from the checkpoint's shards, layer by layer: 200 B do not fit into memory"
    )
    assert "3 times a step, about 750 B, 8 s at 100 B/s" in streamed["reading"] and "estimate" in streamed["reading"]
    resident = Memory(10**9, 0, SHAPE, 3, offload=chosen("auto", True, room=200))
    assert weight_rows(resident, 7, 2, None) == [("weights", "resident: 200 B fit")]


def test_branch_and_layer_bytes() -> None:
    assert SHAPE.branch_bytes == 2 * 100 * (32 * 2 + 16 * 4)
    assert SHAPE.layer_bytes == 2 * 100**2 * (2 * 4 + 8 + 3 + 2) * 4


def test_what_layers_hand_on_beside_states_and_selection_is_counted() -> None:
    """Such as keys and values that Mistral-Large-4's layers share."""
    more = replace(SHAPE, left_numbers=10)
    assert more.branch_bytes == SHAPE.branch_bytes + 2 * 100 * 10 * 2
    assert more.pinned_bytes == SHAPE.pinned_bytes + 4096


def test_budget_decides_how_many_live() -> None:
    fixed = SIZES.total + SHAPE.layer_bytes

    def patterns(branches: int) -> int:
        job = Job(SHAPE, SIZES, (0, 1, 2, 3), 4, patterns=20, offload="none")
        return plan_memory(job, Machine(True, fixed + branches * SHAPE.branch_bytes, 0)).patterns_per_sweep

    assert (patterns(10), patterns(FEWEST_BRANCHES)) == (8, 1)
    with pytest.raises(IcsearchError, match=r"memory budget .* 200 B of weights .* raise --memory"):
        patterns(FEWEST_BRANCHES - 1)


def test_a_large_vocabulary_can_be_what_counts() -> None:
    wide = replace(SHAPE, vocab_size=10**6)
    states = 2 * 100 * 32 * 2  # normed
    assert wide.layer_bytes == states + 2 * 100 * 10**6 * (2 + 8)


def test_the_peak_is_what_lives_at_once() -> None:
    memory = Memory(10**6, 500, SHAPE, 2)
    branch, call = SHAPE.branch_bytes, SHAPE.layer_bytes
    assert memory.peak(3, 70) == (500 + call + 4 * branch + 70, 0)  # two candidates, the trunk, an output
    assert replace(memory, grid=Grid(1, 2)).peak(3, 70)[0] == 500 + call + (3 * 4 + 1) * branch + 70
    working, tensor = call + 4 * branch + 70, 2 * 100 * 32 * 2
    lost = int(HEAP_SHARE * (1 - tensor / 2**25) * working)
    assert replace(memory, program=300).peak(3, 70) == (300 + 500 + working + lost, lost)
    large = replace(memory, program=300, shape=replace(SHAPE, seq_len=2**19))  # tensors with pages of their own
    assert large.peak(3, 70)[1] == 0


def test_states_that_rest_in_cpu_memory_leave_three_on_the_device() -> None:
    """Of one batch, as they are there; what rests is of a whole wave, and rounded up."""
    memory = Memory(10**6, 500, SHAPE, 2, in_cpu_memory=10**5, batches_per_wave=4)
    assert memory.peak(3, 70)[0] == 500 + SHAPE.layer_bytes + 3 * SHAPE.branch_bytes


DRAWS, LAYERS = 4, (0, 1, 2, 3)
LAYER = SHAPE.differentiated_bytes(DRAWS + 1)
ENTRY = 2 * 100 * 32 * 2
ONE = 4 * (ENTRY + 2 * 100 * 16)  # a batch's entries, and its selections in bytes
SEVERAL = ONE + (DRAWS + 1) * ENTRY  # where others of its wave are at work, its cotangents too


def table(room: int, offload: str = "none", sequences: int = 7, grid: Grid | None = None, **more: Any) -> TablePlan:
    """With so many bytes of the device beside weights and one layer."""
    job = Job(SHAPE, SIZES, LAYERS, sequences, offload=offload, draws=DRAWS)
    machine = Machine(**{"on_cpu": True, "budget": 0, "cpu_free": 0, **more})
    weights = plan_memory(job, replace(machine, budget=10**9), [grid or Grid()]).weights
    found = plan_memory(job, replace(machine, budget=weights + LAYER + room), [grid or Grid()]).table
    assert found is not None
    return found


def test_entries_rest_in_the_nearest_place_that_takes_them() -> None:
    """Of resident weights one batch at a time."""
    cpu_free = int(ONE * SHAPE.pinned_bytes / SHAPE.branch_bytes / SHARE_OF_CPU) + 2
    disk_free = int(ONE / SHARE_OF_DISK) + 2
    assert table(ONE) == TablePlan(DEVICE, 1, LAYER, ONE)
    assert table(ONE - 1, disk_free=disk_free) == TablePlan(DISK, 1, LAYER, ONE)
    rooms: dict[str, Any] = {"on_cpu": False, "cpu_free": cpu_free, "disk_free": disk_free}
    assert table(ONE - 1, **rooms).place == CPU
    assert table(ONE - 1, **{**rooms, "cpu_free": cpu_free - 10}).place == DISK
    assert table(ONE, **rooms).place == DEVICE


def test_streamed_weights_have_the_fewest_waves() -> None:
    """As many batches as fit, on disk where they do not all fit nearer."""
    disk_free = int(3 * SEVERAL / SHARE_OF_DISK) + 2
    for room, place, together in ((4 * SEVERAL, DEVICE, 4), (3 * SEVERAL, DEVICE, 3), (2 * SEVERAL, DISK, 3)):
        found = table(room, DISK, disk_free=disk_free)
        assert (found.place, found.batches_per_wave, found.resting) == (place, together, together * SEVERAL)
    alone = table(ONE, DISK)
    assert (alone.place, alone.batches_per_wave, alone.resting) == (DEVICE, 1, ONE)
    shared = table(4 * SEVERAL, DISK, grid=Grid(2, 1))  # 4 batches, 2 for each
    assert shared.batches_per_wave == 2


def test_a_pipeline_keeps_the_entries_of_a_wave_for_each_of_its_places() -> None:
    """Its first process has two waves on their way, each with half of the layers and with all selections."""
    half = 2 * (2 * ENTRY + 4 * 2 * 100 * 16)
    assert table(half, grid=Grid(1, 2)) == TablePlan(DEVICE, 1, LAYER, half)
    with pytest.raises(IcsearchError, match="for the entries of all layers"):
        table(half - 1, grid=Grid(1, 2))
    assert [Grid(1, 2).waves_per_job(waves) for waves in (1, 7, 100)] == [1, 7, 8]
    assert [Grid(2, 2).waves_per_job(waves) for waves in (1, 7, 100)] == [1, 4, 8]
    assert Grid(3, 1).waves_per_job(100) == 1


def test_a_table_without_room_is_refused() -> None:
    job = Job(SHAPE, SIZES, LAYERS, 7, offload="none", draws=DRAWS)
    with pytest.raises(
        IcsearchError, match=r"memory budget .* 200 B of weights .* to differentiate a layer; raise --mem"
    ):
        plan_memory(job, Machine(True, SIZES.total + LAYER - 1, 0))
    with pytest.raises(IcsearchError, match=r"differentiate a layer, with .* for the entries of all layers; raise --m"):
        plan_memory(job, Machine(True, SIZES.total + LAYER + ONE - 1, 0))
    assert plan_memory(job, Machine(True, SIZES.total + LAYER + ONE, 0)).table is not None


def test_weights_are_streamed_where_only_the_table_has_no_room() -> None:
    """The search beside it would fit with all weights."""
    sizes = WeightSizes(outside=100, layers=(10**6,) * 4, on_disk=4 * 10**6)
    job = Job(SHAPE, sizes, LAYERS, 7, draws=DRAWS)
    budget = 3 * 10**6 + 100 + LAYER + ONE  # on a CPU device: two layers, and what reading one takes
    assert plan_memory(replace(job, draws=0), Machine(True, sizes.total + LAYER, 0)).offload.where == "none"
    for room in (0, 10**6 - 1):  # the second: all weights and a layer fit, the entries do not
        found = plan_memory(job, Machine(True, budget + room, 0))
        assert (found.offload.where, found.table and found.table.place) == (DISK, DEVICE)
    resident = plan_memory(job, Machine(True, sizes.total + LAYER, 0, disk_free=10 * ONE))
    assert (resident.offload.where, resident.table) == ("none", TablePlan(DISK, 1, LAYER, ONE))


def test_the_peak_of_a_table() -> None:
    memory = Memory(10**6, 500, SHAPE, 2, table=TablePlan(DEVICE, 1, 1000, 70))
    assert memory.table_peak == 1570
    assert replace(memory, table=TablePlan(DISK, 1, 1000, 70)).table_peak == 1500
    assert replace(memory, table=None).table_peak == 0
    lost = int(HEAP_SHARE * (1 - 2 * 100 * 32 * 2 / 2**25) * 1070)
    assert replace(memory, program=300).table_peak == 300 + 1570 + lost


def test_a_row_says_where_entries_rest() -> None:
    memory = Memory(10**6, 500, SHAPE, 2, table=TablePlan(DISK, 3, 10**6, 7 * 10**6))
    ((_, text),) = table_rows(memory)
    assert text == (
        "1.0 MB while a layer is differentiated; the entries of all layers, 7.0 MB for 3 batches at a time, on disk "
        "(estimate)"
    )
    assert table_rows(replace(memory, table=None)) == []
