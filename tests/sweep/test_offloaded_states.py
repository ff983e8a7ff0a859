"""Branch states in CPU memory: moved in and out around every layer call, with the same bits. No GPU: see `Device`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from icsearch.core.pattern import Pattern
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.model import DsaModel
from icsearch.model.shape import CPU as CPU_MEMORY
from icsearch.model.shape import DISK, RESIDENT
from icsearch.planning.footprint import INT, BatchShape, Call, blockwise_shape
from icsearch.planning.memory import Memory, Offload, plan_kept, room_for_states
from icsearch.planning.modelfile import open_model_file
from icsearch.sweep.branches import Batch, InCpuMemory, OnDevice, cut_batches
from icsearch.sweep.states import Keeping, StateStore
from icsearch.sweep.sweep import KlSweeper, Sweeper

PATTERNS = [Pattern(letters) for letters in ("FFFFFF", "FSFFFF", "FFFSFF", "FFFFSS", "FSSSSS")]
CPU = torch.device("cpu")


class Device(InCpuMemory):
    """Stands for a device apart: what is taken is a copy, and only copies may enter and leave a layer call."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.offloaded: set[int] = set()
        self.moved = 0

    def put(self, value: Any) -> Any:
        laid = super().put(value)
        if isinstance(laid, torch.Tensor):
            assert laid.data_ptr() != value.data_ptr()
            self.offloaded.add(laid.data_ptr())
            self.moved += 1
        return laid

    def fetch(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            assert value.data_ptr() in self.offloaded
            return value.clone()
        return value


@pytest.fixture(scope="module", params=["deepseek_v32", "glm_moe_dsa"])
def dsa(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DsaModel:
    directory = tiny.save_checkpoint(tmp_path_factory.mktemp("model"), request.param)
    return loading.load(open_checkpoint(str(directory)), device="cpu", block_elements=2**12)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    ids = torch.randint(tiny.VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))
    return cut_batches(ids, torch.ones_like(ids, dtype=torch.bool), 2)


def test_a_sweep_of_offloaded_states_has_the_same_bits(dsa: DsaModel, batches: list[Batch]) -> None:
    device = Device()
    assert Sweeper(dsa, None, device).sweep(PATTERNS, batches) == Sweeper(dsa).sweep(PATTERNS, batches)
    # hidden states once for each batch, at the embedding and behind each of the layer runs; selections of F layers
    letters = [str(pattern) for pattern in PATTERNS]
    nodes = {text[: end + 1] for text in letters for end in range(6)}
    assert device.moved == len(batches) * (1 + len(nodes) + sum(node[-1] == "F" for node in nodes))


def test_the_kl_of_offloaded_states_has_the_same_bits(dsa: DsaModel, batches: list[Batch]) -> None:
    offloaded = KlSweeper(dsa, None, True, Device()).sweep(PATTERNS, batches)
    assert offloaded == KlSweeper(dsa, None, True).sweep(PATTERNS, batches)


def test_kept_states_rest_too(dsa: DsaModel, batches: list[Batch]) -> None:
    keeping = Keeping(6, tuple(range(6)), frozenset(range(1, 6)), 1)
    device, base = Device(), Pattern.full(6)
    kept = Sweeper(dsa, StateStore(keeping, base, 10**9), device)
    kept.sweep([base], batches)
    flips = [base.flip(layer) for layer in range(1, 6)]
    again = kept.sweep(flips, batches)
    assert again.nll == Sweeper(dsa).sweep(flips, batches).nll
    assert again.layer_sequences < Sweeper(dsa).sweep(flips, batches).layer_sequences


def test_on_the_device_nothing_moves() -> None:
    states = torch.zeros(2)
    assert OnDevice().put(states) is states and OnDevice().fetch(states) is states
    assert InCpuMemory(CPU).put(None) is None and InCpuMemory(CPU).fetch("other") == "other"


def memory(patterns: int, **changes: Any) -> Memory:
    shape = blockwise_shape(Call(open_model_file("demo").shape, 1, 256, 4, 2**19))
    return Memory(budget=10**9, weights=0, shape=shape, patterns_per_sweep=patterns, **changes)


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 1024, 1025])
def test_pinned_memory_comes_in_powers_of_two(size: int) -> None:
    """As torch's allocator rounds (ATen/core/CachingHostAllocator.h), each of a state's two tensors by itself."""
    shape = BatchShape(1, size, 5, 2, 3, 1, 1, 1, 1)
    powers = [2**n for n in range(20)]
    tensors = (size * 5 * 2, size * min(3, size) * INT)
    assert shape.branch_bytes == sum(tensors)
    assert shape.pinned_bytes == sum(next(power for power in powers if power >= one) for one in tensors)


def test_what_rests_is_planned_at_the_size_that_it_takes() -> None:
    """Room, what is left of it, and the states kept between steps; the device holds the tensors as they are."""
    shape = BatchShape(1, 1000, 100, 4, 10, 1, 1, 1, 1)  # 400 kB and 40 kB, pinned 524288 and 65536 bytes
    pinned = 524288 + 65536
    assert (shape.branch_bytes, shape.pinned_bytes) == (440_000, pinned)
    offloaded = Memory(10**9, 0, shape, 2).offload_states(12 * pinned, patterns=10, batches=1)
    assert (offloaded.patterns_per_sweep, offloaded.branch_bytes, offloaded.spare) == (10, pinned, 10 * pinned)
    assert Memory(10**9, 0, shape, 2).offload_states(12 * pinned - 1, 10, 1).patterns_per_sweep < 10
    keeping = Keeping(4, tuple(range(4)), frozenset(range(1, 4)))
    assert plan_kept(keeping, shape, 8, 10**9, pinned=True).bytes % pinned == 0


def test_states_rest_in_cpu_memory_where_that_lets_more_live() -> None:
    branch = memory(2).shape.pinned_bytes
    offloaded = memory(2).offload_states(12 * branch, patterns=15, batches=4)
    assert (offloaded.in_cpu_memory, offloaded.patterns_per_sweep, offloaded.batches_per_wave) == (
        12 * branch,
        8,
        1,
    )  # 2 sweeps of 8
    assert offloaded.spare == 10 * branch
    assert memory(2).offload_states(100 * branch, patterns=15, batches=4).patterns_per_sweep == 15
    assert memory(15).offload_states(100 * branch, patterns=15, batches=4).in_cpu_memory == 0  # all live on the device
    assert memory(2).offload_states(3 * branch, patterns=15, batches=4).in_cpu_memory == 0  # CPU memory is smaller


def test_resident_weights_are_not_passed_in_waves() -> None:
    """5 patterns and 4 batches together would be fewer passes; with weights that are there, sweeps are what counts."""
    shape = memory(2).shape
    assert memory(2).offload_states(28 * shape.pinned_bytes, patterns=15, batches=4).patterns_per_sweep == 15


def test_cpu_memory_for_states_is_beside_what_it_holds_of_the_weights() -> None:
    assert room_for_states(1000, 1, RESIDENT, weights=100, stored=50) == 800
    assert room_for_states(1000, 2, CPU_MEMORY, weights=100, stored=50) == 300  # each process has its own weights there
    assert room_for_states(1000, 2, DISK, weights=100, stored=50) == 375  # the system's cache is one for all
    assert room_for_states(1000, 2, DISK, weights=100, stored=801) == 400  # it could not hold the checkpoint anyway


def test_streamed_weights_make_longer_waves_of_offloaded_states() -> None:
    branch = memory(2).shape.pinned_bytes
    streamed = memory(2, offload=Offload(DISK, "", 0, 1))
    assert streamed.offload_states(70 * branch, patterns=15, batches=4).batches_per_wave == 4
