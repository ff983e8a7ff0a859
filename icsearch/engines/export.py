"""What to give a serving engine so that it runs a pattern: flags, keys or a file, with warnings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

from icsearch.core.files import check_new
from icsearch.core.jsonfile import FieldError, check_fields, write_object
from icsearch.core.pattern import FULL, SHARED, Pattern
from icsearch.core.pattern_file import MODEL_FIELDS, PatternFile
from icsearch.engines.engine import CARRIED, UNKNOWN, Engine, ExportError, decoder_letters
from icsearch.engines.gguf import write_gguf
from icsearch.engines.native import declared_shared, edit_config
from icsearch.engines.pipeline import (
    ADD,
    NONE,
    REPAIRS,
    SAME,
    Losses,
    Repair,
    add_full,
    aligned_partition,
    cut_in_words,
    describe,
    move_full,
    serving_sizes,
    stage_starts,
    stages_on_shared,
    usual_sizes_on_shared,
)
from icsearch.engines.table import ENGINES, TRANSFORMERS, find_engine
from icsearch.model.config import COMMON, family, load_config, read_backbone, refuse_modes


@dataclass(frozen=True)
class Export:
    """One engine's form of a pattern. `text` is what to paste, `how` says where, `warnings` what to look out for.

    `letters` are those that the engine counts, most often one a decoder layer; `settings` the keys in `text`.
    """

    engine: str
    title: str
    text: str
    how: str
    pattern: Pattern
    letters: str
    settings: dict[str, Any]
    warnings: tuple[str, ...]


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


def export(
    pattern_file: PatternFile, engine: str, retention: Fraction | None = None, serving: Serving | None = None
) -> Export:
    """The pattern of a pattern.json for one engine; with `retention`, an earlier pattern of the same run.

    With `serving`, the pattern is made fit for a pipeline layout: it may then come out as another one, and a warning
    says so. Raises ExportError for an unknown engine or a pattern that the checkpoint cannot run, PatternError where
    the run holds no pattern of that retention.
    """
    target, model = find_engine(engine), pattern_file.model
    pattern = pattern_file.pattern if retention is None else pattern_file.at_retention(retention)
    _check(pattern, model)
    stage_warnings: list[str] = []
    if serving is not None:
        pattern, stage_warnings = _fit_stages(pattern, pattern_file, target, serving)
    model_type, letters = model.get("model_type"), pattern.letters
    if not target.counts_indexed(model_type):
        letters = decoder_letters(pattern, pattern_file.layer_indices, model.get("num_hidden_layers"))
    if target.all_layers_alike and len(letters) != len(pattern):
        raise ExportError(
            f"{len(letters) - len(pattern)} of the {len(letters)} decoder layers have no indexer, and how "
            f"{target.title} numbers layers of such a model is not known here: no flags can be given"
        )
    settings = target.settings(letters, family(model_type))
    if model.get("wrapper_config") and target.nests_for(model_type):
        settings = {"text_config": settings}
    return Export(
        engine=target.name,
        title=target.title,
        text=target.render(settings),
        how=target.how,
        pattern=pattern,
        letters=letters,
        settings=settings,
        warnings=(*stage_warnings, *_warnings(target, pattern, pattern_file, letters, serving is not None)),
    )


def exports_of_type(file: PatternFile) -> tuple[list[Export], dict[str, str]]:
    """What each engine that serves models of the file's type is given, those first that take a flag.

    Behind them, by their titles, why others cannot be given this pattern, as Megatron's two numbers give few. Raises
    ExportError where none of them can: then something is wrong with the run.
    """
    known = [engine for engine in ENGINES.values() if engine.serves(file.model.get("model_type"))]
    exports, refused = [], {}
    for engine in sorted(known, key=lambda engine: engine.writes is not None):
        try:
            exports.append(export(file, engine.name))
        except ExportError as error:
            refused[engine.title] = str(error)
    if refused and not exports:
        raise ExportError("; ".join(dict.fromkeys(refused.values())))
    return exports, refused


def _check(pattern: Pattern, model: Mapping[str, Any]) -> None:
    """Refuse a file's model that holds what no file of ours does, and F on a layer that the checkpoint shares."""
    try:
        check_fields(model, MODEL_FIELDS)
    except FieldError as error:
        raise ExportError(f"the file's model is damaged ({error}): write the file again") from None
    native = model.get("native_shared") or []
    wrong = [layer for layer in native if layer >= len(pattern) or pattern.is_full(layer)]
    if wrong:
        raise ExportError(
            f"the checkpoint has no indexer weights at positions {wrong} (it shares these layers itself), but the "
            "pattern does not have S there: only F to S edits are possible on this checkpoint"
        )


def _warnings(engine: Engine, pattern: Pattern, file: PatternFile, letters: str, layout_known: bool) -> list[str]:
    """All warnings for a pattern of a file in these letters.

    Where the serving layout is not known, the usual numbers of stages are looked at, if it is known how the engine
    cuts.
    """
    model_type, num_layers = file.model.get("model_type"), file.model.get("num_hidden_layers")
    found = []
    if not engine.serves(model_type):
        whose = f"model_type {model_type}" if model_type else "a model whose model_type the file does not say"
        found.append(
            f"{engine.title} is known to share selections for {', '.join(engine.model_types)}; this file is for "
            f"{whose}. {engine.on_other_types}"
        )
    if len(letters) != len(pattern):
        found.append(
            f"{len(letters) - len(pattern)} of the {len(letters)} decoder layers have no indexer; {engine.title} "
            "counts all decoder layers, so these are written as F: check that this engine version counts them too"
        )
    if num_layers is None and not engine.counts_indexed(model_type):
        found.append(
            f"the file does not say how many decoder layers the model has: the pattern is right if it is {len(letters)}"
        )
    if native := file.model.get("native_shared"):
        found.append(
            f"{len(native)} S layers are the checkpoint's own and have no indexer weights: they cannot become F"
        )
    elif is_uniform(pattern) and file.loss is None:
        found.append(
            f"{UNMEASURED}; measure it (icsearch eval MODEL --calibration SOURCE --pattern {pattern.letters[:32]}...), "
            "or find one for this model (icsearch fisher)"
        )
    found += [note for of_type, note in engine.notes if of_type in ("", family(model_type))]
    if engine.split and engine.stages != CARRIED and not layout_known:
        wrong = usual_sizes_on_shared(pattern, file.layer_indices, num_layers or len(pattern), engine.split)
        if wrong:
            found.append(f"{cut_in_words(wrong)}: give --serve-pp {wrong[0]} if you serve it so")
    if file.model.get("wrapper_config") and engine.nests_for(model_type) and engine.wrapper_note:
        found.append(engine.wrapper_note)
    if engine.writes == "config.json" and COMMON.fit(letters) is None:
        found.append(
            "no index_topk_freq and index_skip_topk_offset give this pattern: remove both keys from config.json "
            "where they are present (do not set them to null)"
        )
    return found


UNMEASURED = (
    "a uniform pattern that nobody measured on this checkpoint: in public reports such patterns cost half of the "
    "accuracy on long contexts where short tests had shown nothing (sgl-project/sglang issue 32285)"
)


def is_uniform(pattern: Pattern) -> bool:
    """Whether F layers stand at even distances, behind some more F in front as engines count them."""
    even = Pattern.uniform(len(pattern), Fraction(len(pattern.full_layers), len(pattern)))
    behind = pattern.letters.lstrip(FULL)
    return SHARED in behind and (pattern == even or (FULL in behind and COMMON.fit(pattern.letters) is not None))


# --- a pattern made fit for a pipeline layout -----------------------------------------------------------------------


def _fit_stages(pattern: Pattern, file: PatternFile, engine: Engine, serving: Serving) -> tuple[Pattern, list[str]]:
    """The pattern as it can be served, and what was changed and why.

    Raises ExportError for a layout that does not fit, and where a stage that gets no selection would start on a layer
    that the checkpoint itself shares.
    """
    num_layers = len(decoder_letters(pattern, file.layer_indices, file.model.get("num_hidden_layers")))
    sizes = serving_sizes(serving.layout, num_layers, engine.title, engine.split)
    wrong = stages_on_shared(pattern, file.layer_indices, sizes)
    if not wrong:
        return pattern, []
    trouble, title = describe(sizes, wrong), engine.title
    if engine.stages == CARRIED:
        return pattern, [f"{trouble}, which {title} serves: a selection goes from stage to stage ({engine.carried})"]
    if engine.stages == UNKNOWN:
        unsure = f"whether {title} hands a selection on from stage to stage is not known here"
        return pattern, [f"{trouble}; {unsure}: the pattern is left as it is, try it before you rely on it"]
    trouble += ", with no selection to reuse"
    aligned = aligned_partition(pattern, file.layer_indices, sizes)
    cuts = _cuts(engine, aligned) if aligned else ""
    fewer = "has fewer F layers than there are stages: serve it in fewer"
    served = f"serve it with {cuts}" if cuts else f"it {fewer}"
    if lacking := _among(wrong, file, "native_shared"):
        raise ExportError(f"{trouble}; the checkpoint shares layer {lacking[0]} itself, which cannot be F: {served}")
    if serving.repair == NONE:
        left = f"so serve it with {cuts}" if cuts else f"and {fewer}"
        return pattern, [f"{trouble}; the pattern is left as it is, {left}"]
    if lacking := _among(wrong, file, "declared_shared"):
        raise ExportError(
            f"{trouble}; the config shares layer {lacking[0]}, and whether there is an indexer is not known: give the "
            f"checkpoint's directory with --model-config, or {served}"
        )
    elsewhere = f"; or leave the pattern as it is, and serve it with {cuts}" if cuts else ""
    starts = stage_starts(file.layer_indices, sizes)  # those that are F already must stay so
    added = add_full(pattern, starts, serving.losses)
    moved = move_full(pattern, starts, serving.losses)
    chosen, other = (added, moved) if serving.repair == ADD else (moved, added)
    if chosen is None:
        raise ExportError(f"{trouble}; --repair {SAME}: {_lack(added, starts, serving.losses)}: give --repair {ADD}")
    text = f"{trouble}: {_in_words(chosen, pattern, file, serving.losses)}"
    if other is not None:
        name = SAME if serving.repair == ADD else ADD
        text += f"; --repair {name}: {_in_words(other, pattern, file, serving.losses)}"
    return chosen.pattern, [text + elsewhere]


def _cuts(engine: Engine, sizes: Sequence[int]) -> str:
    """How the layers are cut into stages of these sizes, in the engine's words where those are known."""
    if engine.partition_variable:
        return f"{engine.partition_variable}={','.join(map(str, sizes))}"
    return f"stages that begin at layers {', '.join(map(str, accumulate([0, *sizes[:-1]])))}"


def _among(wrong: Sequence[tuple[int, int]], file: PatternFile, key: str) -> list[int]:
    """Of the layers on which stages would start, those at positions that the file's model lists under a key."""
    listed = {file.layer_indices[position] for position in file.model.get(key) or []}
    return [layer for _, layer in wrong if layer in listed]


def _lack(added: Repair, starts: Sequence[int], losses: Losses) -> str:
    """Why no layers can be given up for those that must become F; those that start a stage cannot."""
    if not losses:
        return "which layers to give up is chosen by the losses of a run, and the file holds none"
    others = len(set(added.pattern.full_layers) - {0, *starts})
    if others < len(added.made_full):
        return f"{len(added.made_full)} layers must become F, and only {others} others could be given up for them"
    return "the file's losses do not say what enough other layers cost; those in the journal of a RUN may"


def _in_words(repair: Repair, pattern: Pattern, file: PatternFile, losses: Losses) -> str:
    """What a repair changes, the indexers that then run, and the loss with where it comes from."""
    changes = [
        f"{letter} at {', '.join(str(file.layer_indices[position]) for position in positions)}"
        for letter, positions in (("F", repair.made_full), ("S", repair.made_shared))
        if positions
    ]
    before, after = len(pattern.full_layers), len(repair.pattern.full_layers)
    kept = f"{after} F as before" if after == before else f"{after} F instead of {before}"
    if not losses:
        loss = "the file holds no losses"
    elif repair.loss is None:
        loss = "loss unknown: the run never shared these layers alone"
    else:
        how = "measured in the run" if repair.measured else "estimated from the run's losses, evaluate it"
        was = f" for {losses[pattern.letters]:.4f}" if pattern.letters in losses else ""
        loss = f"loss {repair.loss:.4f}{was}, {how}"
    return f"{' and '.join(changes)} ({kept}, {loss})"


# --- held against the checkpoint that will be served ----------------------------------------------------------------


def with_config(
    file: PatternFile, config: Mapping[str, Any], name: str, with_indexer: Collection[int] | None = None
) -> tuple[PatternFile, list[str]]:
    """The file with what its checkpoint's config.json (`name`) says of the model, and notes on it.

    That is the number of decoder layers, and whether it wraps a text model. `with_indexer` are the decoder layers that
    the checkpoint has indexer weights for, so that all others must stay S; None where that is not known: keys of a
    config share layers, but take no weights away.
    Raises ExportError where the pattern is for other layers or another type of model.
    """
    refuse_modes(config, name, ExportError)
    backbone = read_backbone(config, name)
    letters, known, mtp = len(file.pattern), file.model.get("model_type"), backbone.mtp_layers
    if mtp and letters == len(backbone.layer_indices) + mtp:
        raise ExportError(
            f"the pattern has {letters} letters, {name} {letters - mtp} layers and {mtp} "
            "of multi-token prediction: a pattern has no letters for those, leave them out"
        )
    if file.layer_indices != backbone.layer_indices or letters != len(backbone.layer_indices):
        raise ExportError(
            f"the pattern has {letters} letters for layers {_span(file.layer_indices)}, {name} has "
            f"{len(backbone.layer_indices)} layers with an indexer ({_span(backbone.layer_indices)}): they do not "
            "belong together; give the checkpoint's own config.json"
        )
    if known and backbone.model_type and known != backbone.model_type:
        raise ExportError(
            f"the pattern is for model_type {known}, {name} has {backbone.model_type}: give the right one"
        )
    native, declared, notes = file.model.get("native_shared"), list[int](), list[str]()
    if with_indexer is not None:
        native = [position for position, layer in enumerate(backbone.layer_indices) if layer not in with_indexer]
    elif (
        native is None
        and TRANSFORMERS.serves(backbone.model_type)
        and (shared := sorted(declared_shared(config, name).intersection(backbone.layer_indices)))
    ):
        declared = [backbone.layer_indices.index(layer) for layer in shared]
        notes.append(
            f"{name} itself shares layers {_span(shared)}: should the checkpoint have no indexer weights there, they "
            "cannot be F; give its directory with --model-config, and that is checked"
        )
    if mtp:
        plural = "s" if mtp > 1 else ""
        notes.append(
            f"the checkpoint has {mtp} layer{plural} of multi-token prediction: not in the pattern, they stay F"
        )
    model = {
        **file.model,
        "model_type": known or backbone.model_type,
        "num_hidden_layers": backbone.num_layers,
        "wrapper_config": backbone.wrapper,
        "native_shared": native,
        "declared_shared": declared,
    }
    return replace(file, model=model), notes


def _span(layers: Sequence[int]) -> str:
    """Layers in short: a range where they follow one another."""
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers[:6])) + (", ..." if len(layers) > 6 else "")


def write_file(result: Export, config: Path | None, gguf: Path | None, out: Path) -> list[str]:
    """Write what the engine reads to `out`, from the checkpoint's config.json or a GGUF; returns warnings.

    Raises ExportError where the engine reads no file, its original is not given, or `out` exists, and
    EngineConfigError for an original that does not fit.
    """
    kind = find_engine(result.engine).writes
    if kind is None:
        raise ExportError(f"{result.title} reads no file of ours: leave --out away and paste what is printed")
    if kind == "GGUF":
        if gguf is None:
            raise ExportError("--out NEW.gguf is a copy of a model: give that one with --gguf OLD.gguf")
        return write_gguf(result.letters, gguf, out)
    if config is None:
        raise ExportError(
            f"--out is a config.json with the keys for {result.title}: give the original with --model-config"
        )
    check_new(out, ExportError)
    write_object(out, edit_config(load_config(config), str(config), result.letters).document)
    return []
