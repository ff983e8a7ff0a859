"""A pattern from what an engine is given today: a config.json, overrides, freq and offset, a GGUF file."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icsearch.core.errors import PatternError
from icsearch.core.files import typed_path
from icsearch.core.jsonfile import MAX_LAYERS, AmbiguityError, shown, unambiguous
from icsearch.core.pattern import FULL, SHARED, Pattern
from icsearch.core.pattern_file import PatternFile
from icsearch.core.text import did_you_mean
from icsearch.engines.engine import GGUF_KEY, HEEDED, MEGATRON_FREQ, MEGATRON_OFFSET, Engine, Reader, dsa_letters
from icsearch.engines.gguf import read_gguf
from icsearch.engines.table import (
    ATOM_ENGINE,
    ENGINES,
    LLAMACPP,
    LMDEPLOY,
    MEGATRON_ENGINE,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    VLLM_ASCEND,
    find_engine,
)
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
    inner_config,
    load_config,
    read_backbone,
    text_keys,
)

HF_OVERRIDES, SGLANG_ARGS = "--hf-overrides", "--json-model-override-args"
NUMBER_FLAGS = {f"--{name.replace('_', '-')}": name for name in (MEGATRON_FREQ, MEGATRON_OFFSET)}
FLAGS = (HF_OVERRIDES, SGLANG_ARGS, *NUMBER_FLAGS)
_PARSERS = {SGLANG_ARGS: "SGLang's", **dict.fromkeys(NUMBER_FLAGS, "Megatron-LM's")}  # which are strict about names
_ANY_SPELLING = "|".join(flag[2:].replace("-", "[-_]") for flag in FLAGS)
_FLAG = re.compile(rf"""(?:^|[\s'"])--(?:{_ANY_SPELLING})(?=[\s=.]|$)""")
_COMMAND = re.compile(r"\S\s+(?:--?[a-zA-Z]|serve\s)")
# Flags of Megatron-LM's own that are near to those of a pattern, and hold none.
_OTHERS = ("--dsa-indexer-topk", "--dsa-indexer-n-heads", "--dsa-indexer-head-dim", "--dsa-indexer-loss-coeff")
_LIST = "+"  # at the end of a dotted key: its values, with commas between, are items of a list
_NOT_JSON = {"True": "true", "False": "false", "None": "null"}


@dataclass(frozen=True)
class Flags:
    """What the flags of one engine say: keys, the flag that they came with, and what is to be known about them."""

    flag: str
    keys: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Given:
    """One flag of a pattern, as typed: `path` is what stands behind its first dot."""

    flag: str
    typed: str
    path: str
    value: str


def has_flag(text: str) -> bool:
    """Whether a flag that holds a pattern is among the words, as in `vllm serve MODEL --hf-overrides '{}'`."""
    return bool(_FLAG.search(text))


def is_command(text: str) -> bool:
    """Whether this is a launch command or flags of one, with a pattern among them or not, and no file's name."""
    return text.startswith("--") or has_flag(text) or (bool(_COMMAND.search(text)) and not os.path.exists(text))


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object as typed; raises EngineConfigError."""
    try:
        keys = json.loads(text, object_pairs_hook=unambiguous)
    except (ValueError, RecursionError) as error:
        raise EngineConfigError(f"{text[:40]!r} is not JSON ({error}): quote it as one argument") from None
    if not isinstance(keys, dict):
        raise EngineConfigError(f"{shown(keys)} is no JSON object: expected keys such as index_topk_pattern")
    return keys


def parse_flags(text: str) -> Flags:
    """Launch flags as a shell would split them; other flags beside them are passed over. EngineConfigError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise EngineConfigError(f"{text[:40]!r} cannot be split into flags ({error}): check the quotes") from None
    given = list(_given(words))
    for flag in (HF_OVERRIDES, SGLANG_ARGS):
        if of_flag := [one for one in given if one.flag == flag]:
            return _overrides(flag, of_flag)
    if not given:
        raise EngineConfigError(f"no flag of a pattern in {text[:40]!r}: {_instead(words)}")
    return Flags(given[0].flag, {NUMBER_FLAGS[one.flag]: _number(one.value) for one in given})


def _instead(words: Sequence[str]) -> str:
    """What was probably meant by words that hold no flag of a pattern, or what an engine does without one."""
    for word in words:
        name = re.split("[=.]", word)[0]
        spelled = name.replace("_", "-")
        if name.startswith("--") and spelled not in _OTHERS and (meant := did_you_mean(spelled, FLAGS, "--")):
            return f"for {shown(name)}, {meant}"
    return f"without {', '.join(FLAGS)} an engine runs what the model's config says; give its config.json"


def _given(words: Sequence[str]) -> Iterator[_Given]:
    """The flags of a pattern among the words, with their values: behind an equals sign, or the next word."""
    for place, word in enumerate(words):
        typed, equals, value = word.partition("=")
        name, dot, path = typed.partition(".")
        flag = name.replace("_", "-")
        if flag not in FLAGS or not name.startswith("--"):
            continue
        if flag in _PARSERS and typed != flag:
            raise EngineConfigError(f"{shown(typed)}: {_PARSERS[flag]} parser knows {flag} alone; write it so")
        if dot and not all(path.removesuffix(_LIST).split(".")):
            raise EngineConfigError(f"{shown(typed)} names no key: expected one such as {flag}.index_topk_pattern")
        if not equals and place + 1 == len(words):
            raise EngineConfigError(f"{shown(typed)} has no value: give it behind a space or an equals sign")
        yield _Given(flag, typed, path, value if equals else words[place + 1])


def _overrides(flag: str, given: Sequence[_Given]) -> Flags:
    """The object that an engine gets: the last whole one, or, where there are any, the dotted keys alone."""
    whole, dotted = [one for one in given if not one.path], [one for one in given if one.path]
    if not dotted:
        notes = [f"{flag} is given {len(whole)} times: engines read the last one alone"] if len(whole) > 1 else []
        return Flags(flag, parse_object(whole[-1].value), tuple(notes))
    keys: dict[str, Any] = {}
    for one in dotted:
        _merge(keys, _nested(one))
    notes = [f"{flag} beside {shown(dotted[0].typed)} is not read: the dotted keys take its place"] if whole else []
    return Flags(flag, keys, tuple(notes))


def _nested(one: _Given) -> dict[str, Any]:
    """`a.b` and its value as {"a": {"b": value}}: JSON where it is some, else text."""
    path, value = one.path, _value(one)
    if path.endswith(_LIST):
        path, value = path.removesuffix(_LIST), one.value.split(",")
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _value(one: _Given) -> Any:
    if one.value in _NOT_JSON:
        raise EngineConfigError(
            f"{shown(one.typed)} has {one.value}, which engines read as a text: write {_NOT_JSON[one.value]}, as JSON "
            "does"
        )
    try:
        return json.loads(one.value, object_pairs_hook=unambiguous)
    except AmbiguityError as error:
        raise EngineConfigError(f"{shown(one.typed)} {error}: give it once") from None
    except (ValueError, RecursionError):
        return one.value


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    """Objects are merged, lists joined; of anything else the later one stays."""
    for key, value in more.items():
        known = into.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            _merge(known, value)
        elif isinstance(known, list) and isinstance(value, list):
            known += value
        else:
            into[key] = value


def _number(value: str) -> int:
    if not re.fullmatch(r"\d{1,6}", value):
        raise EngineConfigError(f"a flag of Megatron-LM has {value[:40]!r}: expected a whole number")
    return int(value)


MAX_SHOWN = 128  # letters in a message
TAKING_OVERRIDES = (VLLM, LMDEPLOY, ATOM_ENGINE, VLLM_ASCEND)  # those that have a flag --hf-overrides
_NUMBERS = re.compile(r"freq:(\d{1,6})(?:,offset:(\d{1,6}))?")


@dataclass(frozen=True)
class Typed:
    """The keys in a text, and the engine that they were written for where the text says so."""

    keys: dict[str, Any]
    engine: Engine | None = None
    numbers: bool = False  # freq and offset without the name of a key
    notes: tuple[str, ...] = ()  # what is to be known of the flags
    flag: str | None = None  # that the keys came with


def is_letters(text: str) -> bool:
    """Whether these are the letters of a pattern themselves, and no file's name."""
    return bool(re.fullmatch("[FSfs]+", text)) and not os.path.exists(text)


def how_to_save(letters: str) -> str:
    """The command that writes a pattern.json of letters."""
    written = letters.upper() if len(letters) <= MAX_SHOWN else "..."
    return f"""icsearch import '{{"{PATTERN}": "{written}"}}' --out pattern.json"""


def split_engine(text: str) -> tuple[Engine | None, str]:
    """An engine named in front, as in `vllm:config.json`, and the rest."""
    name, colon, rest = text.partition(":")
    engine = ENGINES.get(name.strip().lower()) if colon else None
    return (engine, rest.strip()) if engine else (None, text)


def is_typed(text: str) -> bool:
    """Whether this is the text itself, and not the name of a file."""
    return text.startswith(("{", "freq:")) or is_command(text)


def parse_typed(text: str) -> Typed:
    """The keys in JSON, in flags that hold JSON, in Megatron's flags, or in `freq:4,offset:2`; EngineConfigError."""
    if text.startswith("{"):
        keys = parse_object(text)
        return Typed(keys, written_for(keys, None))
    if has_flag(text) or not text.startswith("freq:"):
        flags = parse_flags(text)
        return Typed(flags.keys, written_for(flags.keys, flags.flag), notes=flags.notes, flag=flags.flag)
    found = _NUMBERS.fullmatch(text.replace(" ", ""))
    if not found:
        raise EngineConfigError(f"cannot read {text[:60]!r}: expected freq:4 or freq:4,offset:2")
    numbers = {FREQ: int(found[1]), **({} if found[2] is None else {OFFSET: int(found[2])})}
    return Typed(numbers, numbers=True)


def takers(typed: Typed, model_type: str | None) -> list[Engine]:
    """The engines that can be given these keys in this way, and look at one of them; of a known type, those it serves.

    Flags other than --hf-overrides are one engine's own.
    """
    if typed.numbers or typed.flag in (SGLANG_ARGS, *NUMBER_FLAGS):
        return []
    engines = TAKING_OVERRIDES if typed.flag == HF_OVERRIDES else ENGINES.values()
    keys = {**typed.keys, **text_keys(typed.keys)}
    return [
        engine
        for engine in engines
        if any(key in keys for key in engine.reader_of(model_type).order)
        and (model_type is None or engine.serves(model_type))
    ]


def for_engine(typed: Typed, engine: Engine) -> dict[str, Any]:
    """The keys as this engine names them: freq and offset without a name are its own."""
    if not typed.numbers:
        return typed.keys
    reader = engine.reader
    names = {FREQ: reader.freq, OFFSET: reader.offset}
    return {**{names[key]: value for key, value in typed.keys.items()}, SWITCH: True}


def written_for(keys: dict[str, Any], flag: str | None) -> Engine:
    """The engine that would read these keys: the flag's, else that of a key that one engine alone has.

    A whole config.json is transformers' own, or vLLM's where transformers does not read the keys for such a model.
    """
    inner = text_keys(keys)
    if flag == SGLANG_ARGS:
        return SGLANG
    if GGUF_KEY in inner:
        return LLAMACPP
    if flag in NUMBER_FLAGS or MEGATRON_FREQ in inner:
        return MEGATRON_ENGINE
    if "num_hidden_layers" in inner:
        model_type = str(keys.get("model_type") or inner.get("model_type")).removesuffix("_text")
        return TRANSFORMERS if model_type in TRANSFORMERS.model_types or TYPES in inner else VLLM
    if SWITCH in inner:
        return VLLM
    if flag == HF_OVERRIDES:
        return LMDEPLOY if TYPES in inner else VLLM
    return TRANSFORMERS


PATTERN_KEYS = (TYPES, PATTERN, FREQ, OFFSET, SWITCH, GGUF_KEY, MEGATRON_FREQ, MEGATRON_OFFSET)
DEFAULT_FREQ = {"hy_v4": 4}  # transformers' hy_v4 shares by itself where the config does not say; it reads TYPES alone


@dataclass(frozen=True)
class Found:
    """The letters that an engine runs, as it counts them, and what is to be known about them."""

    letters: str
    notes: tuple[str, ...] = ()


def read_letters(
    keys: Mapping[str, Any], engine: Engine, num_letters: int | None, mtp_layers: int = 0, model_type: str | None = None
) -> Found:
    """What the engine makes of these keys for a model of so many letters (None: as many as the keys have).

    Raises EngineConfigError for keys that no engine reads as a pattern, or that this one fails on.
    """
    notes: list[str] = []
    reader = engine.reader_of(model_type)
    given = {key: keys[key] for key in PATTERN_KEYS if keys.get(key) is not None or (key == FREQ and FREQ in keys)}
    readable = _readable(given, engine, reader, model_type)
    key = next((key for key in reader.order if key in readable), None)
    if key is None:
        letters = _default(engine, reader, num_letters, model_type, given, notes)
    else:
        letters = _letters_of(key, given, reader, num_letters)
        letters = _fit_length(letters, key, engine, reader, num_letters, mtp_layers, notes)
        notes += _ignored(key, given, letters, engine, reader)
        letters = _switch(key, given, letters, engine, reader, notes)
        if model_type and not engine.serves(model_type):
            notes.append(f"{engine.title} is not known to read {key} for {model_type}: it may run every layer as F")
    if reader.first_is_full and letters[0] == SHARED:
        notes.append(f"{engine.title} takes layer 0 as F, whatever is given")
        letters = FULL + letters[1:]
    return Found(letters, tuple(notes))


def _readable(given: Mapping[str, Any], engine: Engine, reader: Reader, model_type: str | None) -> list[str]:
    """The given keys that this engine looks at for this type of model."""
    unknown = [key for key in given if key in reader.unknown]
    if unknown and not any(key in reader.order for key in given):
        raise EngineConfigError(
            f"how {engine.title} reads {unknown[0]} for {model_type} is not known here: "
            f"give {' or '.join(reader.order)}"
        )
    types_alone = engine is TRANSFORMERS and model_type in DEFAULT_FREQ
    return [key for key in given if key in reader.order and not (types_alone and key != TYPES)]


def _default(
    engine: Engine,
    reader: Reader,
    num_letters: int | None,
    model_type: str | None,
    given: Mapping[str, Any],
    notes: list[str],
) -> str:
    """The letters where no key says anything: all F, but for a family that shares by itself."""
    if num_letters is None:
        raise EngineConfigError(
            f"no key that {engine.title} reads: expected one of {', '.join(reader.order)}; check the text, or "
            "give another --engine"
        )
    unread = f" (it does not read {', '.join(given)})" if given else ""
    freq = DEFAULT_FREQ.get(model_type or "", 1) if engine is TRANSFORMERS else 1
    what = "every layer is F" if freq == 1 else f"every {freq}th layer is F, as {model_type} has it by default"
    notes.append(f"no key that {engine.title} reads{unread}: {what}")
    return COMMON.letters(num_letters, freq)


def _letters_of(key: str, given: Mapping[str, Any], reader: Reader, num_letters: int | None) -> str:
    if key == TYPES:
        return _from_types(given[key])
    if key == PATTERN:
        return _from_pattern(given[key], reader)
    if key == GGUF_KEY:
        return _from_flags(given[key])
    if num_letters is None:
        raise EngineConfigError(
            f"{key} alone does not say how many layers there are: give --layers N, or --model-config CONFIG.json"
        )
    return _from_schedule(given, reader, num_letters)


def _from_types(value: Any, key: str = TYPES) -> str:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_LAYERS:
        raise EngineConfigError(f"{key} is {shown(value)}: expected a list of full and shared, one a layer")
    for layer, kind in enumerate(value):
        if not isinstance(kind, str) or kind not in LETTERS:
            raise EngineConfigError(
                f"{key} has {shown(kind)} for layer {layer}: expected full or shared (transformers takes a list of "
                "anything else as all full without a word)"
            )
    return "".join(LETTERS[kind] for kind in value)


def _from_pattern(value: Any, reader: Reader) -> str:
    """A text of F and S; as a list, the words that transformers takes there, or the letters that others do."""
    if isinstance(value, list) and reader.words:
        return _from_types(value, PATTERN)
    if isinstance(value, list):
        wrong = [(layer, kind) for layer, kind in enumerate(value) if kind not in (FULL, SHARED)]
        if wrong:
            layer, kind = wrong[0]
            raise EngineConfigError(
                f"{PATTERN} has {shown(kind)} for layer {layer}: expected F or S in a list (an engine that compares "
                "with S takes anything else as F without a word)"
            )
        value = "".join(value)
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_LAYERS:
        raise EngineConfigError(f"{PATTERN} is {shown(value)}: expected the letters F and S, one a layer")
    for layer, letter in enumerate(value):
        if letter not in (FULL, SHARED):
            raise EngineConfigError(
                f"{PATTERN} has {letter!r} at position {layer}: expected F and S in capitals (engines take another "
                "letter as F, transformers fails)"
            )
    return value


def _from_flags(value: Any) -> str:
    """llama.cpp's array; files have it as bool, some as 0 and 1."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_LAYERS or not all(flag in (0, 1) for flag in value):
        raise EngineConfigError(f"{GGUF_KEY} is {shown(value)}: expected a list of true and false, one a layer")
    return "".join(FULL if flag else SHARED for flag in value)


def _from_schedule(given: Mapping[str, Any], reader: Reader, num_letters: int) -> str:
    freq, offset = given.get(reader.freq), given.get(reader.offset)
    if isinstance(freq, bool) or not isinstance(freq, int) or not 1 <= freq <= MAX_LAYERS:
        raise EngineConfigError(
            f"{reader.freq} is {shown(freq)}: expected an integer from 1 (transformers and vLLM fail on null); remove "
            "the key where it is not meant"
        )
    if offset is not None and (
        isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset <= MAX_LAYERS
    ):
        raise EngineConfigError(f"{reader.offset} is {shown(offset)}: expected an integer from 0")
    return reader.schedule.letters(num_letters, freq, offset)


def _fit_length(
    letters: str,
    key: str,
    engine: Engine,
    reader: Reader,
    num_letters: int | None,
    mtp_layers: int,
    notes: list[str],
) -> str:
    """The letters of the backbone: cut behind it, or F from where they end, where the engine does so."""
    if num_letters is None or len(letters) == num_letters:
        return letters
    more = len(letters) - num_letters
    if more == mtp_layers and mtp_layers:
        notes.append(f"{key} has {len(letters)} letters, the last {more} of multi-token prediction: left out")
        return letters[:num_letters]
    if not reader.past_the_end:
        raise EngineConfigError(
            f"{key} has {len(letters)} letters, the model {num_letters}: what {engine.title} does then is an error or "
            "not known here; give one letter a layer"
        )
    if more > 0:
        notes.append(f"{key} has {len(letters)} letters, the model {num_letters}: {engine.title} reads no further")
        return letters[:num_letters]
    notes.append(f"{key} has {len(letters)} letters, the model {num_letters}: past the end {engine.title} takes F")
    return letters + FULL * -more


def _ignored(key: str, given: Mapping[str, Any], letters: str, engine: Engine, reader: Reader) -> list[str]:
    """Notes on other keys that say something else and lose."""
    notes = []
    for other in (TYPES, PATTERN, FREQ):
        if other == key or other not in given:
            continue
        try:
            differs = _letters_of(other, given, reader, len(letters))[: len(letters)] != letters
        except EngineConfigError:
            differs = True
        if differs:
            notes.append(f"{other} says something else: {engine.title} goes by {key}")
    return notes


def _switch(key: str, given: Mapping[str, Any], letters: str, engine: Engine, reader: Reader, notes: list[str]) -> str:
    """The letters, or all F where the engine leaves the pattern alone."""
    if reader.switch is None or SHARED not in letters or given.get(SWITCH) is True:
        return letters
    if SWITCH not in given and reader.switch == HEEDED:
        notes.append(f"{SWITCH} is missing: versions of {engine.title} that ask for it run every layer as F")
        return letters
    freq = given.get(reader.freq)
    if SWITCH not in given and reader.switched_by_freq and isinstance(freq, int) and freq > 1:
        return letters
    notes.append(f"{engine.title} looks at {key} with {SWITCH} true alone: as given, every layer is F")
    return FULL * len(letters)


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
