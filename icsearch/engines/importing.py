"""A pattern from what an engine is given today: a config.json, overrides, flags, freq and offset, a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icsearch.engines.backbone import Backbone, EngineConfigError, inner_config, load_config, read_backbone, text_keys
from icsearch.engines.engine import Engine
from icsearch.engines.gguf_file import read_gguf
from icsearch.engines.letters import dsa_letters
from icsearch.engines.reading import PATTERN_KEYS, Found, read_letters
from icsearch.engines.schedule import COMMON
from icsearch.engines.table import LLAMACPP, VLLM, find_engine
from icsearch.engines.texts import (
    Typed,
    for_engine,
    how_to_save,
    is_letters,
    is_typed,
    parse_typed,
    split_engine,
    takers,
    written_for,
)
from icsearch.errors import PatternError
from icsearch.files import typed_path
from icsearch.pattern import SHARED, Pattern, PatternFile


@dataclass(frozen=True)
class Imported:
    """The pattern that an engine runs, on the decoder layers of a model, and what is to be known about it."""

    pattern: Pattern
    engine: Engine
    backbone: Backbone
    notes: tuple[str, ...]
    model_type: str | None = None  # as the keys themselves say, where they do

    def pattern_file(self, source: str) -> PatternFile:
        """The pattern.json of it; `source` says where it came from."""
        model = {
            "name_or_path": None,
            "model_type": self.model_type,
            "fingerprint": None,
            "num_hidden_layers": self.backbone.num_layers,
            "wrapper_config": self.backbone.wrapper,
            "source": f"{source}, as {self.engine.title} reads it",
        }
        return PatternFile(self.pattern, self.backbone.layer_indices, method="imported", model=model)


@dataclass(frozen=True)
class Source:
    """What was typed or found in a file: keys, the engine that they were written for, and the model's layers."""

    typed: Typed
    backbone: Backbone | None = None


def import_pattern(text: str, engine: str | None = None, backbone: Backbone | None = None) -> Imported:
    """The pattern that an engine runs with `text`: a file's name, JSON, flags, or `freq:4,offset:2`.

    An engine may stand in front, as in `megatron:freq:4`. `backbone` is the model that it is for, where that is
    known; a config.json says it by itself. Raises EngineConfigError, or ExportError for an unknown engine.
    """
    named, rest = split_engine(text.strip())
    source = _typed_source(rest) if is_typed(rest) else _file_source(_file_named(rest))
    chosen = find_engine(engine) if engine else named
    found = _read(source, chosen or source.typed.engine or VLLM, backbone, rest)
    guessed = [] if chosen else _guess_notes(source, found, backbone)
    return replace(found, notes=(*source.typed.notes, *guessed, *found.notes))


def is_engine_source(text: str) -> bool:
    """Whether a SPEC is of this kind: typed keys, an engine's name in front, a GGUF, or a config of an engine."""
    named, rest = split_engine(text.strip())
    if named or is_typed(rest):
        return True
    path = typed_path(rest, EngineConfigError)
    if path.is_dir():
        return (path / "config.json").exists() and not (path / "pattern.json").exists()
    return path.suffix == ".gguf" or (path.suffix == ".json" and path.exists() and _is_config(path))


def _is_config(path: Path) -> bool:
    """Whether a JSON file is an engine's, and not one of ours: it has no format, and keys of a config."""
    try:
        document = load_config(path)
    except EngineConfigError:
        return False  # what is wrong with it, the reader of pattern files says
    inner = text_keys(document)
    return "format" not in document and any(key in inner for key in (*PATTERN_KEYS, "num_hidden_layers"))


def _typed_source(text: str) -> Source:
    typed = parse_typed(text)
    return Source(typed, _own_backbone(typed.keys, "the text"))


def _file_named(text: str) -> Path:
    """The file of this name; EngineConfigError for letters, which need no engine to read them."""
    if is_letters(text):
        raise EngineConfigError(
            "these letters are a pattern already: give them to eval --pattern as they are; for export, "
            f"{how_to_save(text)}"
        )
    return typed_path(text, EngineConfigError)


def _file_source(path: Path) -> Source:
    if path.suffix == ".gguf":
        keys, backbone = read_gguf(path)
        if not keys:
            raise EngineConfigError(
                f"{path} has no list of layers with an indexer: which ones llama.cpp then takes is not known here"
            )
        return Source(Typed(keys, LLAMACPP), backbone)
    keys = load_config(path)
    if str(keys.get("format", "")).startswith("icsearch."):
        raise EngineConfigError(f"{path} is a file of icsearch itself: give it to eval or export as it is")
    return Source(Typed(keys, written_for(keys, None)), _own_backbone(keys, str(path)))


def _own_backbone(keys: Mapping[str, Any], name: str) -> Backbone | None:
    """The layers that the keys themselves describe: those of a whole config.json."""
    inner, _ = inner_config(keys)
    return read_backbone(keys, name) if "num_hidden_layers" in inner else None


def _model_type(own: Backbone | None, given: Backbone | None) -> str | None:
    """What the keys themselves say, else the model that they are for."""
    return (own.model_type if own else None) or (given.model_type if given else None)


def _guess_notes(source: Source, found: Imported, given: Backbone | None) -> list[str]:
    """What was taken where no engine was named: nothing to say where no other one runs another pattern."""
    if source.typed.numbers:
        model_type = _model_type(source.backbone, given)
        rule = VLLM.reader_of(model_type).schedule
        alike = "vLLM, SGLang and transformers do" if rule == COMMON else f"{VLLM.title} does for {model_type}"
        return [
            f"freq and offset are read as {alike} (offset {rule.default_offset} by default); an engine in front, as in "
            "megatron:freq:4, says another"
        ]
    others = [engine for engine in takers(source.typed, found.model_type) if _differs(engine, source, found, given)]
    if not others:
        return []
    titles = ", ".join(engine.title for engine in others)
    runs = "runs" if len(others) == 1 else "run"
    return [
        f"read as {found.engine.title} does; {titles} {runs} another pattern with these keys: put the engine in front, "
        f"as in {others[0].name}:..."
    ]


def _differs(engine: Engine, source: Source, found: Imported, given: Backbone | None) -> bool:
    """Whether this engine runs another pattern; what it refuses, or is not known to read, is none."""
    try:
        return _read(source, engine, given, "").pattern != found.pattern
    except EngineConfigError:
        return False


def _read(source: Source, engine: Engine, given: Backbone | None, name: str) -> Imported:
    own = source.backbone
    if own and given and own.num_layers != given.num_layers:
        raise EngineConfigError(
            f"{name[:60]} has {own.num_layers} layers, the model {given.num_layers}: expected the same model"
        )
    known = given or own
    model_type = _model_type(own, given)
    over = None if own else given
    keys, key_notes = _keys_seen(source.typed, engine, over, model_type)
    counted = None if known is None else _counted(known, engine, model_type)
    mtp = max(backbone.mtp_layers if backbone else 0 for backbone in (own, given))
    beneath = over.keys if over and not source.typed.numbers else {}
    found = _read_on_top(keys, beneath, lambda keys: read_letters(keys, engine, counted, mtp, model_type))
    backbone = known or Backbone.alike(len(found.letters))
    letters, layer_notes = _on_dsa_layers(found.letters, backbone)
    try:
        pattern = Pattern(letters)
    except PatternError as error:
        raise EngineConfigError(f"{engine.title} would be given a pattern it cannot run: {error}") from None
    return Imported(pattern, engine, backbone, (*key_notes, *found.notes, *layer_notes), model_type)


def _keys_seen(
    typed: Typed, engine: Engine, over: Backbone | None, model_type: str | None
) -> tuple[Mapping[str, Any], list[str]]:
    """What the text model sees of what was typed, as overrides of a model (`over`) or as a config of its own."""
    if engine.nests and not engine.nests_for(model_type) and not typed.numbers:
        return _handed_on(typed.keys, engine, over), []
    if over and over.wrapper and not typed.numbers:
        return _of_wrapped(typed.keys, engine)
    return _inner_keys(for_engine(typed, engine))


def _handed_on(keys: Mapping[str, Any], engine: Engine, over: Backbone | None) -> Mapping[str, Any]:
    """What an engine sees that hands the keys beside text_config on to the text model, where they win."""
    inner, nested = inner_config(keys)
    if nested and over:
        raise EngineConfigError(
            f"{engine.title} would put this text_config in the place of the model's own: write the keys outside of it"
        )
    return {**inner, **{key: keys[key] for key in PATTERN_KEYS if keys.get(key) is not None}}


def _inner_keys(keys: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The keys of the text model; those beside text_config are not the text model's."""
    inner, wrapper = inner_config(keys)
    outside = [key for key in PATTERN_KEYS if wrapper and key in keys]
    note = f"{', '.join(outside)} stands beside text_config, where the text model does not read it: left out"
    return inner, [note] if outside else []


def _of_wrapped(keys: Mapping[str, Any], engine: Engine) -> tuple[Mapping[str, Any], list[str]]:
    """What an engine sees of keys that are laid over a config that wraps a text model, and notes on the rest."""
    inner, nested = inner_config(keys)
    if nested:
        return inner, [
            *_inner_keys(keys)[1],
            *([] if engine.nested_alone or not engine.nests else [engine.wrapper_note]),
        ]
    outside = ", ".join(key for key in PATTERN_KEYS if key in keys)
    if not outside or not engine.nests:
        return keys, []
    stands = f"{outside} stands outside text_config, and the model's config wraps a text model"
    if engine.nested_alone:
        return {}, [f'{stands}, which does not see it: left out; {engine.title} needs {{"text_config": {{...}}}}']
    return keys, [f"{stands}: whether {engine.title} reads it there is not known here"]


def _read_on_top(
    keys: Mapping[str, Any], config: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Found]
) -> Found:
    """What `read` makes of overrides on top of the model's own config: what they do not replace is read too."""
    kept = {key: config[key] for key in PATTERN_KEYS if config.get(key) is not None and key not in keys}
    found = read({**kept, **keys})
    if not kept or _letters_alone(keys, read) == found.letters:
        return found
    note = f"on top of the model's own config, where {', '.join(kept)} stays as it is"
    return Found(found.letters, (note, *found.notes))


def _letters_alone(keys: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Found]) -> str | None:
    """What the keys say without the model's own config; None where that is nothing."""
    try:
        return read(keys).letters
    except EngineConfigError:
        return None


def _counted(backbone: Backbone, engine: Engine, model_type: str | None) -> int:
    """How many letters the engine counts for this model."""
    return len(backbone.layer_indices) if engine.counts_indexed(model_type) else backbone.num_layers


def _on_dsa_layers(letters: str, backbone: Backbone) -> tuple[str, list[str]]:
    """The letters of the layers with an indexer, of letters over those or over all decoder layers."""
    if len(letters) != backbone.num_layers or len(backbone.layer_indices) == backbone.num_layers:
        return letters, []
    indexed = set(backbone.layer_indices)
    idle = [layer for layer, letter in enumerate(letters) if letter == SHARED and layer not in indexed]
    note = f"layers {', '.join(map(str, idle))} have no indexer: S says nothing there"
    return dsa_letters(letters, backbone.layer_indices), [note] if idle else []
