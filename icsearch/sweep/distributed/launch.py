"""The processes of a run as a launcher started them, the layers of each, and the names of their jobs. No torch here.

torchrun and accelerate tell each process its number (rank) and how many there are. A run arranges them as a grid:
data ranks score other sequences with the same layers, pipeline ranks have other layers of the same sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from icsearch.core.errors import IcsearchError
from icsearch.core.jsonfile import shown
from icsearch.search.greedy import split_stages

CALIBRATION, HELDOUT = "calibration", "heldout"  # the sets of sequences that a run scores
# What processes do with a wave beside scoring it: see `Worker.do_job`.
MEASURE, COMPARE, TABLE = "measure", "compare", "table"
WAVES_PER_PLACE = 2  # of a pipeline whose layers are streamed
LAUNCHED = "TORCHELASTIC_RUN_ID"  # torchrun and accelerate set it; what else is in an environment may be left over
IN_FLIGHT = 2  # packets of branches that may be on their way to the next process of a pipeline before one waits


@dataclass(frozen=True)
class Launch:
    """This process among those of a run; `local_*` are those on the same machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def neighbours(self, devices: int) -> int:
        """Processes that share the memory of one of this machine's devices; of a CPU's there is one for all."""
        return -(-self.local_size // max(devices, 1))


def read_launch(environment: Mapping[str, str]) -> Launch:
    """What a launcher has set in the environment; one process where none has. Raises IcsearchError for half of it."""
    if environment.get("WORLD_SIZE", "1") == "1":
        return Launch()
    size = _number(environment, "WORLD_SIZE", 1)
    rank = _number(environment, "RANK", 0)
    if rank >= size:
        raise IcsearchError(f"RANK is {rank} and WORLD_SIZE is {size}: ranks go from 0 to {size - 1}; use torchrun")
    if not environment.get("MASTER_ADDR") or not environment.get("MASTER_PORT"):
        raise IcsearchError(f"WORLD_SIZE is {size}, but MASTER_ADDR or MASTER_PORT is not set: start with torchrun")
    everyone_here = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    local = {**everyone_here, **{name: environment[name] for name in everyone_here if name in environment}}
    return Launch(rank, size, _number(local, "LOCAL_RANK", 0), _number(local, "LOCAL_WORLD_SIZE", 1))


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    text = environment.get(name, "")
    if not text.isdecimal() or len(text) > 9 or int(text) < least:
        raise IcsearchError(f"{name} is {shown(text)} in the environment: expected a number from {least}; use torchrun")
    return int(text)


@dataclass(frozen=True)
class Grid:
    """`data` x `pipeline` processes: rank = (number among the data ranks) * pipeline + (place in the pipeline)."""

    data: int = 1
    pipeline: int = 1

    @property
    def size(self) -> int:
        return self.data * self.pipeline

    def data_rank(self, rank: int) -> int:
        return rank // self.pipeline

    def place(self, rank: int) -> int:
        """0 is the pipeline's first process: it has the embedding."""
        return rank % self.pipeline

    def last_rank(self, data_rank: int) -> int:
        """The process of a pipeline that has the LM head."""
        return data_rank * self.pipeline + self.pipeline - 1

    def batches_per_wave(self, batches: int) -> int:
        """The most of a data rank's batches that may go through streamed layers together.

        In a pipeline its processes would wait for one another with fewer waves, though each reads its layers for each:
        so there are at most `WAVES_PER_PLACE` of them for each place.
        """
        return batches if self.pipeline == 1 else -(-batches // (WAVES_PER_PLACE * self.pipeline))

    @property
    def packets(self) -> int:
        """How often a sweep's branches are there beside those at work: come, or on their way to the next process."""
        return 1 + IN_FLIGHT if self.pipeline > 1 else 0

    def waves_per_job(self, waves: int) -> int:
        """How many waves of a table a pipeline gets at once, so that its processes seldom wait for one another."""
        return 1 if self.pipeline == 1 else max(1, min(2 * WAVES_PER_PLACE * self.pipeline, -(-waves // self.data)))

    @property
    def words(self) -> str:
        """Such as `4 processes: 2 share the sequences, each with 2 that share the layers`."""
        if self.size == 1:
            return "1 process"
        if self.pipeline == 1:
            return f"{self.size} processes, which share the sequences"
        if self.data == 1:
            return f"{self.size} processes, which share the layers"
        return f"{self.size} processes: {self.data} pipelines share the sequences, {self.pipeline} in each the layers"


def grids(size: int, data: int | None, pipeline: int | None) -> list[Grid]:
    """The grids that so many processes can make, given what was asked for; short pipelines first.

    Raises IcsearchError where the processes do not make what was asked for.
    """
    wanted = {"--dp": data, "--pp": pipeline}
    asked = " ".join(f"{name} {value}" for name, value in wanted.items() if value is not None)
    possible = [Grid(size // p, p) for p in range(1, size + 1) if size % p == 0]
    fitting = [grid for grid in possible if data in (None, grid.data) and pipeline in (None, grid.pipeline)]
    if fitting:
        return fitting
    product = (data or 1) * (pipeline or 1)
    exactly = "" if data and pipeline else "a multiple of " if product > 1 else ""
    started = "this is one" if size == 1 else f"{size} were started"
    raise IcsearchError(
        f"{asked} needs {exactly}{product} processes, and {started}: start them with torchrun "
        f"--nproc-per-node {product} -m icsearch, or give other numbers"
    )


def check_device(device: str, size: int) -> None:
    """Refuse one GPU for several processes; raises IcsearchError."""
    if size > 1 and device.startswith("cuda:"):
        raise IcsearchError(
            f"--device {device} is one device, and {size} processes were started: give cuda, and each takes its own"
        )


def can_be_cut(dsa_layers: int, pipeline: int) -> bool:
    """Whether so many DSA layers make a block for each place of a pipeline."""
    return len(split_stages(dsa_layers, pipeline)) == pipeline


def pipeline_blocks(num_layers: int, layer_indices: Sequence[int], pipeline: int) -> list[range]:
    """The decoder layers of each place in a pipeline: the blocks of as many stages (IndexCache, pipeline split).

    A block begins with its first DSA layer; layers of other kinds go with the DSA layer before them. Raises
    IcsearchError where there are not as many blocks.
    """
    stages = split_stages(len(layer_indices), pipeline)
    if len(stages) != pipeline:
        raise IcsearchError(
            f"--pp {pipeline} cuts {len(layer_indices)} DSA layers into {len(stages)} blocks of {len(stages[0])}: "
            f"give --pp {len(stages)}, or a number that divides them better"
        )
    edges = [0, *(layer_indices[stage.start] for stage in stages[1:]), num_layers]
    return [range(first, last) for first, last in pairwise(edges)]
