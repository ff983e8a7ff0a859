"""Runs of several real processes: started by a launcher, or by hand, so that a test can end one of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

BIN = Path(sys.executable).parent
PATIENCE = 300  # seconds; on a busy machine a process may take ten to start


def environment() -> dict[str, str]:
    """One thread for each process, and nothing of a launcher that runs the tests."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "ACCELERATE"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
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
        self._logs = [logs / f"rank{rank}.log" for rank in range(processes)]
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, "-m", "icsearch", *map(str, arguments)]
        self.processes = []
        for rank, log in enumerate(self._logs):
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env={**environment(), **shared, "RANK": str(rank)},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        preexec_fn=(limits or {}).get(rank),
                        cwd=folders[rank] if folders else None,
                    )
                )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def wait(self, ranks: Sequence[int] | None = None, seconds: float = PATIENCE) -> list[int]:
        """Exit statuses of all, or of these."""
        deadline = time.monotonic() + seconds
        chosen = self.processes if ranks is None else [self.processes[rank] for rank in ranks]
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in chosen]

    def wait_for_lines(self, journal: Path, lines: int) -> None:
        """Until the journal has so many; fails where the run ends before."""
        deadline = time.monotonic() + PATIENCE
        while not journal.exists() or len(journal.read_bytes().splitlines()) < lines:
            assert time.monotonic() < deadline, self.said(0)
            assert self.processes[0].poll() is None, self.said(0)
            time.sleep(0.02)

    def said(self, rank: int) -> str:
        return self._logs[rank].read_text()

    def complaints(self, rank: int) -> list[str]:
        """The lines of a rank that say why it ended."""
        return [line for line in self.said(rank).splitlines() if line.startswith("icsearch: ")]
