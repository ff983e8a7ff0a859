"""Environment variables of options: one that no option has is a slip of the pen, and refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icsearch.errors import IcsearchError, did_you_mean

PREFIX = "ICSEARCH"
_DEBUG = f"{PREFIX}_DEBUG"  # read before the parser is there
_COMPLETION = f"_{PREFIX}_COMPLETE"  # set by a shell that completes a command line


def check_variables(environment: Mapping[str, str], root: Any) -> None:
    """Raise IcsearchError where a variable is named as an option's, or nearly so, and no option of `root` is.

    While a shell completes a command line nothing is refused: it would be printed into that line.
    """
    if _COMPLETION in environment:
        return
    known = {_DEBUG, *_variables(PREFIX, root)}
    commands = {f"{PREFIX}_{name.replace('-', '_').upper()}": command for name, command in root.commands.items()}
    for prefix, command in commands.items():
        known |= _variables(prefix, command)
    for name in sorted(environment):
        if not name.startswith(f"{PREFIX}_") or name in known:
            continue
        of_command = any(name.startswith(f"{prefix}_") for prefix in commands)
        if meant := _meant(name, known, of_command):
            raise IcsearchError(f"no option is read from the environment variable {name}: {meant}; or unset it")


def _meant(name: str, known: set[str], of_command: bool) -> str:
    """What a variable was meant to be; nothing where it is nobody's, such as what a cluster sets for a service."""
    if name.endswith("_CONFIG"):
        return f"the config file of all commands is named by {PREFIX}_CONFIG"
    rule = f"expected {PREFIX}_COMMAND_OPTION, such as {PREFIX}_GREEDY_SEED for --seed of icsearch greedy"
    return did_you_mean(name, known, f"{PREFIX}_") or (rule if of_command else "")


def _variables(prefix: str, command: Any) -> set[str]:
    """The variables that the parser reads for the options of one command, or of all."""
    options = (one for one in command.params if one.param_type_name == "option")
    return {f"{prefix}_{one.name.upper()}" for one in options if one.allow_from_autoenv and one.name != "help"}
