"""A pattern from what an engine is given today: a config.json, overrides as JSON, freq and offset, a GGUF, letters."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icsearch.core.errors import PatternError
from icsearch.core.files import read_text, typed_path
from icsearch.core.jsonfile import MAX_LAYERS, AmbiguityError, shown, unambiguous, whole
from icsearch.core.pattern import FULL, SHARED, Pattern
from icsearch.core.pattern_file import PatternFile
from icsearch.core.text import first_line, parse_toml
from icsearch.engines.engine import GGUF_KEY, LETTER_KEYS, MEGATRON_FREQ, MEGATRON_OFFSET, PRIME_RL_FREQ, Engine, Reader
from icsearch.engines.gguf import read_gguf
from icsearch.engines.table import ENGINES, LLAMACPP, PRIME_RL, find_engine
from icsearch.model.config import (
    COMMON,
    FREQ,
    LETTERS,
    OFFSET,
    PATTERN,
    SWITCH,
    TYPES,
    Backbone,
    EngineConfigError,
    Modes,
    language_config,
    load_config,
    own_modes,
    read_backbone,
)

PATTERN_KEYS = (
    TYPES, *LETTER_KEYS, FREQ, OFFSET, SWITCH, GGUF_KEY, MEGATRON_FREQ, MEGATRON_OFFSET, PRIME_RL_FREQ,
)  # fmt: skip
MAX_SHOWN = 128  # letters in a message
_TABLE = re.compile(r"\[[a-z]")  # how a table of a TOML file begins
_NUMBERS = re.compile(r"freq:(\d{1,6})(?:,offset:(\d{1,6}))?")


class NotKnownError(EngineConfigError):
    """What an engine makes of these keys is not known here."""


@dataclass(frozen=True)
class Imported:
    """The pattern that an engine runs, on the decoder layers of a model, and what is to be known about it.

    `engine` is None for letters, which mean the same to all.
    """

    pattern: Pattern
    engine: Engine | None
    backbone: Backbone
    notes: tuple[str, ...] = ()
    model_type: str | None = None  # as the keys themselves say, where they do

    def pattern_file(self, source: str) -> PatternFile:
        """The pattern.json of it; `source` says where it came from."""
        model = {
            "name_or_path": None,
            "model_type": self.model_type,
            "fingerprint": None,
            "num_hidden_layers": self.backbone.num_layers,
            "wrapper_config": self.backbone.wrapper,
            "source": f"{source}, as {self.engine.title} reads it" if self.engine else source,
        }
        return PatternFile(self.pattern, self.backbone.layer_indices, method="imported", model=model)


def import_pattern(text: str, engine: str | None = None, backbone: Backbone | None = None) -> Imported:
    """The pattern that an engine runs with `text`: a file's name, JSON, or `freq:4,offset:2`; or that letters are.

    The engine is named by `engine`, or in front, as in `megatron:freq:4`; letters and a GGUF need none. `backbone` is
    the model that it is for, where that is known; a config.json says it by itself. Raises EngineConfigError, also
    where no engine is named, or ExportError for an unknown one.
    """
    named, rest = _split_engine(text.strip())
    chosen = find_engine(engine) if engine else named
    if chosen and named and chosen is not named:
        raise EngineConfigError(f"{named.name}: in front and --engine {chosen.name} are two engines: give one of them")
    if is_letters(rest):
        if chosen:
            raise EngineConfigError("these letters are a pattern already, whatever the engine: give them alone")
        known = backbone or Backbone.alike(len(rest))
        return Imported(Pattern.parse(rest, len(known.layer_indices)), None, known, model_type=known.model_type)
    source = _source(rest, backbone)
    if chosen and source.engine not in (None, chosen):
        raise EngineConfigError(
            f"{source.name} is what {source.engine.title} reads, not {chosen.title}: name no engine"
        )
    if source.backbone and (modes := own_modes(source.keys, source.name)):
        return _by_modes(modes, source.backbone)
    chosen = chosen or source.engine
    if chosen is None:
        model_type = _model_type(source.backbone, backbone)
        keys = {FREQ, MEGATRON_FREQ} if source.numbers else {*source.keys, *language_config(source.keys, source.name)}
        looking = [engine for engine in ENGINES.values() if keys.intersection(engine.reader_of(model_type).order)]
        sharing = [engine for engine in looking or ENGINES.values() if engine.serves(model_type)]
        raise EngineConfigError(
            f"{source.name} is read by each engine in its own way, and none is named: give --engine NAME, or NAME: in "
            f"front, one of {', '.join(engine.name for engine in sharing or looking or ENGINES.values())}"
        )
    return _imported(source, chosen, backbone)


def import_config(config: Mapping[str, Any], name: str, engine: Engine, backbone: Backbone) -> Imported:
    """The pattern that an engine runs with a model's own config.json, called `name`, which describes `backbone`.

    Raises EngineConfigError.
    """
    return _imported(_Source(name, config, backbone=backbone), engine, None)


def is_engine_source(text: str) -> bool:
    """Whether a SPEC is of this kind: typed keys, an engine's name in front, a GGUF, or a config of an engine.

    A command line is, too: it is refused here, and in no other place with more sense.
    """
    named, rest = _split_engine(text.strip())
    if named or rest.startswith(("{", "freq:")) or _TABLE.match(rest) or _part_to_give(rest):
        return True
    path = typed_path(rest, EngineConfigError)
    if path.is_dir():
        return (path / "config.json").exists() and not (path / "pattern.json").exists()
    if path.suffix != ".json" or not path.exists():
        return path.suffix in (".gguf", ".toml")
    try:
        document = load_config(path)
        keys = language_config(document, "", EngineConfigError)
    except EngineConfigError:
        return False  # what is wrong with it, the reader of pattern files says
    return "format" not in document and any(key in keys for key in (*PATTERN_KEYS, "num_hidden_layers"))


def _split_engine(text: str) -> tuple[Engine | None, str]:
    """An engine named in front, as in `vllm:config.json`, and the rest."""
    name, colon, rest = text.partition(":")
    engine = ENGINES.get(name.strip().lower()) if colon else None
    return (engine, rest.strip()) if engine else (None, text)


def is_letters(text: str) -> bool:
    """Whether these are the letters of a pattern themselves, and no file's name."""
    return bool(re.fullmatch("[FSfs]+", text)) and not os.path.exists(text)


def how_to_save(letters: str) -> str:
    """The command that writes a pattern.json of letters."""
    return f"icsearch import {letters.upper() if len(letters) <= MAX_SHOWN else '...'} --out pattern.json"


# --- what was given -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """The keys that were typed or are in a file, called `name`.

    `numbers`: freq and offset without the name of a key. `engine` is the one whose format this is, where it is one's.
    `backbone`: what the keys describe by themselves, as a whole config.json does.
    """

    name: str
    keys: Mapping[str, Any]
    numbers: bool = False
    engine: Engine | None = None
    backbone: Backbone | None = None


def _source(text: str, given: Backbone | None) -> _Source:
    """What `text` is: JSON, freq and offset, or a file of that name. EngineConfigError, also for a command line."""
    if text.startswith("{"):
        try:
            keys = json.loads(text, object_pairs_hook=unambiguous)
        except AmbiguityError as error:
            raise EngineConfigError(f"{text[:40]!r} has {error} twice: keep one of them") from None
        except (ValueError, RecursionError) as error:
            raise EngineConfigError(f"{text[:40]!r} is not JSON ({error}): quote it as one argument") from None
        return _of_keys(keys, "the text", given)
    if text.startswith("freq:"):
        numbers = _NUMBERS.fullmatch(text.replace(" ", ""))
        if not numbers:
            raise EngineConfigError(f"cannot read {text[:60]!r}: expected freq:4 or freq:4,offset:2")
        offset = {} if numbers[2] is None else {OFFSET: int(numbers[2])}
        return _Source(text, {FREQ: int(numbers[1]), **offset}, numbers=True)
    if _TABLE.match(text):
        return _of_toml(text)
    if part := _part_to_give(text):
        raise EngineConfigError(f"a command line is not read here: give {part}")
    path = typed_path(text, EngineConfigError)
    if path.suffix == ".gguf":
        keys, backbone = read_gguf(path)
        if not keys:
            raise EngineConfigError(
                f"{path} has no list of layers with an indexer: which ones llama.cpp then takes is not known here"
            )
        return _Source(str(path), keys, engine=LLAMACPP, backbone=backbone)
    if path.suffix == ".toml":
        return _of_toml(path)
    document = load_config(path)
    if str(document.get("format", "")).startswith("icsearch."):
        raise EngineConfigError(f"{path} is a file of icsearch itself: give it to eval or export as it is")
    return _of_keys(document, str(path), given)


def _of_toml(text: str | Path) -> _Source:
    """The table of prime-rl that shares selections, wherever in a TOML text or a file it stands."""
    name, advice = str(text) if isinstance(text, Path) else "the text", "give the file that prime-rl is started with"
    try:
        tables = [parse_toml(read_text(text) if isinstance(text, Path) else text)]
    except OSError as error:
        raise EngineConfigError(f"cannot read {name} ({error.strerror}): {advice}") from None
    except (ValueError, RecursionError) as error:
        raise EngineConfigError(f"{name} is not TOML ({first_line(error)}): {advice}") from None
    found: list[dict[str, Any]] = []
    while tables:
        table = tables.pop()
        tables += [each for each in table.values() if isinstance(each, dict)]
        found += [table[PRIME_RL.inside]] if isinstance(table.get(PRIME_RL.inside), dict) else []
    if not found:
        raise EngineConfigError(f"{name} has no table {PRIME_RL.inside}: prime-rl goes by the model's config.json then")
    if any(keys != found[0] for keys in found):
        raise EngineConfigError(f"{name} has several tables {PRIME_RL.inside}, which differ: give one of them")
    return _Source(name, found[0], engine=PRIME_RL)


def _of_keys(keys: Mapping[str, Any], name: str, given: Backbone | None) -> _Source:
    """A JSON object: the model's own config, or overrides, which lie on top of that of the given model.

    Where a model is given, only what names its type too is a config of its own.
    """
    inner = language_config(keys, name, EngineConfigError)
    typed = given is None or "model_type" in {**keys, **inner}
    whole_config = "num_hidden_layers" in inner and typed
    return _Source(name, keys, backbone=read_backbone(keys, name) if whole_config else None)


# What shows that a text is a command line, and the part of it that is read. What may be in there under another name is
# not denied: the last one says where to look.
_PARTS = (
    (
        re.compile(r"(?<![\w-])--hf[-_]overrides\b"),
        "the JSON object behind --hf-overrides alone, as one argument, and --engine NAME",
    ),
    (
        re.compile(r"(?<![\w-])--json[-_]model[-_]override[-_]args\b"),
        "the JSON object behind --json-model-override-args alone, as one argument, and --engine sglang",
    ),
    (
        re.compile(r"(?<![\w-])--dsa[-_]indexer[-_](topk[-_]freq|skip[-_]topk[-_]offset)\b"),
        "freq:N,offset:M for its --dsa-indexer-topk-freq N and --dsa-indexer-skip-topk-offset M, and --engine megatron",
    ),
    (
        re.compile(r"\A-|\S\s+(?:--?[a-zA-Z]|serve\s)"),
        "the JSON object that it lays over the model's config, as one argument, or that config.json, and --engine NAME",
    ),
)


def _part_to_give(text: str) -> str | None:
    """Of a launch command, or flags of one, the part that is read; None for what is no command, or a file's name."""
    part = next((part for sign, part in _PARTS if sign.search(text)), None)
    return part if text.startswith("-") or not os.path.exists(text) else None


def _model_type(own: Backbone | None, given: Backbone | None) -> str | None:
    """What the keys themselves say, else the model that they are for."""
    return (own.model_type if own else None) or (given.model_type if given else None)


# --- what the engine makes of it ------------------------------------------------------------------------------------


def _imported(source: _Source, engine: Engine, given: Backbone | None) -> Imported:
    own = source.backbone
    if own and given and own.num_layers != given.num_layers:
        raise _other_model(source, own.num_layers, given)
    model_type = _model_type(own, given)
    over = None if own else given
    keys, key_notes = _keys_seen(source, engine, over, model_type)
    layers = keys.get("num_hidden_layers")
    if over and "num_hidden_layers" in keys and layers != over.num_layers:  # so many of them, by what the config says
        if not over.keys:
            raise _other_model(source, layers, over)
        config = {**over.keys, "model_type": over.model_type, "num_hidden_layers": layers}
        found = read_backbone(config, source.name)
        over = replace(over, num_layers=found.num_layers, layer_indices=found.layer_indices)
    known = over or given or own
    mtp = max(backbone.mtp_layers if backbone else 0 for backbone in (own, given))
    beneath = over.keys if over and not source.numbers else {}

    def read(keys: Mapping[str, Any]) -> Read:
        counted = _counted(keys, engine, known, model_type) if known else None
        return read_letters(keys, engine, counted, mtp, model_type)

    letters, notes = _on_top(keys, beneath, read)
    backbone = known or Backbone.alike(len(letters))
    if len(letters) == backbone.num_layers != len(backbone.layer_indices):  # letters over all decoder layers
        indexed = set(backbone.layer_indices)
        if idle := [layer for layer, letter in enumerate(letters) if letter == SHARED and layer not in indexed]:
            notes = [*notes, f"layers {', '.join(map(str, idle))} have no indexer: S says nothing there"]
        letters = "".join(letters[index] for index in backbone.layer_indices)
    try:
        pattern = Pattern(letters)
    except PatternError as error:
        raise EngineConfigError(f"{engine.title} would be given a pattern it cannot run: {error}") from None
    return Imported(pattern, engine, backbone, (*key_notes, *notes), model_type)


def _by_modes(modes: Modes, backbone: Backbone) -> Imported:
    """F where a layer selects, whatever the engine: the config says what the model is."""
    selecting = {*modes.full, *modes.reindex}
    letters = "".join(FULL if layer in selecting else SHARED for layer in backbone.layer_indices)
    notes = [
        f"{backbone.model_type} shares by itself: layers {', '.join(map(str, modes.full))} are Full, "
        f"{', '.join(map(str, modes.reindex)) or 'none'} Reindex (F here: they select, by keys of an earlier layer), "
        "the rest Reuse (S)"
    ]
    try:
        return Imported(Pattern(letters), None, backbone, tuple(notes), backbone.model_type)
    except PatternError as error:
        raise EngineConfigError(f"its index_source_layer_ids are of another model: {error}") from None


def _counted(keys: Mapping[str, Any], engine: Engine, model: Backbone, model_type: str | None) -> int:
    """How many letters these keys give the layers of a model: one a decoder layer, or one a layer with an indexer."""
    reader = engine.reader_of(model_type)
    by_freq = reader.freq_counts_indexed and not any(keys.get(key) for key in LETTER_KEYS)
    return len(model.layer_indices) if by_freq or engine.counts_indexed(model_type) else model.num_layers


def _other_model(source: _Source, layers: Any, given: Backbone) -> EngineConfigError:
    return EngineConfigError(
        f"{source.name[:60]} has {shown(layers)} layers, the model {given.num_layers}: expected the same model"
    )


def _keys_seen(
    source: _Source, engine: Engine, over: Backbone | None, model_type: str | None
) -> tuple[Mapping[str, Any], list[str]]:
    """What the language model sees of the keys, as overrides of a model (`over`) or as its own config, and notes."""
    keys = source.keys
    if isinstance(options := keys.get(engine.inside), dict):
        keys = options
    if source.numbers:
        names = {FREQ: engine.reader.freq, OFFSET: engine.reader.offset}
        return {**{names[key]: value for key, value in keys.items()}, SWITCH: True}, []
    inner = language_config(keys, source.name, EngineConfigError)
    nested = inner is not keys
    outside = [key for key in PATTERN_KEYS if key in keys]
    if engine.nests and not engine.nests_for(model_type):  # it hands on what stands outside, and that wins
        if nested and over:
            raise EngineConfigError(
                f"{engine.title} would put this text_config in the place of the model's own: write the keys outside of "
                "it"
            )
        return {**inner, **{key: keys[key] for key in outside if keys[key] is not None}}, []
    wrapped = over is not None and over.wrapper and engine.nests
    if nested:
        beside = f"{', '.join(outside)} stands beside text_config, where the text model does not read it: left out"
        unsure = [engine.wrapper_note] if wrapped and not engine.nested_alone else []
        return inner, [*([beside] if outside else []), *unsure]
    if not wrapped or not outside:
        return keys, []
    stands = f"{', '.join(outside)} stands outside text_config, and the model's config wraps a text model"
    if engine.nested_alone:
        return {}, [f'{stands}, which does not see it: left out; {engine.title} needs {{"text_config": {{...}}}}']
    return keys, [f"{stands}: whether {engine.title} reads it there is not known here"]


Read = tuple[str, list[str]]  # letters as the engine counts them, and what is to be known about them


def _on_top(keys: Mapping[str, Any], config: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Read]) -> Read:
    """What `read` makes of overrides on top of the model's own config: what they do not replace is read too."""
    kept = {key: config[key] for key in PATTERN_KEYS if config.get(key) is not None and key not in keys}
    letters, notes = read({**kept, **keys})
    try:
        alone = read(keys)[0] if kept else letters
    except EngineConfigError:
        alone = None  # the keys say nothing by themselves
    if alone != letters:
        notes = [f"on top of the model's own config, where {', '.join(kept)} stays as it is", *notes]
    return letters, notes


# --- an engine's rules ----------------------------------------------------------------------------------------------


def read_letters(
    keys: Mapping[str, Any], engine: Engine, num_letters: int | None, mtp_layers: int = 0, model_type: str | None = None
) -> Read:
    """What the engine makes of these keys for a model of so many letters (None: as many as the keys have).

    Raises EngineConfigError for keys that no engine reads as a pattern, or that this one fails on.
    """
    reader = engine.reader_of(model_type)
    given = {key: keys[key] for key in PATTERN_KEYS if keys.get(key) is not None or (key == FREQ and FREQ in keys)}
    key = next((key for key in reader.order if key in given), None)
    if key is None:
        letters, notes = _by_default(given, engine, reader, num_letters, model_type)
    else:
        letters, notes = _fitted(
            _letters_of(key, given, reader, num_letters), key, engine, reader, num_letters, mtp_layers
        )
        notes += _losing(key, given, letters, engine, reader)
        letters, switch_notes = _switched(key, given, letters, engine, reader)
        notes += switch_notes
        if model_type and not engine.serves(model_type):
            notes.append(f"{engine.title} is not known to read {key} for {model_type}: it may run every layer as F")
    if reader.first_is_full and letters[0] == SHARED:
        notes.append(f"{engine.title} takes layer 0 as F, whatever is given")
        letters = FULL + letters[1:]
    return letters, notes


def _by_default(
    given: Mapping[str, Any], engine: Engine, reader: Reader, num_letters: int | None, model_type: str | None
) -> Read:
    """Where no key says anything: all F, but for a family that shares by itself."""
    if unknown := [key for key in given if key in reader.unknown]:
        raise NotKnownError(
            f"how {engine.title} reads {unknown[0]}{f' for {model_type}' if model_type else ''} is not known here: "
            f"give {' or '.join(reader.order)}"
        )
    if num_letters is None:
        raise EngineConfigError(
            f"no key that {engine.title} reads: expected one of {', '.join(reader.order)}; check the text, or "
            "give another --engine"
        )
    unread = f" (it does not read {', '.join(given)})" if given else ""
    freq = reader.default_freq
    what = "every layer is F" if freq == 1 else f"every {freq}th layer is F, as {model_type} has it by default"
    return COMMON.letters(num_letters, freq), [f"no key that {engine.title} reads{unread}: {what}"]


def _letters_of(key: str, given: Mapping[str, Any], reader: Reader, num_letters: int | None) -> str:
    """The letters by one key, as long as it says; EngineConfigError for a value that nobody means."""
    value = given[key]
    if key == GGUF_KEY:  # as a bool, in some files as 0 and 1
        if not _is_list(value) or not all(flag in (0, 1) for flag in value):
            raise EngineConfigError(f"{key} is {shown(value)}: expected a list of true and false, one a layer")
        return "".join(FULL if flag else SHARED for flag in value)
    if key == TYPES or (key == PATTERN and reader.words and isinstance(value, list)):
        if not _is_list(value):
            raise EngineConfigError(f"{key} is {shown(value)}: expected a list of full and shared, one a layer")
        for layer, kind in enumerate(value):
            if not isinstance(kind, str) or kind not in LETTERS:
                raise EngineConfigError(
                    f"{key} has {shown(kind)} for layer {layer}: expected full or shared (transformers takes a list of "
                    "anything else as all full without a word)"
                )
        return "".join(LETTERS[kind] for kind in value)
    if key in LETTER_KEYS:
        return _from_letters(key, value.upper() if reader.any_case and isinstance(value, str) else value)
    if num_letters is None:
        raise EngineConfigError(
            f"{key} alone does not say how many layers there are: give --layers N, or --model-config CONFIG.json"
        )
    freq, offset = given.get(reader.freq), given.get(reader.offset)
    if freq is None and reader.null_is_one:
        freq = 1
    if not whole(1, MAX_LAYERS).fits(freq):
        raise EngineConfigError(
            f"{reader.freq} is {shown(freq)}: expected an integer from 1; remove the key where it is not meant"
        )
    if offset is not None and not whole(0, MAX_LAYERS).fits(offset):
        raise EngineConfigError(f"{reader.offset} is {shown(offset)}: expected an integer from 0")
    return reader.schedule.letters(num_letters, freq, offset)  # type: ignore[arg-type]  # they fit


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= MAX_LAYERS


def _from_letters(key: str, value: Any) -> str:
    """A text of F and S, or a list of them."""
    if not _is_list(value) and not (isinstance(value, str) and 1 <= len(value) <= MAX_LAYERS):
        raise EngineConfigError(f"{key} is {shown(value)}: expected the letters F and S, one a layer")
    for layer, letter in enumerate(value):
        if letter not in (FULL, SHARED):
            raise EngineConfigError(
                f"{key} has {shown(letter)} for layer {layer}: expected F or S in a list (an engine that compares with "
                "S takes anything else as F without a word)"
                if isinstance(value, list)
                else f"{key} has {letter!r} at position {layer}: expected F and S in capitals (engines take another "
                "letter as F, transformers fails)"
            )
    return "".join(value)


def _fitted(letters: str, key: str, engine: Engine, reader: Reader, num_letters: int | None, mtp_layers: int) -> Read:
    """The letters of the backbone: cut behind it, or F from where they end, where the engine does so."""
    if num_letters is None or len(letters) == num_letters:
        return letters, []
    more = len(letters) - num_letters
    said = f"{key} has {len(letters)} letters"
    if more == mtp_layers and mtp_layers:
        return letters[:num_letters], [f"{said}, the last {more} of multi-token prediction: left out"]
    said += f", the model {num_letters}"
    if not reader.past_the_end:
        raise EngineConfigError(
            f"{said}: what {engine.title} does then is an error or not known here; give one letter a layer"
        )
    if more > 0:
        return letters[:num_letters], [f"{said}: {engine.title} reads no further"]
    return letters + FULL * -more, [f"{said}: past the end {engine.title} takes F"]


def _losing(key: str, given: Mapping[str, Any], letters: str, engine: Engine, reader: Reader) -> list[str]:
    """Notes on other keys that say something else and lose."""
    notes = []
    for other in (TYPES, PATTERN, FREQ):
        if other == key or other not in given or (other == FREQ and reader.freq != FREQ):
            continue
        try:
            differs = _letters_of(other, given, reader, len(letters))[: len(letters)] != letters
        except EngineConfigError:
            differs = True
        if differs:
            notes.append(f"{other} says something else: {engine.title} goes by {key}")
    return notes


def _switched(key: str, given: Mapping[str, Any], letters: str, engine: Engine, reader: Reader) -> Read:
    """The letters, or all F where the engine leaves the pattern alone."""
    if SHARED not in letters or given.get(SWITCH) is True:
        return letters, []
    if not reader.needs_switch:
        off = f"{engine.title} does not read {SWITCH}, false here: the pattern runs all the same"
        return letters, [off] if SWITCH in given else []
    freq = given.get(reader.freq)
    if SWITCH not in given and reader.switched_by_freq and isinstance(freq, int) and freq > 1:
        return letters, []
    return FULL * len(letters), [f"{engine.title} looks at {key} with {SWITCH} true alone: as given, every layer is F"]
