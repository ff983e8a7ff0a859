"""What commands that run a model have in common: the processes, the display around a run, the result behind it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from icsearch.commands.options import MACHINES, OUTPUT, Option, Request
from icsearch.commands.requests import RunRequest
from icsearch.core.errors import IcsearchError
from icsearch.core.signals import Terminated

if TYPE_CHECKING:
    from rich.console import RenderableType

    from icsearch.search.loop import Progress
    from icsearch.sweep.distributed.world import World


@dataclass(frozen=True)
class Session(Request):
    """What is asked of a run that does not belong to what it computes."""

    timeout: Annotated[float, Option("End when a process is silent so long", MACHINES, "SECONDS", least=5)] = 60.0
    quiet: Annotated[bool, Option("No plan and no progress, only the result", OUTPUT)] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.timeout):
            raise IcsearchError(f"--timeout {self.timeout} is no time: give a number of seconds")


@contextlib.contextmanager
def running(context: typer.Context, request: RunRequest, session: Session) -> Iterator[tuple[Progress, World | None]]:
    """The display of a run, and the processes where a launcher has started several; they hear of the time-out.

    It is opened before anything heavy is imported, and closed however the run ends.
    """
    from icsearch.commands.progress import make_listener

    world: World | None = context.obj
    if world is not None:
        world.set_timeout(session.timeout)
    listener = make_listener(session.quiet)
    try:
        listener.opening(f"opening {request.model} ...")
        from icsearch.model.loading import quiet_transformers

        quiet_transformers()
        yield listener, world
    except (KeyboardInterrupt, Terminated) as ending:
        listener.close()
        how = "terminated" if isinstance(ending, Terminated) else "interrupted"
        typer.echo(f"{how}; {request.after_interruption}", err=True)
        raise
    finally:
        listener.close()


def print_result(table: RenderableType, written: str) -> None:
    from rich.console import Console

    console = Console()
    console.print(table)
    console.print(f"wrote {written}", highlight=False, soft_wrap=True, markup=False)
