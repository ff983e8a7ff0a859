"""The memory of a search, planned from numbers before any weights are read: what fits, and where it is. No torch here.

One planner, for a run and for `icsearch plan`. A process of the grid has the weights of its layers, resident or
streamed; the room beside them and one layer call is for branches. Only the cost of a run follows from what is decided
here, never the bits of its losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from icsearch.core.errors import IcsearchError
from icsearch.core.text import format_bytes
from icsearch.model.shape import CPU, DISK, RESIDENT
from icsearch.planning.footprint import BatchShape
from icsearch.sweep.distributed.launch import Grid, can_be_cut, pipeline_blocks
from icsearch.sweep.states import Keeping

ALONE = Grid()  # one process
AUTO = "auto"  # of where weights are: wherever they fit
DEVICE = "device"  # of where a table's entries are, beside CPU and DISK
MEMORY_SHARE = 0.8  # of what a device has free when the run starts
SHARE_OF_CPU = 0.8  # of what is free there, for weights and states that are kept in it
SHARE_OF_DISK = 0.5  # of what is free beside the run, for a table's entries
FEWEST_BRANCHES = 3  # the trunk, a candidate, and the layer output that is just being made
_ON_DEVICE = 2  # streamed layers at once: the one that runs, the one that is on its way
_CONVERTING = 1  # on a CPU device, what reading a layer takes beside: its tensors as the shards hold them
# glibc gives a tensor pages of its own from 32 MB on; smaller ones share a heap, and what is freed between them stays
# with the process: a third of what they hold where they are small, less where they are large. Fitted on the runs of
# benchmarks/memory.py. With pages for every tensor (MALLOC_MMAP_THRESHOLD_) the plan holds without it, within 3%, but
# layers take 1.1 to 2.1 times as long.
LARGEST_IN_HEAP, HEAP_SHARE = 2**25, 0.35


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of weights, in the type that the model computes with, and of the checkpoint's shards."""

    outside: int  # what is no decoder layer: embedding, final norm, LM head
    layers: tuple[int, ...]
    on_disk: int

    @property
    def total(self) -> int:
        return self.outside + sum(self.layers)

    def of_block(self, block: range) -> WeightSizes:
        """Of a process that has these decoder layers and all that is none; of the shards, its part."""
        layers = self.layers[block.start : block.stop]
        return WeightSizes(self.outside, layers, int(self.on_disk * (sum(layers) / sum(self.layers))))


@dataclass(frozen=True)
class Machine:
    """What one process may take. `budget`: bytes of its device. `cpu_free`: of the CPU memory for all of a machine."""

    on_cpu: bool
    budget: int
    cpu_free: int
    processes: int = 1  # on the same machine
    program: int = 0  # measured: what the program itself has taken before the weights come; on CUDA not counted
    disk_free: int = 0  # beside the run, for all of a machine


@dataclass(frozen=True)
class Job:
    """What is to be run, in the numbers that its memory follows from."""

    shape: BatchShape
    weights: WeightSizes  # of the whole model
    layer_indices: tuple[int, ...]  # the decoder layer of each DSA layer
    sequences: int
    patterns: int = 1  # that are scored together at most
    heldout: int = 0  # held-out sequences
    offload: str = AUTO
    by_kl: bool = False
    draws: int = 0  # of a second-order table; 0: none is made
    may_offload_states: bool = True  # branch states, in CPU memory; what dp-baseline compares stays on the device

    def blocks(self, grid: Grid) -> list[range]:
        """The decoder layers of each place in the pipeline; raises IcsearchError where there are not as many."""
        return pipeline_blocks(len(self.weights.layers), self.layer_indices, grid.pipeline)


@dataclass(frozen=True)
class Offload:
    """Where weights are, why there, the bytes of weights that are on the device at once, and what a pass reads.

    A pass is one wave through all layers; `pass_bytes` are an estimate, 0 where nothing is read. `missing`: bytes of
    CPU memory that are wanting, where the weights are to be there.
    """

    where: str
    why: str
    device_bytes: int
    pass_bytes: int = 0
    missing: int = 0

    @property
    def streamed(self) -> bool:
        return self.where != RESIDENT


NO_OFFLOAD = Offload(RESIDENT, "", 0)


@dataclass(frozen=True)
class Kept:
    """Which states are kept between steps, the memory that they may take, and what they take at most, in bytes."""

    keeping: Keeping
    budget: int
    bytes: int

    @property
    def words(self) -> str:
        """Such as `240.0 MB, every 2nd layer`."""
        stride = self.keeping.stride
        if not stride:
            return "nothing: there is no room"
        which = {1: "every layer", 2: "every 2nd layer", 3: "every 3rd layer"}.get(stride, f"every {stride}th layer")
        return f"{format_bytes(self.bytes)}, {which}"


@dataclass(frozen=True)
class TablePlan:
    """How a second-order table is made, in bytes: `layer_bytes` while one layer of one batch is differentiated.

    `resting` of a wave: the entries of all layers and what they selected, on the device, in CPU memory or on disk
    (`place`). `missing`: what even the roomiest place is short of for one batch.
    """

    place: str
    batches_per_wave: int
    layer_bytes: int
    resting: int
    missing: int = 0

    @property
    def on_device(self) -> int:
        return self.layer_bytes + (self.resting if self.place == DEVICE else 0)


@dataclass(frozen=True)
class Memory:
    """The memory of a process: its budget and what it goes into, in bytes.

    `full_states`: the unmodified model's final states, kept for the KL; 0 where they are not needed or do not fit.
    `missing`: what the device, or the CPU memory beside it, is short of; then nothing runs, for the reason `refusal`.
    """

    budget: int
    weights: int  # on the device at once
    shape: BatchShape
    patterns_per_sweep: int  # how many patterns may live at once beside the trunk
    full_states: int = 0
    grid: Grid = ALONE
    batches_per_wave: int = 1  # how many batches go through the layers together
    offload: Offload = NO_OFFLOAD
    in_cpu_memory: int = 0  # for branch states, where the device has no room for them; 0: they are on the device
    program: int = 0  # as of the machine
    along: int = 0  # patterns that run in every sweep beside those that are scored
    table: TablePlan | None = None
    missing: int = 0
    refusal: str = ""

    @property
    def branch_bytes(self) -> int:
        """One branch's states, of all batches of a wave, where they are between layer calls."""
        return (self.shape.pinned_bytes if self.in_cpu_memory else self.shape.branch_bytes) * self.batches_per_wave

    @property
    def spare(self) -> int:
        """What weights, kept final states, one layer call and two branches leave; for states in CPU memory, of that."""
        if self.in_cpu_memory:
            return self.in_cpu_memory - 2 * self.branch_bytes
        fixed = self.weights + self.full_states + self.shape.layer_bytes
        return self.budget - fixed - 2 * self.branch_bytes

    def beside(self, patterns: int) -> int:
        """What so many patterns in one sweep leave of `spare`."""
        packets, living = self.grid.packets, min(patterns, self.patterns_per_sweep) + self.along
        return self.spare - (living * (1 + packets) + packets) * self.branch_bytes

    def for_kl(self, full_states: int) -> Memory:
        """The final states of the unmodified model come first; where they do not fit, it runs along in each sweep."""
        packets = self.grid.packets
        left = ((self.spare - full_states) // self.shape.branch_bytes - packets) // (1 + packets)
        if left >= 1:
            return replace(self, full_states=full_states, patterns_per_sweep=left)
        return replace(self, patterns_per_sweep=max(1, self.patterns_per_sweep - 1), along=1)

    def offload_states(self, room: int, patterns: int, batches: int) -> Memory:
        """With branch states in so many bytes of CPU memory, where that lets more of the patterns live at once.

        The device then holds three states of one batch: what a layer call starts from, makes, and has made. Longer
        waves alone are not worth it: every state crosses the link twice a layer, and copies are waited for.
        """
        batches = batches if self.offload.streamed else 1
        together, wave = plan_waves(room // self.shape.pinned_bytes, patterns, batches, 2 + self.along)
        if self.patterns_per_sweep >= patterns or together <= self.patterns_per_sweep:
            return self
        return replace(self, in_cpu_memory=room, patterns_per_sweep=together, batches_per_wave=wave)

    def keep(self, keeping: Keeping, patterns: int, sequences: int) -> Kept:
        """States kept between steps: so many patterns of a sweep come first, of the sequences of the largest share."""
        share = largest_share(sequences, self.shape.batch_size, self.grid)
        blocks = pipeline_blocks(keeping.num_layers, keeping.layer_indices, self.grid.pipeline)
        return plan_kept(keeping, self.shape, share, self.beside(patterns), blocks, self.in_cpu_memory > 0)

    def live_branches(self, patterns: int) -> int:
        """Of a sweep of so many: at work and on their way, the trunk, and the layer output that is being made."""
        return (min(patterns, self.patterns_per_sweep) + self.along + 1) * (1 + self.grid.packets) + 1

    def states(self, patterns: int, kept: int) -> int:
        """Branch states on the device while so many patterns are scored, with so many bytes kept between steps."""
        if self.in_cpu_memory:
            return FEWEST_BRANCHES * self.shape.branch_bytes
        return self.live_branches(patterns) * self.branch_bytes + kept

    def peak(self, patterns: int, kept: int) -> tuple[int, int]:
        """Estimate of the most that the process has at once while so many patterns are scored, and what of that is
        lost between tensors.
        """
        return self._process(self.shape.layer_bytes + self.full_states + self.states(patterns, kept))

    @property
    def table_peak(self) -> int:
        """Estimate of the most that the process has at once while a table is made; 0 where none is."""
        return self._process(self.table.on_device)[0] if self.table is not None else 0

    def _process(self, working: int) -> tuple[int, int]:
        """All of a process that works in so many bytes; and what, on the CPU, the C library's heap holds between
        tensors: see HEAP_SHARE.
        """
        tensor = self.shape.final_bytes * self.shape.batch_size
        lost = int(HEAP_SHARE * max(0.0, 1 - tensor / LARGEST_IN_HEAP) * working) if self.program else 0
        return self.program + self.weights + working + lost, lost


def plan_memory(job: Job, machine: Machine, grids: Sequence[Grid] = (ALONE,)) -> Memory:
    """The memory of a process under the first of these grids in which one pattern at least fits.

    Weights are streamed only where no grid can keep them, or where that is asked for. Raises IcsearchError where no
    grid does: for want of memory, unless the layers cannot be cut for any of them.
    """
    cut = [grid for grid in grids if can_be_cut(len(job.layer_indices), grid.pipeline)] or grids
    planned = [fit(job, machine, grid) for grid in cut]
    fitting = [memory for memory in planned if not memory.missing]
    if not fitting:
        raise IcsearchError(planned[-1].refusal)
    resident = [memory for memory in fitting if not memory.offload.streamed]
    return resident[0] if resident and job.offload == AUTO else fitting[0]


def fit(job: Job, machine: Machine, grid: Grid) -> Memory:
    """What the process of a grid that has most takes, and how much of the job it can run at once.

    Weights first; then one layer call and the fewest branches; then, for the KL, the unmodified model's final states;
    then as many patterns and, with streamed weights, batches together as there is room for.
    """
    shape, least = job.shape, FEWEST_BRANCHES + 2 * grid.packets  # between processes trunk and candidate are on the way

    differentiated = shape.differentiated_bytes(job.draws + 1) if job.draws else 0
    needed = max(shape.layer_bytes + least * shape.branch_bytes, differentiated)

    def short(weights: int) -> int:
        return weights + needed - machine.budget

    def fits(weights: int) -> bool:
        resident = Memory(machine.budget, weights, shape, 1, grid=grid)
        return short(weights) <= 0 and not (job.draws and plan_table(job, machine, resident).missing)

    largest = max(job.blocks(grid), key=lambda block: sum(job.weights.layers[block.start : block.stop]))
    sizes, cpu_free = job.weights.of_block(largest), machine.cpu_free // machine.processes
    offload = choose_offload(job.offload, machine.on_cpu, sizes, fits, cpu_free)
    weights = offload.device_bytes
    if grid.size > 1:
        one_pass = pass_bytes(offload.where, job.weights) if offload.streamed else 0  # however unequal the blocks are
        why = offload.why if offload.missing else f"{offload.why}, in each process"
        offload = replace(offload, why=why, pass_bytes=one_pass * grid.data)
    memory = Memory(machine.budget, weights, shape, 1, grid=grid, offload=offload, program=machine.program)
    if offload.missing:
        return replace(memory, missing=offload.missing * machine.processes, refusal=offload.why)

    def refused(missing: int, for_what: str) -> Memory:
        refusal = (
            f"memory budget {format_bytes(machine.budget)} is too small: {format_bytes(weights)} of weights and about "
            f"{for_what}{shape.guess}; raise --memory, or lower --batch-size or --seq-len"
        )
        return replace(memory, missing=missing, refusal=refusal)

    if short(weights) > 0:
        what = "to differentiate a layer" if differentiated == needed else "for one candidate"
        return refused(short(weights), f"{format_bytes(needed)} {what}")
    if job.draws:
        table = plan_table(job, machine, memory)
        if table.missing:
            entries = f"{format_bytes(differentiated)} to differentiate a layer, with {format_bytes(table.resting)}"
            return refused(table.missing, f"{entries} for the entries of all layers")
        memory = replace(memory, table=table)
    room = (machine.budget - weights - shape.layer_bytes) // shape.branch_bytes
    memory = replace(memory, patterns_per_sweep=(room - 2 - grid.packets) // (1 + grid.packets))
    batches = grid.batches_per_wave(-(-largest_share(job.sequences, shape.batch_size, grid) // shape.batch_size))
    if job.by_kl:
        scored = sum(largest_share(total, shape.batch_size, grid) for total in (job.sequences, job.heldout))
        memory = memory.for_kl(scored * shape.final_bytes)
    if offload.streamed:
        room = (machine.budget - weights - memory.full_states - shape.layer_bytes) // shape.branch_bytes
        together, wave = plan_waves(room // (1 + grid.packets), job.patterns, batches, 2 + memory.along)
        memory = replace(memory, patterns_per_sweep=together, batches_per_wave=wave)
    if machine.on_cpu or grid.pipeline > 1 or not job.may_offload_states:
        return memory
    whole = job.weights
    room = room_for_states(machine.cpu_free, machine.processes, offload.where, sum(whole.layers), whole.on_disk)
    return memory.offload_states(room, job.patterns, batches)


def plan_table(job: Job, machine: Machine, memory: Memory) -> TablePlan:
    """Where a table's entries rest between the way forth and back, and how many batches go that way together.

    The fewest waves, for with streamed weights each reads all layers twice; among equals the nearest place.
    """
    shape, grid, streamed = job.shape, memory.grid, memory.offload.streamed
    cotangents, layers = job.draws + 1, max(map(len, job.blocks(grid)))
    layer = shape.differentiated_bytes(cotangents)
    one = layers * shape.entry_bytes + shape.selections_bytes(len(job.layer_indices))
    one *= grid.pipeline  # waves that are on their way before the first one comes back
    several = one + cotangents * shape.entry_bytes  # what a batch has while others of its wave are at work
    batches = -(-largest_share(job.sequences, shape.batch_size, grid) // shape.batch_size)
    wanted = grid.batches_per_wave(batches) if streamed else 1
    rooms = {DEVICE: machine.budget - memory.weights - layer}
    if not machine.on_cpu:
        whole = job.weights
        in_cpu_memory = room_for_states(
            machine.cpu_free, machine.processes, memory.offload.where, sum(whole.layers), whole.on_disk
        )
        rooms[CPU] = in_cpu_memory * shape.branch_bytes // shape.pinned_bytes
    rooms[DISK] = int(SHARE_OF_DISK * machine.disk_free) // machine.processes
    waves = {place: min(wanted, room // several) or int(room >= one) for place, room in rooms.items()}
    place = max(waves, key=waves.__getitem__)
    together = max(1, waves[place])
    missing = 0 if waves[place] else one - max(rooms.values())
    return TablePlan(place, together, layer, one if together == 1 else together * several, missing)


def largest_share(sequences: int, batch_size: int, grid: Grid) -> int:
    """The most that a data rank has of so many sequences, in whole batches."""
    batches = -(-sequences // batch_size)
    return min(sequences, -(-batches // grid.data) * batch_size)


def choose_offload(
    requested: str, on_cpu: bool, sizes: WeightSizes, fits: Callable[[int], bool], cpu_free: int
) -> Offload:
    """The place that was requested, or for `auto` the nearest one that is large enough: device, CPU memory, disk.

    `fits` says whether so many bytes of weights leave room to work on the device.
    """
    weights, room = format_bytes(sizes.total), int(SHARE_OF_CPU * cpu_free)
    at_once = _ON_DEVICE + (_CONVERTING if on_cpu else 0)
    device_bytes = sizes.outside + at_once * max(sizes.layers)

    def streamed(where: str, why: str, missing: int = 0) -> Offload:
        return Offload(where, why, device_bytes, pass_bytes(where, sizes), missing)

    if requested == RESIDENT:
        return Offload(RESIDENT, "as asked for", sizes.total)
    if requested == CPU and on_cpu:
        return Offload(RESIDENT, "--offload cpu is what a CPU device does anyway", sizes.total)
    if requested == CPU and sizes.total > room:
        why = f"--offload cpu needs {weights} of CPU memory for the weights and {format_bytes(room)} are to be had"
        return streamed(CPU, f"{why}: give --offload disk", sizes.total - room)
    if requested in (CPU, DISK):
        return streamed(requested, "as asked for")
    if fits(sizes.total):
        return Offload(RESIDENT, f"{weights} fit", sizes.total)
    if not on_cpu and sizes.total <= room:
        return streamed(CPU, f"{weights} do not fit on the device, but into CPU memory")
    return streamed(DISK, f"{weights} do not fit into memory")


def pass_bytes(where: str, sizes: WeightSizes) -> int:
    """What a pass through all layers reads."""
    return sizes.on_disk if where == DISK else sum(sizes.layers)


def plan_waves(room: int, patterns: int, batches: int, beside: int = 2) -> tuple[int, int]:
    """(patterns per sweep, batches per wave) with which scoring takes the fewest passes over the weights.

    `room` is how many states of one batch fit; each sweep needs `beside` more than it has patterns, for the trunk and
    the layer output that is just being made. Among equals, fewer sweeps: each of them runs the trunk again.
    """
    possible = []
    for sweeps in range(1, patterns + 1):
        together = -(-patterns // sweeps)
        wave = min(batches, room // (together + beside))
        if wave:
            possible.append((sweeps * -(-batches // wave), sweeps, together, wave))
    _, _, together, wave = min(possible, default=(0, 0, 1, 1))
    return together, wave


def room_for_states(free: int, processes: int, where: str, weights: int, stored: int) -> int:
    """Bytes of CPU memory that each of so many processes on one machine may fill with branch states.

    Weights that are kept there come first, for each process its own. Where they are streamed from disk, the system's
    cache of the checkpoint does, if it can hold all of it: every pass reads it again.
    """
    room = int(SHARE_OF_CPU * free)
    if where == CPU:
        return room // processes - weights
    return (room - stored if where == DISK and stored <= room else room) // processes


def plan_kept(
    keeping: Keeping,
    shape: BatchShape,
    sequences: int,
    room: int,
    blocks: Sequence[range] | None = None,
    pinned: bool = False,
) -> Kept:
    """The states of every k-th layer entry, with the smallest k for which all that are of use fit into `room` bytes.

    `blocks`: the decoder layers of each process of a pipeline, of which every one has that room. `pinned`: it is in
    pinned CPU memory. Decided before the run, from numbers alone: it changes what a run costs, never its bits.
    """
    entry_bytes = (shape.pinned_bytes if pinned else shape.branch_bytes) // shape.batch_size * sequences
    for stride in range(1, keeping.num_layers):
        spaced = replace(keeping, stride=stride)
        most = max(spaced.states_in(block) for block in blocks or [range(keeping.num_layers)])
        if most * entry_bytes <= room:
            return Kept(spaced, room, most * entry_bytes)
    return Kept(replace(keeping, stride=0), 0, 0)
