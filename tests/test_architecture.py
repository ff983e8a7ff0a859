"""The house: eleven rooms on seven floors, read from the sources; and that light rooms stay light."""

from __future__ import annotations

import ast
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "icsearch"

# A room imports rooms on lower floors only. What lies at the top of the package (the public names) is on the highest.
FLOORS = {
    "core": 1,
    "calibration": 2,
    "runs": 2,
    "search": 3,
    "model": 3,
    "sweep": 4,
    "engines": 4,
    "planning": 5,
    "report": 5,
    "commands": 6,
    "cli": 7,
}
TOP = 8
NO_TORCH = ("core", "calibration", "runs", "search", "engines", "planning", "report")
# Of rooms with torch, what those without it stand on; and what the command line reads before it runs anything.
LIGHT_MODULES = ("model.config", "model.checkpoint", "model.shape", "commands.requests", "commands.export", "api")


def module_of(path: Path) -> str:
    """The dotted name below `icsearch`; "" is the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    first = module.split(".")[0]
    return first if first in FLOORS else ""


def is_module(dotted: str) -> bool:
    return dotted.removeprefix("icsearch").lstrip(".") in MODULES


def imports_of(module: str) -> Iterator[str]:
    """Modules that one imports, at its top or inside functions; "" where it is what `icsearch` itself defines."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name[9:] for alias in node.names if alias.name.startswith("icsearch."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "icsearch":
            inner = node.module.removeprefix("icsearch").lstrip(".")
            for alias in node.names:
                dotted = f"{inner}.{alias.name}".lstrip(".")
                yield dotted if dotted in MODULES else inner


def test_eleven_rooms() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert rooms == FLOORS.keys()


def test_imports_go_down() -> None:
    up = [
        (module, imported)
        for module in MODULES
        for imported in imports_of(module)
        if room_of(imported) != room_of(module)
        and FLOORS.get(room_of(imported), TOP) >= FLOORS.get(room_of(module), TOP)
    ]
    assert up == []


def test_no_circle_within_a_room() -> None:
    """Imports inside functions count: a circle that only runs late is one all the same."""
    graph = {
        module: {other for other in imports_of(module) if room_of(other) == room_of(module)} - {module, ""}
        for module in MODULES
        if module
    }
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(' '.join(name for name in sys.modules if '.' not in name))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return set(output.splitlines()[-1].split())


def test_light_rooms_load_nothing_heavy() -> None:
    light = [module for module in MODULES if room_of(module) in NO_TORCH or module in LIGHT_MODULES]
    code = "\n".join(f"import icsearch.{module}" for module in light)
    assert loaded_by(code) & {"torch", "transformers", "datasets", "matplotlib"} == set()


def test_help_loads_nothing_heavy() -> None:
    code = "import sys\nfrom icsearch.cli import app\nfor a in (['--help'], ['greedy', '--help']): app._run(a, False)"
    assert loaded_by(code) & {"torch", "transformers", "datasets", "matplotlib", "numpy", "jinja2"} == set()


def scripts_in(path: Path) -> list[ast.Module]:
    """The strings of a test that are Python themselves and import something: other processes run them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import" in node.value:
            with contextlib.suppress(SyntaxError):
                found.append(ast.parse(node.value))
    return found


def test_scripts_of_slow_tests_import_what_there_is() -> None:
    """A module that has moved is found by every other test at once; by these only where the slow ones are run."""
    named = set()
    for path in Path(__file__).parent.rglob("*.py"):
        for script in scripts_in(path):
            for node in ast.walk(script):
                if isinstance(node, ast.Import):
                    named |= {alias.name for alias in node.names if alias.name.startswith("icsearch.")}
                elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("icsearch."):
                    named.add(str(node.module))
    assert named
    assert {dotted for dotted in named if not is_module(dotted)} == set()
