"""Where the weights of decoder layers rest while a run is at work: chosen from sizes and free memory. Numbers only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from icsearch.core.errors import IcsearchError
from icsearch.core.text import format_bytes
from icsearch.model.shape import CPU, DISK, RESIDENT

SHARE_OF_CPU = 0.8  # of what is free there, for weights that rest in it
_ON_DEVICE = 2  # layers at once: the one that runs, the one that is on its way
_CONVERTING = 1  # on a CPU device, what reading a layer takes beside: its tensors as the shards hold them


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of weights, in the type that the model computes with, and of the checkpoint's shards."""

    outside: int  # what is no decoder layer: embedding, final norm, LM head
    layers: tuple[int, ...]
    on_disk: int

    @property
    def total(self) -> int:
        return self.outside + sum(self.layers)


@dataclass(frozen=True)
class Offload:
    """Where weights rest, why there, the bytes of weights that are on the device at once, and what a pass reads.

    A pass is one wave through all layers; `pass_bytes` are an estimate, 0 where nothing is read.
    """

    where: str
    why: str
    device_bytes: int
    pass_bytes: int = 0

    @property
    def streamed(self) -> bool:
        return self.where != RESIDENT


NO_OFFLOAD = Offload(RESIDENT, "", 0)


def choose(requested: str, on_cpu: bool, sizes: WeightSizes, fits: Callable[[int], bool], cpu_free: int) -> Offload:
    """The place that was requested, or for `auto` the nearest one that is large enough: device, CPU memory, disk.

    `fits` says whether so many bytes of weights leave room to work on the device. Raises IcsearchError where weights
    are to rest in CPU memory and do not fit.
    """
    weights, room = format_bytes(sizes.total), int(SHARE_OF_CPU * cpu_free)
    if requested == RESIDENT:
        return Offload(RESIDENT, "as asked for", sizes.total)
    if requested == CPU and on_cpu:
        return Offload(RESIDENT, "--offload cpu is what a CPU device does anyway", sizes.total)
    if requested == CPU:
        if sizes.total > room:
            raise IcsearchError(
                f"--offload cpu needs {weights} of CPU memory for the weights and {format_bytes(room)} are to be had: "
                "give --offload disk"
            )
        return _streamed(CPU, "as asked for", on_cpu, sizes)
    if requested == DISK:
        return _streamed(DISK, "as asked for", on_cpu, sizes)
    if fits(sizes.total):
        return Offload(RESIDENT, f"{weights} fit", sizes.total)
    if not on_cpu and sizes.total <= room:
        return _streamed(CPU, f"{weights} do not fit on the device, but into CPU memory", on_cpu, sizes)
    return _streamed(DISK, f"{weights} do not fit into memory", on_cpu, sizes)


def pass_bytes(where: str, sizes: WeightSizes) -> int:
    """What a pass through all layers reads."""
    return sizes.on_disk if where == DISK else sum(sizes.layers)


def _streamed(where: str, why: str, on_cpu: bool, sizes: WeightSizes) -> Offload:
    at_once = _ON_DEVICE + (_CONVERTING if on_cpu else 0)
    device_bytes = sizes.outside + at_once * max(sizes.layers)
    return Offload(where, why, device_bytes, pass_bytes(where, sizes))


def plan_waves(room: int, patterns: int, batches: int, beside: int = 2) -> tuple[int, int]:
    """(patterns per sweep, batches per wave) with which scoring takes the fewest passes over the weights.

    `room` is how many states of one batch fit; each sweep needs `beside` more than it has patterns, for the trunk and
    the layer output that is just being made. Among equals, fewer sweeps: each of them runs the trunk again.
    """
    found = []
    for sweeps in range(1, patterns + 1):
        together = -(-patterns // sweeps)
        wave = min(batches, room // (together + beside))
        if wave:
            found.append((sweeps * -(-batches // wave), sweeps, together, wave))
    _, _, together, wave = min(found, default=(0, 0, 1, 1))
    return together, wave


def resting_room(free: int, processes: int, where: str, weights: int, stored: int) -> int:
    """Bytes of CPU memory that each of so many processes on one machine may fill with branch states.

    Weights that rest there come first, for each process its own. Where they are streamed from disk, the system's cache
    of the checkpoint does, if it can hold all of it: every pass reads it again.
    """
    room = int(SHARE_OF_CPU * free)
    if where == CPU:
        return room // processes - weights
    return (room - stored if where == DISK and stored <= room else room) // processes


def rows(offload: Offload, passes: int, bytes_per_second: float | None) -> list[tuple[str, str]]:
    """The plan's rows on weights; `passes` is how many a step takes at most."""
    if not offload.streamed:
        return [("weights", f"resident: {offload.why}")]
    source = {DISK: "the checkpoint's shards", CPU: "CPU memory"}[offload.where]
    found = [("weights", f"streamed from {source}, layer by layer: {offload.why}")]
    size = passes * offload.pass_bytes
    times = "once" if passes == 1 else f"{passes} times"
    text = f"all layers {times} a step, about {format_bytes(size)}"
    if bytes_per_second:
        rate = f"{format_bytes(int(bytes_per_second))}/s, as measured just now"
        text += f", {size / bytes_per_second:.0f} s at {rate} (estimate; read while layers compute)"
    return [*found, ("reading", text)]
