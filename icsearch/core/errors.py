"""Errors that are the user's to mend: each message says what was found, what was expected, what to do."""

from __future__ import annotations


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
