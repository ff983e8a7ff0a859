"""`icsearch plan` as a function: what a search will take on given devices, from a config.json alone. No torch.

Three kinds of numbers, never mixed: *counted* (layer evaluations, FLOPs, bytes of weights read: exact by their
formulas, for the course that an exact search is likely to take, and as a bound for the others), *measured* (the share
of exact's layer evaluations that another strategy took on the runs named in `workload`) and *estimated* (memory, by
`footprint` and `plan`; hours, by `layer_time`; what of that share is left in few waves, and how often a lazy search
reads the weights, by `workload`). Peak rates of devices are quoted.

Hours of a sweep: each data rank passes its waves through the places of the pipeline. A place takes, for each wave,
what its layers' runs take, or what bringing its weights takes if that is more, and sending its branches on; the slowest
place sets the pace, and one trunk has to run through the others first. Exact's sweeps are those of the rehearsal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import mul

from icsearch.commands.requests import PatternRequest
from icsearch.core.errors import IcsearchError
from icsearch.model.shape import DISK, default_batch_size
from icsearch.planning.devices import CPU as DEVICE_CPU
from icsearch.planning.devices import Devices
from icsearch.planning.layer_time import CallWork, Efficiency, efficiency_of, head_call, layer_call
from icsearch.planning.modelfile import open_model_file
from icsearch.planning.offload import pass_bytes
from icsearch.planning.placement import MEMORY_SHARE, Case, Fit, fit, placements, weight_sizes, why_nothing_fits
from icsearch.planning.rehearsal import Sweep
from icsearch.planning.workload import Plays, Workload, layer_evaluations, likely_passes, share_of_exact
from icsearch.search.registry import STRATEGIES

DEFAULT_SEQUENCES = 24
SECONDS_AN_HOUR = 3600.0
PATIENCE = 24.0  # hours: above that, another strategy than exact is recommended


@dataclass(frozen=True)
class PlanRequest(PatternRequest):
    """What a search is to be planned for: the search itself, and the devices."""

    devices: Devices = field(kw_only=True)


@dataclass(frozen=True)
class Forecast:
    """What one strategy takes in one placement. Layer evaluations are of one layer over all sequences.

    `layer_evaluations`, `flops`, `weight_bytes` (read in the whole search) and `hours`: exact, the likely course; other
    strategies, exact's times their measured share, in the waves of the placement. `most_*`: bounds. Hours are
    estimates.
    """

    strategy: str
    share: float
    steps: int
    layer_evaluations: float
    most_layer_evaluations: int
    flops: float
    most_flops: float
    weight_bytes: float
    most_weight_bytes: float
    hours: float
    most_hours: float

    @property
    def hours_per_step(self) -> float:
        return self.hours / self.steps

    @property
    def weight_bytes_per_step(self) -> float:
        return self.weight_bytes / self.steps


@dataclass(frozen=True)
class Plan:
    """Everything that the command says: the case, every placement with what it takes, and the one to use."""

    request: PlanRequest
    case: Case
    efficiency: Efficiency
    basis: str  # where that comes from
    fits: tuple[Fit, ...]
    forecasts: dict[Fit, tuple[Forecast, ...]]

    @property
    def best(self) -> tuple[Fit, Forecast]:
        """The placement on which exact is fastest; there exact, or above `PATIENCE` hours what takes the fewest."""
        fastest = min(self.forecasts, key=lambda one: self.forecasts[one][0].hours)
        exact = self.forecasts[fastest][0]
        if exact.hours <= PATIENCE:
            return fastest, exact
        return fastest, min(self.forecasts[fastest], key=lambda one: one.hours)  # of equals exact, which comes first


def make_plan(request: PlanRequest) -> Plan:
    """The plan of a search; raises IcsearchError for bad input, and where nothing fits."""
    case = make_case(request)
    efficiency, basis = efficiency_of(case.device)
    fits = [fit(case, one) for one in placements(case)]
    fitting = [one for one in fits if not one.missing]
    if not fitting:
        raise why_nothing_fits(case, fits)
    clock, plays = Clock(case, efficiency), Plays(case.workload)
    forecasts = {one: forecast(case, one, clock, plays) for one in fitting}
    return Plan(request, case, efficiency, basis, tuple(fits), forecasts)


def make_case(request: PlanRequest) -> Case:
    """The case of a request, checked; raises IcsearchError."""
    model = open_model_file(request.model)
    sequences = request.calibration.num_sequences or DEFAULT_SEQUENCES
    seq_len = request.calibration.seq_len or max(256, 4 * model.shape.index_topk)
    if seq_len <= model.shape.index_topk:
        raise IcsearchError(
            f"--seq-len {seq_len} is not longer than index_topk {model.shape.index_topk}: every selection would be all "
            f"tokens, and every flip free; give more than {model.shape.index_topk}"
        )
    if model.max_positions and seq_len > model.max_positions:
        raise IcsearchError(f"--seq-len {seq_len} is more than the model's {model.max_positions} positions: give less")
    flips = request.resolve_num_shared(model.start)
    workload = Workload(
        start=model.start,
        flippable=frozenset(request.flippable(model.start)),
        num_shared=flips,
        stages=request.num_stages,
        sequences=sequences,
        keep_full=tuple(sorted(request.keep_full)),
    )
    dtype = model.dtype if request.dtype == "auto" else request.dtype
    batch_size = min(request.batch_size or default_batch_size(seq_len, sequences), sequences)
    return Case(model, workload, seq_len, batch_size, dtype, request.devices)


class Clock:
    """Seconds and FLOPs of the calls of a case."""

    def __init__(self, case: Case, efficiency: Efficiency) -> None:
        self._device, self._efficiency = case.device, efficiency
        layers = range(case.model.shape.layers)
        self.full = [layer_call(case.call, index, full=True) for index in layers]
        self.shared = [layer_call(case.call, index, full=False) for index in layers]
        self.head = head_call(case.call)
        self.full_flops = [work.flops for work in self.full]  # once: they are asked for in every sweep
        self.shared_flops = [work.flops for work in self.shared]
        self.full_seconds = [self.of(work) for work in self.full]
        self.shared_seconds = [self.of(work) for work in self.shared]
        self.head_seconds = self.of(self.head)

    def of(self, work: CallWork) -> float:
        return work.seconds(self._device, self._efficiency)

    def flops(self, sweep: Sweep) -> float:
        """Of one sweep over one batch."""
        runs = sweep.runs
        full = sum(map(mul, runs.full, self.full_flops))
        shared = sum(map(mul, runs.shared, self.shared_flops))
        return full + shared + sweep.patterns * self.head.flops

    def seconds(self, sweep: Sweep, block: range) -> float:
        """Of one sweep over one batch, through the layers of a block; with the LM head behind the last one."""
        runs = sweep.runs
        full = sum(runs.full[index] * self.full_seconds[index] for index in block)
        shared = sum(runs.shared[index] * self.shared_seconds[index] for index in block)
        last = block.stop == len(self.full)
        return full + shared + (sweep.patterns * self.head_seconds if last else 0)


def forecast(case: Case, fitting: Fit, clock: Clock, plays: Plays) -> tuple[Forecast, ...]:
    """What each strategy takes in a placement that fits."""
    return tuple(_forecast(case, fitting, clock, name, plays) for name in STRATEGIES)


def _forecast(case: Case, fitting: Fit, clock: Clock, name: str, plays: Plays) -> Forecast:
    likely = plays.likely(fitting.per_sweep, fitting.kept.keeping.stride)
    most = plays.most(name, fitting.per_sweep)
    course = Course(case, fitting, clock)
    share, passes = share_of_exact(name, course.waves), likely_passes(name, likely, most)
    return Forecast(
        strategy=name,
        share=share,
        steps=case.workload.num_shared,
        layer_evaluations=share * layer_evaluations(likely),
        most_layer_evaluations=layer_evaluations(most),
        flops=share * case.all_batches * sum(map(clock.flops, likely)),
        most_flops=case.all_batches * sum(map(clock.flops, most)),
        weight_bytes=course.weight_bytes(passes),
        most_weight_bytes=course.weight_bytes(len(most)),
        hours=course.seconds(likely, share, passes / len(likely)) / SECONDS_AN_HOUR,
        most_hours=course.seconds(most) / SECONDS_AN_HOUR,
    )


@dataclass(frozen=True)
class Course:
    """The course of a search in one placement."""

    case: Case
    fit: Fit
    clock: Clock

    @property
    def waves(self) -> int:
        """Waves of the data rank that has most batches."""
        return -(-self.case.batches(self.fit.placement) // self.fit.wave)

    @cached_property
    def blocks(self) -> list[range]:
        return self.case.blocks(self.fit.placement)

    def weight_bytes(self, passes: float) -> float:
        """Bytes of weights that all processes read: a checkpoint for each data rank, or for each wave of each pass."""
        placement, sizes = self.fit.placement, weight_sizes(self.case)
        if not placement.streamed:
            return float(sizes.on_disk * placement.data)
        one_pass = pass_bytes(placement.offload, sizes)
        return float(one_pass * placement.data * self.waves * passes)

    def seconds(self, sweeps: Sequence[Sweep], share: float = 1.0, portions: float = 1.0) -> float:
        """Of the whole search, with loading; `share` of the layer runs are made, each sweep in so many `portions`."""
        return self._loading() + sum(self._sweep(sweep, share, portions) for sweep in sweeps)

    def _loading(self) -> float:
        """Weights that rest on the device or in CPU memory come once. All processes read the same disks."""
        placement, model, device = self.fit.placement, self.case.model, self.case.device
        if placement.offload == DISK:
            return 0.0
        converting = model.stored_model_bytes / placement.pipeline / device.convert_rate if model.quantised else 0.0
        return model.stored_model_bytes * placement.data / device.node_read_rate + converting

    def _sweep(self, sweep: Sweep, share: float, portions: float) -> float:
        pace = max(self._place(sweep, share, portions, place) for place in range(len(self.blocks)))
        others = 1 - 1 / len(self.blocks)  # a trunk runs through them before the last one has anything to do
        return pace + portions * others * sum(self.clock.full_seconds)

    def _place(self, sweep: Sweep, share: float, portions: float, place: int) -> float:
        """Seconds of one place of the pipeline over all its waves."""
        block, batches = self.blocks[place], self.case.batches(self.fit.placement)
        runs = share * (self.clock.seconds(sweep, block) + self._moving(sweep, block)) * batches
        arriving = self._runs_of(sweep, block.start - 1) if block.start else 0
        sent = share * arriving * batches * self.fit.branch / self.case.device.peer
        if not self.fit.placement.streamed:
            return runs + sent
        first = self.loads[place] / len(block)  # comes before anything runs
        return max(runs + sent, portions * self.loads[place] * self.waves) + portions * first

    def _moving(self, sweep: Sweep, block: range) -> float:
        """Seconds of bringing states in and out, on one batch; copies are waited for."""
        if not self.fit.resting:
            return 0.0
        runs = sum(self._runs_of(sweep, index) for index in block)
        return runs * 2 * self.fit.branch / self.case.device.link

    def _runs_of(self, sweep: Sweep, index: int) -> int:
        return sweep.runs.full[index] + sweep.runs.shared[index]

    @cached_property
    def loads(self) -> list[float]:
        """Seconds of bringing each block's layers once: they are read, converted on the CPU, and sent to the device.

        A checkpoint that the CPU memory holds is read from the page cache.
        """
        return [self._from_disk(block) + self._over_the_link(block) for block in self.blocks]

    def _from_disk(self, block: range) -> float:
        model, device, placement = self.case.model, self.case.device, self.fit.placement
        if placement.offload != DISK:
            return 0.0
        stored = sum(model.stored_layer_bytes(index) for index in block)
        cached = model.stored_model_bytes <= MEMORY_SHARE * device.node_memory
        rate = (device.node_cached_rate if cached else device.node_read_rate) / placement.processes
        return stored / rate + (stored / device.convert_rate if model.quantised else 0.0)

    def _over_the_link(self, block: range) -> float:
        layers = weight_sizes(self.case).layers
        computed = sum(layers[index] for index in block)
        return 0.0 if self.case.device.kind == DEVICE_CPU else computed / self.case.device.link
