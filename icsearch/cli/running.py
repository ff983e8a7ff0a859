"""What commands that run a model have in common: the processes, the display around a run, the result behind it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from icsearch.core.errors import IcsearchError
from icsearch.core.signals import Terminated

if TYPE_CHECKING:
    from rich.console import RenderableType

    from icsearch.commands.requests import RunRequest
    from icsearch.search.loop import Progress
    from icsearch.sweep.distributed.world import World


def default_run(model: str, method: str) -> Path:
    """runs/MODEL-METHOD, from the last part of the model's name."""
    return Path("runs") / f"{Path(model).name or 'model'}-{method}"


def print_result(table: RenderableType, written: str) -> None:
    from rich.console import Console

    console = Console()
    console.print(table)
    console.print(f"wrote {written}", highlight=False, soft_wrap=True, markup=False)


def world_of(context: typer.Context, timeout: float) -> World | None:
    """The processes of this run, where a launcher has started several; they hear of the time-out."""
    if not math.isfinite(timeout):
        raise IcsearchError(f"--timeout {timeout} is no time: give a number of seconds")
    world: World | None = context.obj
    if world is not None:
        world.set_timeout(timeout)
    return world


@contextlib.contextmanager
def display(request: RunRequest, quiet: bool) -> Iterator[Progress]:
    """The display of a run: opened before anything heavy is imported, closed however the run ends."""
    from icsearch.commands.progress import make_listener

    listener = make_listener(quiet)
    try:
        listener.opening(f"opening {request.model} ...")
        from icsearch.model.loading import quiet_transformers

        quiet_transformers()
        yield listener
    except (KeyboardInterrupt, Terminated) as ending:
        listener.close()
        typer.echo(_to_go_on(ending, request), err=True)
        raise
    finally:
        listener.close()


def _to_go_on(ending: BaseException, request: RunRequest) -> str:
    """What to do after a run was ended from outside."""
    how = "terminated" if isinstance(ending, Terminated) else "interrupted"
    command = "the same command without --fresh" if request.fresh else "the same command"
    return f"{how}; {command} continues {request.out}"
