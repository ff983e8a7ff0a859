"""How much of the house one has to walk through: counted from the sources, and from one small search that is traced.

    python benchmarks/structure.py                  # this checkout
    python benchmarks/structure.py --package DIR    # another one, such as an earlier commit's

Static: files, lines, functions, private functions with one caller, raises with a text; what lies at the top of the
package, and the floors of it (the longest chain of imports among these). Traced: in which files code runs, during
`greedy demo` with one flip on two sequences, once a module is imported: in all; before the first loss is there; from a
batch that enters the sweep to its losses; and from losses to the report, outside of sweeps.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
WORDING = "in-sample"  # a wording that a report, a table and a page share
SWEEP = ("sweep.py", "sweep")  # file and function where a batch enters the sweep

TRACER = """
import json, os, sys, threading
package, out, sweep_file, sweep_name = sys.argv[1:5]
sys.path.insert(0, package)
inside = os.path.join(package, "icsearch") + os.sep
walked, depth, state = {"all": set(), "before": set(), "sweep": set(), "after": set()}, [0], {"swept": False}

def hear(frame, event, arg):
    code = frame.f_code
    is_function = code.co_flags & 1  # and not the body of a module or a class
    if not (is_function and code.co_filename.startswith(inside) and code.co_filename.endswith(".py")):
        return
    name = code.co_filename[len(inside):]
    entrance = os.path.basename(name) == sweep_file and code.co_name == sweep_name
    if event == "call":
        depth[0] += entrance
        walked["all"].add(name)
        if not state["swept"]:
            walked["before"].add(name)
        if depth[0]:
            walked["sweep"].add(name)
        elif state["swept"]:
            walked["after"].add(name)
    elif event == "return" and entrance:
        depth[0] -= 1
        state["swept"] = True

try:
    from icsearch.cli.app import _run
except ImportError:  # before the rooms
    from icsearch.cli import _run
threading.setprofile(hear)
sys.setprofile(hear)
status = _run(sys.argv[5:], False)
sys.setprofile(None)
json.dump({"status": status, **{name: sorted(files) for name, files in walked.items()}}, open(out, "w"))
"""


def sources(package: Path) -> dict[str, ast.Module]:
    root = package / "icsearch"
    return {str(path.relative_to(root)): ast.parse(path.read_text("utf-8")) for path in sorted(root.rglob("*.py"))}


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def one_caller(trees: dict[str, ast.Module]) -> float:
    """The share of functions and methods that are private and named exactly once in their file."""
    every, once = 0, 0
    for tree in trees.values():
        used = Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
        used += Counter(node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        for function in functions(tree):
            private = function.name.startswith("_") and not function.name.startswith("__")
            every += 1
            once += private and used[function.name] == 1
    return once / every


def room_of(name: str) -> str:
    return Path(name).parts[0].removesuffix(".py")


def arrows(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """What lies at the top of the package, each with what it imports of the others."""
    rooms = {room_of(name) for name in trees}
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "icsearch":
                inner = str(node.module).split(".")[1:]
                found[room_of(name)] |= ({inner[0]} if inner else {alias.name for alias in node.names}) & rooms
    return {room: others - {room} for room, others in found.items()}


def floors(graph: dict[str, set[str]]) -> tuple[int, int]:
    """The longest chain of imports, arrows in circles left out; and how many arrows lie in circles."""
    reach: dict[str, set[str]] = {}
    for room in graph:
        reach[room], todo = set(), [room]
        while todo:
            for other in graph[todo.pop()] - reach[room]:
                reach[room].add(other)
                todo.append(other)
    back = {(room, other) for room in graph for other in graph[room] if room in reach[other]}

    def height(room: str) -> int:
        return 1 + max((height(other) for other in graph[room] if (room, other) not in back), default=0)

    return max(height(room) for room in graph), len(back)


def traced(package: Path) -> dict[str, Any]:
    """The files in which code ran during one small search."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "walked.json"
        command = [
            "greedy", "demo", "--calibration", "demo", "--num-sequences", "2", "--num-shared", "1", "--quiet",
            "--device", "cpu", "--threads", "1", "--out", str(Path(folder) / "run"),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        script = [sys.executable, "-c", TRACER, str(package), str(out), *SWEEP, *command]
        subprocess.run(script, cwd=folder, env=environment, check=True, capture_output=True)
        walked: dict[str, Any] = json.loads(out.read_text())
    return walked


def measure(package: Path) -> dict[str, Any]:
    trees = sources(package)
    lines = sum(len((package / "icsearch" / name).read_text("utf-8").splitlines()) for name in trees)
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    raises = [node.exc for node in nodes if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    graph = arrows({name: tree for name, tree in trees.items() if not name.startswith("__")})
    height, back = floors(graph)
    count = sum(len(functions(tree)) for tree in trees.values())
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    walked = traced(package)
    return {
        "files with code": sum(len(tree.body) > 1 for tree in trees.values()),
        "lines": lines,
        "functions per 1,000 lines": round(1000 * count / lines),
        "private functions with one caller": f"{one_caller(trees):.0%}",
        "raises with a text per 1,000 lines": round(1000 * sum(bool(call.args) for call in raises) / lines, 1),
        "folders at the top": sum(not (package / "icsearch" / f"{room}.py").exists() for room in graph),
        "modules at the top": sum((package / "icsearch" / f"{room}.py").exists() for room in graph),
        "floors": height,
        "arrows in circles": back,
        "files that one small search runs code in": len(walked["all"]),
        "… before the first loss": len(walked["before"]),
        "… from a batch to its losses": len(walked["sweep"]),
        "… from losses to the report, outside sweeps": len(walked["after"]),
        f"places that say “{WORDING}”": sum(WORDING in text for text in texts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=HERE, help="the checkout to measure")
    parser.add_argument("--files", action="store_true", help="also name the files of each walk")
    given = parser.parse_args()
    package = given.package.resolve()
    for name, value in measure(package).items():
        print(f"{name:45} {value}")
    if given.files:
        for walk, files in traced(package).items():
            print(f"\n{walk}: {files if isinstance(files, int) else ' '.join(files)}")


if __name__ == "__main__":
    main()
