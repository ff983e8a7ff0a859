"""Where weights rest: chosen by what fits, and waves that take the fewest passes over them."""

from __future__ import annotations

import itertools

import pytest

from icsearch.core.errors import IcsearchError
from icsearch.planning.offload import SHARE_OF_CPU, Offload, WeightSizes, choose, plan_waves, rows

SIZES = WeightSizes(outside=100, layers=(10, 30, 30, 30), on_disk=250)
ENOUGH, TOO_LITTLE = int(200 / SHARE_OF_CPU) + 1, int(200 / SHARE_OF_CPU) - 2


def chosen(requested: str, on_cpu: bool, room: int, cpu_free: int = ENOUGH) -> Offload:
    return choose(requested, on_cpu, SIZES, lambda weights: weights <= room, cpu_free)


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
    assert found.where == "none" and "what a CPU device does anyway" in dict(rows(found, 1, None))["weights"]


def test_cpu_memory_that_is_too_small_is_refused() -> None:
    with pytest.raises(IcsearchError, match="needs 200 B of CPU memory .* 198 B .* --offload disk"):
        chosen("cpu", False, room=1000, cpu_free=TOO_LITTLE)


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
    streamed = dict(rows(chosen("auto", True, room=199), 3, 100.0))
    assert streamed["weights"] == (
        "streamed from the checkpoint's shards, layer by layer: 200 B do not fit into memory"
    )
    assert "3 times a step, about 750 B, 8 s at 100 B/s" in streamed["reading"] and "estimate" in streamed["reading"]
    assert rows(chosen("auto", True, room=200), 3, None) == [("weights", "resident: 200 B fit")]
