"""Options from a TOML file and from the environment, below flags, above the defaults."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from icsearch.commands.options import EXCLUSIVE
from icsearch.core.errors import IcsearchError
from icsearch.core.files import read_text
from icsearch.core.jsonfile import shown
from icsearch.core.text import did_you_mean, first_line, parse_toml

PREFIX = "ICSEARCH"
COMMON = "common"
_DEBUG = f"{PREFIX}_DEBUG"  # read before the parser is there
_COMPLETION = f"_{PREFIX}_COMPLETE"  # set by a shell that completes a command line
_PLACES = ("COMMANDLINE", "ENVIRONMENT", "DEFAULT_MAP")  # as the parser calls them; the last one is the config file

# The options of one command as the parser has them, by the name that they have there, without dashes in front.
Options = Mapping[str, Any]


class ConfigError(IcsearchError):
    """A config file that cannot be used."""


def use_config(context: typer.Context, path: Path | None) -> Path | None:
    """What `--config` does before the other options are looked at: its values become the command's defaults.

    Before the command's name it is for whichever command follows, unless that one has a file of its own. Raises
    ConfigError for a file that is no TOML, or names a table or an option that does not exist.
    """
    if path is not None and not context.resilient_parsing:
        root = context.find_root()
        known = {name: _options(command) for name, command in getattr(root.command, "commands", {}).items()}
        values = defaults(path, read_tables(path), known)
        context.default_map = values if context is root else values[context.info_name or ""]
    return path


def read_tables(path: Path) -> dict[str, Any]:
    """The document of a TOML file. Raises ConfigError."""
    expected = "expected TOML with tables such as [common] and [greedy]"
    try:
        return parse_toml(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}: {expected}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror or error}): {expected}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, nested too deeply
        raise ConfigError(f"{path} is not TOML ({first_line(error)}): {expected}") from None


def defaults(path: Path, document: dict[str, Any], known: Mapping[str, Options]) -> dict[str, dict[str, Any]]:
    """For each command, what the file says of its parameters: its own table above [common].

    An option of [common] goes to the commands that have it. Raises ConfigError, with the nearest name where a table
    or an option is unknown.
    """
    every = {name for options in known.values() for name in options}
    for table, values in document.items():
        if not isinstance(values, dict) and table not in known and table.replace("_", "-") in every:
            raise ConfigError(
                f"{path}: {table} stands in no table: write it below [{COMMON}] or below a command, such as [greedy]"
            )
        if table not in (COMMON, *known):
            raise ConfigError(f"{path}: unknown table {shown(table)}{_nearest(table, (COMMON, *known))}")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {table} is {shown(values)}: expected a table, [{table}]")
        _check(path, table, values, known.values() if table == COMMON else [known[table]])
    common = _by_option(document.get(COMMON, {}))
    return {name: _values(common, _by_option(document.get(name, {})), options) for name, options in known.items()}


def _options(command: Any) -> dict[str, Any]:
    """Those that may stand in a file."""
    parameters = (each for each in command.params if each.param_type_name == "option" and each.name != "config")
    return {max(option.opts, key=len).lstrip("-"): option for option in parameters}


def _by_option(values: dict[str, Any]) -> dict[str, Any]:
    """The values by the names of the options: num_sequences is num-sequences."""
    return {key.replace("_", "-"): value for key, value in values.items()}


def _check(path: Path, table: str, values: dict[str, Any], commands: Iterable[Options]) -> None:
    """Raise ConfigError for an option that no command here has, one said twice, or a value of no use to one of them."""
    if len(_by_option(values)) != len(values):
        raise ConfigError(f"{path}: [{table}] says an option twice, with - and with _: leave one out")
    for key, value in values.items():
        name = key.replace("_", "-")
        having = [options[name] for options in commands if name in options]
        if not having:
            known = {name for options in commands for name in options}
            raise ConfigError(f"{path}: [{table}] has no option {shown(key)}{_nearest(name, known)}")
        for option in having:
            try:
                _typed(value, option)
            except ValueError as error:
                raise ConfigError(f"{path}: [{table}] {key} is {shown(value)}: expected {error}") from None


def _nearest(name: str, names: Collection[str]) -> str:
    """A hint at the name that was meant, or at all of them."""
    return ": " + (did_you_mean(name, names).strip() or f"expected one of {', '.join(sorted(names))}")


def _values(common: dict[str, Any], own: dict[str, Any], options: Options) -> dict[str, Any]:
    """What a command's parameters are by the file; what its own table says takes back what excludes it in [common]."""
    weaker = set()
    for ways in (rule.ways for rule in EXCLUSIVE):
        chosen = [way for way in ways if way[0].replace("_", "-") in own]
        weaker |= {name for way in ways if chosen and way not in chosen for name in way}
    merged = {**{key: value for key, value in common.items() if key.replace("-", "_") not in weaker}, **own}
    return {options[key].name: _typed(value, options[key]) for key, value in merged.items() if key in options}


def _typed(value: Any, option: Any) -> Any:
    """A value as it would be typed: text, for the parser to read. ValueError says what is expected of another one."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value
    items = value if option.multiple and isinstance(value, list) else [value]
    if not all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in items):
        several = ", or a list of them" if option.multiple else ", as on the command line"
        raise ValueError(f"a text or a number{several}")
    return [str(item) for item in items] if option.multiple else str(value)


def drop_outranked(context: typer.Context) -> None:
    """Of ways that exclude one another, take back the options of those from a weaker place than that of another one.

    So `--num-shared` stands above a `retention` of a config file, and `--checkpoint` above an `engine` and a `serve-pp`
    there. What comes from the same place stays, to be refused.
    """
    for ways in (rule.ways for rule in EXCLUSIVE):
        chosen = {way: _rank(context, way[0]) for way in ways}
        strongest = min(chosen.values())
        outranked = [way for way, rank in chosen.items() if rank > strongest]
        for name in (name for way in outranked for name in way):
            if strongest < _rank(context, name) < len(_PLACES):
                context.params[name] = False if isinstance(context.params[name], bool) else None


def _rank(context: typer.Context, name: str) -> int:
    """How far from the command line an option's value comes; the number of places where it is a default."""
    place = getattr(context.get_parameter_source(name), "name", "")
    return _PLACES.index(place) if place in _PLACES else len(_PLACES)


def check_variables(environment: Mapping[str, str], root: Any) -> None:
    """Raise IcsearchError where a variable is named as an option's, or nearly so, and no option of `root` is.

    One that is nobody's, such as what a cluster sets for a service, is left alone. While a shell completes a command
    line nothing is refused: it would be printed into that line.
    """
    if _COMPLETION in environment:
        return
    commands = {f"{PREFIX}_{name.replace('-', '_').upper()}": command for name, command in root.commands.items()}
    known = {_DEBUG}
    for prefix, command in {PREFIX: root, **commands}.items():
        options = _options(command).values()
        known |= {f"{prefix}_{option.name.upper()}" for option in options if option.allow_from_autoenv}
    known.add(f"{PREFIX}_CONFIG")
    rule = f"expected {PREFIX}_COMMAND_OPTION, such as {PREFIX}_GREEDY_SEED for --seed of icsearch greedy"
    for name in sorted(environment):
        if not name.startswith(f"{PREFIX}_") or name in known:
            continue
        of_command = any(name.startswith(f"{prefix}_") for prefix in commands)
        meant = did_you_mean(name, known, f"{PREFIX}_").strip() or (rule if of_command else "")
        if name.endswith("_CONFIG"):
            meant = f"the config file of all commands is named by {PREFIX}_CONFIG"
        if meant:
            raise IcsearchError(f"no option is read from the environment variable {name}: {meant}; or unset it")
