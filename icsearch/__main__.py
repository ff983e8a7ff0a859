"""`python -m icsearch`, and what the command `icsearch` calls."""

from __future__ import annotations

import os
import sys

from icsearch.core.endings import open_closed_streams, run_to_its_end
from icsearch.core.signals import Signals

TRUE = ("1", "true", "t", "yes", "y", "on")  # as the parser reads a flag from an environment variable


def main() -> None:
    """Turn every way to end into one line on stderr and an exit status."""
    debug = "--debug" in sys.argv or os.environ.get("ICSEARCH_DEBUG", "").lower() in TRUE
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    signals = Signals()

    def command() -> object:
        signals.listen()
        open_closed_streams()
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a plain terminal is no reason to fail
        from icsearch.cli.app import start  # takes its time: a signal is heard already

        return start(arguments, debug)

    sys.exit(run_to_its_end(command, debug, signals))


if __name__ == "__main__":
    main()
