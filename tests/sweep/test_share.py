"""Which grid several processes make where none is asked for: what fits, from sizes alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from icsearch.commands.plan import make_case
from icsearch.commands.requests import BaselineRequest, CalibrationRequest, GreedyRequest
from icsearch.commands.setup import Inputs, machine_here, memory_job, obtain, open_model, run_options
from icsearch.core.errors import IcsearchError
from icsearch.model.shape import DISK
from icsearch.planning.memory import (
    FEWEST_BRANCHES,
    SHARE_OF_CPU,
    Job,
    Machine,
    Memory,
    fit,
    largest_share,
    plan_memory,
)
from icsearch.planning.rows import process_rows
from icsearch.sweep.distributed.launch import Grid, Launch, grids
from plan_fixtures import plan_request

BATCH = 2


@pytest.fixture(scope="module")
def request_(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> GreedyRequest:
    model = tiny.save_checkpoint(tmp_path_factory.mktemp("glm"), num_hidden_layers=8, first_k_dense_replace=4)
    source = CalibrationRequest(str(model), str(tokens))
    return GreedyRequest(source, tmp_path_factory.mktemp("run"), batch_size=BATCH, memory=10**9, block_elements=1024)


@pytest.fixture(scope="module")
def inputs(request_: GreedyRequest) -> Inputs:
    source, layout = open_model(request_.calibration)
    batches, _ = obtain(request_.calibration, source, layout, request_.out / "calibration", fresh=False)
    return Inputs(source, layout, batches)


def asked_of(request: GreedyRequest | BaselineRequest, inputs: Inputs, size: int = 1) -> tuple[Job, Machine]:
    """What a run of so many processes hands to the planner."""
    options = run_options(request, inputs, [])
    return memory_job(request, inputs, options), machine_here(request, options["device"], Launch(0, size, 0, size))


def chosen(request: GreedyRequest, inputs: Inputs, size: int, memory: int, offload: str = "auto") -> Memory:
    asked = replace(request, memory=memory, offload=offload)
    return plan_memory(*asked_of(asked, inputs, size), grids(size, None, None))


def needed(request: GreedyRequest, inputs: Inputs, grid: Grid) -> int:
    """The least memory of a process that keeps its weights."""
    one = fit(*asked_of(replace(request, offload="none"), inputs), grid)
    least = FEWEST_BRANCHES + 2 * grid.packets
    return one.weights + one.shape.layer_bytes + least * one.shape.branch_bytes


def test_sequences_are_shared_where_the_weights_fit(request_: GreedyRequest, inputs: Inputs) -> None:
    memory = chosen(request_, inputs, 4, needed(request_, inputs, Grid(4, 1)))
    assert (memory.grid, memory.offload.streamed) == (Grid(4, 1), False)


def test_layers_are_shared_by_as_few_as_it_takes(request_: GreedyRequest, inputs: Inputs) -> None:
    sizes = {p: needed(request_, inputs, Grid(4 // p, p)) for p in (1, 2, 4)}
    assert sizes[1] > sizes[2] > sizes[4]
    for pipeline in (2, 4):
        memory = chosen(request_, inputs, 4, sizes[pipeline])
        assert (memory.grid, memory.offload.streamed) == (Grid(4 // pipeline, pipeline), False)


def test_weights_are_streamed_where_no_grid_keeps_them(request_: GreedyRequest, inputs: Inputs) -> None:
    memory = chosen(request_, inputs, 2, needed(request_, inputs, Grid(1, 2)) - 1)
    assert (memory.grid, memory.offload.where) == (Grid(2, 1), "disk")
    assert memory.offload.why.endswith("in each process")


def test_streaming_that_is_asked_for(request_: GreedyRequest, inputs: Inputs) -> None:
    """All batches of a data rank go through the layers together; what is read is read by both."""
    memory = chosen(request_, inputs, 2, 10**9, "disk")
    assert (memory.grid, memory.batches_per_wave) == (Grid(2, 1), 2)  # 3 batches for two
    assert memory.offload.pass_bytes == 2 * inputs.source.num_bytes


@pytest.mark.parametrize("grid", [Grid(2, 1), Grid(1, 2), Grid(1, 4), Grid(2, 2)])
def test_a_pass_reads_the_checkpoint_once_for_each_data_rank(
    request_: GreedyRequest, inputs: Inputs, grid: Grid
) -> None:
    """However unequal the blocks of a pipeline are."""
    asked = replace(request_, offload="disk")
    memory = fit(*asked_of(asked, inputs), grid)
    assert memory.offload.pass_bytes == grid.data * inputs.source.num_bytes


def test_nothing_fits(request_: GreedyRequest, inputs: Inputs) -> None:
    with pytest.raises(IcsearchError, match="is too small"):
        chosen(request_, inputs, 4, 1000)


def test_a_grid_that_cannot_be_cut_does_not_hide_that_memory_is_short(request_: GreedyRequest, inputs: Inputs) -> None:
    """8 layers make no 6 or 12 blocks: that is no news where nobody asked for it."""
    with pytest.raises(IcsearchError, match="memory budget 1.0 kB is too small"):
        chosen(request_, inputs, 12, 1000)
    with pytest.raises(IcsearchError, match="--pp 6 cuts 8 DSA layers into 4 blocks"):
        plan_memory(*asked_of(request_, inputs, 6), grids(6, None, 6))


@pytest.mark.parametrize(
    ("grid", "sequences", "words"),
    [
        (Grid(8, 1), 12, "2 of the 8 have nothing to do, for 12 sequences make 6 shares: give --batch-size 1 (not"),
        (Grid(4, 2), 5, "2 of the 8 have nothing to do, for 5 sequences make 3 shares"),
        (Grid(2, 1), 2, "1 of the 2 has nothing to do, for 2 sequences make 1 share: give --batch-size 1 ("),
        (Grid(4, 1), 3, "2 of the 4 have nothing to do, for 3 sequences make 2 shares: give more sequences"),
        (Grid(4, 1), 7, "4 processes, which share the sequences"),
        (Grid(1, 8), 2, "8 processes, which share the layers"),
    ],
)
def test_who_has_nothing_to_do(request_: GreedyRequest, inputs: Inputs, grid: Grid, sequences: int, words: str) -> None:
    memory = replace(fit(*asked_of(request_, inputs), Grid(grid.data)), grid=grid)
    ((name, found),) = process_rows(memory, sequences)
    assert name == "processes" and words in found and ("nothing to do" in found) == ("nothing to do" in words)


def test_a_share_of_the_sequences_is_whole_batches() -> None:
    assert [largest_share(total, 2, Grid(2, 1)) for total in (1, 4, 5, 8, 9)] == [1, 2, 4, 4, 6]
    assert largest_share(9, 2, Grid()) == 9


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 1), Grid(1, 2), Grid(1, 4), Grid(2, 2)])
def test_a_plan_cuts_streamed_waves_as_a_run_does(request_: GreedyRequest, inputs: Inputs, grid: Grid) -> None:
    asked = replace(request_, offload="disk")
    memory = fit(*asked_of(asked, inputs), grid)
    batches = inputs.calibration
    request = plan_request(asked.model, "4xcpu", batches.num_sequences, batches.seq_len, batch_size=BATCH)
    assert make_case(request).place(grid, DISK).memory.batches_per_wave == memory.batches_per_wave


def test_a_pipeline_wants_several_waves() -> None:
    assert Grid(1, 1).batches_per_wave(24) == Grid(2, 1).batches_per_wave(24) == 24
    assert Grid(1, 2).batches_per_wave(24) == 6
    assert Grid(1, 8).batches_per_wave(24) == 2
    for batches in range(1, 40):  # and never so many that each is read for more than two for each process
        waves = -(-batches // Grid(1, 2).batches_per_wave(batches))
        assert min(batches, 3) <= waves <= 4


def test_states_of_flips_rest_in_cpu_memory_and_selections_that_are_compared_do_not(
    request_: GreedyRequest, inputs: Inputs
) -> None:
    """On a device without room for a step's branches; no GPU is needed for a plan. A pipeline hands states on."""
    asked = replace(request_, memory=needed(request_, inputs, Grid()), offload="none")
    job, here = asked_of(asked, inputs)
    gpu = replace(here, on_cpu=False, cpu_free=10**9)
    assert fit(job, here, Grid()).in_cpu_memory == 0
    assert fit(job, gpu, Grid()).in_cpu_memory == int(SHARE_OF_CPU * 10**9)
    assert fit(job, replace(gpu, processes=2), Grid(2, 1)).in_cpu_memory == int(SHARE_OF_CPU * 10**9) // 2
    assert fit(job, replace(gpu, budget=10**9), Grid(1, 2)).in_cpu_memory == 0
    compared = BaselineRequest(asked.calibration, asked.out, batch_size=BATCH, memory=asked.memory, offload="none")
    assert fit(asked_of(compared, inputs)[0], gpu, Grid()).in_cpu_memory == 0


def test_a_plan_and_a_run_plan_the_same_memory(request_: GreedyRequest, inputs: Inputs) -> None:
    """From a config.json and from a checkpoint: one planner, asked by both."""
    options = run_options(replace(request_, block_elements=None), inputs, [])
    run = memory_job(replace(request_, block_elements=None), inputs, options)
    batches = inputs.calibration
    case = make_case(plan_request(request_.model, "1xcpu", batches.num_sequences, batches.seq_len, batch_size=BATCH))
    assert (case.job.shape, case.job.weights.layers, case.job.weights.outside) == (
        run.shape,
        run.weights.layers,
        run.weights.outside,
    )
    assert (case.job.patterns, case.job.sequences, case.job.layer_indices) == (
        run.patterns,
        run.sequences,
        run.layer_indices,
    )
