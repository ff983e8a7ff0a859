"""The scorer of a run: weights loaded, on one process or several, and sweeps that answer the search."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icsearch.commands.requests import KL, RunRequest
from icsearch.commands.setup import (
    Inputs,
    environment_notes,
    is_ready,
    machine_here,
    memory_job,
    obtain,
    obtain_heldout,
    open_model,
)
from icsearch.core.pattern import Pattern
from icsearch.model.layout import Layout
from icsearch.model.loading import bring_up, resolve_device
from icsearch.model.model import DsaModel
from icsearch.model.shape import DISK
from icsearch.model.shards import read_rate
from icsearch.planning import rows
from icsearch.planning.memory import Kept, Memory, plan_memory
from icsearch.runs.directory import RunDirectory
from icsearch.runs.journal import Event
from icsearch.runs.record import RunRecord
from icsearch.runs.results import guessing_notes
from icsearch.search.loop import Progress, Scorer, Scoring
from icsearch.sweep.branches import Batch, BranchState, device_batches
from icsearch.sweep.distributed.launch import CALIBRATION, HELDOUT, Grid
from icsearch.sweep.states import Keeping, StateStore
from icsearch.sweep.sweep import SweepScorer, make_sweeper

if TYPE_CHECKING:
    from icsearch.sweep.distributed.coordinator import Coordinator
    from icsearch.sweep.distributed.world import World

# Writes the results of a run into its directory.
Publish = Callable[[Path, RunRecord], object]
# Hears a line for whoever watches the run.
Tell = Callable[[str], None]


def publish_nothing(out: Path, record: RunRecord) -> None:
    """For callers who only want the record."""


@dataclass(frozen=True)
class Opened:
    """A directory that is ours: its inputs checked, its events so far, and the first event that it has or gets."""

    inputs: Inputs
    run: RunDirectory
    existing: list[Event]
    start: Event


@contextlib.contextmanager
def opened(
    request: RunRequest, describe: Callable[[Inputs, list[Event]], Event], listener: Progress
) -> Iterator[Opened]:
    """Check the inputs, hold the directory, and refuse to continue a run with other settings.

    `describe` makes the first event. Nothing of an earlier run is touched; no weights are read.
    """
    resolve_device(request.device)  # refused before anything is read or made
    source, layout = open_model(request.calibration)
    request.check(layout.start_pattern, layout.backbone)
    run = RunDirectory(request.out)
    with run.locked():
        batches, hit = obtain(request.calibration, source, layout, request.out / "calibration", request.fresh)
        inputs = Inputs(source, layout, batches, obtain_heldout(request, source, layout, batches))
        existing = [] if request.fresh else run.existing()
        start = describe(inputs, existing)
        run.check_same(existing, start)
        how = "ready" if is_ready(request.calibration.source) else "from the cache" if hit else "made now"
        listener.info(f"calibration: {batches.num_sequences} x {batches.seq_len} tokens ({how})")
        if existing:
            done = existing[-1]["event"] == "finish"
            listener.info(f"{request.out} is finished" if done else f"continuing {request.out}")
        yield Opened(inputs, run, existing, start)


@dataclass(frozen=True)
class Loaded:
    """A model in memory, its batches beside it, and the memory that was planned for them."""

    dsa: DsaModel
    batches: list[Batch]
    memory: Memory
    heldout: list[Batch]
    coordinator: Coordinator | None = None  # in a run of several processes
    notes: tuple[str, ...] = ()
    bytes_per_second: float | None = None  # of reading streamed weights, as measured when the run started


def load(request: RunRequest, inputs: Inputs, options: dict[str, Any], tell: Tell = lambda _: None) -> Loaded:
    """Plan the memory, then load the weights under these options; raises ModelError, OutOfMemoryError.

    `tell` hears when weights are about to be read: by then everything that needs none of them has been refused.
    """
    memory = plan_memory(memory_job(request, inputs, options), machine_here(request, options["device"]))
    tell(f"loading {request.model} ...")
    remote = request.calibration.trust_remote_code
    dsa = bring_up(inputs.source, options, remote, None, memory.offload.where)
    size = options["batch_size"]
    heldout = [] if inputs.heldout is None else device_batches(inputs.heldout, size, dsa.device)
    rate = read_rate(inputs.source.shards) if memory.offload.where == DISK else None
    batches = device_batches(inputs.batches, size, dsa.device)
    return Loaded(dsa, batches, memory, heldout, bytes_per_second=rate)


def load_together(request: RunRequest, here: Opened, world: World | None, wanted: Sequence[Grid], tell: Tell) -> Loaded:
    """As `load`, by all processes of a run: what each of them gets follows from the grid that they make.

    That is the first of those wanted in which the weights fit. Without a world, this process is the only one.
    """
    if world is None:
        return load(request, here.inputs, here.start["options"], tell)
    from icsearch.sweep.distributed.coordinator import (
        Coordinator,  # torch.distributed, which one process can do without
    )
    from icsearch.sweep.distributed.startup import check_ready, start_worker

    inputs, options = here.inputs, here.start["options"]
    job = memory_job(request, inputs, options)
    memory = plan_memory(job, machine_here(request, options["device"], world.launch), wanted)
    tell(f"loading {request.model} ...")
    grid, layers = memory.grid, job.blocks(memory.grid)
    sets = {CALIBRATION: inputs.batches, **({HELDOUT: inputs.heldout} if inputs.heldout else {})}
    remote, where = request.calibration.trust_remote_code, memory.offload.where
    worker, dsa = start_worker(world, grid, layers, inputs.source, remote, options, sets, where)
    notes = check_ready(world, here.start)
    batches = {name: worker.batches_of(name) for name in sets}
    return Loaded(
        dsa,
        batches[CALIBRATION],
        memory,
        batches.get(HELDOUT, []),
        Coordinator(world, grid, worker),
        tuple(notes),
        read_rate(inputs.source.shards) if where == DISK else None,
    )


def make_scoring(
    here: Opened, record: RunRecord, loaded: Loaded, listener: Progress, kept: Kept | None = None
) -> Scoring:
    """The scoring of a run by the layer sweep; notes what has changed around a run that goes on.

    `kept` says which states are kept between sweeps; by default none.
    """
    layout = here.inputs.layout
    kept = kept or _keep_nothing(layout)
    scorer = _scorer(loaded, CALIBRATION, loaded.batches, kept, record)
    scoring = Scoring(here.run.journal, record, scorer, listener)
    changed = environment_notes(here.existing, here.start)
    scoring.note([*changed, *loaded.notes, *weight_notes(loaded), *(text for _, text in rows.stage_rows(here.start))])
    return scoring


def heldout_scorer(here: Opened, record: RunRecord, loaded: Loaded) -> Scorer:
    """Scores the held-out sequences of a refinement; few patterns ever come there, and no states are kept."""
    return _scorer(loaded, HELDOUT, loaded.heldout, _keep_nothing(here.inputs.layout), record)


def _scorer(loaded: Loaded, name: str, batches: Sequence[Batch], kept: Kept, record: RunRecord) -> Scorer:
    """Measures what the run's objective needs; by all processes of the run, where it has several."""
    by_kl, keep_full_states = record.start["options"]["objective"] == KL, loaded.memory.full_states > 0
    if loaded.coordinator is not None:
        from icsearch.sweep.distributed.coordinator import Schedule

        memory, full = loaded.memory, loaded.dsa.start_pattern if by_kl else None
        schedule = Schedule(kept.keeping, record.pattern, full, keep_full_states)
        sizes = memory.patterns_per_sweep, memory.batches_per_wave
        return loaded.coordinator.scorer(name, schedule, *sizes, memory.in_cpu_memory > 0)
    store: StateStore[BranchState] = StateStore(kept.keeping, record.pattern, kept.budget)
    sweeper = make_sweeper(loaded.dsa, store, by_kl, keep_full_states, loaded.memory.in_cpu_memory > 0)
    return SweepScorer(sweeper, batches, loaded.memory.patterns_per_sweep, loaded.memory.batches_per_wave)


def process_rows(loaded: Loaded) -> list[tuple[str, str]]:
    """The plan's row on processes, where there are several."""
    return rows.process_rows(loaded.memory, sum(len(batch.input_ids) for batch in loaded.batches))


def weight_rows(loaded: Loaded, patterns: int) -> list[tuple[str, str]]:
    """The plan's rows on weights, for steps of so many patterns at most."""
    sequences = sum(len(batch.input_ids) for batch in loaded.batches)
    return rows.weight_rows(loaded.memory, patterns, sequences, loaded.bytes_per_second)


def score_baseline(scoring: Scoring, layout: Layout, *more: Pattern) -> None:
    """Step 0 of a run, and a note where its loss says that something is wrong."""
    scoring.score_references(*more)
    loss = scoring.record.loss(scoring.record.start_pattern.letters)
    for text in guessing_notes(loss, layout.vocab_size):
        scoring.progress.info(text)
        scoring.note([text])


def weight_notes(loaded: Loaded) -> list[str]:
    """Where the losses came from, as far as it is not the usual: the bits do not follow from it."""
    if not loaded.memory.offload.streamed:
        return []
    return [f"weights were streamed layer by layer (--offload {loaded.memory.offload.where}): the same bits"]


def _keep_nothing(layout: Layout) -> Kept:
    return Kept(Keeping(layout.num_layers, layout.layer_indices), 0, 0)


def count_in_sweeps(layout: Layout, patterns: Sequence[Pattern], per_sweep: int, along: Sequence[Pattern] = ()) -> int:
    """Layer runs of scoring these patterns, with so many in one sweep, and others that run along in each."""
    starts = range(0, len(patterns), per_sweep)
    return sum(layout.count_layer_runs([*patterns[start : start + per_sweep], *along]) for start in starts)
