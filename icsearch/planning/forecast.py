"""What a search will take on given devices, from the sizes of a model alone, in every placement. No torch.

Two kinds of numbers, never mixed: *counted* (layer evaluations, FLOPs, bytes of weights read: exact by their formulas,
for the course that a rehearsal takes, and as a bound) and *estimated* (memory, by the planner of a run; hours).

Hours: one roofline for each phase of a layer call, `Device.seconds`. A sweep passes its waves through the places of the
pipeline; a place takes what computing takes, or what bringing its weights takes if that is more (the next layer comes
while one runs). The slowest place sets the pace, and one trunk has to run through the others first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

from icsearch.core.errors import IcsearchError
from icsearch.core.text import format_bytes
from icsearch.model.shape import BLOCK_ELEMENTS, CPU, DISK, EXPERT_CHUNK_TOKENS, HEAD_CHUNK_TOKENS, RESIDENT
from icsearch.planning.devices import Device, Devices
from icsearch.planning.footprint import FLOAT, Call, blockwise_shape
from icsearch.planning.memory import MEMORY_SHARE, Job, Kept, Machine, Memory, WeightSizes, fit
from icsearch.planning.modelfile import DTYPE_BYTES, ModelFile
from icsearch.planning.rehearsal import Sweep, Workload, layer_evaluations
from icsearch.planning.work import Widths, layer_work
from icsearch.search.registry import DRAWS, LIKELY_ROUNDS, ROUNDS, STRATEGIES
from icsearch.sweep.distributed.launch import Grid, can_be_cut
from icsearch.sweep.states import LayerRuns

SECONDS_AN_HOUR = 3600.0
FISHER = "fisher"  # beside the strategies of greedy
INDEX_SCORES, ATTENTION, REST, HEAD = "index scores", "attention", "projections, experts", "LM head"


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
    def batches(self) -> int:
        return -(-self.workload.sequences // self.batch_size)

    @property
    def call(self) -> Call:
        """One layer call: one batch."""
        elements = BLOCK_ELEMENTS[self.device.kind]
        return Call(self.model.shape, self.batch_size, self.seq_len, DTYPE_BYTES[self.dtype], elements)

    @cached_property
    def job(self) -> Job:
        """What the memory planner of a run is asked."""
        model, width = self.model, DTYPE_BYTES[self.dtype]
        layers = tuple(model.layer_parameters(index) * width for index in range(model.shape.layers))
        return Job(
            shape=blockwise_shape(self.call),
            weights=WeightSizes(model.outside_parameters * width, layers, round(model.stored_model_bytes)),
            layer_indices=tuple(range(model.shape.layers)),
            sequences=self.workload.sequences,
            patterns=len(self.workload.flippable),
        )

    def place(self, grid: Grid, offload: str) -> Placement:
        """The search under one grid, each process on its own device."""
        budget, node = int(MEMORY_SHARE * self.device.memory), self.device.node_memory
        machine = Machine(self.device.kind == "cpu", budget, node, grid.size)
        memory = fit(replace(self.job, offload=offload), machine, grid)
        most, sequences = max(self.job.patterns, 1 + len(self.workload.references)), self.workload.sequences
        nothing = Kept(self.workload.keeping(), 0, 0)
        kept = nothing if memory.missing else memory.keep(self.workload.keeping(), most, sequences)
        return Placement(grid, offload, memory, kept, most)


@dataclass(frozen=True)
class Placement:
    """One way to place a search, with what its fullest device holds, in bytes; `memory.missing` where it does not fit.

    Weights are resident, or streamed layer by layer from CPU memory or disk (`offload`).
    """

    grid: Grid
    offload: str
    memory: Memory
    kept: Kept
    patterns: int  # of a sweep at most

    @property
    def states(self) -> int:
        """Live branches, those on their way to other processes included, and states kept between steps."""
        return self.memory.states(self.patterns, self.kept.bytes)

    @property
    def total(self) -> int:
        return self.memory.weights + self.states + self.memory.shape.layer_bytes

    @property
    def words(self) -> str:
        """Such as `dp 2 x pp 4 from disk`; resident where nothing is said of weights."""
        shares = {"dp": self.grid.data, "pp": self.grid.pipeline}
        grid = " x ".join(f"{name} {count}" for name, count in shares.items() if count > 1) or "one device"
        return grid if self.offload == RESIDENT else f"{grid} from {self.offload}"


@dataclass(frozen=True)
class Forecast:
    """What `fisher`, or a strategy of greedy's, takes in one placement, in steps or sweeps.

    Layer evaluations are of one layer over all sequences.

    `layer_evaluations`, `flops`, `weight_bytes` (read in the whole search) and `hours`: the likely course, rehearsed;
    `most_*`: bounds. `computing_hours` of the slowest place, and `bringing_hours` of its weights, are what `hours` is
    made of where neither waits for the other. Hours are estimates.
    """

    strategy: str
    steps: int
    layer_evaluations: int
    most_layer_evaluations: int
    flops: float
    most_flops: float
    weight_bytes: float
    most_weight_bytes: float
    hours: float
    most_hours: float
    computing_hours: float
    bringing_hours: float

    @property
    def binds(self) -> str:
        """Which side sets the pace."""
        return "computing" if self.computing_hours >= self.bringing_hours else "bringing weights"


@dataclass(frozen=True)
class Plan:
    """Everything that the command says: the case, every placement, and what each strategy takes where it fits."""

    case: Case
    placements: tuple[Placement, ...]
    forecasts: dict[Placement, tuple[Forecast, ...]]

    @property
    def best(self) -> tuple[Placement, Forecast]:
        """The placement on which the search on the table is fastest; of those within 1%, the simplest one."""
        fastest = min(fisher.hours for fisher, *_ in self.forecasts.values())
        fisher = ((placement, first) for placement, (first, *_) in self.forecasts.items())
        return next((placement, forecast) for placement, forecast in fisher if forecast.hours <= 1.01 * fastest)


def make_plan(case: Case) -> Plan:
    """Every placement of a search; raises IcsearchError where nothing fits."""
    placements = [case.place(grid, offload) for grid, offload in all_placements(case)]
    fitting = [placement for placement in placements if not placement.memory.missing]
    if not fitting:
        raise _why_nothing_fits(case, placements)
    clock = Clock(case)
    likely = cache(lambda name, per_sweep, stride: case.workload.likely(name, per_sweep, case.workload.keeping(stride)))
    most = cache(case.workload.most)

    def forecast(placement: Placement, name: str) -> Forecast:
        per_sweep, course = placement.memory.patterns_per_sweep, Course(case, placement, clock)
        if name == FISHER:
            nothing_kept, table = case.workload.keeping(), clock.table(DRAWS)
            sweeps, bound = (
                [*table, *case.workload.proposed(per_sweep, nothing_kept, rounds)] for rounds in (LIKELY_ROUNDS, ROUNDS)
            )
        else:
            sweeps, bound = likely(name, per_sweep, placement.kept.keeping.stride), most(name, per_sweep)
        hours, computing, bringing = (seconds / SECONDS_AN_HOUR for seconds in course.seconds(sweeps))
        return Forecast(
            strategy=name,
            steps=len(sweeps) if name == FISHER else case.workload.num_shared,
            layer_evaluations=layer_evaluations(sweeps),
            most_layer_evaluations=layer_evaluations(bound),
            flops=clock.flops(sweeps) * case.batches,
            most_flops=clock.flops(bound) * case.batches,
            weight_bytes=course.weight_bytes(len(sweeps)),
            most_weight_bytes=course.weight_bytes(len(bound)),
            hours=hours,
            most_hours=course.seconds(bound)[0] / SECONDS_AN_HOUR,
            computing_hours=computing,
            bringing_hours=bringing,
        )

    forecasts = {each: tuple(forecast(each, name) for name in (FISHER, *STRATEGIES)) for each in fitting}
    return Plan(case, tuple(placements), forecasts)


def all_placements(case: Case) -> list[tuple[Grid, str]]:
    """All grids of the devices, and one of them alone; resident before streamed, short pipelines before long ones.

    There are layers for every place and sequences for every data rank; what is in CPU memory is no streaming on a CPU.
    """
    count = case.devices.count
    grids = dict.fromkeys([*(Grid(count // p, p) for p in range(1, count + 1) if count % p == 0), Grid()])
    possible = [g for g in grids if case.batches >= g.data and can_be_cut(case.model.shape.layers, g.pipeline)]
    offloads = (RESIDENT, DISK) if case.device.kind == "cpu" else (RESIDENT, CPU, DISK)
    return [(grid, offload) for offload in offloads for grid in possible]


def _why_nothing_fits(case: Case, placements: Sequence[Placement]) -> IcsearchError:
    """What is missing where no placement fits."""
    least = min(placements, key=lambda placement: placement.memory.missing)
    parts = {"weights": least.memory.weights, "a layer call": least.memory.shape.layer_bytes, "branches": least.states}
    sizes = ", ".join(f"{format_bytes(size)} {name}" for name, size in parts.items())
    more = "plan for more --devices or --device-memory, or a shorter --seq-len"
    if case.device.kind == "cpu":
        more = "plan for GPUs, such as --devices 8xH200, or a shorter --seq-len"
    return IcsearchError(
        f"nothing fits {case.devices.words}, of whose memory {format_bytes(least.memory.budget)} each may be taken "
        f"({MEMORY_SHARE:.0%}): the least is {format_bytes(least.total)} ({least.words}; {sizes}), which is "
        f"{format_bytes(least.memory.missing)} too much; {more}"
    )


@dataclass(frozen=True)
class Phase:
    """A part of a call: FLOPs, and bytes to and from the device's memory, as our arithmetic moves them."""

    name: str
    flops: float
    bytes: float
    in_float32: bool = False


def layer_phases(call: Call, index: int, full: bool) -> list[Phase]:
    """The phases of a call of a DSA layer, with its own indexer or without.

    FLOPs are the counted ones of `work`, but where attention is dense behind a mask. Of bytes, weights are read once
    (those of experts once a chunk); each head's index scores are written, passed through the ReLU, and added to their
    sum; latents are gathered, and copied to float32; attention scores are scaled, masked, and put through the softmax.
    """
    shape, width, batch = call.shape, call.dtype_bytes, call.batch_size
    work = layer_work(shape, index, full, call.seq_len, Widths(weights=width, latents=width, index_keys=FLOAT))
    visible = batch * call.seq_len * (call.seq_len + 1) / 2  # (query, key) pairs
    products = work.projections.flops + work.index_projections.flops + work.mlp.flops
    weights = work.projections.bytes + work.index_projections.bytes + work.mlp.bytes
    moved = call.tokens * shape.hidden_size * (8 * FLOAT + 8 * width)  # two norms in float32, two sums
    if index >= shape.dense_layers:  # what is between, of each (token, expert) pair
        weights += (-(-call.tokens // EXPERT_CHUNK_TOKENS) - 1) * shape.expert_weights * shape.routed_experts * width
        pair = shape.hidden_size * (4 * width + 4 * FLOAT) + 8 * shape.moe_intermediate_size * width
        moved += call.tokens * shape.experts_per_token * pair
    phases = [Phase(REST, products * batch, weights + moved)]
    if full:
        traffic = visible * shape.index_heads * 6 * FLOAT + work.index_topk.bytes * batch
        phases.append(Phase(INDEX_SCORES, work.index_scores.flops * batch, traffic, in_float32=True))
    if call.gathers:
        flops = work.attention.flops * batch
        rows = flops / (2 * shape.heads * (shape.latent + shape.kv_lora_rank))  # (query, selected token) pairs
        copies = 3 * width + (0 if width == FLOAT else 2 * FLOAT)
        traffic = rows * (shape.latent * copies + shape.heads * 8 * FLOAT)
        return [*phases, Phase(ATTENTION, flops, traffic, in_float32=True)]
    per_pair = 2 * shape.heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim + shape.v_head_dim)
    return [*phases, Phase(ATTENTION, visible * per_pair, visible)]


def head_phase(call: Call) -> Phase:
    """Final norm, LM head and loss of one branch on one batch."""
    weights, chunks = call.shape.embedding_weights, -(-call.tokens // HEAD_CHUNK_TOKENS)
    logits = call.tokens * call.shape.vocab_size * (2 * call.dtype_bytes + 5 * FLOAT)
    return Phase(HEAD, 2 * call.tokens * weights, chunks * weights * call.dtype_bytes + logits)


class Clock:
    """Seconds and FLOPs of the calls of a case, by layer and role (with its own indexer, or without)."""

    def __init__(self, case: Case) -> None:
        call, device, in_float32 = case.call, case.device, case.call.dtype_bytes == FLOAT
        self.flops_of: dict[bool, list[float]] = {True: [], False: []}
        self.attention_flops: list[float] = []
        self.seconds_of: dict[bool, list[float]] = {True: [], False: []}

        def roofline(*phases: Phase) -> float:
            return sum(device.seconds(each.flops, each.bytes, in_float32 or each.in_float32) for each in phases)

        for full in (True, False):
            for index in range(case.model.shape.layers):
                phases = layer_phases(call, index, full)
                self.flops_of[full].append(sum(phase.flops for phase in phases))
                self.seconds_of[full].append(roofline(*phases))
                if full:
                    self.attention_flops.append(next(phase.flops for phase in phases if phase.name == ATTENTION))
        head = head_phase(call)
        self.head_flops, self.head_seconds = head.flops, roofline(head)

    def of(self, costs: dict[bool, list[float]], head: float, sweep: Sweep, block: range) -> float:
        """Of one sweep over one batch, through the layers of a block; with the LM head behind the last one."""
        runs, last = sweep.runs, block.stop == len(costs[True])
        layers = sum(runs.full[i] * costs[True][i] + runs.shared[i] * costs[False][i] for i in block)
        return layers + (sweep.patterns * head if last else 0)

    def table(self, draws: int) -> list[Sweep]:
        """The second-order table as two passes: forth, and back, where each layer runs again and is differentiated.

        Taking one of draws + 1 gradients back costs the FLOPs of running the layer on another layer's selection, but
        that attention is computed once more; so does each pair of layers' core attention cost its part of such a run.
        """
        layers = len(self.flops_of[True])
        back = tuple(
            round(2 + draws + (index + draws + 1) * self.attention_flops[index] / self.flops_of[False][index])
            for index in range(layers)
        )
        nothing, once = (0,) * layers, (1,) * layers
        return [Sweep(0, LayerRuns(once, nothing)), Sweep(draws + 1, LayerRuns(nothing, back))]

    def flops(self, sweeps: Sequence[Sweep]) -> float:
        """Of one batch."""
        whole = range(len(self.flops_of[True]))
        return sum(self.of(self.flops_of, self.head_flops, sweep, whole) for sweep in sweeps)


class Course:
    """The course of a search in one placement."""

    def __init__(self, case: Case, placement: Placement, clock: Clock) -> None:
        self.case, self.placement, self.clock = case, placement, clock
        self.blocks = case.job.blocks(placement.grid)
        self.batches = -(-case.batches // placement.grid.data)  # of the data rank that has most
        self.waves = -(-self.batches // placement.memory.batches_per_wave)
        self.streamed = placement.offload != RESIDENT

    def weight_bytes(self, sweeps: int) -> float:
        """Bytes of weights that all processes read: a checkpoint for each data rank, or for each wave of each sweep."""
        if self.streamed:
            return float(self.placement.memory.offload.pass_bytes * self.waves * sweeps)
        return self.case.model.stored_model_bytes * self.placement.grid.data

    def seconds(self, sweeps: Sequence[Sweep]) -> tuple[float, float, float]:
        """Of the whole search, with loading; what computing takes of it, and bringing weights."""
        model, device, grid = self.case.model, self.case.device, self.placement.grid
        loading = 0.0
        if self.placement.offload != DISK:  # weights come once; all processes read the same disks
            loading = model.stored_model_bytes * grid.data / device.read_rate
            if model.quantisation:
                loading += model.stored_model_bytes / grid.pipeline / device.convert_rate
        bringing = [self._bringing(block) if self.streamed else 0.0 for block in self.blocks]
        # A trunk runs through the other places before the last one has anything to do.
        ahead = sum(self.clock.seconds_of[True]) * (1 - 1 / len(self.blocks))
        total = computing = 0.0
        for sweep in sweeps:
            places = [self._computing(sweep, block) for block in self.blocks]
            total += max(map(max, places, bringing)) + ahead
            computing += max(places) + ahead
        return loading + total, computing, loading + max(bringing) * len(sweeps)

    def _computing(self, sweep: Sweep, block: range) -> float:
        """Seconds of one place of the pipeline. States in CPU memory come and go, and their copies are waited for."""
        moving = 0.0
        if self.placement.memory.in_cpu_memory:
            runs = sum(sweep.runs.full[index] + sweep.runs.shared[index] for index in block)
            moving = runs * 2 * self.placement.memory.shape.branch_bytes / self.case.device.link
        clock = self.clock
        return (clock.of(clock.seconds_of, clock.head_seconds, sweep, block) + moving) * self.batches

    def _bringing(self, block: range) -> float:
        """Seconds of bringing a block's streamed layers in one sweep, once for each wave.

        They are read, converted on the CPU, and sent to the device. A checkpoint that the CPU memory holds is read from
        the page cache.
        """
        model, device = self.case.model, self.case.device
        seconds = 0.0
        if device.kind != "cpu":
            seconds = sum(self.case.job.weights.layers[block.start : block.stop]) / device.link
        if self.placement.offload == DISK:
            stored = sum(model.stored_layer_bytes(index) for index in block)
            cached = model.stored_model_bytes <= MEMORY_SHARE * device.node_memory
            rate = device.cached_rate if cached else device.read_rate
            seconds += stored * self.placement.grid.size / rate
            seconds += stored / device.convert_rate if model.quantisation else 0.0
        return seconds * self.waves
