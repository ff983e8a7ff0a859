"""What all benchmarks share: the machine, memory peaks, children with memory of their own, restartable results."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
RESULTS = BENCHMARKS / "results"
WORK = ROOT / "runs" / "benchmarks"  # checkpoints, tokens and journals that the benchmarks make; git ignores it

Json = dict[str, Any]


def machine(threads: int) -> Json:
    """What a number was measured on. Imports torch."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def stamp() -> Json:
    """When, and of which commit; `dirty` where the tree had changes."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


@dataclass
class Peak:
    """The highest resident memory of this process from `start` on, in bytes, and what was resident then.

    On Linux the kernel's high-water mark (VmHWM) is set back at the start; elsewhere, and where that is refused,
    the peak is that of the whole life of the process, loading included. `method` says which.
    """

    baseline: int = 0
    method: str = ""

    def start(self) -> Peak:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.method = "VmHWM since loading"
        except OSError:
            self.method = "peak of the process"
        self.baseline = high_water()
        return self

    def numbers(self) -> Json:
        high = high_water()
        return {
            "peak_bytes": high,
            "loaded_bytes": self.baseline,
            "peak_above_loaded_bytes": high - self.baseline,
            "memory_method": self.method,
        }


def high_water() -> int:
    """The highest resident memory of this program since it began, in bytes.

    Where Linux tells it (VmHWM): ru_maxrss is also that of the program which this process was before it began, of
    a parent that has loaded a large model.
    """
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run_child(script: str, spec: Json, threads: int) -> Json:
    """Run `benchmarks/SCRIPT --child SPEC` as a process of its own; its last line of output is its result."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }
    command = [sys.executable, str(BENCHMARKS / script), "--child", json.dumps({**spec, "threads": threads})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script} failed on {json.dumps(spec)}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@dataclass
class Results:
    """JSON lines, one per measurement, written as they come: a run that was stopped goes on where it was.

    Each line has a `key`, by which it is found again: whatever the measurement hangs on, beside the machine. Lines of
    another machine or other versions are refused; those of another commit are used, and every summary names it.
    """

    path: Path
    machine: Json
    lines: list[Json] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, machine: Json, fresh: bool = False) -> Results:
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        results = cls(path, machine, read_lines(path))
        others = [line["machine"] for line in results.lines if line["machine"] != machine]
        if others:
            raise SystemExit(f"{path} was begun on {others[0]}, and this is {machine}: give --fresh, or another --out")
        return results

    def origin(self) -> Json:
        """The head of a summary: machine, date of the last line, and every commit that lines are of."""
        last = self.lines[-1]
        return {"machine": self.machine, "date": last["date"], "commit": last["commit"], "commits": self.commits()}

    def commits(self) -> list[str]:
        """The commits that lines were measured at, in order; says so on stdout where there are several."""
        found = list(dict.fromkeys(_commit_of(line) for line in self.lines))
        if len(found) > 1:
            print(f"{self.path}: lines are of different commits: {', '.join(found)}", flush=True)
        return found

    def find(self, key: Sequence[Any]) -> Json | None:
        return next((line for line in self.lines if line["key"] == list(key)), None)

    def add(self, key: Sequence[Any], values: Json) -> Json:
        line = {"key": list(key), **values, "machine": self.machine, **stamp()}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
        return line


def _commit_of(line: Json) -> str:
    return line["commit"] + (" with changes" if line["dirty"] else "")


def read_lines(path: Path) -> list[Json]:
    """The whole lines of a results file; one that was cut off while being written is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def spread(values: Sequence[float]) -> Json:
    """Min, median and max."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "repeats": len(values)}


def ratios(slow: Sequence[float], fast: Sequence[float]) -> Json:
    """Paired ratios: measurement i over measurement i of the same repeat, then min, median and max."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


class Clock:
    """Prints what is being measured and about how long all of it still takes."""

    def __init__(self, expected: float) -> None:
        self._left = expected
        print(f"expected duration: about {minutes(expected)} on an idle machine", flush=True)

    def run(self, label: str, expected: float, work: Any) -> Any:
        """Do the work, which was expected to take so many seconds."""
        started = time.monotonic()
        print(f"{label} (about {minutes(expected)}, {minutes(self._left)} left) ...", end=" ", flush=True)
        value = work()
        self._left = max(0.0, self._left - expected)
        print(minutes(time.monotonic() - started), flush=True)
        return value

    def skip(self, expected: float) -> None:
        self._left = max(0.0, self._left - expected)


def run_cases(
    about: str | None,
    case: str,
    cases: Sequence[str],
    out: str,
    child: Callable[[Json], Json],
    measure: Callable[[Results, str, int | None, int, Clock], object],
    seconds: float,
) -> tuple[Path, Results] | None:
    """The command line of a script that measures memory, case by case, each in a child with memory of its own.

    Where the results are, and they; None in such a child, which prints what it has measured. `case` is the form of one,
    `out` the name of the results by default, and `seconds` what a case takes.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--case", nargs="*", default=list(cases), metavar=case)
    parser.add_argument("--memory", type=int, help="bytes of budget, instead of most of what is free")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / out)
    parser.add_argument("--fresh", action="store_true", help="discard what --out holds")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return None
    results = Results.open(arguments.out, machine(arguments.threads), arguments.fresh)
    clock = Clock(seconds * len(arguments.case))
    for each in arguments.case:
        measure(results, each, arguments.memory, arguments.threads, clock)
    return arguments.out, results


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def write_json(path: Path, document: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
