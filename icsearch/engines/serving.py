"""A pattern in the layout that it will be served in: which stages would start on S, and the repair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from icsearch.engines.cautions import partition_setting
from icsearch.engines.engine import Engine
from icsearch.engines.letters import ExportError
from icsearch.engines.losses import Losses
from icsearch.engines.repair import ADD, NONE, REPAIRS, SAME, Repair, add_full, move_full
from icsearch.engines.stages import describe, serving_sizes, stage_starts, stages_on_shared
from icsearch.pattern import Pattern, PatternFile


@dataclass(frozen=True)
class Serving:
    """A pipeline layout as typed, what to do where a stage would start on S, and the losses that the run measured.

    `repair` is add (make these layers F), same (and as many others S), or none (leave the pattern as it is).
    """

    layout: str
    repair: str = ADD
    losses: Losses = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.repair not in REPAIRS:
            raise ExportError(f"--repair {self.repair!r} is not known: expected {', '.join(REPAIRS)}")


def fit_stages(
    pattern: Pattern, file: PatternFile, engine: Engine, num_layers: int, serving: Serving
) -> tuple[Pattern, list[str]]:
    """The pattern as it can be served, and what was changed and why.

    Raises ExportError for a layout that does not fit, and where a stage would start on a layer that the checkpoint
    itself shares.
    """
    sizes = serving_sizes(serving.layout, num_layers, engine.title, engine.split)
    wrong = stages_on_shared(pattern, file.layer_indices, sizes)
    if not wrong:
        return pattern, []
    trouble = describe(sizes, wrong)
    partition = partition_setting(engine, pattern, file.layer_indices, sizes)
    elsewhere = f"; or leave the pattern as it is and set {partition}" if partition else ""
    _check_native([layer for _, layer in wrong], file, trouble, elsewhere)
    if serving.repair == NONE:
        return pattern, [f"{trouble}; the pattern is left as it is{_instead(engine, partition)}"]
    starts = stage_starts(file.layer_indices, sizes)  # those that are F already must stay so
    added = add_full(pattern, starts, serving.losses)
    moved = move_full(pattern, starts, serving.losses)
    chosen, other = (added, moved) if serving.repair == ADD else (moved, added)
    if chosen is None:
        raise ExportError(f"{trouble}; --repair {SAME}: {_lack(added, starts, serving.losses)}: give --repair {ADD}")
    text = f"{trouble}: {_describe(chosen, pattern, file, serving.losses)}"
    if other is not None:
        name = SAME if serving.repair == ADD else ADD
        text += f"; --repair {name}: {_describe(other, pattern, file, serving.losses)}"
    return chosen.pattern, [text + elsewhere]


def _instead(engine: Engine, partition: str | None) -> str:
    """What to set where the pattern stays; where there is a variable for it, too few F layers are all that can lack."""
    if partition:
        return f", so set {partition}"
    return ", and has fewer F layers than there are stages: serve it in fewer" if engine.partition_variable else ""


def _check_native(layers: Sequence[int], file: PatternFile, trouble: str, elsewhere: str) -> None:
    shared = {file.layer_indices[position] for position in file.model.get("native_shared") or []}
    native = [layer for layer in layers if layer in shared]
    if native:
        raise ExportError(
            f"{trouble}; the checkpoint has no indexer at layer {native[0]}: give other first layers with --serve-pp"
            f"{elsewhere}"
        )


def _lack(added: Repair, starts: Sequence[int], losses: Losses) -> str:
    """Why no layers can be given up for those that must become F; those that start a stage cannot."""
    if not losses:
        return "which layers to give up is chosen by the losses of a run, and the file holds none"
    others = len(set(added.pattern.full_layers) - {0, *starts})
    if others < len(added.made_full):
        return f"{len(added.made_full)} layers must become F, and only {others} others could be given up for them"
    return "the file's losses do not say what enough other layers cost; those in the journal of a RUN may"


def _describe(repair: Repair, pattern: Pattern, file: PatternFile, losses: Losses) -> str:
    """What a repair changes, the indexers that then run, and the loss with where it comes from."""
    changes = [f"F at {_layers(repair.made_full, file)}"]
    if repair.made_shared:
        changes.append(f"S at {_layers(repair.made_shared, file)}")
    before, after = len(pattern.full_layers), len(repair.pattern.full_layers)
    kept = f"{after} F as before" if after == before else f"{after} F instead of {before}"
    return f"{' and '.join(changes)} ({kept}, {_loss(repair, pattern, losses)})"


def _layers(positions: Sequence[int], file: PatternFile) -> str:
    return ", ".join(str(file.layer_indices[position]) for position in positions)


def _loss(repair: Repair, pattern: Pattern, losses: Losses) -> str:
    if not losses:
        return "the file holds no losses"
    if repair.loss is None:
        return "loss unknown: the run never shared these layers alone"
    how = "measured in the run" if repair.measured else "estimated from the run's losses, evaluate it"
    before = f" for {losses[pattern.letters]:.4f}" if pattern.letters in losses else ""
    return f"loss {repair.loss:.4f}{before}, {how}"
