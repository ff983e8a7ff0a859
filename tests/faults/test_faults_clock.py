"""A wall clock that jumps: durations are of a clock that does not, and nothing else follows from the time."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fault_harness import Case, Commands, outcome
from icsearch.runs.journal import Journal

pytestmark = pytest.mark.alone

# Seconds by which the wall clock is wrong, one look after the other: by years, back and forth.
JUMPS = (0, -90_000_000, 40_000_000, -3600, 100_000_000)

SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
static long jump(void) {
    static const long jumps[] = {JUMPS};
    static unsigned long looks;
    return jumps[looks++ % (sizeof jumps / sizeof *jumps)];
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *)) dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += jump();
    return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    int failed = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return failed;
}
time_t time(time_t *into) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (into) *into = exact.tv_sec;
    return exact.tv_sec;
}
"""


def jumping_clock() -> None:
    """In this process, the wall clock of Python's time module jumps at every look."""
    now, jumps = time.time, itertools.cycle(JUMPS)
    time.time = lambda: now() + next(jumps)
    time.time_ns = lambda: int((now() + next(jumps)) * 1e9)


def check_seconds(run: Path, elapsed: float) -> None:
    """Every duration in the journal is one, and all of them together are no more than what went by."""
    seconds = [event["seconds"] for event in Journal(run / "journal.jsonl").events() if "seconds" in event]
    assert seconds
    assert min(seconds) >= 0
    assert sum(seconds) <= elapsed


@pytest.mark.parametrize("name", ["greedy", pytest.param("eval", marks=pytest.mark.slow)])
def test_python_clock_jumps(cases: dict[str, Case], commands: Commands, tmp_path: Path, name: str) -> None:
    out, started = tmp_path / "run", time.monotonic()
    ended = commands.run(cases[name].into(out), jumping_clock)
    assert ended.status == 0, ended.err
    check_seconds(out, time.monotonic() - started)
    assert outcome(out) == cases[name].outcome


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler for a library that stands before the C library")
def test_clock_jumps_for_the_whole_process(cases: dict[str, Case], tmp_path: Path) -> None:
    """Every look at the wall clock, of Python and of all compiled libraries, through LD_PRELOAD."""
    source, shim, out = tmp_path / "shim.c", tmp_path / "shim.so", tmp_path / "run"
    source.write_text(SHIM.replace("JUMPS", ", ".join(map(str, JUMPS))))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(shim)}
    look = [sys.executable, "-c", "import time; print(max(abs(time.time() - time.time()) for _ in range(5)))"]
    assert float(subprocess.run(look, env=environment, capture_output=True, text=True, check=True).stdout) > 10**7
    started = time.monotonic()
    command = [sys.executable, "-m", "icsearch", *map(str, cases["greedy"].into(out))]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    check_seconds(out, time.monotonic() - started)
    assert outcome(out) == cases["greedy"].outcome
