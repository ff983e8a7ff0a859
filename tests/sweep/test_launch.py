"""Which processes there are, and how they share a run."""

from __future__ import annotations

import pytest

from icsearch.core.errors import IcsearchError
from icsearch.search.greedy import split_stages
from icsearch.sweep.distributed.launch import Grid, Launch, grids, pipeline_blocks, read_launch

STARTED = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_no_launcher_is_one_process() -> None:
    assert read_launch({}) == Launch()
    assert read_launch({"WORLD_SIZE": "1", "RANK": "0"}) == Launch()
    assert read_launch({"RANK": "3"}) == Launch()  # of something else


def test_a_launcher_says_who_this_is() -> None:
    assert read_launch({**STARTED, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}) == Launch(5, 8, 1, 4)
    assert read_launch(STARTED) == Launch(5, 8, 5, 8)  # all on this machine


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"RANK": ""}, "RANK is ''"),
        ({"RANK": "8"}, "RANK is 8 and WORLD_SIZE is 8"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"MASTER_PORT": ""}, "MASTER_ADDR or MASTER_PORT is not set"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
    ],
)
def test_half_an_environment_is_refused(change: dict[str, str], text: str) -> None:
    with pytest.raises(IcsearchError, match=text):
        read_launch({**STARTED, **change})


def test_processes_that_share_a_device() -> None:
    launch = Launch(local_size=4)
    assert [launch.neighbours(devices) for devices in (1, 2, 3, 4, 8)] == [4, 2, 2, 1, 1]


def test_ranks_count_through_pipelines() -> None:
    grid = Grid(data=3, pipeline=2)
    assert [(grid.data_rank(rank), grid.place(rank)) for rank in range(grid.size)] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    assert [grid.last_rank(data_rank) for data_rank in range(3)] == [1, 3, 5]


@pytest.mark.parametrize(
    ("size", "data", "pipeline", "expected"),
    [
        (6, None, None, [(6, 1), (3, 2), (2, 3), (1, 6)]),  # short pipelines first
        (6, 2, None, [(2, 3)]),
        (6, None, 2, [(3, 2)]),
        (6, 3, 2, [(3, 2)]),
        (1, None, None, [(1, 1)]),
        (1, 1, 1, [(1, 1)]),
    ],
)
def test_grids(size: int, data: int | None, pipeline: int | None, expected: list[tuple[int, int]]) -> None:
    assert [(grid.data, grid.pipeline) for grid in grids(size, data, pipeline)] == expected


@pytest.mark.parametrize(
    ("size", "data", "pipeline", "text"),
    [
        (4, 2, 3, "--dp 2 --pp 3 needs 6 processes, and 4 were started"),
        (4, None, 3, "--pp 3 needs a multiple of 3 processes, and 4 were started"),
        (4, 1, 2, "--dp 1 --pp 2 needs 2 processes, and 4 were started"),
        (1, 2, None, "--dp 2 needs a multiple of 2 processes, and this is one: start them with torchrun"),
    ],
)
def test_other_numbers_are_refused(size: int, data: int | None, pipeline: int | None, text: str) -> None:
    with pytest.raises(IcsearchError, match=text):
        grids(size, data, pipeline)


@pytest.mark.parametrize(("layers", "pipeline"), [(78, 4), (47, 4), (61, 8), (6, 1), (16, 3)])
def test_blocks_are_the_stages_of_a_search(layers: int, pipeline: int) -> None:
    assert pipeline_blocks(layers, range(layers), pipeline) == list(split_stages(layers, pipeline))


def test_blocks_begin_with_a_dsa_layer() -> None:
    """Decoder layers of other kinds go with the DSA layer before them, the first ones with the first block."""
    assert pipeline_blocks(9, (1, 4, 5, 7), 2) == [range(0, 5), range(5, 9)]


def test_blocks_that_do_not_come_out_are_refused() -> None:
    with pytest.raises(IcsearchError, match="--pp 4 cuts 9 DSA layers into 3 blocks of 3: give --pp 3"):
        pipeline_blocks(9, range(9), 4)
