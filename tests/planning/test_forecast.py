"""The plan of a search: placements and what they hold; invariants of counts and hours, not numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tiny
from icsearch.commands.plan import make_case
from icsearch.core.errors import IcsearchError
from icsearch.core.pattern import Pattern
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.shape import CPU, DISK, RESIDENT
from icsearch.model.slot import SelectionStore
from icsearch.planning.devices import device_table
from icsearch.planning.footprint import Call
from icsearch.planning.forecast import (
    ATTENTION,
    INDEX_SCORES,
    REST,
    Case,
    Clock,
    Forecast,
    Placement,
    Plan,
    all_placements,
    head_phase,
    layer_phases,
    make_plan,
)
from icsearch.planning.memory import SHARE_OF_CPU
from icsearch.planning.modelfile import open_model_file
from icsearch.planning.work import layer_work
from icsearch.sweep.distributed.launch import Grid
from plan_fixtures import DEEPSEEK, GLM, plan_request


def case_of(*arguments: Any, node_memory: int | None = None, **more: Any) -> Case:
    case = make_case(plan_request(*arguments, **more))
    if node_memory is None:
        return case
    return replace(case, devices=replace(case.devices, device=replace(case.device, node_memory=node_memory)))


def place(case: Case, data: int = 1, pipeline: int = 1, offload: str = RESIDENT) -> Placement:
    return case.place(Grid(data, pipeline), offload)


# --- placements ------------------------------------------------------------------------------------------------------


def test_all_grids_of_the_devices_and_one_alone() -> None:
    grids = [Grid(4, 1), Grid(2, 2), Grid(1, 4), Grid(1, 1)]
    expected = [(grid, offload) for offload in (RESIDENT, CPU, DISK) for grid in grids]
    assert all_placements(case_of(devices="4xH200")) == expected


def test_what_is_in_cpu_memory_is_no_streaming_on_a_cpu() -> None:
    assert {offload for _, offload in all_placements(case_of("demo", "2xcpu", 4, 256))} == {RESIDENT, DISK}


def test_weights_in_cpu_memory_need_room_there_once_for_each_data_rank() -> None:
    case = case_of()
    assert place(case, offload=CPU).memory.missing == 0
    room = int(SHARE_OF_CPU * case.device.node_memory)
    assert place(case, 2, offload=CPU).memory.missing == 2 * case.job.weights.total - room


def test_no_more_parts_than_there_are_sequences_or_layers() -> None:
    few = all_placements(case_of(devices="4xH200", sequences=2))
    assert max(grid.data for grid, _ in few) == 2
    many = all_placements(case_of(devices="120xH200", sequences=240))
    assert {grid.pipeline for grid, _ in many} == {1, 2, 3, 4, 5, 6, 8, 10, 12, 20}  # in 15, blocks of 6 would make 13


@pytest.mark.parametrize("name", [GLM, DEEPSEEK])
def test_layers_that_are_shared_out_add_up(name: str) -> None:
    case = case_of(name)
    whole = place(case).memory.weights
    assert whole == case.model.num_parameters * 2
    eighth = place(case, pipeline=8).memory.weights
    assert whole / 8 < eighth < whole / 5  # blocks of 8 or 10 layers, embedding and head at the ends
    streamed = place(case, offload=DISK).memory.weights
    assert streamed == (2 * case.model.layer_parameters(40) + case.model.outside_parameters) * 2


def test_what_fits_is_within_its_budget_and_what_does_not_says_by_how_much() -> None:
    case = case_of()
    for grid, offload in all_placements(case):
        found = case.place(grid, offload)
        budget, missing = found.memory.budget, found.memory.missing
        if offload != CPU:
            assert (found.total <= budget) == (missing == 0)
        if found.total > budget:
            assert missing == found.total - budget


def test_more_memory_lets_more_patterns_live() -> None:
    sizes = [100 * 10**9, 141 * 10**9, 10**12]
    found = [place(case_of(device_memory=size), 8, 1, DISK).memory for size in sizes]
    assert found[0].patterns_per_sweep < found[1].patterns_per_sweep < found[2].patterns_per_sweep
    assert found[2].patterns_per_sweep == case_of().job.patterns and found[2].batches_per_wave > 1


def test_states_are_kept_where_resident_weights_leave_room() -> None:
    small = case_of("demo", "1xcpu", 24, 256, device_memory=10**9)
    assert place(small).kept.keeping.stride == 1
    tight = replace(small, devices=replace(small.devices, device=replace(small.device, memory=60 * 10**6)))
    assert place(tight).kept.keeping.stride != 1


def test_where_nothing_fits_the_message_says_what_is_missing() -> None:
    with pytest.raises(IcsearchError, match=r"one device from cpu.*too much; plan for more --devices"):
        make_plan(case_of(devices="1xH100", device_memory=40 * 10**9))


def test_one_gpu_lets_states_rest_in_cpu_memory_where_more_live_so() -> None:
    case = case_of(devices="1xH200")
    rested = place(case, offload=DISK)
    memory = rested.memory
    assert memory.in_cpu_memory and rested.states == 3 * memory.shape.branch_bytes
    assert rested.total <= memory.budget
    held = (memory.patterns_per_sweep + 2) * memory.batches_per_wave * memory.shape.branch_bytes
    assert held <= SHARE_OF_CPU * case.device.node_memory
    little = place(case_of(devices="1xH200", node_memory=10**9), offload=DISK).memory
    assert not little.in_cpu_memory and little.patterns_per_sweep < memory.patterns_per_sweep


def test_processes_that_share_sequences_share_the_cpu_memory_beside_the_checkpoint() -> None:
    """Those that share layers hand states on, and keep them on the device."""
    case = case_of(device_memory=80 * 10**9)
    rested = place(case, 8, 1, DISK).memory
    little = place(case_of(device_memory=80 * 10**9, node_memory=10**9), 8, 1, DISK).memory
    assert rested.in_cpu_memory and not little.in_cpu_memory
    assert rested.patterns_per_sweep > little.patterns_per_sweep
    held = 8 * (rested.patterns_per_sweep + 2) * rested.batches_per_wave * case.job.shape.pinned_bytes
    assert held + case.model.stored_model_bytes <= SHARE_OF_CPU * case.device.node_memory
    assert not place(case, 4, 2, DISK).memory.in_cpu_memory


# --- phases of a call ------------------------------------------------------------------------------------------------


def call_of(name: str, seq_len: int = 65536, batch_size: int = 1) -> Call:
    return Call(open_model_file(name).shape, batch_size, seq_len, 2, 2**26)


@pytest.mark.parametrize("name", [GLM, DEEPSEEK])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("index", [0, 40])
def test_flops_are_the_counted_ones_where_latents_are_gathered(name: str, full: bool, index: int) -> None:
    call = call_of(name, batch_size=2)
    assert call.gathers
    counted = 2 * layer_work(call.shape, index, full, call.seq_len).total.flops
    assert sum(phase.flops for phase in layer_phases(call, index, full)) == pytest.approx(counted, rel=1e-12)


@pytest.mark.parametrize("full", [True, False])
def test_flops_are_what_torch_does(full: bool, tmp_path: Path) -> None:
    """But for what a block computes beyond the causal half, and the sums of heads, which are no products."""
    checkpoint = open_checkpoint(str(tiny.save_checkpoint(tmp_path, index_topk=4)))
    dsa = loading.load(checkpoint, device="cpu", block_elements=2**10)
    call = Call(open_model_file(str(tmp_path)).shape, 1, 320, 4, 2**10)
    ids = torch.randint(tiny.VOCABULARY, (1, 320), generator=torch.Generator().manual_seed(0))
    store = SelectionStore(Pattern("FFFFFF" if full else "FSFFFF"))
    with torch.inference_mode():
        calls, states = dsa.capture_calls(ids), dsa.embed(ids)
        states = dsa.run_layer(0, states, calls[0], store)
        with FlopCounterMode(display=False) as counter:  # a dense layer: experts are counted by no counter
            dsa.run_layer(1, states, calls[1], store)
    assert call.gathers
    counted = sum(phase.flops for phase in layer_phases(call, 1, full))
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.05)


def test_an_indexer_is_a_phase_of_its_own_and_costs_more_the_longer_the_input() -> None:
    device, seconds = device_table()["h200"], {}
    for length in (16384, 32768, 65536):
        shared, full = (layer_phases(call_of(GLM, length), 40, role) for role in (False, True))
        assert [phase.name for phase in shared] == [REST, ATTENTION]
        (scores,) = [phase for phase in full if phase.name == INDEX_SCORES]
        seconds[length] = device.seconds(scores.flops, scores.bytes, scores.in_float32)
    assert seconds[65536] / seconds[32768] == pytest.approx(4, rel=0.01)
    assert seconds[32768] / seconds[16384] == pytest.approx(4, rel=0.01)


def test_batches_of_two_take_two_of_one() -> None:
    one, two = (head_phase(call_of(GLM, 8192, size)) for size in (1, 2))
    assert (two.flops, two.bytes) == (2 * one.flops, 2 * one.bytes)


# --- forecasts -------------------------------------------------------------------------------------------------------


def of(plan: Plan, data: int = 1, pipeline: int = 1, offload: str = RESIDENT) -> Forecast:
    """Of exact."""
    wanted = (Grid(data, pipeline), offload)
    return next(exact for one, (_, exact) in plan.forecasts.items() if (one.grid, one.offload) == wanted)


def demo(devices: str = "2xcpu", sequences: int = 8, seq_len: int = 256, **more: Any) -> Plan:
    return make_plan(case_of("demo", devices, sequences, seq_len, **more))


@pytest.mark.parametrize("name", [GLM, DEEPSEEK])
def test_700b_models_on_one_node(name: str) -> None:
    """64 x 64K tokens on 8 H200: nothing is resident in 16 bits, streamed fits; the parts of each memory add up."""
    plan = make_plan(case_of(name, stages=4))
    assert {one.offload for one in plan.forecasts} == {CPU, DISK}
    for one in plan.placements:
        assert one.total == one.memory.weights + one.states + one.memory.shape.layer_bytes
        assert bool(one.memory.missing) == (one not in plan.forecasts)
    best, forecast = plan.best
    assert best.total <= best.memory.budget < 141e9
    assert forecast.hours <= 1.01 * min(fisher.hours for fisher, _ in plan.forecasts.values())
    for fisher, exact in plan.forecasts.values():  # what the second-order table is for
        assert 2 * fisher.layer_evaluations < exact.layer_evaluations
        assert fisher.strategy == "fisher"
        assert 2 * fisher.hours < exact.hours


def test_more_sequences_take_longer() -> None:
    hours = [of(demo(sequences=count), 2).hours for count in (8, 16, 32)]
    assert hours == sorted(hours) and 3.8 < hours[2] / hours[0] < 4.2


def test_longer_sequences_take_longer_than_their_tokens() -> None:
    hours = [of(demo(seq_len=length, sequences=4)).hours for length in (512, 1024, 2048)]
    assert hours[2] > 2 * hours[1] > 4 * hours[0] * 0.9


def test_data_ranks_share_the_work_and_a_pipeline_less_evenly() -> None:
    """Branches fork on their way: the last block of layers has more to do than the first."""
    plan = demo(sequences=64)
    alone, data, pipeline = (of(plan, *grid).hours for grid in ((1, 1), (2, 1), (1, 2)))
    assert data == pytest.approx(alone / 2, rel=0.02)
    assert alone / 2 < pipeline < alone


def test_flops_are_those_of_the_layers_that_run() -> None:
    plan = demo()
    forecast = of(plan)
    sequences, shape = plan.case.workload.sequences, plan.case.model.shape
    cheapest = layer_work(shape, 0, False, 256).total.flops
    dearest = layer_work(shape, 15, True, 256).total.flops
    runs = forecast.layer_evaluations * sequences
    heads = 2 * 256 * shape.embedding_weights * sequences
    assert runs * cheapest < forecast.flops < runs * dearest * 3 + heads * 1000  # attention is dense at 256 tokens
    assert of(plan, 2).flops == forecast.flops == of(plan, 1, 2).flops


def test_bounds_are_above_what_is_likely() -> None:
    plan = demo()
    for forecasts in plan.forecasts.values():
        for one in forecasts:
            assert one.layer_evaluations <= one.most_layer_evaluations
            assert one.flops <= one.most_flops and one.hours <= one.most_hours
        assert forecasts[1].steps == plan.case.workload.num_shared


def test_the_table_counts_each_layer_twice_and_every_gradient() -> None:
    clock = Clock(demo().case)
    forth, back = clock.table(draws=4)
    assert forth.runs.full == (1,) * 16 and not any(forth.runs.shared)
    assert not any(back.runs.full) and back.patterns == 5
    assert all(runs >= 2 + 4 for runs in back.runs.shared)
    assert back.runs.shared[15] > back.runs.shared[0]  # more earlier layers to borrow from
    assert clock.table(draws=5)[1].runs.total >= back.runs.total + 16


def test_weights_are_read_once_or_once_a_wave() -> None:
    plan = demo()
    stored = round(plan.case.model.stored_model_bytes)
    assert of(plan, 2).weight_bytes == 2 * stored
    streamed = next(one for one in plan.forecasts if (one.grid, one.offload) == (Grid(), DISK))
    sweeps = plan.case.workload.likely("exact", streamed.memory.patterns_per_sweep, streamed.kept.keeping)
    assert streamed.memory.batches_per_wave == 2 == -(-8 // plan.case.batch_size)  # a small model: one wave
    assert of(plan, offload=DISK).weight_bytes == stored * len(sweeps)


def test_weights_in_cpu_memory_come_over_the_link_as_they_compute() -> None:
    """A step reads them all once for each wave, in bfloat16, where the checkpoint has FP8."""
    plan = make_plan(case_of(stages=4))
    placement = next(one for one in plan.forecasts if (one.grid, one.offload) == (Grid(), CPU))
    layers = 2 * sum(map(plan.case.model.layer_parameters, range(78)))
    sweeps = plan.case.workload.likely("exact", placement.memory.patterns_per_sweep, placement.kept.keeping)
    waves = -(-64 // placement.memory.batches_per_wave)
    assert of(plan, offload=CPU).weight_bytes == layers * waves * len(sweeps)


def test_a_slow_disk_sets_the_pace_of_streamed_weights() -> None:
    fast, slow = (demo(read_rate=rate, node_memory=1) for rate in (1e12, 1e5))
    assert of(slow, offload=DISK).hours > 2 * of(fast, offload=DISK).hours
    assert of(slow).hours > of(fast).hours  # loading


def test_the_side_that_binds_is_the_slower_one() -> None:
    fast, slow = (of(demo(read_rate=rate, node_memory=1), offload=DISK) for rate in (1e12, 1e5))
    assert (fast.binds, slow.binds) == ("computing", "bringing weights")
    assert fast.hours == pytest.approx(fast.computing_hours, rel=0.01)
    assert slow.hours == pytest.approx(slow.bringing_hours, rel=0.01)


def test_what_is_about_as_fast_is_kept_simple() -> None:
    """The demo in memory, though streaming it would save the time of loading it."""
    plan = demo("1xcpu")
    assert of(plan, offload=DISK).hours < of(plan).hours
    assert (plan.best[0].grid, plan.best[0].offload) == (Grid(), RESIDENT)


def test_faster_devices_take_less() -> None:
    slow, fast = (make_plan(case_of(devices=name, stages=4)).best[1].hours for name in ("8xH200", "8xB200"))
    assert fast < slow


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 2048}, "--seq-len 2048 is not longer than index_topk 2048"),
        ({"seq_len": 10**6}, "more than the model's 202752 positions"),
        ({"num_shared": 78}, "cannot share 78 more layers"),
        ({"stages": 79}, "--stages 79 is out of range"),
        ({"keep_full": frozenset({99})}, "--keep-full names layer 99"),
        ({"devices": "1xA100", "device_memory": 40 * 10**9}, "nothing fits 1xA100"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(IcsearchError, match=message):
        make_plan(case_of(**changes))


def test_the_default_length_is_that_of_a_run() -> None:
    assert case_of("demo", "1xcpu", 4, None).seq_len == 256
