"""Which grid several processes make where none is asked for: what fits, from sizes alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from icsearch.commands.requests import BaselineRequest, CalibrationRequest, GreedyRequest
from icsearch.commands.setup import Inputs, obtain, open_model, run_options
from icsearch.core.errors import IcsearchError
from icsearch.model.shape import DISK
from icsearch.planning import memory as memory_plan
from icsearch.planning import plan
from icsearch.planning.forecast import make_case
from icsearch.planning.memory import Memory, Share, plan_memory, plan_share
from icsearch.planning.offload import SHARE_OF_CPU
from icsearch.planning.placement import Placement, fit
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


def chosen(request: GreedyRequest, inputs: Inputs, size: int, memory: int, offload: str = "auto") -> Memory:
    asked = replace(request, memory=memory, offload=offload)
    options = run_options(asked, inputs, [])
    launch = Launch(0, size, 0, size)
    return plan_share(asked, inputs, options, launch, grids(size, None, None))


def needed(request: GreedyRequest, inputs: Inputs, grid: Grid) -> int:
    """The least memory of a process that keeps its weights."""
    one = plan_memory(replace(request, offload="none"), inputs, run_options(request, inputs, []), Share(grid))
    least = plan.FEWEST_BRANCHES + 2 * grid.packets
    return one.weights + one.shape.layer_bytes + least * one.shape.branch_bytes


def test_sequences_are_shared_where_the_weights_fit(request_: GreedyRequest, inputs: Inputs) -> None:
    memory = chosen(request_, inputs, 4, needed(request_, inputs, Grid(4, 1)))
    assert (memory.share.grid, memory.offload.streamed) == (Grid(4, 1), False)


def test_layers_are_shared_by_as_few_as_it_takes(request_: GreedyRequest, inputs: Inputs) -> None:
    sizes = {p: needed(request_, inputs, Grid(4 // p, p)) for p in (1, 2, 4)}
    assert sizes[1] > sizes[2] > sizes[4]
    for pipeline in (2, 4):
        memory = chosen(request_, inputs, 4, sizes[pipeline])
        assert (memory.share.grid, memory.offload.streamed) == (Grid(4 // pipeline, pipeline), False)


def test_weights_are_streamed_where_no_grid_keeps_them(request_: GreedyRequest, inputs: Inputs) -> None:
    memory = chosen(request_, inputs, 2, needed(request_, inputs, Grid(1, 2)) - 1)
    assert (memory.share.grid, memory.offload.where) == (Grid(2, 1), "disk")
    assert memory.offload.why.endswith("in each process")


def test_streaming_that_is_asked_for(request_: GreedyRequest, inputs: Inputs) -> None:
    """All batches of a data rank go through the layers together; what is read is read by both."""
    memory = chosen(request_, inputs, 2, 10**9, "disk")
    assert (memory.share.grid, memory.batches_per_wave) == (Grid(2, 1), 2)  # 3 batches for two
    assert memory.offload.pass_bytes == 2 * inputs.source.num_bytes


@pytest.mark.parametrize("grid", [Grid(2, 1), Grid(1, 2), Grid(1, 4), Grid(2, 2)])
def test_a_pass_reads_the_checkpoint_once_for_each_data_rank(
    request_: GreedyRequest, inputs: Inputs, grid: Grid
) -> None:
    """However unequal the blocks of a pipeline are."""
    asked = replace(request_, offload="disk")
    memory = plan_memory(asked, inputs, run_options(asked, inputs, []), Share(grid))
    assert memory.offload.pass_bytes == grid.data * inputs.source.num_bytes


def test_nothing_fits(request_: GreedyRequest, inputs: Inputs) -> None:
    with pytest.raises(IcsearchError, match="is too small"):
        chosen(request_, inputs, 4, 1000)


def test_a_grid_that_cannot_be_cut_does_not_hide_that_memory_is_short(request_: GreedyRequest, inputs: Inputs) -> None:
    """8 layers make no 6 or 12 blocks: that is no news where nobody asked for it."""
    with pytest.raises(IcsearchError, match="memory budget 1.0 kB is too small"):
        chosen(request_, inputs, 12, 1000)
    options = run_options(request_, inputs, [])
    with pytest.raises(IcsearchError, match="--pp 6 cuts 8 DSA layers into 4 blocks"):
        plan_share(request_, inputs, options, Launch(0, 6, 0, 6), grids(6, None, 6))


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
    memory = plan_memory(request_, inputs, run_options(request_, inputs, []), Share(Grid(grid.data)))
    found = replace(memory, share=Share(grid)).grid_words(sequences)
    assert words in found and ("nothing to do" in found) == ("nothing to do" in words)


def test_a_share_of_the_sequences_is_whole_batches() -> None:
    share = Share(Grid(2, 1))
    assert [share.sequences(total, 2) for total in (1, 4, 5, 8, 9)] == [1, 2, 4, 4, 6]
    assert Share().sequences(9, 2) == 9


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 1), Grid(1, 2), Grid(1, 4), Grid(2, 2)])
def test_a_plan_cuts_streamed_waves_as_a_run_does(request_: GreedyRequest, inputs: Inputs, grid: Grid) -> None:
    asked = replace(request_, offload="disk")
    memory = plan_memory(asked, inputs, run_options(asked, inputs, []), Share(grid))
    batches = inputs.batches
    request = plan_request(asked.model, "4xcpu", batches.num_sequences, batches.seq_len, batch_size=BATCH)
    planned = fit(make_case(request), Placement(grid.data, grid.pipeline, DISK))
    assert planned.wave == memory.batches_per_wave


def test_a_pipeline_wants_several_waves() -> None:
    assert Share(Grid(1, 1)).batches_per_wave(24) == 24
    assert Share(Grid(2, 1)).batches_per_wave(24) == 12
    assert Share(Grid(1, 2)).batches_per_wave(24) == 6
    assert Share(Grid(1, 8)).batches_per_wave(24) == 2
    for batches in range(1, 40):  # and never so many that each is read for more than two for each process
        waves = -(-batches // Share(Grid(1, 2)).batches_per_wave(batches))
        assert min(batches, 3) <= waves <= 4


def test_states_of_flips_rest_in_cpu_memory_and_selections_that_are_compared_do_not(
    request_: GreedyRequest, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device without room for a step's branches; no GPU is needed for a plan. A pipeline hands states on."""
    monkeypatch.setattr(memory_plan, "free_bytes", lambda device: 10**9)
    asked = replace(request_, memory=needed(request_, inputs, Grid()), offload="none")
    options = {**run_options(asked, inputs, []), "device": "cuda"}
    assert plan_memory(asked, inputs, {**options, "device": "cpu"}).resting == 0
    assert plan_memory(asked, inputs, options).resting == int(SHARE_OF_CPU * 10**9)
    shared = plan_memory(asked, inputs, options, Share(Grid(2, 1), on_machine=2))
    assert shared.resting == int(SHARE_OF_CPU * 10**9) // 2
    assert plan_memory(replace(asked, memory=10**9), inputs, options, Share(Grid(1, 2))).resting == 0
    compared = BaselineRequest(asked.calibration, asked.out, batch_size=BATCH, memory=asked.memory, offload="none")
    assert plan_memory(compared, inputs, options).resting == 0
