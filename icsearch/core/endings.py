"""How a command ends: whatever happens, one line on stderr and an exit status. No torch here."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from icsearch.core.errors import IcsearchError
from icsearch.core.files import is_disk_full
from icsearch.core.signals import Signals, Terminated
from icsearch.core.text import first_line

EXIT_FAILURE, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 128 + signal.SIGTERM

# A path that the user gave, or may not use; one that is missing can have gone while the command ran.
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
_OTHER_PATH = "check its permissions, or give another path"
_GOES_ON = "without --fresh, it continues where it stopped"


def open_closed_streams() -> None:
    """Streams that whoever started this process has closed lead nowhere from here on.

    Else the next file to be opened would get the number of one, and hold whatever is printed there.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is not None:
            continue
        null = os.open(os.devnull, os.O_RDWR)
        try:
            os.fstat(number)
        except OSError:  # closed, else the process has it open for something of its own
            os.dup2(null, number)
        setattr(sys, name, open(null, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def run_to_its_end(command: Callable[[], object], debug: bool, signals: Signals | None = None) -> int:
    """Run a command; every way to end becomes an exit status, and a line on stderr where something went wrong.

    Where one of the `signals` came that the command listens to, the status is that of its end, whatever became of the
    command.
    """
    signals = signals or Signals()
    try:
        status = _status_of(command, debug, signals)
        signals.close()
    except (KeyboardInterrupt, Terminated):  # it came while the end was written down: no further one will
        signals.close()
    return status if signals.received is None else 128 + signals.received


def _status_of(command: Callable[[], object], debug: bool, signals: Signals) -> int:
    try:
        status = command()
        sys.stdout.flush()  # what cannot be written fails here, and not after the last line of defence
        return status if isinstance(status, int) else 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Terminated:
        return EXIT_TERMINATED
    except BrokenPipeError:  # whoever read the output went away, and wants to hear no more
        _say("")
        return EXIT_FAILURE
    except Exception as error:  # the last line of defence: whatever happens, one line and a status
        message, status = explain(error)
        if signals.received is None:  # else a library took it for a failure of its own
            _say(f"{traceback.format_exc() if debug else ''}icsearch: {one_line(message)}\n")
        return status


def one_line(message: str) -> str:
    """The message on one line, with escapes for what is no sign: names from outside can hold a terminal's commands."""
    line = " ".join(message.split())
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line)


def explain(error: Exception) -> tuple[str, int]:
    """The line for the user and the exit status."""
    if isinstance(error, IcsearchError):
        return str(error), error.exit_status
    if hasattr(error, "format_message"):  # a usage error of the command-line parser
        return _usage(error), EXIT_BAD_INPUT
    if is_disk_full(error):
        where = ", ".join(str(part) for part in (error.strerror, error.filename) if part)
        return f"the disk is full ({where}): free some space and repeat the command; {_GOES_ON}", EXIT_FAILURE
    if isinstance(error, MemoryError):
        return f"out of memory ({first_line(error)}): free some and repeat the command; {_GOES_ON}", EXIT_FAILURE
    if isinstance(error, OSError) and error.errno in _UNUSABLE and error.filename:
        path = os.fsdecode(error.filename)
        short = path if len(path) <= 200 else f"{path[:196]}..."
        return f"cannot use {short} ({error.strerror}): {_OTHER_PATH}", EXIT_BAD_INPUT
    return f"{type(error).__name__}: {error} (--debug shows where)", EXIT_FAILURE


def _usage(error: Any) -> str:
    """What the parser says, where the value came from unless it was typed, and whose help says more."""
    context: Any = getattr(error, "ctx", None)
    parameter: Any = getattr(error, "param", None)
    command = f" {context.info_name}" if context is not None and context.parent is not None else ""
    source, origin = "", ""
    if context is not None and parameter is not None:
        source = getattr(context.get_parameter_source(parameter.name), "name", "")
    if source == "DEFAULT_MAP":
        origin = f" (from the config file {context.params.get('config') or context.find_root().params.get('config')})"
    elif source == "ENVIRONMENT":
        origin = f" (from the environment, {context.auto_envvar_prefix}_{parameter.name.upper()})"
    return f"{error.format_message()}{origin} (see icsearch{command} --help)"


def _say(what: str) -> None:
    """Write to stderr what went wrong, and let go of a stdout or stderr that takes nothing more."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, what)):
        try:
            stream.write(text)
            stream.flush()
        except OSError:  # a log on a full disk, a terminal that is gone: there is no other place to say it
            # What the buffer still holds must not fail at the interpreter's end too; some streams have no file.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
