"""What a user types or pastes for a pattern that an engine runs: JSON, launch flags, freq and offset."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from icsearch.engines.backbone import EngineConfigError, text_keys
from icsearch.engines.engine import FREQ, OFFSET, PATTERN, SWITCH, TYPES, Engine
from icsearch.engines.flags import (
    HF_OVERRIDES,
    NUMBER_FLAGS,
    SGLANG_ARGS,
    has_flag,
    is_command,
    parse_flags,
    parse_object,
)
from icsearch.engines.keys import GGUF_KEY, MEGATRON_FREQ
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
)

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
