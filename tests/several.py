"""Runs of several real processes: started by a launcher, or by hand, so that a test can end one of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fault_harness import PATIENCE, Running, command

BIN = Path(sys.executable).parent


def environment() -> dict[str, str]:
    """One thread for each process, and nothing of a launcher that runs the tests."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "ACCELERATE"))}
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in (*launcher, "TORCH_CPP_LOG_LEVEL"):  # the command sets the last one itself
        own.pop(name, None)
    return {**own, "OMP_NUM_THREADS": "1"}


def launched(launcher: Sequence[str], arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """The command through a launcher that lies beside this Python."""
    command = [str(BIN / launcher[0]), *launcher[1:], "-m", "icsearch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=PATIENCE, check=False)


def torchrun(processes: int) -> list[str]:
    return ["torchrun", "--standalone", "--nproc-per-node", str(processes)]


def accelerate(processes: int) -> list[str]:
    """Without a GPU too: with --cpu it would start one process, or ask for MPI."""
    fixed = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return ["accelerate", "launch", "--multi_gpu", "--num_processes", str(processes), *fixed, *_port()]


def _port() -> list[str]:
    return ["--main_process_port", str(free_port())]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Ranks:
    """The processes of one run, without a launcher; each writes to a file of its own.

    `limits` are set on single ranks before they begin; `folders` is where each of them begins.
    """

    def __init__(
        self,
        processes: int,
        arguments: Sequence[object],
        logs: Path,
        limits: dict[int, Callable[[], None]] | None = None,
        folders: Sequence[Path] | None = None,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        words, self.processes = tuple(map(str, arguments)), []
        for rank in range(processes):
            own = {**shared, "RANK": str(rank)}
            begin = partial(_begin, own, folders[rank] if folders else Path.cwd(), (limits or {}).get(rank))
            self.processes.append(Running(partial(command, words, begin), logs / f"rank{rank}"))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.alive:
                process.send(signal.SIGKILL)
                process.end()

    def wait(self, ranks: Sequence[int] | None = None) -> list[int]:
        """Exit statuses of all, or of these."""
        chosen = self.processes if ranks is None else [self.processes[rank] for rank in ranks]
        return [process.end().status for process in chosen]

    def wait_for_lines(self, journal: Path, lines: int) -> None:
        """Until the journal has so many; fails where the run ends before."""
        deadline = time.monotonic() + PATIENCE
        while not journal.exists() or len(journal.read_bytes().splitlines()) < lines:
            assert time.monotonic() < deadline, self.said(0)
            assert self.processes[0].alive, self.said(0)
            time.sleep(0.02)

    def said(self, rank: int) -> str:
        return self.processes[rank].said

    def complaints(self, rank: int) -> list[str]:
        """The lines of a rank that say why it ended."""
        return [line for line in self.said(rank).splitlines() if line.startswith("icsearch: ")]


def _begin(variables: dict[str, str], folder: Path, limit: Callable[[], None] | None) -> None:
    os.environ.update(variables)
    os.chdir(folder)
    if limit is not None:
        limit()
