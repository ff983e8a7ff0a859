"""From a request to sweeps: the directory opened and locked, weights loaded by one process or several, the scorer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from icsearch.calibration.sources import ReadyTokens, parse_source
from icsearch.commands.requests import RunRequest
from icsearch.commands.setup import (
    Inputs,
    environment_notes,
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
from icsearch.planning.memory import Kept, Memory, plan_memory
from icsearch.planning.rows import stage_rows
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
    with run.locked() as without_locks:
        if without_locks:
            listener.info(without_locks)
        calibration, hit = obtain(request.calibration, source, layout, request.out / "calibration", request.fresh)
        inputs = Inputs(source, layout, calibration, obtain_heldout(request, source, layout, calibration))
        existing = [] if request.fresh else run.existing()
        start = describe(inputs, existing)
        run.check_same(existing, start)
        ready = isinstance(parse_source(request.calibration.source), ReadyTokens)  # used as they are
        how = "ready" if ready else "from the cache" if hit else "made now"
        listener.info(f"calibration: {calibration.num_sequences} x {calibration.seq_len} tokens ({how})")
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


def load(request: RunRequest, here: Opened, world: World | None, wanted: Sequence[Grid], listener: Progress) -> Loaded:
    """Plan the memory, then load the weights under the run's options; raises ModelError, OutOfMemoryError.

    By all processes of a run: what each of them gets follows from the grid that they make, the first of those wanted
    in which the weights fit. Without a world, this process is the only one. What needs no weights has been refused by
    the time that the listener hears of loading.
    """
    inputs, options = here.inputs, here.start["options"]
    job, size = memory_job(request, inputs, options), options["batch_size"]
    remote = request.calibration.trust_remote_code
    machine = machine_here(request, options["device"], world.launch if world else None)
    memory = plan_memory(job, machine, wanted)
    listener.info(f"loading {request.model} ...")
    sets = {CALIBRATION: inputs.calibration, **({HELDOUT: inputs.heldout} if inputs.heldout else {})}
    coordinator, notes, where = None, [], memory.offload.where
    if world is None:
        dsa = bring_up(inputs.source, options, remote, offload=where)
        batches = {name: device_batches(sequences, size, dsa.device) for name, sequences in sets.items()}
    else:
        from icsearch.sweep.distributed.coordinator import Coordinator  # torch.distributed: one process needs it not
        from icsearch.sweep.distributed.startup import check_ready, start_worker

        blocks = job.blocks(memory.grid)
        worker, dsa = start_worker(world, memory.grid, blocks, inputs.source, remote, options, sets, where)
        notes = check_ready(world, here.start)
        batches = {name: worker.batches_of(name) for name in sets}
        coordinator = Coordinator(world, memory.grid, worker)
    if memory.offload.streamed:  # where the losses come from, where it is not the usual: no bits follow from it
        notes.append(f"weights were streamed layer by layer (--offload {where}): the same bits")
    if left_out := dsa.weights.left_out:
        what = f"layers {', '.join(map(str, left_out))}" if len(left_out) > 1 else f"layer {left_out[0]}"
        notes.append(f"{what} of the checkpoint, for multi-token prediction, left out")
    rate = read_rate(inputs.source.shards) if where == DISK else None
    return Loaded(dsa, batches[CALIBRATION], memory, batches.get(HELDOUT, []), coordinator, tuple(notes), rate)


def make_scoring(
    here: Opened, record: RunRecord, loaded: Loaded, listener: Progress, kept: Kept | None = None
) -> Scoring:
    """The scoring of a run by the layer sweep; notes what has changed around a run that goes on.

    `kept` says which states are kept between sweeps; by default none.
    """
    scoring = Scoring(here.run.journal, record, make_scorer(here, record, loaded, CALIBRATION, kept), listener)
    changed = environment_notes(here.existing, here.start)
    scoring.note([*changed, *loaded.notes], tell=True)
    scoring.note([text for _, text in stage_rows(here.start)])  # the plan says so too
    return scoring


def make_scorer(here: Opened, record: RunRecord, loaded: Loaded, name: str, kept: Kept | None = None) -> Scorer:
    """Scores one set of sequences by what the run's objective needs; by all processes of the run, where it has several.

    By default no states are kept: few patterns ever come to the held-out sequences of a refinement.
    """
    layout, memory = here.inputs.layout, loaded.memory
    kept = kept or Kept(Keeping(layout.num_layers, layout.layer_indices), 0, 0)
    by_kl, keep_full_states = record.has_kl, memory.full_states > 0
    sizes, in_cpu_memory = (memory.patterns_per_sweep, memory.batches_per_wave), memory.in_cpu_memory > 0
    if loaded.coordinator is not None:
        from icsearch.sweep.distributed.coordinator import Schedule

        full = loaded.dsa.start_pattern if by_kl else None
        schedule = Schedule(kept.keeping, record.pattern, full, keep_full_states)
        return loaded.coordinator.scorer(name, schedule, *sizes, in_cpu_memory)
    store: StateStore[BranchState] = StateStore(kept.keeping, record.pattern, kept.budget)
    sweeper = make_sweeper(loaded.dsa, store, by_kl, keep_full_states, in_cpu_memory)
    return SweepScorer(sweeper, loaded.heldout if name == HELDOUT else loaded.batches, *sizes)


def score_baseline(scoring: Scoring, layout: Layout, *more: Pattern) -> None:
    """Step 0 of a run, and a note where its loss says that something is wrong."""
    scoring.score_references(*more)
    loss = scoring.record.loss(scoring.record.start_pattern.letters)
    scoring.note(guessing_notes(loss, layout.vocab_size), tell=True)


def count_in_sweeps(layout: Layout, patterns: Sequence[Pattern], per_sweep: int, along: Sequence[Pattern] = ()) -> int:
    """Layer runs of scoring these patterns, with so many in one sweep, and others that run along in each."""
    starts = range(0, len(patterns), per_sweep)
    return sum(layout.count_layer_runs([*patterns[start : start + per_sweep], *along]) for start in starts)
