"""Commands made of functions that take requests: each field of a request is an option, as the field declares it.

Help has one line for an option, in panels; what needs more words is on the page that it names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from icsearch.cli.config import drop_outranked, use_config
from icsearch.commands.options import PANELS, Declared, declared, request_of
from icsearch.commands.requests import RunRequest

OTHER = "Other"
WIDTH = 100  # of help, at most

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        help="[common], [eval], ... in TOML; or ICSEARCH_EVAL_SEED",
        rich_help_panel=OTHER,
        allow_from_autoenv=False,  # ICSEARCH_CONFIG is that of all commands
        is_eager=True,  # before the options that it has values for
        callback=use_config,
    ),
]


def print_help(command: Any, ctx: Any, formatter: Any) -> None:
    """Usage, what it does, and in panels one line for each option or command."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    commands = getattr(command, "commands", {})
    positional = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    needed = [f"{option.opts[0]} {option.metavar}" for option in options if option.required]
    words = ["COMMAND" for _ in commands][:1] + [argument.metavar for argument in positional] + needed + ["[OPTIONS]"]
    usage, about = f"Usage: {ctx.command_path} {' '.join(words)}", " ".join(command.help.split())
    console.print(Padding(Text(f"\n{usage}\n\n{about}\n"), (0, 1)))

    panels: dict[str, list[tuple[str, str]]] = {name: [] for name in PANELS}
    for name, known in commands.items():
        panels.setdefault(known.rich_help_panel, []).append((name, known.help.partition(".\n")[0]))
    for option in options:
        metavar = f" {option.metavar}" if option.metavar and not option.is_flag else ""
        panels.setdefault(option.rich_help_panel or OTHER, []).append((option.opts[0] + metavar, option.help))
    panels[OTHER].append(("--help", "This help"))
    arguments = [(argument.metavar, argument.help) for argument in positional]
    first = max(len(name) for rows in (arguments, *panels.values()) for name, _ in rows)

    def table(rows: list[tuple[str, str]]) -> Table:
        made = Table.grid(padding=(0, 2, 0, 0), expand=True)
        made.add_column(style="cyan", width=first, no_wrap=True)
        made.add_column(ratio=1)
        for name, said in rows:
            text = Text(said)
            text.highlight_regex(r"\[[^]]*\]$", "dim")  # the default
            made.add_row(name, text)
        return made

    if arguments:
        console.print(Padding(table(arguments), (0, 2, 1, 2)))
    for title, rows in panels.items():
        if rows:
            width = min(console.width, WIDTH)
            console.print(Panel(table(rows), title=title, title_align="left", border_style="dim", width=width))
    if command.epilog:
        console.print(Padding(f"In brackets: the default. More: {command.epilog}", (0, 1)))


class Command(TyperCommand):
    """A command with our help, and where options exclude one another, the one that was given closest counts."""

    def invoke(self, ctx: Any) -> Any:
        drop_outranked(ctx)
        return super().invoke(ctx)

    format_help = print_help


class Group(TyperGroup):
    """All commands, with our help."""

    format_help = print_help


def add(
    app: typer.Typer,
    name: str,
    function: Callable[..., object],
    panel: str,
    more: Sequence[str],
    arguments: Sequence[str] = ("model",),
) -> None:
    """Add a command that calls a function with the requests that it takes.

    `arguments` are the fields that stand without an option's name, `more` names pages of docs/ that explain them.
    """
    kinds = [kind for kind in get_type_hints(function).values() if kind is not NoneType]
    requests = [kind for kind in kinds if kind is not typer.Context]
    known = [option for kind in requests for option in declared(kind)]

    def call(ctx: typer.Context, **given: Any) -> object:
        values = {option.field: given[option.field if option.field in arguments else option.name] for option in known}
        if values.get("out") is None and issubclass(requests[0], RunRequest):
            values["out"] = Path("runs") / f"{Path(values['model']).name or 'model'}-{name}"
        return function(*(ctx if kind is typer.Context else request_of(kind, values) for kind in kinds))

    parameters = [
        inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *(_argument(option) if option.field in arguments else _option(option, name) for option in known),
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, annotation=ConfigFile, default=None),
    ]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    epilog = ", ".join(f"docs/{page}.md" for page in more)
    settings = {"ignore_unknown_options": name == "import"}  # a command line that is pasted is refused with advice
    app.command(
        name,
        cls=Command,
        help=inspect.getdoc(function),
        epilog=epilog,
        rich_help_panel=panel,
        context_settings=settings,
    )(call)


def _argument(option: Declared) -> inspect.Parameter:
    info = typer.Argument(metavar=option.option.metavar, help=option.option.help)
    return inspect.Parameter(option.field, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[_typed(option), info])


def _option(option: Declared, command: str) -> inspect.Parameter:
    """What the parser is told of an option; what it reads of none is the field's default."""
    offers = option.option.offers or option.option.choices

    def complete(typed: str) -> list[str]:  # for the shell
        return [choice for choice in offers if choice.startswith(typed)]

    said, flag, value = option.option, option.flag, option.default
    needed, switch = value is MISSING and not said.default, isinstance(value, bool)
    default = said.default.replace("COMMAND", command)
    if not default and isinstance(value, (str, int, float)) and not switch:
        default = str(value).removesuffix(".0")
    info = typer.Option(
        f"{flag}/--no-{flag[2:]}" if switch else flag,
        metavar=said.metavar,
        help=f"{said.help} [{default}]" if default else said.help,
        min=said.least,
        rich_help_panel=said.panel,
        autocompletion=complete if offers else None,
    )
    kind = _typed(option) if needed or switch else _typed(option) | None
    unsaid = inspect.Parameter.empty if needed else value if switch else None
    annotation = Annotated[kind, info]  # type: ignore[valid-type]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=unsaid)


def _typed(option: Declared) -> Any:
    """The type that the parser reads: text where the field has a reader of its own."""
    kinds = [kind for kind in get_args(option.kind) or (option.kind,) if kind not in (NoneType, ...)]
    kind = str if option.option.read else kinds[0]
    return list[kind] if option.option.many else kind  # type: ignore[valid-type]
