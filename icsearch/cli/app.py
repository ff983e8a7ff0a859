"""The commands as one program, in the processes that a launcher started. Heavy imports stay inside the commands."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icsearch.cli import commands
from icsearch.cli.config import PREFIX, check_variables, use_config
from icsearch.cli.options import Group, add
from icsearch.core import __version__
from icsearch.core.endings import run_to_its_end
from icsearch.sweep.distributed.launch import LAUNCHED, read_launch

if TYPE_CHECKING:
    from icsearch.sweep.distributed.world import World

app = typer.Typer(
    name="icsearch",
    cls=Group,
    no_args_is_help=True,
    context_settings={"auto_envvar_prefix": PREFIX},
    pretty_exceptions_enable=False,
    help="Find out which layers of a DeepSeek-Sparse-Attention model can drop their indexer, and what that costs.",
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version", allow_from_autoenv=False)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere")] = False,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="As --config of the command", is_eager=True, callback=use_config),
    ] = None,
) -> None:
    if version:
        typer.echo(f"icsearch {__version__}")
        raise typer.Exit


SEARCHING, EVALUATING, SERVING = "Search", "Evaluate", "Serve"
add(app, "calibrate", commands.calibrate, SEARCHING, ["choosing", "families"], ["model", "source"])
add(app, "plan", commands.plan, SEARCHING, ["any-size", "strategies"])
add(app, "fisher", commands.fisher, SEARCHING, ["method", "choosing", "any-size"])
add(app, "greedy", commands.greedy, SEARCHING, ["strategies", "choosing", "any-size"])
add(app, "dp-baseline", commands.dp_baseline, SEARCHING, ["method", "any-size"])
add(app, "eval", commands.evaluate, EVALUATING, ["choosing", "method"])
add(app, "report", commands.report, EVALUATING, ["command-line"], ["runs"])
add(app, "export", commands.export, SERVING, ["engines", "native-checkpoints"], ["file"])
add(app, "import", commands.import_pattern, SERVING, ["engines"], ["source"])
add(app, "check", commands.check, SERVING, ["engines"], ["model"])

COMMANDS = {command.name for command in app.registered_commands}
TOGETHER = ("calibrate", "fisher", "greedy", "dp-baseline", "eval")  # of several processes, rank 0 makes the batches


@cache
def program() -> Any:
    """The parser of all commands. Making it takes as long as most refusals do."""
    return typer.main.get_command(app)


def _run(arguments: list[str], debug: bool) -> int:
    return run_to_its_end(lambda: start(arguments, debug), debug)


def start(arguments: list[str], debug: bool) -> object:
    """In this process, or in all that a launcher such as torchrun has started, where the command runs in several."""
    command = next((argument for argument in arguments if argument in COMMANDS), "")
    if command not in TOGETHER or "--help" in arguments:
        repeated = LAUNCHED in os.environ and os.environ.get("RANK", "0") != "0"
        return None if repeated else _call(arguments)
    launch = read_launch(os.environ)
    if launch.size == 1:
        return _call(arguments)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # when torch starts it reads this: no C++ stacks
    from icsearch.sweep.distributed.startup import run_together

    return run_together(launch, lambda world: _call(arguments, world), debug)


def _call(arguments: list[str], world: World | None = None) -> object:
    check_variables(os.environ, program())
    try:
        return program()(args=arguments, prog_name="icsearch", standalone_mode=False, obj=world)
    except typer.Abort as error:  # the parser takes an EOFError, such as a cut file's, for the end of typed input
        raise error.__cause__ or error from None
