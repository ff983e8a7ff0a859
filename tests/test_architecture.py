"""The one-way imports of the design, read from the sources; and that light commands stay light."""

from __future__ import annotations

import ast
import contextlib
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
    "weights.holding": set(),
    "files": {"errors"},
    "jsonfile": {"errors", "files"},
    "resources": set(),
    "statistics": set(),
    "pattern": {"errors", "jsonfile"},
    "engines": set(),
    "engines.letters": {"errors", "pattern"},
    "engines.schedule": {"pattern"},
    "engines.stages": {"engines.letters", "pattern"},
    "engines.engine": {"engines.schedule", "engines.stages"},
    "engines.rendering": set(),
    "engines.keys": {"engines.engine", "engines.letters", "engines.schedule", "pattern"},
    "engines.table": {
        "engines.engine", "engines.keys", "engines.letters", "engines.rendering", "engines.schedule", "engines.stages",
        "errors",
    },
    "engines.backbone": {"errors", "jsonfile"},
    "engines.gguf_scan": set(),
    "engines.gguf_file": {"engines.backbone", "engines.gguf_scan", "engines.keys", "files", "jsonfile", "pattern"},
    "engines.flags": {"engines.backbone", "engines.keys", "errors", "jsonfile"},
    "engines.texts": {"engines.backbone", "engines.engine", "engines.flags", "engines.keys", "engines.table"},
    "engines.reading": {
        "engines.backbone", "engines.engine", "engines.keys", "engines.schedule", "engines.table", "jsonfile",
        "pattern",
    },
    "engines.importing": {
        "engines.backbone", "engines.engine", "engines.gguf_file", "engines.letters", "engines.reading",
        "engines.schedule", "engines.table", "engines.texts", "errors", "files", "pattern",
    },
    "cost": {"errors", "pattern"},
    "cosine_dp": {"errors", "pattern"},
    "journal": {"errors", "files", "jsonfile"},
    "runs": set(),
    "runs.refinement": {"journal", "jsonfile", "pattern"},
    "runs.journal_schema": {"journal", "jsonfile", "pattern", "runs.refinement"},
    "runs.loss_table": {"errors", "statistics"},
    "runs.commit": {"journal", "jsonfile", "pattern", "statistics"},
    "runs.similarity_sums": {"journal", "jsonfile"},
    "runs.record": {
        "errors", "journal", "jsonfile", "pattern", "runs.commit", "runs.journal_schema", "runs.loss_table",
        "runs.refinement", "runs.similarity_sums", "statistics",
    },
    "specs": {
        "engines.backbone", "engines.importing", "errors", "files", "jsonfile", "pattern", "resources", "runs.record",
    },
    "engines.losses": {"pattern", "runs.record"},
    "engines.repair": {"engines.losses", "pattern"},
    "engines.cautions": {"engines.engine", "engines.schedule", "engines.stages", "engines.table", "pattern"},
    "engines.serving": {
        "engines.cautions", "engines.engine", "engines.letters", "engines.losses", "engines.repair", "engines.stages",
        "pattern",
    },
    "engines.export": {
        "engines.cautions", "engines.engine", "engines.letters", "engines.serving", "engines.table", "jsonfile",
        "pattern",
    },
    "engines.fitting": {"engines.backbone", "engines.letters", "engines.reading", "engines.table", "pattern"},
    "runs.similarity_file": {"errors", "files", "journal", "jsonfile", "runs.record"},
    "runs.results": {"pattern", "runs.record", "runs.refinement"},
    "runs.guessing": set(),
    "runs.eval_schema": {"journal", "jsonfile", "pattern"},
    "runs.evaluation": {"errors", "journal", "jsonfile", "pattern", "runs.eval_schema", "statistics"},
    "texts": set(),
    "texts.corpus": set(),
    "texts.sources": {"errors", "files", "texts.corpus"},
    "calibration": {"", "errors", "files", "jsonfile", "texts.sources"},
    "weights.configfile": {"engines.backbone", "errors", "jsonfile"},
    "weights.sharing": {
        "engines.backbone", "engines.engine", "engines.keys", "engines.schedule", "errors", "jsonfile", "pattern",
        "weights.configfile",
    },
    "weights.header": {"errors", "jsonfile"},
    "weights.checkpoint": {
        "errors", "files", "jsonfile", "resources", "weights.configfile", "weights.header", "weights.sharing",
    },
    "memory": {"errors"},
    "slot": {"errors", "pattern"},
    "ops": {"block_sizes"},
    "families": set(),
    "families.selection": {"errors"},
    "families.classes": set(),
    "families.calls": {"errors"},
    "families.decoder": {"errors"},
    "families.handed": {"families.calls", "slot"},
    "families.indexer": set(),
    "families.ending": {"errors", "families.calls"},
    "families.attention": {"errors", "pattern", "slot"},
    "kernels": {"", "block_sizes", "errors", "families.attention", "families.indexer", "ops"},
    "weights.shards": {"errors", "weights.header"},
    "weights.fp8": {"errors", "weights.checkpoint", "weights.configfile", "weights.shards"},
    "experts": {"block_sizes", "families.calls"},
    "model": {
        "errors", "experts", "families.attention", "families.calls", "families.decoder", "families.ending",
        "families.handed", "families.indexer", "kernels", "pattern", "slot", "weights.holding",
    },
    "weights.layout": {
        "cost", "engines.backbone", "errors", "families.classes", "families.decoder", "families.ending",
        "families.handed", "families.selection", "kernels", "model", "pattern", "weights.checkpoint", "weights.fp8",
    },
    "weights.conversion": {
        "errors", "families.decoder", "model", "weights.checkpoint", "weights.configfile", "weights.shards",
    },
    "weights.reader": {
        "errors", "families.decoder", "weights.checkpoint", "weights.conversion", "weights.fp8", "weights.shards",
    },
    "weights.loading": {
        "errors", "families.classes", "memory", "model", "weights.checkpoint", "weights.holding", "weights.layout",
        "weights.reader",
    },
    "losses": {"block_sizes"},
    "states": {"pattern"},
    "resting": {"families.handed"},
    "block": {"families.calls", "families.handed", "model", "pattern", "resting", "slot", "states"},
    "sweep": {"block", "errors", "families.calls", "losses", "memory", "model", "pattern", "resting", "slot", "states"},
    "divergence": {"block", "losses", "model", "pattern", "resting", "states", "sweep"},
    "similarity": {
        "block", "errors", "families.attention", "families.calls", "journal", "losses", "model", "slot", "sweep",
    },
    "measure": {"errors", "memory", "model", "pattern"},
    "tasks": {"calibration", "errors", "statistics", "texts.corpus"},
    "lm_eval_bridge": {"errors", "model", "pattern"},
    "strategies": {"pattern", "statistics"},
    "processes": set(),
    "processes.launch": {"errors", "jsonfile", "strategies"},
    "processes.ledger": {"pattern", "states"},
    "endings": {"errors", "files"},
    "processes.watch": {"endings", "errors"},
    "processes.world": {"errors", "processes.launch", "processes.watch"},
    "processes.wire": {"block", "errors", "families.handed", "pattern", "processes.launch", "processes.world"},
    "processes.wave_jobs": {"block", "journal", "measures", "model", "pattern", "similarity"},
    "processes.member": {
        "block", "divergence", "errors", "journal", "model", "pattern", "processes.launch", "processes.wave_jobs",
        "processes.wire", "processes.world", "states", "sweep",
    },
    "processes.crew": {
        "errors", "journal", "pattern", "processes.launch", "processes.ledger", "processes.member", "processes.world",
        "search",
    },
    "processes.muster": {
        "block", "calibration", "errors", "model", "processes.launch", "processes.member", "processes.world",
        "setup.bring_up", "setup.start_event", "weights.checkpoint",
    },
    "processes.worker": {"processes.member", "processes.muster", "processes.world"},
    "processes.together": {
        "endings", "processes.launch", "processes.watch", "processes.worker", "processes.world", "weights.loading",
    },
    "requests": {
        "engines.backbone", "errors", "jsonfile", "pattern", "processes.launch", "specs", "strategies",
        "weights.holding",
    },
    "planning": set(),
    "planning.footprint": {"block_sizes", "cost"},
    "planning.plan": {"errors", "jsonfile", "planning.footprint", "states", "strategies"},
    "planning.stage_starts": {"engines.stages", "pattern"},
    "planning.offload": {"errors", "planning.plan", "weights.holding"},
    "planning.devices": {"errors", "jsonfile"},
    "planning.layer_time": {"block_sizes", "cost", "planning.devices", "planning.footprint"},
    "planning.modelfile": {
        "cost", "errors", "files", "jsonfile", "pattern", "resources", "weights.configfile", "weights.sharing",
    },
    "measures": {
        "block", "errors", "journal", "losses", "model", "pattern", "planning.plan", "runs.evaluation", "sweep",
    },
    "planning.rehearsal": {"pattern", "states", "strategies"},
    "planning.workload": {"pattern", "planning.rehearsal", "specs", "states", "strategies"},
    "planning.placement": {
        "block_sizes", "errors", "planning.devices", "planning.footprint", "planning.modelfile", "planning.offload",
        "planning.plan", "planning.workload", "processes.launch", "weights.holding",
    },
    "planning.forecast": {
        "block_sizes", "errors", "planning.devices", "planning.layer_time", "planning.modelfile", "planning.offload",
        "planning.placement", "planning.rehearsal", "planning.workload", "requests", "strategies", "weights.holding",
    },
    "planning.report": {
        "", "planning.forecast", "planning.offload", "planning.placement", "planning.plan", "planning.stage_starts",
        "strategies", "weights.holding",
    },
    "runs.rundir": {"errors", "files", "journal", "jsonfile", "runs.journal_schema", "runs.record"},
    "search": {
        "errors", "journal", "pattern", "planning.plan", "runs.commit", "runs.record", "runs.refinement", "strategies",
    },
    "refine": {"errors", "journal", "pattern", "runs.record", "runs.refinement", "search", "strategies"},
    "setup": set(),
    "setup.inputs": {
        "calibration", "requests", "texts.sources", "weights.checkpoint", "weights.layout", "weights.loading",
    },
    "setup.run_options": {
        "block_sizes", "errors", "journal", "pattern", "requests", "runs.rundir", "setup.inputs", "strategies",
        "weights.layout", "weights.loading",
    },
    "setup.start_event": {
        "", "calibration", "journal", "pattern", "requests", "runs.rundir", "setup.inputs", "setup.run_options",
        "specs", "strategies", "weights.checkpoint",
    },
    "setup.memory_plan": {
        "errors", "memory", "planning.footprint", "planning.offload", "planning.plan", "processes.launch", "requests",
        "setup.inputs", "weights.holding", "weights.layout",
    },
    "setup.bring_up": {"block", "calibration", "model", "weights.checkpoint", "weights.holding", "weights.loading"},
    "setup.prepare": {
        "block", "journal", "model", "processes.crew", "processes.launch", "processes.ledger", "processes.muster",
        "processes.world", "requests", "runs.record", "runs.rundir", "search", "setup.bring_up", "setup.inputs",
        "setup.memory_plan", "weights.holding", "weights.loading", "weights.shards",
    },
    "setup.sweep_scorer": {
        "block", "divergence", "pattern", "planning.offload", "planning.plan", "planning.stage_starts",
        "processes.ledger", "processes.member", "requests", "runs.guessing", "runs.record", "search",
        "setup.prepare", "setup.start_event", "states", "sweep", "weights.layout",
    },
    "greedy": {
        "journal", "pattern", "planning.plan", "planning.rehearsal", "planning.stage_starts", "processes.launch",
        "processes.world", "refine",
        "requests", "runs.record", "runs.rundir", "search", "setup.inputs", "setup.memory_plan", "setup.prepare",
        "setup.start_event", "setup.sweep_scorer", "states", "strategies", "weights.layout",
    },
    "baseline": {
        "block", "cosine_dp", "journal", "pattern", "planning.plan", "planning.stage_starts", "processes.launch",
        "processes.wave_jobs",
        "processes.world", "requests", "runs.record", "runs.similarity_file", "search", "setup.inputs",
        "setup.prepare", "setup.start_event", "setup.sweep_scorer", "similarity", "weights.layout",
    },
    "evaluate": {
        "block", "cost", "errors", "journal", "lm_eval_bridge", "measure", "measures", "model", "pattern",
        "planning.plan", "processes.launch", "processes.wave_jobs", "processes.world", "requests", "runs.evaluation",
        "runs.guessing", "search", "setup.inputs", "setup.prepare", "setup.run_options", "setup.start_event",
        "setup.sweep_scorer", "specs", "tasks", "weights.layout", "weights.loading",
    },
    "report": {
        "engines.export", "engines.letters", "engines.table", "errors", "files", "pattern", "planning.plan",
        "runs.commit", "runs.evaluation", "runs.guessing", "runs.record", "runs.refinement", "runs.results",
        "statistics", "texts.sources",
    },
    "engines.indexer_weights": {"engines.letters", "jsonfile", "weights.checkpoint", "weights.header"},
    "engines.readers": {"engines.cautions", "engines.letters", "engines.stages", "engines.table", "pattern"},
    "engines.native_config": {
        "engines.engine", "engines.keys", "engines.reading", "engines.table", "errors", "jsonfile", "pattern",
        "weights.configfile",
    },
    "engines.writing": {
        "engines.backbone", "engines.export", "engines.gguf_file", "engines.letters", "engines.native_config",
        "engines.table", "files", "jsonfile",
    },
    "engines.shard_rewrite": {"errors", "files", "weights.header"},
    "engines.checkpoint_copy": {
        "engines.shard_rewrite", "errors", "files", "planning.plan", "weights.checkpoint", "weights.header",
    },
    "engines.native": {
        "engines.checkpoint_copy", "engines.indexer_weights", "engines.letters", "engines.native_config",
        "engines.readers", "jsonfile", "pattern", "weights.checkpoint", "weights.header",
    },
    "progress": {"report", "runs.record", "runs.refinement", "statistics"},
    "cli.config": {"errors", "files", "jsonfile"},
    "cli.environment": {"errors"},
    "cli.options": {"cli.config", "engines.table", "requests"},
    "cli.plan": {
        "cli.options", "planning.devices", "planning.forecast", "planning.plan", "planning.report", "requests",
    },
    "listening": {"runs.record", "search"},
    "tracking": set(),
    "tracking.rows": {"pattern", "runs.commit", "runs.record", "runs.refinement", "statistics"},
    "tracking.trackers": {"errors", "files", "jsonfile", "tracking.rows"},
    "tracking.listener": {"errors", "listening", "runs.record", "search", "tracking.rows", "tracking.trackers"},
    "cli.running": {"endings", "errors", "processes.world", "progress", "requests", "search", "weights.loading"},
    "cli.calibrate": {"cli.options", "requests", "setup.inputs"},
    "cli.greedy": {"cli.options", "cli.running", "greedy", "planning.plan", "report", "requests", "tracking.listener"},
    "cli.baseline": {"baseline", "cli.options", "cli.running", "planning.plan", "report", "requests"},
    "cli.evaluate": {
        "cli.options", "cli.running", "evaluate", "pattern", "planning.plan", "report", "requests", "tracking.listener",
    },
    "cli.native": {"engines.native", "planning.plan"},
    "exporting": {
        "engines.backbone", "engines.export", "engines.fitting", "engines.indexer_weights", "engines.losses",
        "engines.native", "engines.repair", "engines.serving", "engines.texts", "errors", "files", "pattern",
        "runs.record", "specs",
    },
    "cli.export": {"cli.native", "cli.options", "engines.export", "engines.writing", "exporting", "requests"},
    "cli.importing": {"cli.options", "engines.backbone", "engines.flags", "engines.importing", "files"},
    "cli.report": {"cli.options", "report"},
    "cli": {
        "", "cli.baseline", "cli.calibrate", "cli.config", "cli.environment", "cli.evaluate", "cli.export",
        "cli.greedy", "cli.importing", "cli.plan", "cli.report", "endings",
        "processes.launch", "processes.together", "processes.world",
    },
    "api": set(),
    "api.models": {
        "engines.backbone", "errors", "families.decoder", "model", "pattern", "slot", "specs", "weights.checkpoint",
        "weights.layout", "weights.loading",
    },
    "api.options": {"pattern", "planning.plan", "requests"},
    "api.runs": {
        "api.options", "calibration", "evaluate", "greedy", "listening", "pattern", "progress", "report", "requests",
        "runs.record", "runs.results", "search", "setup.inputs", "tracking.listener",
    },
    "api.engines": {"api.options", "engines.export", "engines.native", "exporting", "pattern"},
    "__init__": {"api.engines", "api.models", "api.runs", "errors", "pattern"},
    "__main__": {"cli"},
}  # fmt: skip

NO_TORCH = [
    "errors",
    "processes.launch",
    "processes.ledger",
    "block_sizes",
    "endings",
    "resources",
    "families",
    "families.selection",
    "files",
    "jsonfile",
    "pattern",
    "cost",
    "journal",
    "runs.journal_schema",
    "runs.loss_table",
    "runs.commit",
    "runs.similarity_sums",
    "runs.record",
    "runs.results",
    "runs.similarity_file",
    "runs.refinement",
    "statistics",
    "texts.corpus",
    "texts.sources",
    "calibration",
    "weights.configfile",
    "weights.sharing",
    "weights.checkpoint",
    "weights.holding",
    "states",
    "strategies",
    "cosine_dp",
    "specs",
    "planning.footprint",
    "planning.plan",
    "planning.stage_starts",
    "planning.offload",
    "planning.rehearsal",
    "planning.devices",
    "planning.layer_time",
    "planning.modelfile",
    "planning.workload",
    "planning.placement",
    "planning.forecast",
    "planning.report",
    "requests",
    "runs.rundir",
    "search",
    "refine",
    "runs.eval_schema",
    "runs.evaluation",
    "runs.guessing",
    "progress",
    "api.options",
    "api.runs",
    "api.engines",
    "listening",
    "tracking.rows",
    "tracking.trackers",
    "tracking.listener",
    "report",
    "engines.export",
    "weights.header",
    "engines.native",
    "engines.importing",
    "engines.writing",
    "exporting",
]


# Packages that are one row: their modules belong together and import each other.
WHOLE = {"calibration", "cost", "report", "strategies"}


def row_of(dotted: str) -> str:
    """The row of a module: its name below `icsearch`; of a package that is one row, that package's."""
    parts = dotted.removeprefix("icsearch").lstrip(".").split(".")
    return parts[0] if parts[0] in WHOLE else ".".join(parts)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return row_of(".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts))


def is_module(dotted: str) -> bool:
    place = PACKAGE.joinpath(*dotted.split(".")[1:])
    return place.is_dir() or place.with_suffix(".py").exists()


def imports_of(path: Path) -> set[str]:
    """Rows of the table that a file imports, at its top or inside functions; "" is what `icsearch` itself defines."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {row_of(alias.name) for alias in node.names if alias.name.startswith("icsearch.")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "icsearch":
            inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {row_of(dotted if is_module(dotted) else node.module) for dotted in inner.values()}
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
