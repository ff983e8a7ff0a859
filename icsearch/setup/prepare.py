"""What every run has in common before it starts: inputs checked, its directory held, the model loaded.

Nothing of an earlier run is touched before all of that has gone well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icsearch.block import Batch
from icsearch.journal import Event
from icsearch.model import DsaModel
from icsearch.processes.launch import Grid, pipeline_blocks
from icsearch.processes.ledger import CALIBRATION, HELDOUT
from icsearch.requests import RunRequest
from icsearch.runs.record import RunRecord
from icsearch.runs.rundir import RunDirectory
from icsearch.search import Progress
from icsearch.setup.bring_up import bring_up, device_batches
from icsearch.setup.inputs import Inputs, is_ready, obtain, obtain_heldout, open_model
from icsearch.setup.memory_plan import Memory, plan_memory, plan_share
from icsearch.weights.holding import DISK
from icsearch.weights.loading import resolve_device
from icsearch.weights.shards import read_rate

if TYPE_CHECKING:
    from icsearch.processes.crew import Crew
    from icsearch.processes.world import World

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
    crew: Crew | None = None  # in a run of several processes
    notes: tuple[str, ...] = ()
    bytes_per_second: float | None = None  # of reading streamed weights, as measured when the run started


def load(request: RunRequest, inputs: Inputs, options: dict[str, Any], tell: Tell = lambda _: None) -> Loaded:
    """Plan the memory, then load the weights under these options; raises ModelError, OutOfMemoryError.

    `tell` hears when weights are about to be read: by then everything that needs none of them has been refused.
    """
    memory = plan_memory(request, inputs, options)
    tell(f"loading {request.model} ...")
    remote = request.calibration.trust_remote_code
    dsa = bring_up(inputs.source, options, remote, None, memory.offload.where)
    size = options["batch_size"]
    heldout = [] if inputs.heldout is None else device_batches(dsa, inputs.heldout, size)
    rate = read_rate(inputs.source.shards) if memory.offload.where == DISK else None
    batches = device_batches(dsa, inputs.batches, size)
    return Loaded(dsa, batches, memory, heldout, bytes_per_second=rate)


def load_together(request: RunRequest, here: Opened, world: World | None, wanted: Sequence[Grid], tell: Tell) -> Loaded:
    """As `load`, by all processes of a run: what each of them gets follows from the grid that they make.

    That is the first of those wanted in which the weights fit. Without a world, this process is the only one.
    """
    if world is None:
        return load(request, here.inputs, here.start["options"], tell)
    from icsearch.processes.crew import Crew  # torch.distributed, which one process can do without
    from icsearch.processes.muster import check_ready, lead_in, load_order

    inputs, options = here.inputs, here.start["options"]
    memory = plan_share(request, inputs, options, world.launch, wanted)
    tell(f"loading {request.model} ...")
    grid = memory.share.grid
    layers = pipeline_blocks(inputs.layout.num_layers, inputs.layout.layer_indices, grid.pipeline)
    sets = {CALIBRATION: inputs.batches, **({HELDOUT: inputs.heldout} if inputs.heldout else {})}
    remote, where = request.calibration.trust_remote_code, memory.offload.where
    order = load_order(grid, layers, inputs.source, remote, options, sets, where)
    member, dsa = lead_in(world, order, inputs.source, sets)
    notes = check_ready(world, here.start)
    batches = {name: member.batches_of(name) for name in sets}
    return Loaded(
        dsa,
        batches[CALIBRATION],
        memory,
        batches.get(HELDOUT, []),
        Crew(world, grid, member),
        tuple(notes),
        read_rate(inputs.source.shards) if where == DISK else None,
    )
