"""Where a search could run: grids of processes, weights resident or streamed, and whether that fits. No torch.

Every process has one device. `data` of them share the sequences, `pipeline` of them share the layers, in the blocks of
`launch.pipeline_blocks`. Weights are resident, or streamed layer by layer from CPU memory or disk (`offload`). On CUDA,
branch states go to CPU memory where more of them live so and no pipeline hands them on, as a run plans it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from icsearch.core.errors import IcsearchError
from icsearch.core.text import format_bytes
from icsearch.model.shape import BLOCK_ELEMENTS, CPU, DISK, RESIDENT
from icsearch.planning import plan
from icsearch.planning.devices import CPU as DEVICE_CPU
from icsearch.planning.devices import Device, Devices
from icsearch.planning.footprint import Call
from icsearch.planning.modelfile import DTYPE_BYTES, ModelFile
from icsearch.planning.offload import SHARE_OF_CPU, WeightSizes, choose, plan_waves, resting_room
from icsearch.planning.plan import BatchShape, Kept
from icsearch.planning.workload import Workload
from icsearch.sweep.distributed.launch import Grid, can_be_cut, pipeline_blocks

OFFLOADS = (RESIDENT, CPU, DISK)
MEMORY_SHARE = 0.8  # of a device's memory, as a run takes by default of what is free


@dataclass(frozen=True)
class Placement:
    """One way to place a search: `data` x `pipeline` devices, weights resident or streamed from `offload`."""

    data: int = 1
    pipeline: int = 1
    offload: str = RESIDENT

    @property
    def processes(self) -> int:
        return self.data * self.pipeline

    @property
    def grid(self) -> Grid:
        return Grid(self.data, self.pipeline)

    @property
    def streamed(self) -> bool:
        return self.offload != RESIDENT

    @property
    def words(self) -> str:
        """Such as `dp 2 x pp 4 from disk`; resident where nothing is said of weights."""
        weights = f" from {self.offload}" if self.streamed else ""
        if self.processes == 1:
            return f"one device{weights}"
        shares = {"dp": self.data, "pp": self.pipeline}
        return " x ".join(f"{name} {count}" for name, count in shares.items() if count > 1) + weights


@dataclass(frozen=True)
class Case:
    """What is to run and on what: the model, its workload, tokens and type, and the devices."""

    model: ModelFile
    workload: Workload
    seq_len: int
    batch_size: int
    dtype: str
    devices: Devices

    @property
    def device(self) -> Device:
        return self.devices.device

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def call(self) -> Call:
        """One layer call: one batch."""
        elements = BLOCK_ELEMENTS[self.device.kind]
        return Call(self.model.shape, self.batch_size, self.seq_len, self.dtype_bytes, elements)

    @property
    def shape(self) -> BatchShape:
        """One batch, as the plan of a run has it."""
        return plan.blockwise_shape(self.call)

    @property
    def budget(self) -> int:
        """Bytes of a device that a run may take."""
        return int(MEMORY_SHARE * self.device.memory)

    @property
    def all_batches(self) -> int:
        return -(-self.workload.sequences // self.batch_size)

    def batches(self, placement: Placement) -> int:
        """Batches of the data rank that has most."""
        return -(-self.all_batches // placement.data)

    def blocks(self, placement: Placement) -> list[range]:
        """The decoder layers of each place in the pipeline; raises IcsearchError where there are not as many."""
        layers = self.model.shape.layers
        return pipeline_blocks(layers, range(layers), placement.pipeline)


@dataclass(frozen=True)
class Fit:
    """A placement with what its fullest device holds, in bytes; `missing` where that is more than its budget.

    `per_sweep` patterns live at once; `wave` batches pass through a layer while its weights are there.
    """

    placement: Placement
    budget: int
    weights: int
    call: int
    branch: int
    per_sweep: int
    wave: int
    kept: Kept
    missing: int = 0
    resting: bool = False  # states are in CPU memory, but for three of one batch

    @property
    def states(self) -> int:
        """Live branches, those on their way to other processes included, and states kept between steps."""
        if self.resting:
            return plan.FEWEST_BRANCHES * self.branch
        packets = self.placement.grid.packets
        live = (self.per_sweep + 1) * (1 + packets) + 1
        return live * self.wave * self.branch + self.kept.bytes

    @property
    def total(self) -> int:
        return self.weights + self.states + self.call


def placements(case: Case) -> list[Placement]:
    """All grids of the devices, and one of them alone; resident before streamed, few places before many."""
    count = case.devices.count
    grids = [(count // p, p) for p in range(1, count + 1) if count % p == 0]
    shapes = list(dict.fromkeys([*grids, (1, 1)]))
    found = [Placement(data, pipeline, offload) for offload in OFFLOADS for data, pipeline in shapes]
    return [one for one in found if _can_be(case, one)]


def _can_be(case: Case, placement: Placement) -> bool:
    """Whether there are layers for every place and sequences for every data rank."""
    needless = placement.offload == CPU and case.device.kind == DEVICE_CPU  # its memory is CPU memory
    cut = can_be_cut(case.model.shape.layers, placement.pipeline)
    return case.all_batches >= placement.data and cut and not needless


def fit(case: Case, placement: Placement) -> Fit:
    """What a placement takes; `missing` says by how many bytes it does not fit on the device, or into CPU memory."""
    shape, weights = case.shape, weight_bytes(case, placement)
    nothing = Kept(case.workload.keeping(), 0, 0)
    empty = Fit(placement, case.budget, weights, shape.layer_bytes, shape.branch_bytes, 1, 1, nothing)
    try:
        patterns = plan.patterns_per_sweep(shape, weights, case.budget, placement.grid.packets)
    except IcsearchError:
        return replace(empty, missing=empty.total - case.budget)
    if short := missing_cpu_bytes(case, placement):
        return replace(empty, missing=short)
    most = case.workload.most_patterns
    if placement.streamed:
        room = plan.room_for_branches(shape, weights, case.budget) // (1 + placement.grid.packets)
        batches = placement.grid.batches_per_wave(case.batches(placement))
        together, wave = plan_waves(room, most, batches)
        return _rested(case, replace(empty, per_sweep=together, wave=wave))
    if patterns < most:
        return _rested(case, replace(empty, per_sweep=patterns))
    full = replace(empty, per_sweep=most)
    return replace(full, kept=_kept(case, placement, case.budget - full.total))


def _rested(case: Case, found: Fit) -> Fit:
    """With states in CPU memory, where that lets more patterns live at once: see Memory.rest_in_cpu."""
    most, placement = case.workload.most_patterns, found.placement
    if case.device.kind == DEVICE_CPU or placement.pipeline > 1 or found.per_sweep >= most:
        return found
    sizes, free = weight_sizes(case), case.device.node_memory
    room = resting_room(free, placement.processes, placement.offload, sum(sizes.layers), sizes.on_disk)
    batches = case.batches(placement) if placement.streamed else 1
    together, wave = plan_waves(room // case.shape.pinned_bytes, most, batches)
    if together <= found.per_sweep:
        return found
    return replace(found, resting=True, per_sweep=together, wave=wave)


def _kept(case: Case, placement: Placement, room: int) -> Kept:
    """States between steps: of the sequences of a data rank, in the memory of each process of its pipeline."""
    sequences = case.batches(placement) * case.batch_size
    return plan.plan_kept(case.workload.keeping(), case.shape, sequences, room, case.blocks(placement))


def weight_sizes(case: Case) -> WeightSizes:
    """Of the weights as the model computes with them, and of the checkpoint."""
    model, width = case.model, case.dtype_bytes
    layers = tuple(model.layer_parameters(index) * width for index in range(model.shape.layers))
    return WeightSizes(model.outside_parameters * width, layers, round(model.stored_model_bytes))


def weight_bytes(case: Case, placement: Placement) -> int:
    """Weights on the device of the process that has most of them, as a run counts them."""
    sizes = weight_sizes(case)
    if placement.streamed:
        on_cpu = case.device.kind == DEVICE_CPU
        return choose(DISK, on_cpu, sizes, lambda weights: False, 0).device_bytes
    return sizes.outside + max(sum(sizes.layers[index] for index in block) for block in case.blocks(placement))


def missing_cpu_bytes(case: Case, placement: Placement) -> int:
    """By how much the node's CPU memory is too small for the weights that rest there: one copy for each data rank."""
    if placement.offload != CPU:
        return 0
    return max(0, weight_sizes(case).total * placement.data - int(SHARE_OF_CPU * case.device.node_memory))


def why_nothing_fits(case: Case, fits: list[Fit]) -> IcsearchError:
    """What is missing where no placement fits."""
    least = min(fits, key=lambda one: one.missing)
    parts = {"weights": least.weights, "a layer call": least.call, "branches": least.states}
    sizes = ", ".join(f"{format_bytes(size)} {name}" for name, size in parts.items())
    more = "plan for more --devices or --device-memory, or a shorter --seq-len"
    if case.device.kind == DEVICE_CPU:
        more = "plan for GPUs, such as --devices 8xH200, or a shorter --seq-len"
    return IcsearchError(
        f"nothing fits {case.devices.words}, of whose memory {format_bytes(least.budget)} each may be taken "
        f"({MEMORY_SHARE:.0%}): the least is {format_bytes(least.total)} ({least.placement.words}; {sizes}), which is "
        f"{format_bytes(least.missing)} too much; {more}"
    )
