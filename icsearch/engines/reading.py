"""The pattern that an engine runs with given keys, by the engine's own rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from icsearch.engines.backbone import EngineConfigError
from icsearch.engines.engine import FREQ, HEEDED, OFFSET, PATTERN, SWITCH, TYPES, Engine, Reader
from icsearch.engines.keys import GGUF_KEY, LETTERS, MEGATRON_FREQ, MEGATRON_OFFSET
from icsearch.engines.schedule import COMMON
from icsearch.engines.table import TRANSFORMERS
from icsearch.jsonfile import MAX_LAYERS, shown
from icsearch.pattern import FULL, SHARED

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
