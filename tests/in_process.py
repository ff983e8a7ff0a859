"""A command as its users see it, run in this process."""

from __future__ import annotations

import pytest

from icsearch.cli import app


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The command's status, stdout and stderr."""
    capsys.readouterr()
    status = app._run([str(argument) for argument in arguments], debug=False)
    captured = capsys.readouterr()
    return status, captured.out, captured.err
