"""The command line: one module for each command. Heavy imports stay inside the commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from icsearch import __version__
from icsearch.cli import baseline, calibrate, evaluate, export, greedy, importing, plan, report
from icsearch.cli.config import PREFIX, check_variables, drop_outranked, use_config
from icsearch.core.endings import run_to_its_end
from icsearch.sweep.distributed.launch import read_launch

if TYPE_CHECKING:
    from icsearch.sweep.distributed.world import World

app = typer.Typer(
    name="icsearch",
    no_args_is_help=True,
    context_settings={"auto_envvar_prefix": PREFIX},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Find out which layers of a DeepSeek-Sparse-Attention model can drop their indexer, and what that costs.",
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", allow_from_autoenv=False)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. May stand anywhere.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="As --config of the command.", is_eager=True, callback=use_config),
    ] = None,
) -> None:
    if version:
        typer.echo(f"icsearch {__version__}")
        raise typer.Exit


class Command(TyperCommand):
    """A command whose help does not name the environment variable of each option: --config states the rule."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for parameter in self.params:
            parameter.show_envvar = False  # type: ignore[attr-defined]

    def invoke(self, ctx: Any) -> Any:
        """Run it; of options that exclude one another, the one that was given closest to the command line counts."""
        drop_outranked(ctx)
        return super().invoke(ctx)


app.command("calibrate", cls=Command)(calibrate.calibrate_batches)
app.command("greedy", cls=Command)(greedy.greedy_search)
app.command("plan", cls=Command)(plan.plan_search)
app.command("dp-baseline", cls=Command)(baseline.similarity_baseline)
app.command("eval", cls=Command)(evaluate.evaluate_patterns)
app.command("export", cls=Command)(export.export_pattern)
PASTED = {"ignore_unknown_options": True}  # a command line, which is refused with the part of it that is meant
app.command("import", cls=Command, context_settings=PASTED)(importing.import_engine_pattern)
app.command("report", cls=Command)(report.report_on_runs)


def _run(arguments: list[str], debug: bool) -> int:
    return run_to_its_end(lambda: start(arguments, debug), debug)


def start(arguments: list[str], debug: bool) -> object:
    """In this process, or in all that a launcher such as torchrun has started."""
    launch = read_launch(os.environ)
    if launch.size == 1:
        return _call(arguments)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # when torch starts it reads this: no C++ stacks
    from icsearch.sweep.distributed.startup import run_together

    return run_together(launch, lambda world: _call(arguments, world), debug)


def _call(arguments: list[str], world: World | None = None) -> object:
    check_variables(os.environ, typer.main.get_command(app))
    try:
        return app(args=arguments, prog_name="icsearch", standalone_mode=False, obj=world)
    except typer.Abort as error:  # the parser takes an EOFError, such as a cut file's, for the end of typed input
        raise error.__cause__ or error from None
