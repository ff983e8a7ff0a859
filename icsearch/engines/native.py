"""A pattern made a checkpoint's own: a copy with the config that says so, with or without the indexers it spares."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from icsearch.core.jsonfile import read_object, shown, strict, whole
from icsearch.core.pattern import SHARED, Pattern
from icsearch.core.pattern_file import PatternFile, load_pattern_file
from icsearch.engines.copy import (
    Copied,
    CopyPlan,
    check_outside,
    fill_directory,
    free_place,
    plan_copy,
    whole_directory,
)
from icsearch.engines.engine import ExportError, config_keys, decoder_letters
from icsearch.engines.pipeline import cut_in_words, split_vllm, usual_sizes_on_shared
from icsearch.engines.table import ENGINES, TRANSFORMERS, VLLM
from icsearch.model.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, fingerprint, open_checkpoint
from icsearch.model.config import (
    FREQ,
    OFFSET,
    PATTERN,
    SWITCH,
    TEXT_CONFIG,
    TYPES,
    language_config,
    num_hidden_layers,
    start_pattern,
)
from icsearch.model.header import Entry, read_header

PATTERN_NAME = "pattern.json"
KEYS = (TYPES, PATTERN, SWITCH, FREQ, OFFSET)
_INDEXER = re.compile(r"((?:.*?\.)?)layers\.(\d{1,6})\.(?:.*\.)?indexer\..")


@dataclass(frozen=True)
class NativeConfig:
    """An edited config.json: which keys it got, which it lost, and where they are."""

    document: dict[str, Any]
    written: tuple[str, ...]
    removed: tuple[str, ...]
    nested: bool  # the keys are in text_config


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


def export_checkpoint(
    source: Path,
    out: Path,
    *,
    model: str | None = None,
    retention: Fraction | None = None,
    drop_indexers: bool = False,
    other_weights: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> NativeCheckpoint:
    """Write the copy; nothing is left under `out` unless all of it is there. `tell` hears what is about to be done.

    `source` is a pattern.json. `model` None: the one that it names. `drop_indexers`: without those of S layers.
    `other_weights` lets weights through that the pattern was not searched on.
    Raises an IcsearchError where pattern and checkpoint do not belong together, `out` is taken, or there is no room.
    """
    file = _chosen(load_pattern_file(source), retention)
    target = free_place(out)
    model = file.model.get("name_or_path") if model is None else model
    if model is None:
        raise ExportError(f"{source} does not say which checkpoint it belongs to: give --model")
    checkpoint = open_checkpoint(model)
    check_outside(target, checkpoint.directory)
    stated = checkpoint.config.get("model_type")
    model_type = stated if isinstance(stated, str) and stated.isprintable() else shown(stated)
    letters = _letters(file, checkpoint, model_type)
    config = edit_config(checkpoint.config, checkpoint.name, letters)
    shards = {path.name: read_header(path).entries for path in checkpoint.shards}
    indexers = indexers_by_layer((entry.name for entries in shards.values() for entry in entries), len(letters))
    _check_weights(source, file, checkpoint, set(indexers), other_weights)
    dropped = _dropped(shards, indexers, letters, model_type) if drop_indexers else {}
    plan = _plan(checkpoint, file, config, dropped)
    with whole_directory(target) as directory:
        copied = fill_directory(plan, directory, tell)
        open_checkpoint(str(directory))  # checked as any checkpoint is, before it gets its name
    told = [*notes(model_type, letters, drop_indexers, (checkpoint.directory / "params.json").exists())]
    wrong = usual_sizes_on_shared(file.pattern, file.layer_indices, len(letters), split_vllm)
    if wrong and model_type in VLLM.model_types:  # vLLM checks nothing
        serve = f"icsearch export --engine vllm --serve-pp {wrong[0]}"
        told.append(f"vLLM: {cut_in_words(wrong)}; {serve} says what to do")
    return NativeCheckpoint(
        out=out,
        source=checkpoint.name,
        pattern=file.pattern,
        config=config,
        copied=copied,
        left_out=(*plan.gone, *plan.left_out),
        dropped=tuple(entry for entries in dropped.values() for entry in entries),
        notes=tuple(told),
    )


def _chosen(file: PatternFile, retention: Fraction | None) -> PatternFile:
    """The file, cut back to the step whose pattern has that retention, as if the search had ended there."""
    pattern = file.pattern if retention is None else file.at_retention(retention)
    if pattern == file.pattern:
        return file
    steps = tuple(step for step in file.steps if len(Pattern(step.pattern).full_layers) >= len(pattern.full_layers))
    loss = steps[-1].loss if steps else file.baseline_loss
    return replace(file, pattern=pattern, steps=steps, loss=loss, refinement=None)


def _letters(file: PatternFile, checkpoint: Checkpoint, model_type: str) -> str:
    """One letter a decoder layer; raises ExportError where the file is for another kind of model."""
    layers, known = num_hidden_layers(checkpoint.config, checkpoint.name), file.model.get("model_type")
    if known not in (None, model_type):
        raise ExportError(
            f"the pattern is for model_type {known}, {checkpoint.name} is {model_type}: give its own --model"
        )
    if file.model.get("num_hidden_layers") not in (None, layers):
        raise ExportError(
            f"the pattern is for {file.model['num_hidden_layers']} decoder layers, and {checkpoint.name} has {layers}: "
            "give its own --model"
        )
    return decoder_letters(file.pattern, file.layer_indices, layers)


def _check_weights(
    source: Path, file: PatternFile, checkpoint: Checkpoint, with_indexer: Collection[int], other_weights: bool
) -> None:
    """Refuse weights that the pattern was not searched on, unless they may be others, and F where no indexer is.

    That is a layer that the checkpoint shares, or one that lacks an indexer where others have theirs.
    """
    known = file.model.get("fingerprint")
    if not other_weights and known != fingerprint(checkpoint):
        what = "does not say which weights it was searched on" if known is None else "was searched on other weights"
        raise ExportError(
            f"{source} {what}, and {checkpoint.name} need not be the same: give --model, or --other-weights if "
            "these are a copy of them, such as a quantised or a tuned one"
        )
    positions = file.model.get("native_shared")
    if positions is None:
        native = declared_shared(checkpoint.config, checkpoint.name)
    else:
        native = {file.layer_indices[position] for position in positions if position < len(file.layer_indices)}
    full = {file.layer_indices[position] for position in file.pattern.full_layers}
    if wrong := sorted(full & native or (full.difference(with_indexer) if with_indexer else ())):
        raise ExportError(
            f"the checkpoint has no indexers of its own in decoder layers {', '.join(map(str, wrong))}, and the "
            "pattern has F there: only F to S edits are possible on this checkpoint"
        )


def _dropped(
    shards: Mapping[str, Sequence[Entry]], indexers: Mapping[int, list[str]], letters: str, model_type: str
) -> dict[str, list[Entry]]:
    """By shard the indexer tensors of the S layers; ExportError where nobody is known to load the rest of them."""
    if model_type not in LOAD_WITHOUT_INDEXERS:
        raise ExportError(
            f"--drop-indexers: nothing is known to load a model of type {model_type} without the S layers' indexers "
            f"(known for {', '.join(LOAD_WITHOUT_INDEXERS)}): leave the option out"
        )
    if not indexers:
        raise ExportError("no tensor of the checkpoint is named as an indexer's: leave out --drop-indexers")
    unwanted = {name for layer, names in indexers.items() if letters[layer] == SHARED for name in names}
    dropped = {shard: [entry for entry in entries if entry.name in unwanted] for shard, entries in shards.items()}
    return {shard: entries for shard, entries in dropped.items() if entries}


def _plan(
    checkpoint: Checkpoint, file: PatternFile, config: NativeConfig, dropped: Mapping[str, list[Entry]]
) -> CopyPlan:
    """The copy, with its config, its pattern.json and, where the checkpoint has one, its index."""
    written = {"config.json": config.document, PATTERN_NAME: strict(file.to_json())}
    if (checkpoint.directory / INDEX_NAME).exists():
        written[INDEX_NAME] = _index(checkpoint, dropped)
    names = {shard: {entry.name for entry in entries} for shard, entries in dropped.items()}
    texts = {}
    for name, document in written.items():
        try:
            texts[name] = json.dumps(document, indent=2) + "\n"
        except RecursionError:  # from Python 3.12 on, reading goes deeper than writing
            raise ExportError(f"{name} is nested too deeply to be written again: download it again") from None
    return plan_copy(checkpoint, names, texts)


def _index(checkpoint: Checkpoint, dropped: Mapping[str, list[Entry]]) -> dict[str, Any]:
    """The index without the dropped tensors; what its metadata counts goes down by them."""
    path = checkpoint.directory / INDEX_NAME
    index = read_object(path, expected="the safetensors index", advice="download it again", error=ExportError)
    entries = [entry for gone in dropped.values() for entry in gone]
    names = {entry.name for entry in entries}
    weight_map = {name: shard for name, shard in index["weight_map"].items() if name not in names}
    less = {
        "total_size": sum(entry.bytes for entry in entries),
        "total_parameters": sum(math.prod(entry.shape) for entry in entries),
    }
    if isinstance(metadata := index.get("metadata"), dict):
        for key in less:
            if whole(less[key]).fits(metadata.get(key)):
                metadata[key] -= less[key]
    return {**index, "weight_map": weight_map}


# --- the config, and which layers have an indexer ---------------------------------------------------------------------


def native_keys(letters: str) -> dict[str, Any]:
    """The keys for one letter F or S a decoder layer."""
    return {**config_keys(letters), **({SWITCH: True} if SHARED in letters else {})}


def edit_config(config: Mapping[str, Any], name: str, letters: str) -> NativeConfig:
    """The config with the keys of a pattern, in its text_config where it wraps a language model; others stay as are.

    Raises ModelError, which names the checkpoint, for a text_config that is none.
    """
    inner, keys = language_config(config, f"config.json of {name}"), native_keys(letters)
    nested = inner is not config
    removed = [key for key in KEYS if key in inner and key not in keys]
    edited = {**{key: value for key, value in inner.items() if key not in removed}, **keys}
    if not nested:
        return NativeConfig(edited, tuple(keys), tuple(removed), nested)
    removed += [key for key in KEYS if key in config and key not in removed]  # outside, where they could contradict
    outside = {key: value for key, value in config.items() if key not in KEYS}
    return NativeConfig({**outside, TEXT_CONFIG: edited}, tuple(keys), tuple(removed), nested)


def declared_shared(config: Mapping[str, Any], name: str) -> set[int]:
    """The decoder layers that a config itself shares, as transformers reads it; raises ModelError."""
    return {layer for layer, letter in enumerate(start_pattern(config, name).letters) if letter == SHARED}


def indexers_by_layer(names: Iterable[str], num_layers: int) -> dict[int, list[str]]:
    """The names of each decoder layer's indexer tensors; a layer without any is not there."""
    found: dict[str, dict[int, list[str]]] = {}
    for name in names:
        match = _INDEXER.match(name)
        if match and int(match[2]) < num_layers:
            found.setdefault(match[1], {}).setdefault(int(match[2]), []).append(name)
    return max(found.values(), key=len, default={})


def layers_with_indexer(directory: Path, num_layers: int) -> set[int] | None:
    """The decoder layers that a checkpoint has indexer weights for; None where it has no weights, or none so named.

    Its index alone is enough. Raises an IcsearchError for one that is damaged.
    """
    if (directory / INDEX_NAME).exists():
        index = read_object(
            directory / INDEX_NAME, expected="the safetensors index", advice="download it again", error=ExportError
        )
        names = index.get("weight_map")
        if not isinstance(names, dict):
            raise ExportError(f"{directory / INDEX_NAME} has no weight_map: download it again")
    elif (directory / SINGLE_NAME).exists():
        names = [entry.name for entry in read_header(directory / SINGLE_NAME).entries]
    else:
        return None
    return set(indexers_by_layer(names, num_layers)) or None


# --- what to know before one uses it ----------------------------------------------------------------------------------

# By model_type, who makes no indexer for an S layer, and so does not miss its weights.
LOAD_WITHOUT_INDEXERS = {
    model_type: [
        f"{engine.title} {since}".strip()
        for engine in ENGINES.values()
        for name, since in engine.without_indexers
        if name == model_type
    ]
    for model_type in dict.fromkeys(name for engine in ENGINES.values() for name, _ in engine.without_indexers)
}


def notes(model_type: str, letters: str, dropped: bool, has_params: bool) -> Iterator[str]:
    """What to know before one uses a checkpoint whose config has these letters."""
    if SHARED not in letters:
        return
    if model_type == "glm5_next":
        yield "transformers 5.24 reads the pattern of a glm5_next config, and then fails in its first S layer"
    elif model_type not in TRANSFORMERS.model_types:
        yield f"transformers 5.24 does not read the pattern of a {model_type} config: it runs every layer as F"
    if model_type not in TRANSFORMERS.model_types:
        serving = [engine for engine in ENGINES.values() if engine.nests and engine.serves(model_type)]
        misreading = [engine for engine in serving if engine.counts_indexed(model_type)]
        if readers := [engine.title for engine in serving if engine not in misreading]:
            yield f"known to read it: {', '.join(readers)}"
        elif not misreading:
            yield f"no engine is known to read the pattern of a {model_type} config: try it before you rely on it"
        for engine in misreading:
            yield (
                f"{engine.title} counts only the layers with an indexer there, and would misread these keys: give it "
                f"what icsearch export --engine {engine.name} prints"
            )
    known = LOAD_WITHOUT_INDEXERS.get(model_type, [])
    if dropped:
        yield (
            f"without the S layers' indexers it is known to load in {', '.join(known)}; what still builds them misses "
            "these weights"
        )
        if TRANSFORMERS.title not in known:
            yield "transformers 5.24 loads it with random indexers in the S layers: serve it elsewhere"
    elif TRANSFORMERS.title in known:
        yield (
            "the S layers' indexer weights are still there: transformers leaves them unread and lists them as "
            "unexpected, vllm-ascend may refuse them; --drop-indexers leaves them out"
        )
    if has_params:
        yield "params.json is copied as it is: an engine that reads it in place of config.json sees no pattern"
