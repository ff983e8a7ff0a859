"""Errors that are the user's to mend: each message says what was found, what was expected, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches

MAX_SAID = 200  # characters of another library's error within a message of ours


class IcsearchError(Exception):
    """Bad input. The command line prints the message as one line and exits with `exit_status`."""

    exit_status = 2


class PatternError(IcsearchError):
    """A pattern, or a file that holds one, that cannot be used."""


class CalibrationError(IcsearchError):
    """Calibration text, tokens or a cache that cannot be used."""


class ModelError(IcsearchError):
    """A checkpoint that cannot be used."""


class JournalError(IcsearchError):
    """A journal that cannot be read or continued."""


class OutOfMemoryError(IcsearchError):
    """Memory ran out; the message names the option to change."""

    exit_status = 1


class ShardError(IcsearchError):
    """A shard of the checkpoint that could not be read, or was changed, after it had been found whole."""

    exit_status = 1


class NonFiniteLossError(IcsearchError):
    """A loss came out NaN or infinite; the message names layer and sequence.

    `value`, as text, is the loss of this `sequence` under this `pattern`; `where` it was first seen is empty where this
    process has not all layers.
    """

    exit_status = 1

    def __init__(self, value: str, sequence: int, pattern: str, where: str = "") -> None:
        super().__init__(
            f"the loss of sequence {sequence} under {pattern} is {value}, first seen behind "
            f"{where or 'a layer of another process'}: expected a finite number; try --dtype float32, or look at that "
            "sequence"
        )
        self.value, self.sequence, self.pattern = value, sequence, pattern


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """A question that names what was probably meant, of all these names; empty where none of them is near.

    A `prefix` that all of them have is not compared: it would make them all alike.
    """
    ends = sorted(known.removeprefix(prefix) for known in names)
    close = get_close_matches(name.removeprefix(prefix), ends, n=1)
    return f"did you mean {prefix}{close[0]}?" if close else ""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line: its first, or its name where it says nothing.

    A first line that ends with a colon says nothing alone: then the next one comes with it. Long ones are cut, behind
    a word where one ends near the cut.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if len(said) <= MAX_SAID:
        return said
    space = said.rfind(" ", MAX_SAID - 60, MAX_SAID - 2)
    return f"{said[: MAX_SAID - 3 if space < 0 else space]}..."
