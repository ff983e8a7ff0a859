"""A command run by several processes: rank 0 runs it as one process would, the others serve it; all end together."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from icsearch.core.endings import (
    EXIT_BAD_INPUT,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    Terminated,
    explain,
    run_to_its_end,
)
from icsearch.sweep.distributed.heartbeat import Ended
from icsearch.sweep.distributed.launch import Launch
from icsearch.sweep.distributed.startup import follow_in
from icsearch.sweep.distributed.worker import Member, losses_message
from icsearch.sweep.distributed.world import JoinError, World, join


def serve(world: World) -> None:
    """Do what rank 0 orders. Never returns: whatever ends the run is raised here."""
    member: Member | None = None
    while True:
        order = world.order()
        if order["do"] == "load":
            member = follow_in(world, order)
        elif member is None:
            raise RuntimeError(f"rank 0 orders to {order['do']} before it has ordered to load")
        elif order["do"] == "set up":
            member.set_up(order)
        elif order["do"] == "retain":
            member.retain(order)
        elif order["do"] == "trace":
            if (where := member.trace(order)) is not None:
                world.post(f"traced/{order['item']}", where)
        elif order["do"] == "job":
            if (events := member.do_job(order)) is not None:
                world.post(f"events/{order['item']}/{member.data_rank}", events)
        elif (done := member.sweep(order)) is not None:
            world.post(f"losses/{order['item']}/{member.data_rank}", losses_message(done))


def run_together(launch: Launch, command: Callable[[World], object], debug: bool) -> NoReturn:
    """Join the other processes, do this one's part of the command, and end with the run's exit status."""
    try:
        world = join(launch)
    except JoinError as error:
        _leave(_say(str(error), error.exit_status))
    status = run_to_its_end(lambda: _telling(world, command), debug) if world.rank == 0 else _follow(world, debug)
    world.finish(status)
    _leave(status)


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
    from icsearch.model.loading import quiet_transformers

    quiet_transformers()
    warnings.simplefilter("ignore")  # what of them matters becomes a note of the run
    try:
        serve(world)
    except BaseException as error:
        if debug:
            traceback.print_exc()
        reason = _reason(world, error)
        text = str(reason) if isinstance(reason, Ended) else f"rank {world.rank}: {_told(reason)[1]}"
        status = EXIT_FAILURE if world.watch.end is None else world.watch.end.status
        return _say(text, status) if status == EXIT_FAILURE else status
    raise RuntimeError("a worker ended without a reason")


def _reason(world: World, error: BaseException) -> BaseException:
    """What the run ends for: this error, or what another process said before it."""
    world.watch.unwind()  # first: an interrupt from here on would raise beside what is being handled
    if world.watch.end is not None:
        return world.watch.reason()
    status, text = _told(error)
    failed = status in (EXIT_FAILURE, EXIT_BAD_INPUT)
    end = world.watch.declare(status, f"rank {world.rank} failed: {text}" if failed else text)
    return error if end.rank == world.rank else world.watch.reason()


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
