"""SIGINT and SIGTERM end a command wherever they land.

What a signal handler raises surfaces between two steps of whatever the main thread is at. In a finaliser or a callback
of the garbage collector the interpreter prints it and goes on; an `except:` of another library swallows it. So what is
raised here is followed by a weak reference: where it goes away before it was heard, it is raised once more.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from types import FrameType

AGAIN = 0.01  # seconds from one that went away to the next
GRACE = 5.0  # seconds of raising in vain, until the process is ended without unwinding
ENDING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """SIGINT came. The interpreter's own class takes no weak reference."""


class Terminated(BaseException):
    """SIGTERM came: as KeyboardInterrupt, no error that anything but the end of the command should handle."""


class Insistent:
    """Raises what `reason` makes in the main thread, again and again until it is heard; `give_up` after GRACE."""

    def __init__(self, reason: Callable[[], BaseException], give_up: Callable[[], object]) -> None:
        self._reason, self._give_up = reason, give_up
        self._raised: weakref.ref[BaseException] | None = None
        self._since = 0.0
        self._heard = False
        self._hook_before = sys.unraisablehook

    def throw(self, *_: object) -> None:
        """For a signal handler to call, and one itself."""
        if self._heard:
            return
        if self._raised is None:
            self._since = time.monotonic()
            self._hook_before, sys.unraisablehook = sys.unraisablehook, self._on_unraisable
            signal.signal(signal.SIGALRM, self.throw)
        elif time.monotonic() - self._since > GRACE:
            self._give_up()
        raise self._followed()

    def heard(self) -> None:
        """The main thread is on its way to the end: nothing more is raised."""
        self._heard = True
        if self._raised is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if sys.unraisablehook == self._on_unraisable:
            sys.unraisablehook = self._hook_before

    def _followed(self) -> BaseException:
        """What to raise next. No frame that it passes may hold it, or it would never go away."""
        error = self._reason()
        self._raised = weakref.ref(error, self._on_gone)
        return error

    def _on_gone(self, reference: object) -> None:
        """A callback, in which nothing can be raised either: hence the timer."""
        if not self._heard:
            signal.setitimer(signal.ITIMER_REAL, AGAIN)

    def _on_unraisable(self, dropped: sys.UnraisableHookArgs) -> None:
        """Print nothing of what was raised here, or of a signal that came while its handler was taken away."""
        raised = self._raised() if self._raised is not None else None
        chain = [dropped.exc_value]
        while chain:
            error = chain.pop()
            if error is not None:
                if error is raised or (isinstance(error, OSError) and "ignored due to race condition" in str(error)):
                    return
                chain += [error.__cause__, error.__context__]
        self._hook_before(dropped)


class Signals:
    """SIGINT and SIGTERM, by which schedulers and shut-downs end a process: `received` is the number of the first.

    It unwinds the command, a second one ends the process at once. One that is ignored stays so.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._insistent = Insistent(
            lambda: Interrupted() if self.received == signal.SIGINT else Terminated(),
            give_up=lambda: os._exit(128 + (self.received or 0)),
        )

    def listen(self) -> None:
        for number in ENDING:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, self._on_signal)

    def close(self) -> None:
        """The command has ended: a signal from here on ends the process as one without a handler."""
        self._insistent.heard()
        self._let_go()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        self._let_go()
        self._insistent.throw()

    def _let_go(self) -> None:
        for number in ENDING:
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_DFL)
