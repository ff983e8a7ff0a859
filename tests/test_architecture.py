"""The one-way imports of the design, read from the sources; and that light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "icsearch"

# What each module may import of the package. Rows are in the order in which data flows.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "block_sizes": set(),
    "weights": set(),
    "files": {"errors"},
    "jsonfile": {"errors", "files"},
    "resources": set(),
    "statistics": set(),
    "pattern": {"errors", "jsonfile"},
    "specs": {"errors", "pattern", "resources"},
    "cost": {"errors", "pattern"},
    "cosine_dp": {"errors", "pattern"},
    "journal": {"errors", "files"},
    "refinement": {"journal", "jsonfile", "pattern"},
    "journal_schema": {"journal", "jsonfile", "pattern", "refinement"},
    "loss_table": {"errors", "statistics"},
    "commit": {"journal", "jsonfile", "pattern", "statistics"},
    "similarity_sums": {"journal", "jsonfile"},
    "record": {
        "commit", "errors", "journal", "journal_schema", "jsonfile", "loss_table", "pattern", "refinement",
        "similarity_sums", "statistics",
    },
    "results": {"pattern", "record", "refinement"},
    "evaluation": {"errors", "journal", "jsonfile", "pattern", "statistics"},
    "corpus": set(),
    "sources": {"corpus", "errors", "files"},
    "calibration": {"", "errors", "files", "jsonfile", "sources"},
    "checkpoint": {"errors", "files", "jsonfile", "resources"},
    "memory": {"errors"},
    "slot": {"errors", "pattern"},
    "ops": {"block_sizes"},
    "kernels": {"", "block_sizes", "errors", "ops"},
    "shards": {"errors"},
    "fp8": {"checkpoint", "errors", "jsonfile", "shards"},
    "model": {"errors", "kernels", "pattern", "slot", "weights"},
    "layout": {"checkpoint", "cost", "errors", "fp8", "model", "pattern"},
    "conversion": {"checkpoint", "errors", "model", "shards"},
    "reader": {"checkpoint", "conversion", "fp8", "shards"},
    "loading": {"checkpoint", "errors", "kernels", "layout", "memory", "model", "reader", "weights"},
    "losses": {"block_sizes"},
    "states": {"pattern"},
    "resting": set(),
    "block": {"model", "pattern", "resting", "slot", "states"},
    "sweep": {"block", "errors", "losses", "memory", "model", "pattern", "resting", "slot", "states"},
    "divergence": {"block", "losses", "model", "pattern", "resting", "states", "sweep"},
    "similarity": {"block", "errors", "journal", "kernels", "losses", "model", "slot", "sweep"},
    "measure": {"errors", "memory", "model", "pattern"},
    "tasks": {"calibration", "corpus", "errors", "statistics"},
    "lm_eval_bridge": {"errors", "model", "pattern"},
    "strategies": {"pattern", "statistics"},
    "launch": {"errors", "strategies"},
    "ledger": {"pattern", "states"},
    "endings": {"errors", "files"},
    "watch": {"endings", "errors"},
    "world": {"errors", "launch", "watch"},
    "wire": {"block", "errors", "launch", "pattern", "world"},
    "wave_jobs": {"block", "journal", "measures", "model", "pattern", "similarity"},
    "member": {
        "block", "divergence", "journal", "launch", "model", "pattern", "states", "sweep", "wave_jobs", "wire", "world",
    },
    "crew": {"journal", "launch", "ledger", "member", "pattern", "search", "world"},
    "muster": {
        "block", "bring_up", "calibration", "checkpoint", "errors", "launch", "member", "model", "start_event", "world",
    },
    "worker": {"member", "muster", "world"},
    "processes": {"endings", "launch", "loading", "watch", "worker", "world"},
    "requests": {"errors", "jsonfile", "launch", "pattern", "specs", "strategies", "weights"},
    "footprint": {"block_sizes", "cost"},
    "plan": {"errors", "footprint", "states", "strategies"},
    "offload": {"errors", "plan", "weights"},
    "devices": {"errors"},
    "layer_time": {"block_sizes", "cost", "devices", "footprint"},
    "modelfile": {"cost", "errors", "files", "jsonfile", "pattern", "resources"},
    "measures": {"block", "errors", "evaluation", "journal", "losses", "model", "pattern", "plan", "sweep"},
    "rehearsal": {"pattern", "states", "strategies"},
    "workload": {"pattern", "rehearsal", "specs", "states", "strategies"},
    "placement": {
        "block_sizes", "devices", "errors", "footprint", "launch", "modelfile", "offload", "plan", "strategies",
        "weights", "workload",
    },
    "forecast": {
        "block_sizes", "devices", "errors", "layer_time", "modelfile", "offload", "placement", "rehearsal", "requests",
        "strategies", "weights", "workload",
    },
    "plan_report": {"", "forecast", "placement", "plan", "strategies", "weights"},
    "rundir": {"errors", "files", "journal", "journal_schema", "jsonfile", "record"},
    "search": {"commit", "errors", "journal", "pattern", "plan", "record", "refinement", "strategies"},
    "refine": {"errors", "journal", "pattern", "record", "refinement", "search", "strategies"},
    "inputs": {"calibration", "checkpoint", "layout", "loading", "requests"},
    "run_options": {
        "block_sizes", "errors", "inputs", "journal", "kernels", "layout", "loading", "pattern", "requests", "rundir",
        "strategies",
    },
    "start_event": {
        "", "calibration", "checkpoint", "inputs", "journal", "pattern", "requests", "run_options", "rundir",
        "specs", "strategies",
    },
    "memory_plan": {
        "errors", "footprint", "inputs", "launch", "layout", "memory", "offload", "plan", "requests",
        "weights",
    },
    "bring_up": {"block", "calibration", "checkpoint", "loading", "model", "weights"},
    "prepare": {
        "block", "bring_up", "crew", "inputs", "journal", "launch", "ledger", "memory_plan", "model", "muster",
        "record", "requests", "rundir", "search", "shards", "weights", "world",
    },
    "sweep_scorer": {
        "block", "divergence", "layout", "ledger", "member", "offload", "pattern", "plan", "prepare", "record",
        "requests", "resting", "search", "start_event", "states", "sweep",
    },
    "greedy": {
        "inputs", "journal", "launch", "layout", "memory_plan", "pattern", "plan", "prepare", "record", "refine",
        "rehearsal", "requests", "rundir", "search", "start_event", "states", "strategies", "sweep_scorer", "world",
    },
    "baseline": {
        "block", "cosine_dp", "errors", "files", "inputs", "journal", "jsonfile", "launch", "layout", "pattern",
        "plan", "prepare", "record", "requests", "search", "similarity", "start_event", "sweep_scorer", "wave_jobs",
        "world",
    },
    "evaluate": {
        "block", "cost", "errors", "evaluation", "inputs", "journal", "launch", "lm_eval_bridge", "loading",
        "measure", "measures", "model", "pattern", "plan", "prepare", "requests", "run_options", "search", "specs",
        "start_event", "sweep_scorer", "tasks", "wave_jobs", "world",
    },
    "report": {
        "commit", "errors", "evaluation", "export", "files", "pattern", "plan", "record", "refinement", "results",
        "statistics",
    },
    "export": {"errors", "jsonfile", "pattern"},
    "progress": {"record", "refinement", "report", "statistics"},
    "cli_options": set(),
    "cli_plan": {"cli_options", "devices", "forecast", "plan", "plan_report", "requests"},
    "cli": {
        "", "baseline", "cli_options", "cli_plan", "endings", "errors", "evaluate", "export", "greedy", "inputs",
        "launch", "loading", "pattern", "plan", "processes", "progress", "report", "requests", "search", "world",
    },
    "api": {"checkpoint", "errors", "layout", "loading", "model", "pattern", "slot", "specs"},
    "__init__": {"api"},
    "__main__": {"cli"},
}  # fmt: skip

NO_TORCH = [
    "errors",
    "launch",
    "ledger",
    "block_sizes",
    "endings",
    "resources",
    "files",
    "jsonfile",
    "pattern",
    "cost",
    "journal",
    "journal_schema",
    "loss_table",
    "commit",
    "similarity_sums",
    "record",
    "results",
    "refinement",
    "statistics",
    "corpus",
    "sources",
    "calibration",
    "checkpoint",
    "weights",
    "states",
    "strategies",
    "cosine_dp",
    "specs",
    "footprint",
    "plan",
    "offload",
    "rehearsal",
    "devices",
    "layer_time",
    "modelfile",
    "workload",
    "placement",
    "forecast",
    "plan_report",
    "requests",
    "rundir",
    "search",
    "refine",
    "evaluation",
    "progress",
    "report",
    "export",
]


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports_of(path: Path) -> set[str]:
    """First-level modules of the package that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("icsearch.")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "icsearch":
            inner = node.module.split(".")[1:]
            names = {alias.name for alias in node.names}
            modules = {name for name in names if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()}
            found |= {inner[0]} if inner else modules | ({""} if names - modules else set())
    return found


def test_imports_go_one_way() -> None:
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = module_of(path)
        found.setdefault(module, set()).update(imports_of(path) - {module})
    assert found.keys() == ALLOWED.keys()
    wrong = {module: imported - ALLOWED[module] for module, imported in found.items() if imported - ALLOWED[module]}
    assert wrong == {}


def test_the_table_has_no_circle() -> None:
    known: set[str] = {""}
    left = dict(ALLOWED)
    while left:
        ready = [module for module, imported in left.items() if imported <= known]
        assert ready, f"circle among {sorted(left)}"
        for module in ready:
            known.add(module)
            del left[module]


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(' '.join(name for name in sys.modules if '.' not in name))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return set(output.splitlines()[-1].split())


@pytest.mark.parametrize("heavy", [{"torch", "transformers", "datasets", "matplotlib"}])
def test_light_modules_load_nothing_heavy(heavy: set[str]) -> None:
    light = "\n".join(f"import icsearch.{module}" for module in NO_TORCH)
    assert loaded_by(light) & heavy == set()


def test_help_loads_nothing_heavy() -> None:
    code = "import sys\nfrom icsearch import cli\nfor a in (['--help'], ['greedy', '--help']): cli._run(a, False)"
    assert loaded_by(code) & {"torch", "transformers", "datasets", "matplotlib", "numpy", "jinja2"} == set()
