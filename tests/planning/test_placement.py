"""Placements: which there are, what they hold, what does not fit and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from icsearch.core.errors import IcsearchError
from icsearch.model import layout
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.shape import BLOCK_ELEMENTS, CPU, DISK, RESIDENT
from icsearch.planning import plan
from icsearch.planning.forecast import make_case
from icsearch.planning.memory import batch_shape
from icsearch.planning.offload import SHARE_OF_CPU
from icsearch.planning.placement import Placement, fit, placements, weight_bytes, weight_sizes, why_nothing_fits
from plan_fixtures import DEEPSEEK, GLM, plan_request


def test_all_grids_of_the_devices_and_one_alone() -> None:
    found = placements(make_case(plan_request(devices="4xH200")))
    grids = [(4, 1), (2, 2), (1, 4), (1, 1)]
    assert [(one.data, one.pipeline, one.offload) for one in found] == [
        *((*grid, RESIDENT) for grid in grids),
        *((*grid, CPU) for grid in grids),
        *((*grid, DISK) for grid in grids),
    ]


def test_what_rests_in_cpu_memory_is_no_streaming_on_a_cpu() -> None:
    assert {one.offload for one in placements(make_case(plan_request("demo", "2xcpu", 4, 256)))} == {RESIDENT, DISK}


def test_weights_in_cpu_memory_need_room_there_once_for_each_data_rank() -> None:
    case = make_case(plan_request())
    total = weight_sizes(case).total
    assert fit(case, Placement(1, 1, CPU)).missing == 0
    assert fit(case, Placement(2, 1, CPU)).missing == 2 * total - int(SHARE_OF_CPU * case.device.node_memory)


def test_no_more_parts_than_there_are_sequences_or_layers() -> None:
    few = placements(make_case(plan_request(devices="4xH200", sequences=2)))
    assert max(one.data for one in few) == 2
    many = placements(make_case(plan_request(devices="120xH200", sequences=240)))
    assert {one.pipeline for one in many} == {1, 2, 3, 4, 5, 6, 8, 10, 12, 20}  # in 15, blocks of 6 would make 13


@pytest.mark.parametrize("name", [GLM, DEEPSEEK])
def test_layers_that_are_shared_out_add_up(name: str) -> None:
    case = make_case(plan_request(name))
    whole = weight_bytes(case, Placement())
    assert whole == case.model.num_parameters * 2
    eighth = weight_bytes(case, Placement(pipeline=8))
    assert whole / 8 < eighth < whole / 5  # blocks of 8 or 10 layers, embedding and head at the ends
    streamed = weight_bytes(case, Placement(offload=DISK))
    assert streamed == (2 * case.model.layer_parameters(40) + case.model.outside_parameters) * 2


def test_what_fits_is_within_its_budget_and_what_does_not_says_by_how_much() -> None:
    case = make_case(plan_request())
    for placement in placements(case):
        found = fit(case, placement)
        if placement.offload != CPU:
            assert (found.total <= found.budget) == (found.missing == 0)
        if found.total > found.budget:
            assert found.missing == found.total - found.budget


def test_more_memory_lets_more_patterns_live() -> None:
    sizes = [100 * 10**9, 141 * 10**9, 10**12]
    found = [fit(make_case(plan_request(device_memory=size)), Placement(8, 1, DISK)) for size in sizes]
    assert found[0].per_sweep < found[1].per_sweep < found[2].per_sweep
    assert found[2].per_sweep == make_case(plan_request()).workload.most_patterns and found[2].wave > 1


def test_states_are_kept_where_resident_weights_leave_room() -> None:
    small = make_case(plan_request("demo", "1xcpu", 24, 256, device_memory=10**9))
    assert fit(small, Placement()).kept.keeping.stride == 1
    tight = replace(small, devices=replace(small.devices, device=replace(small.device, memory=60 * 10**6)))
    assert fit(tight, Placement()).kept.keeping.stride != 1


def test_the_shape_of_a_batch_is_that_of_a_run(tmp_path: Path) -> None:
    directory = str(tiny.save_checkpoint(tmp_path))
    case = make_case(plan_request(directory, "1xcpu", 6, 40))
    options = {"dtype": "float32", "batch_size": case.batch_size, "block_elements": BLOCK_ELEMENTS["cpu"]}
    assert case.shape == batch_shape(layout.inspect(open_checkpoint(directory)), options, 40)
    assert isinstance(case.shape, plan.BatchShape)


def test_where_nothing_fits_the_message_says_what_is_missing() -> None:
    case = make_case(plan_request(devices="1xH100", device_memory=40 * 10**9))
    fits = [fit(case, placement) for placement in placements(case)]
    assert all(one.missing for one in fits)
    error = why_nothing_fits(case, fits)
    assert isinstance(error, IcsearchError)
    assert "one device from cpu" in str(error) and "too much; plan for more --devices" in str(error)


def test_one_gpu_lets_states_rest_in_cpu_memory_where_more_live_so() -> None:
    case = make_case(plan_request(devices="1xH200"))
    rested = fit(case, Placement(1, 1, DISK))
    assert rested.resting and rested.states == 3 * rested.branch
    assert rested.total <= rested.budget
    held = (rested.per_sweep + 2) * rested.wave * rested.branch
    assert held <= SHARE_OF_CPU * case.device.node_memory
    little = fit(make_case(plan_request(devices="1xH200", device_node_memory=10**9)), Placement(1, 1, DISK))
    assert not little.resting and little.per_sweep < rested.per_sweep


def test_processes_that_share_sequences_share_the_cpu_memory_beside_the_checkpoint() -> None:
    """Those that share layers hand states on, and keep them on the device."""
    case, placement = make_case(plan_request(device_memory=80 * 10**9)), Placement(8, 1, DISK)
    rested, little = (
        fit(case, placement),
        fit(make_case(plan_request(device_memory=80 * 10**9, device_node_memory=10**9)), placement),
    )
    assert rested.resting and not little.resting
    assert rested.per_sweep > little.per_sweep
    held = 8 * (rested.per_sweep + 2) * rested.wave * case.shape.pinned_bytes
    assert held + case.model.stored_model_bytes <= SHARE_OF_CPU * case.device.node_memory
    assert not fit(case, Placement(4, 2, DISK)).resting
