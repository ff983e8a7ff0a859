"""How the processes of a run start and end: rank 0 runs the command as one process would, the others serve it.

Each loads its layers, and all get the same batches from rank 0. However one of them ends, all end together.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from icsearch.calibration.batches import Calibration
from icsearch.core.endings import (
    EXIT_BAD_INPUT,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    explain,
    run_to_its_end,
)
from icsearch.core.errors import ModelError
from icsearch.core.signals import Terminated
from icsearch.model.checkpoint import Checkpoint, fingerprint, open_checkpoint
from icsearch.model.loading import bring_up, quiet_transformers
from icsearch.model.machine import environment
from icsearch.model.model import DsaModel
from icsearch.sweep.branches import cut_batches
from icsearch.sweep.distributed.heartbeat import Ended
from icsearch.sweep.distributed.launch import Grid, Launch
from icsearch.sweep.distributed.worker import Order, Worker
from icsearch.sweep.distributed.world import JoinError, World, join

SAME = ("torch", "transformers", "device_name")  # what the bits of a loss depend on, beside the options


def run_together(launch: Launch, command: Callable[[World], object], debug: bool) -> NoReturn:
    """Join the other processes, do this one's part of the command, and end with the run's exit status."""
    try:
        world = join(launch)
    except JoinError as error:
        _leave(_say(str(error), error.exit_status))
    status = run_to_its_end(lambda: _telling(world, command), debug) if world.rank == 0 else _follow(world, debug)
    _leave(world.finish(status))


def start_worker(
    world: World,
    grid: Grid,
    blocks: list[range],
    source: Checkpoint,
    trust_remote_code: bool,
    options: dict[str, Any],
    sets: Mapping[str, Calibration],
    offload: str,
) -> tuple[Worker, DsaModel]:
    """Rank 0: have all processes load their block of layers, and load its own."""
    order: Order = {
        "do": "load",
        "grid": [grid.data, grid.pipeline],
        "blocks": [[block.start, block.stop] for block in blocks],
        "model": source.name,
        "trust_remote_code": trust_remote_code,
        "options": options,
        "offload": offload,
        "sets": {name: list(calibration.input_ids.shape) for name, calibration in sets.items()},
    }
    world.tell(order)
    return _make_worker(world, order, source, sets)


def check_ready(world: World, start: Mapping[str, Any]) -> list[str]:
    """Rank 0: wait until all have loaded, the same checkpoint too; raises ModelError.

    `start` is the run's first event. Returns notes on what differs between processes and may change bits.
    """
    notes = []
    for rank in world.others:
        ready = world.take(f"ready/{rank}", f"rank {rank} to load the model")
        if ready["fingerprint"] != start["model"]["fingerprint"]:
            raise ModelError(
                f"rank {rank} has another checkpoint under the name {start['model']['name_or_path']} than rank 0: "
                "give all machines the same files"
            )
        notes += [
            f"rank {rank} has {name} {ready['environment'][name]}, rank 0 {start['environment'][name]}: losses may "
            "differ from those of one process in their last bits"
            for name in SAME
            if ready["environment"][name] != start["environment"][name]
        ]
    return notes


def serve(world: World) -> NoReturn:
    """Another process: do what rank 0 orders. Never returns: whatever ends the run is raised here."""
    worker: Worker | None = None
    while True:
        order = world.order()
        if order["do"] == "load":
            source = open_checkpoint(order["model"], trust_remote_code=order["trust_remote_code"])
            worker, _ = _make_worker(world, order, source, None)
            device = order["options"]["device"]
            world.post(f"ready/{world.rank}", {"fingerprint": fingerprint(source), "environment": environment(device)})
        elif worker is None:
            raise RuntimeError(f"rank 0 orders to {order['do']} before it has ordered to load")
        elif order["do"] == "set up":
            worker.set_up(order)
        elif order["do"] == "retain":
            worker.retain(order)
        elif order["do"] == "trace":
            if (where := worker.trace(order)) is not None:
                world.post(f"traced/{order['item']}", where)
        elif order["do"] == "job":
            if (events := worker.do_job(order)) is not None:
                world.post(f"events/{order['item']}/{world.rank}", events)
        elif (losses := worker.sweep(order)) is not None:
            world.post(f"losses/{order['item']}/{worker.data_rank}", losses)


def _make_worker(
    world: World, order: Order, source: Checkpoint, sets: Mapping[str, Calibration] | None
) -> tuple[Worker, DsaModel]:
    """The batches of all sets, which rank 0 has, and this process's layers."""
    tensors = {}
    for name, shape in order["sets"].items():
        if sets is None:
            ids, counted = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.bool)
        else:
            ids, counted = torch.from_numpy(sets[name].input_ids), torch.from_numpy(sets[name].counted())
        tensors[name] = world.broadcast(ids), world.broadcast(counted)
    grid = Grid(*order["grid"])
    layers = range(*order["blocks"][grid.place(world.rank)])
    dsa = bring_up(source, order["options"], order["trust_remote_code"], layers, order["offload"])
    size = order["options"]["batch_size"]
    batches = {
        name: cut_batches(ids.to(dsa.device), counted.to(dsa.device), size) for name, (ids, counted) in tensors.items()
    }
    return Worker(world, grid, dsa, batches), dsa


def _telling(world: World, command: Callable[[World], object]) -> object:
    """Rank 0's command; however it ends, the others know before the user does."""
    try:
        return command(world)
    except BaseException as error:
        reason = _reason(world, error)
        if reason is error:
            raise
        raise reason from error


def _follow(world: World, debug: bool) -> int:
    """Another process: serve until the run ends. It has a word to say only where something failed."""
    quiet_transformers()
    warnings.simplefilter("ignore")  # what of them matters becomes a note of the run
    try:
        serve(world)
    except BaseException as error:
        if debug:
            traceback.print_exc()
        reason = _reason(world, error)
        text = str(reason) if isinstance(reason, Ended) else f"rank {world.rank}: {_told(reason)[1]}"
        status = EXIT_FAILURE if world.heartbeat.end is None else world.heartbeat.end.status
        return _say(text, status) if status == EXIT_FAILURE else status


def _reason(world: World, error: BaseException) -> BaseException:
    """What the run ends for: this error, or what another process said before it."""
    world.heartbeat.unwind()  # first: an interrupt from here on would raise beside what is being handled
    if world.heartbeat.end is not None:
        return world.heartbeat.reason()
    status, text = _told(error)
    failed = status in (EXIT_FAILURE, EXIT_BAD_INPUT)
    end = world.heartbeat.declare(status, f"rank {world.rank} failed: {text}" if failed else text)
    return error if end.rank == world.rank else world.heartbeat.reason()


def _told(error: BaseException) -> tuple[int, str]:
    """Exit status and reason, for the others."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    if isinstance(error, Terminated):
        return EXIT_TERMINATED, "told to end (SIGTERM)"
    if isinstance(error, Exception):
        text, status = explain(error)
        return status, " ".join(text.split())
    return EXIT_FAILURE, type(error).__name__


def _say(text: str, status: int) -> int:
    print(f"icsearch: {text}", file=sys.stderr)
    return status


def _leave(status: int) -> NoReturn:
    """At once: what libraries do when the interpreter ends may wait for processes that are gone."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
