"""What an option is: declared once, by the annotation of the field of a request that holds it.

The parser, the help, the shell's completion, the config file, Python's keywords and the checks all read `declared`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import Field, dataclass, fields
from typing import Any, TypeVar, get_args, get_type_hints

from icsearch.core.errors import IcsearchError
from icsearch.core.jsonfile import shown
from icsearch.core.text import did_you_mean

# The panels of a command's help.
SEARCH, MEASURE = "What to search", "What to measure"
PATTERN, ENGINE, CHECKPOINT, READING = "Which pattern", "For an engine", "Or as a checkpoint", "How to read it"
CALIBRATION, OUTPUT = "Calibration", "Output"
NUMERICS, MACHINES = "Numerics (losses follow these, to the last bit)", "Machines (losses do not follow these)"
PANELS = (SEARCH, MEASURE, PATTERN, ENGINE, CHECKPOINT, READING, CALIBRATION, NUMERICS, MACHINES, OUTPUT)

RequestT = TypeVar("RequestT", bound="Request")


@dataclass(frozen=True)
class Option:
    """What a field is as an option. Its name, type and default are the field's where nothing is said here."""

    help: str
    panel: str
    metavar: str = ""
    name: str = ""
    default: str = ""  # in words
    least: int | None = None  # of a number, or of each of several
    most: int | None = None
    choices: Collection[str] = ()  # all that there are
    offers: Iterable[str] = ()  # what a shell completes, where `choices` are not all
    many: bool = False  # may be given several times: the field is a tuple
    read: Callable[[Any], Any] | None = None  # makes a value of text, as typed, or of what Python gives


@dataclass(frozen=True)
class Declared:
    """An option with the field that declares it; `default` is dataclasses.MISSING where it must be given."""

    owner: type[Request]
    field: str
    kind: Any
    default: Any
    option: Option

    @property
    def name(self) -> str:
        return self.option.name or self.field

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    def read(self, value: Any) -> Any:
        """The field's value of what was typed, or given in Python; raises IcsearchError."""
        read = self.option.read or (lambda item: item)
        return tuple(map(read, value)) if self.option.many else read(value)

    def check(self, value: Any) -> None:
        """Raise IcsearchError for a value that is no choice, or out of range."""
        option = self.option
        if option.choices and value is not None and value not in option.choices:
            meant, known = did_you_mean(value, option.choices), " or ".join(option.choices)
            raise IcsearchError(f"{self.flag} {value!r} is unknown: {meant}give {known}")
        for number in value if isinstance(value, tuple) else (value,):
            if option.least is not None and number is not None and number < option.least:
                raise IcsearchError(f"{self.flag} {shown(number)} is out of range: give at least {option.least}")
            if option.most is not None and number is not None and number > option.most:
                raise IcsearchError(f"{self.flag} {shown(number)} is out of range: give at most {option.most}")


@dataclass(frozen=True)
class Exclusive:
    """Ways that exclude one another: of each, the option that chooses it, and behind it those of that way alone."""

    say: str
    ways: tuple[tuple[str, ...], ...]


EXCLUSIVE = (
    Exclusive("how far to go", (("retention",), ("num_shared",))),
    Exclusive("how many layers there are", (("model_config",), ("layers",))),
    Exclusive(
        "what to export",
        (
            ("engine", "model_config", "serve_pp", "repair", "gguf", "out"),
            ("checkpoint", "model", "drop_indexers", "other_weights"),
        ),
    ),
)


@dataclass(frozen=True)
class Request:
    """Options as one object. What can be said of one of them alone is checked here, and what excludes what."""

    def __post_init__(self) -> None:
        own = {option.field: option for option in declared(type(self)) if option.owner is type(self)}
        for name, option in own.items():
            option.check(getattr(self, name))
        for rule in EXCLUSIVE:
            if all(way[0] in own for way in rule.ways):
                given = ([own[name].flag for name in way if getattr(self, name)] for way in rule.ways)
                if len(firsts := [flags[0] for flags in given if flags]) > 1:
                    raise IcsearchError(f"{' and '.join(firsts)} both say {rule.say}: give one of them")


def declared(kind: type[Request]) -> tuple[Declared, ...]:
    """The options of a request, and of the requests that it holds."""
    found: list[Declared] = []
    for field, hint in _hints(kind):
        found += declared(hint) if _is_request(hint) else ()
        for option in get_args(hint):
            if isinstance(option, Option):
                found.append(Declared(kind, field.name, get_args(hint)[0], field.default, option))
    return tuple(found)


def request_of(kind: type[RequestT], given: Mapping[str, Any]) -> RequestT:
    """A request of what was given, by the names of its fields; None stands for the default. Raises IcsearchError."""
    held = {field.name: request_of(hint, given) for field, hint in _hints(kind) if _is_request(hint)}
    values = {
        option.field: option.read(given[option.field])
        for option in declared(kind)
        if option.owner is kind and given.get(option.field) is not None
    }
    return kind(**held, **values)


def _hints(kind: type[Request]) -> list[tuple[Field[Any], Any]]:
    hints = get_type_hints(kind, include_extras=True)
    return [(field, hints[field.name]) for field in fields(kind)]


def _is_request(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Request)
