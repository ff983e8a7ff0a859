"""A disk that fills up, in three kinds that really bite: a small tmpfs, a limit on file sizes, and /dev/full.

The tmpfs needs a mount namespace of its own: as root, or where users may make one. Without it, the limit on file
sizes (RLIMIT_FSIZE) remains: for the kernel a write that fails too, with EFBIG in place of ENOSPC.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from fault_harness import Case, Commands, Ended, command_in_fork, outcome, scored_twice, whole_lines

pytestmark = pytest.mark.alone

FULL = "icsearch: the disk is full"
NO_MOUNT = 77  # exit status of a process that may not mount anything


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("dp-baseline", "eval")]


@pytest.mark.parametrize("name", ["greedy", *SLOW])
def test_files_that_may_not_grow(cases: dict[str, Case], commands: Commands, tmp_path: Path, name: str) -> None:
    """One run under three limits: too low for its tokens, for its journal, for its results; then under none."""
    case, out = cases[name], tmp_path / "run"
    journal, data = out / "journal.jsonl", whole_lines(case.finished)
    torn = data.index(b"\n") + 1 + (len(data) - data.index(b"\n")) // 2  # in the middle of the events behind the first
    page = (case.finished / "report.html").stat().st_size // 2
    assert page > len(data)

    failed_at(commands.run(case.into(out), partial(limit_file_size, 1000)), out / "calibration")
    assert not journal.exists()
    shutil.copytree(case.finished / "calibration", out / "calibration", dirs_exist_ok=True)

    failed_at(commands.run(case.into(out), partial(limit_file_size, torn)), journal)
    assert journal.stat().st_size == torn
    known = whole_lines(out)
    assert 0 < len(known) <= torn

    failed_at(commands.run(case.into(out), partial(limit_file_size, page)), out)
    before = whole_lines(out)
    assert before.startswith(known)
    assert b'"finish"' in before
    assert not (out / "report.html").exists()
    assert not list(out.glob(".*.tmp"))

    again = commands.run(case.into(out))
    assert again.status == 0, again.err
    assert "is finished" in again.err
    assert whole_lines(out) == before
    assert outcome(out) == case.outcome


def failed_at(ended: Ended, place: Path) -> None:
    """A full disk is one line that names the file, and exit status 1."""
    assert ended.status == 1, ended.err
    assert ended.last_line.startswith(f"{FULL} (File too large, {place}")


# --- a small disk -----------------------------------------------------------------------------------------------------


def on_small_disks(arguments: Sequence[str], disk: Path, sizes: Sequence[int], log: Path) -> None:
    """In mounts of its own: the command on a tmpfs of each size in turn, then a copy of the RUN on the usual disk."""
    own_mounts()
    mount(disk, sizes[0])
    for number, size in enumerate(sizes):
        mount(disk, size, remount=True)
        ended = command_in_fork(arguments, log / str(number))
        (log / f"{number}.status").write_text(str(ended.status))
    shutil.copytree(disk / "run", log / "run")


def own_mounts() -> None:
    """What this process mounts is seen by nobody else; as a user, in a namespace where it may mount at all."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private, recursive = 0x20000, 0x10000000, 0x40000, 0x4000
    user, group = os.geteuid(), os.getegid()
    check(libc.unshare(new_mounts if user == 0 else new_mounts | new_user))
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    check(libc.mount(b"none", b"/", None, ctypes.c_ulong(private | recursive), None))


def mount(target: Path, size: int, remount: bool = False) -> None:
    """A tmpfs of so many bytes; with `remount`, the one that is there gets that size."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_ulong(32 if remount else 0)
    check(libc.mount(b"tmpfs", os.fsencode(target), b"tmpfs", flags, f"size={size}".encode()))


def check(result: int) -> None:
    """End this process with NO_MOUNT where the system does not allow what was asked for."""
    if result and ctypes.get_errno() in (errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSPC, errno.ENOSYS):
        os._exit(NO_MOUNT)
    assert not result, os.strerror(ctypes.get_errno())


def pages(*paths: Path) -> int:
    """What these files take on a tmpfs."""
    return sum(-(-path.stat().st_size // resource.getpagesize()) for path in paths) * resource.getpagesize()


def test_full_disk(cases: dict[str, Case], commands: Commands, tmp_path: Path) -> None:
    """A tmpfs with one page for the journal, then with no room for the results, then with enough."""
    case, disk, log = cases["greedy"], tmp_path / "disk", tmp_path / "log"
    disk.mkdir(), log.mkdir()
    journal = case.finished / "journal.jsonl"
    calibration, page = pages(*(case.finished / "calibration").iterdir()), resource.getpagesize()
    assert journal.stat().st_size > 1.2 * page
    sizes = [calibration + page, calibration + pages(journal) + 2 * page, 2**26]
    ended = commands.call(partial(on_small_disks, [*map(str, case.into(disk / "run"))], disk, sizes, log)).end()
    if ended.status == NO_MOUNT:
        pytest.skip("no mount of a small disk is allowed here; the limits on file sizes stand in for it")
    assert ended.status == 0, ended.err
    statuses = [(log / f"{number}.status").read_text() for number in range(3)]
    said = [(log / f"{number}.err").read_text().splitlines()[-1] for number in range(3)]
    assert statuses == ["1", "1", "0"], said
    assert said[0].startswith(f"{FULL} (No space left on device, {disk / 'run' / 'journal.jsonl'})")
    assert said[1].startswith(f"{FULL} (No space left on device, {disk / 'run'}")
    assert "journal" not in said[1]
    assert outcome(log / "run") == case.outcome
    assert not scored_twice(log / "run")


# --- output that nobody takes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_a_log_on_a_full_disk(cases: dict[str, Case], streams: tuple[str, ...]) -> None:
    """The exit status says it where no line can."""
    pattern = cases["greedy"].finished / "pattern.json"
    with open("/dev/full", "w") as full:
        outputs = {name: full if name in streams else subprocess.PIPE for name in ("stdout", "stderr")}
        words = [pattern, "--engine", "vllm"] if "stdout" in streams else ["none.json", "--engine", "vllm"]
        ran = subprocess.run([sys.executable, "-m", "icsearch", "export", *map(str, words)], text=True, **outputs)
    assert ran.returncode == (1 if "stdout" in streams else 2)
    if "stderr" not in streams:
        assert ran.stderr.splitlines()[-1].startswith(FULL)
        assert "Exception" not in ran.stderr  # at the interpreter's end


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_went_away(cases: dict[str, Case], stream: str) -> None:
    """As in `icsearch ... | head -0`: nothing is said any more, on either stream."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [cases["greedy"].finished / "pattern.json" if stream == "stdout" else "none.json", "--engine", "vllm"]
    outputs: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    ran = subprocess.run([sys.executable, "-m", "icsearch", "export", *map(str, words)], text=True, **outputs)
    os.close(writer)
    assert ran.returncode == (1 if stream == "stdout" else 2)
    assert "Exception" not in (ran.stderr or "")
    assert not ran.stdout
