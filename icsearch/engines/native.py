"""A pattern made a checkpoint's own: a copy with the config that says so, with or without the indexers it spares."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from icsearch.engines.checkpoint_copy import (
    Copied,
    CopyPlan,
    check_outside,
    fill_directory,
    free_place,
    plan_copy,
    whole_directory,
)
from icsearch.engines.indexer_weights import indexers_by_layer
from icsearch.engines.letters import ExportError, decoder_letters
from icsearch.engines.native_config import NativeConfig, declared_shared, edit_config, num_hidden_layers
from icsearch.engines.readers import check_droppable, notes, stage_notes
from icsearch.jsonfile import read_object, shown, strict, whole
from icsearch.pattern import SHARED, Pattern, PatternFile, load_pattern_file
from icsearch.weights.checkpoint import INDEX_NAME, Checkpoint, fingerprint, open_checkpoint
from icsearch.weights.header import Entry, read_header

PATTERN_NAME = "pattern.json"


@dataclass(frozen=True)
class NativeRequest:
    """What `icsearch export --checkpoint` can be asked. `model` None: the one that the pattern file names.

    `other_weights` lets weights through that the pattern was not searched on.
    """

    file: Path
    out: Path
    model: str | None = None
    retention: Fraction | None = None
    drop_indexers: bool = False
    other_weights: bool = False


@dataclass(frozen=True)
class NativeCheckpoint:
    """What was written, and what to know of it."""

    out: Path
    source: str
    pattern: Pattern
    config: NativeConfig
    copied: Copied
    left_out: tuple[str, ...]  # files
    dropped: tuple[Entry, ...]  # tensors
    notes: tuple[str, ...]

    @property
    def bytes_saved(self) -> int:
        """Bytes of indexer weights that the copy does not have."""
        return sum(entry.bytes for entry in self.dropped)


def export_checkpoint(request: NativeRequest, tell: Callable[[str], None] = lambda _: None) -> NativeCheckpoint:
    """Write the copy; nothing is left under `out` unless all of it is there. `tell` hears what is about to be done.

    Raises an IcsearchError where pattern and checkpoint do not belong together, `out` is taken, or there is no room.
    """
    file = _chosen(load_pattern_file(request.file), request.retention)
    target = free_place(request.out)
    checkpoint = _open(request, file)
    check_outside(target, checkpoint.directory)
    edit = _edit(request, file, checkpoint)
    plan = _plan(checkpoint, file, edit)
    with whole_directory(target) as directory:
        copied = fill_directory(plan, directory, tell)
        open_checkpoint(str(directory))  # checked as any checkpoint is, before it gets its name
    return NativeCheckpoint(
        out=request.out,
        source=checkpoint.name,
        pattern=file.pattern,
        config=edit.config,
        copied=copied,
        left_out=(*plan.gone, *plan.left_out),
        dropped=tuple(entry for entries in edit.dropped.values() for entry in entries),
        notes=tuple(_notes(request, file, checkpoint, edit)),
    )


@dataclass(frozen=True)
class _Edit:
    """What of a checkpoint changes: the config, by one letter a decoder layer, and the tensors that shards lose."""

    letters: str
    config: NativeConfig
    dropped: dict[str, list[Entry]]


def _edit(request: NativeRequest, file: PatternFile, checkpoint: Checkpoint) -> _Edit:
    """What the pattern makes of the checkpoint; raises ExportError where the two do not belong together."""
    letters = _letters(file, checkpoint)
    config = edit_config(checkpoint.config, checkpoint.name, letters)
    shards = {path.name: read_header(path).entries for path in checkpoint.shards}
    indexers = indexers_by_layer((entry.name for entries in shards.values() for entry in entries), len(letters))
    _check_same_weights(request, file, checkpoint)
    _check_full_layers(file, _native(file, checkpoint), set(indexers))
    if not request.drop_indexers:
        return _Edit(letters, config, {})
    check_droppable(_model_type(checkpoint))
    unwanted = _unwanted(letters, indexers)
    dropped = {shard: [entry for entry in entries if entry.name in unwanted] for shard, entries in shards.items()}
    return _Edit(letters, config, {shard: entries for shard, entries in dropped.items() if entries})


def _notes(request: NativeRequest, file: PatternFile, checkpoint: Checkpoint, edit: _Edit) -> Iterator[str]:
    model_type = _model_type(checkpoint)
    has_params = (checkpoint.directory / "params.json").exists()
    yield from notes(model_type, edit.letters, request.drop_indexers, has_params)
    yield from stage_notes(file, model_type, len(edit.letters))


def _model_type(checkpoint: Checkpoint) -> str:
    found = checkpoint.config.get("model_type")
    return found if isinstance(found, str) and found.isprintable() else shown(found)


def _chosen(file: PatternFile, retention: Fraction | None) -> PatternFile:
    """The file, cut back to the step whose pattern has that retention, as if the search had ended there."""
    pattern = file.pattern if retention is None else file.at_retention(retention)
    if pattern == file.pattern:
        return file
    steps = tuple(step for step in file.steps if len(Pattern(step.pattern).full_layers) >= len(pattern.full_layers))
    loss = steps[-1].loss if steps else file.baseline_loss
    return replace(file, pattern=pattern, steps=steps, loss=loss, refinement=None)


def _open(request: NativeRequest, file: PatternFile) -> Checkpoint:
    model = file.model.get("name_or_path") if request.model is None else request.model
    if model is None:
        raise ExportError(f"{request.file} does not say which checkpoint it belongs to: give --model")
    return open_checkpoint(model)


def _letters(file: PatternFile, checkpoint: Checkpoint) -> str:
    """One letter a decoder layer; raises ExportError where the file is for another kind of model."""
    layers = num_hidden_layers(checkpoint.config, checkpoint.name)
    here, there = _model_type(checkpoint), file.model.get("model_type")
    if there is not None and here != there:
        raise ExportError(f"the pattern is for model_type {there}, {checkpoint.name} is {here}: give its own --model")
    if file.model.get("num_hidden_layers") not in (None, layers):
        raise ExportError(
            f"the pattern is for {file.model['num_hidden_layers']} decoder layers, and {checkpoint.name} has {layers}: "
            "give its own --model"
        )
    return decoder_letters(file.pattern, file.layer_indices, layers)


def _check_same_weights(request: NativeRequest, file: PatternFile, checkpoint: Checkpoint) -> None:
    found = file.model.get("fingerprint")
    if request.other_weights or found == fingerprint(checkpoint):
        return
    what = "does not say which weights it was searched on" if found is None else "was searched on other weights"
    raise ExportError(
        f"{request.file} {what}, and {checkpoint.name} need not be the same: give --model, or --other-weights if these "
        "are a copy of them, such as a quantised or a tuned one"
    )


def _native(file: PatternFile, checkpoint: Checkpoint) -> set[int]:
    """The decoder layers that the checkpoint shares already."""
    positions = file.model.get("native_shared")
    if positions is None:
        return declared_shared(checkpoint.config, checkpoint.name)
    return {file.layer_indices[position] for position in positions if position < len(file.layer_indices)}


def _check_full_layers(file: PatternFile, native: set[int], with_indexer: set[int]) -> None:
    """Refuse F for a layer that the checkpoint shares, or that lacks an indexer where others have theirs."""
    full = {file.layer_indices[position] for position in file.pattern.full_layers}
    if wrong := sorted(full & native or (full - with_indexer if with_indexer else set())):
        raise ExportError(
            f"the checkpoint has no indexers of its own in decoder layers {', '.join(map(str, wrong))}, and the "
            "pattern has F there: only F to S edits are possible on this checkpoint"
        )


def _unwanted(letters: str, indexers: dict[int, list[str]]) -> set[str]:
    """The indexer tensors of the S layers."""
    if not indexers:
        raise ExportError("no tensor of the checkpoint is named as an indexer's: leave out --drop-indexers")
    return {name for layer, names in indexers.items() if letters[layer] == SHARED for name in names}


def _plan(checkpoint: Checkpoint, file: PatternFile, edit: _Edit) -> CopyPlan:
    written = {
        "config.json": _text("config.json", edit.config.document),
        PATTERN_NAME: _text(PATTERN_NAME, strict(file.to_json())),
    }
    if (checkpoint.directory / INDEX_NAME).exists():
        written[INDEX_NAME] = _text(INDEX_NAME, _index(checkpoint, edit.dropped))
    dropped = {shard: {entry.name for entry in entries} for shard, entries in edit.dropped.items()}
    return plan_copy(checkpoint, dropped, written)


def _text(name: str, document: dict[str, Any]) -> str:
    try:
        return json.dumps(document, indent=2) + "\n"
    except RecursionError:  # from Python 3.12 on, reading goes deeper than writing
        raise ExportError(f"{name} is nested too deeply to be written again: download it again") from None


def _index(checkpoint: Checkpoint, dropped: dict[str, list[Entry]]) -> dict[str, Any]:
    """The index without the dropped tensors; what its metadata counts goes down by them."""
    path = checkpoint.directory / INDEX_NAME
    index = read_object(path, expected="the safetensors index", advice="download it again", error=ExportError)
    entries = [entry for found in dropped.values() for entry in found]
    names = {entry.name for entry in entries}
    weight_map = {name: shard for name, shard in index["weight_map"].items() if name not in names}
    less = {"total_size": sum(one.bytes for one in entries), "total_parameters": sum(one.elements for one in entries)}
    if isinstance(metadata := index.get("metadata"), dict):
        for key in less:
            if whole(less[key]).fits(metadata.get(key)):
                metadata[key] -= less[key]
    return {**index, "weight_map": weight_map}
