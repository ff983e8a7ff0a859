"""A RUN directory on file systems that have no locks, or cannot make a rename survive a power cut."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from icsearch.core.errors import JournalError
from icsearch.core.files import sync_directory
from icsearch.core.jsonfile import read_object
from icsearch.runs import directory
from icsearch.runs.directory import RunDirectory


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture(params=["ENOSYS", "ENOLCK", "EOPNOTSUPP", "no fcntl"])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no fcntl":
        monkeypatch.setattr(directory, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", failing(getattr(errno, request.param)))


@pytest.mark.usefixtures("without_locks")
def test_a_file_names_host_and_process_instead(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with run.locked() as note:
        assert note == f"no locks in {tmp_path / 'run'}: .lock.owner there says who is at work"
        owner = (tmp_path / "run" / ".lock.owner").read_text()
        assert str(os.getpid()) in owner and socket.gethostname() in owner
        with pytest.raises(JournalError, match="another icsearch is running in .* \\(if not, remove .*lock.owner\\)"):
            RunDirectory(tmp_path / "run")._take_lock()
        (tmp_path / "run" / "kept").touch()
    assert not (tmp_path / "run" / ".lock.owner").exists()
    with run.locked():
        pass


@pytest.mark.usefixtures("without_locks")
def test_a_process_that_died_holds_nothing(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from icsearch.runs import directory
directory.fcntl = None
lock = directory.RunDirectory(Path(sys.argv[1])).locked()
lock.__enter__()
os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False)
    assert done.returncode == 9
    assert (tmp_path / "run" / ".lock.owner").exists()
    with RunDirectory(tmp_path / "run").locked():
        pass


@pytest.mark.usefixtures("without_locks")
def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").locked():
        pass
    assert not (tmp_path / "run").exists()


def test_another_failure_of_a_lock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with (
        pytest.raises(JournalError, match="cannot write to .* \\(Input/output error\\)"),
        RunDirectory(tmp_path).locked(),
    ):
        pass


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_directory_that_cannot_be_synced_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    sync_directory(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync_directory(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(tmp_path / "x.json", expected="", advice="", error=JournalError) == {"a": 1}
