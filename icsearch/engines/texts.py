"""What a user types or pastes for a pattern that an engine runs: JSON, launch flags, freq and offset."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

from icsearch.engines.backbone import EngineConfigError, text_keys
from icsearch.engines.engine import FREQ, OFFSET, SWITCH, TYPES, Engine
from icsearch.engines.keys import GGUF_KEY, MEGATRON_FREQ, MEGATRON_OFFSET
from icsearch.engines.table import ENGINES, LLAMACPP, LMDEPLOY, MEGATRON_ENGINE, SGLANG, TRANSFORMERS, VLLM
from icsearch.jsonfile import shown, unambiguous

HF_OVERRIDES, SGLANG_ARGS = "--hf-overrides", "--json-model-override-args"
NUMBER_FLAGS = {f"--{name.replace('_', '-')}": name for name in (MEGATRON_FREQ, MEGATRON_OFFSET)}
FLAGS = (HF_OVERRIDES, SGLANG_ARGS, *NUMBER_FLAGS)
_FLAG = re.compile(rf"""(?:^|[\s'"])(?:{"|".join(FLAGS)})(?=[\s=]|$)""")
_NUMBERS = re.compile(r"freq:(\d{1,6})(?:,offset:(\d{1,6}))?")


@dataclass(frozen=True)
class Typed:
    """The keys in a text, and the engine that they were written for where the text says so."""

    keys: dict[str, Any]
    engine: Engine | None = None
    numbers: bool = False  # freq and offset without the name of a key


def split_engine(text: str) -> tuple[Engine | None, str]:
    """An engine named in front, as in `vllm:config.json`, and the rest."""
    name, colon, rest = text.partition(":")
    engine = ENGINES.get(name.strip().lower()) if colon else None
    return (engine, rest.strip()) if engine else (None, text)


def is_typed(text: str) -> bool:
    """Whether this is the text itself, and not the name of a file."""
    return text.startswith(("{", "--", "freq:")) or has_flag(text)


def has_flag(text: str) -> bool:
    """Whether a flag that holds a pattern is among the words, as in `vllm serve MODEL --hf-overrides '{}'`."""
    return bool(_FLAG.search(text))


def parse_typed(text: str) -> Typed:
    """The keys in JSON, in flags that hold JSON, in Megatron's flags, or in `freq:4,offset:2`; EngineConfigError."""
    if text.startswith("{"):
        keys = _parse_json(text)
        return Typed(keys, written_for(keys, None))
    if text.startswith("--") or has_flag(text):
        return _parse_flags(text)
    found = _NUMBERS.fullmatch(text.replace(" ", ""))
    if not found:
        raise EngineConfigError(f"cannot read {text[:60]!r}: expected freq:4 or freq:4,offset:2")
    numbers = {FREQ: int(found[1]), **({} if found[2] is None else {OFFSET: int(found[2])})}
    return Typed(numbers, numbers=True)


def for_engine(typed: Typed, engine: Engine) -> dict[str, Any]:
    """The keys as this engine names them: freq and offset without a name are its own."""
    if not typed.numbers:
        return typed.keys
    reader = engine.reader
    names = {FREQ: reader.freq, OFFSET: reader.offset}
    return {**{names[key]: value for key, value in typed.keys.items()}, SWITCH: True}


def _parse_json(text: str) -> dict[str, Any]:
    try:
        keys = json.loads(text, object_pairs_hook=unambiguous)
    except (ValueError, RecursionError) as error:
        raise EngineConfigError(f"{text[:40]!r} is not JSON ({error}): quote it as one argument") from None
    if not isinstance(keys, dict):
        raise EngineConfigError(f"{shown(keys)} is no JSON object: expected keys such as index_topk_pattern")
    return keys


def _parse_flags(text: str) -> Typed:
    """Launch flags as a shell would split them; other flags beside them are passed over."""
    try:
        words = [part for word in shlex.split(text) for part in _at_equals(word)]
    except ValueError as error:
        raise EngineConfigError(f"{text[:40]!r} cannot be split into flags ({error}): check the quotes") from None
    values = dict(zip(words, [*words[1:], ""], strict=True))
    for flag in (HF_OVERRIDES, SGLANG_ARGS):
        if flag in values:
            keys = _parse_json(values[flag])
            return Typed(keys, written_for(keys, flag))
    numbers = {name: values[flag] for flag, name in NUMBER_FLAGS.items() if flag in values}
    if not numbers:
        raise EngineConfigError(f"no flag of a pattern in {text[:40]!r}: expected one of {', '.join(FLAGS)}")
    wrong = next((value for value in numbers.values() if not re.fullmatch(r"\d{1,6}", value)), None)
    if wrong is not None:
        raise EngineConfigError(f"a flag of Megatron-LM has {wrong[:40]!r}: expected a whole number")
    return Typed({name: int(value) for name, value in numbers.items()}, MEGATRON_ENGINE)


def _at_equals(word: str) -> list[str]:
    """`--flag=value` in its two parts."""
    return word.split("=", 1) if word.startswith("--") else [word]


def written_for(keys: dict[str, Any], flag: str | None) -> Engine:
    """The engine that would read these keys: the flag's, else that of a key that one engine alone has.

    A whole config.json is transformers' own, or vLLM's where transformers does not read the keys for such a model.
    """
    inner = text_keys(keys)
    if flag == SGLANG_ARGS:
        return SGLANG
    if GGUF_KEY in inner:
        return LLAMACPP
    if MEGATRON_FREQ in inner:
        return MEGATRON_ENGINE
    if "num_hidden_layers" in inner:
        model_type = str(keys.get("model_type") or inner.get("model_type")).removesuffix("_text")
        return TRANSFORMERS if model_type in TRANSFORMERS.model_types or TYPES in inner else VLLM
    if SWITCH in inner:
        return VLLM
    if flag == HF_OVERRIDES:
        return LMDEPLOY if TYPES in inner else VLLM
    return TRANSFORMERS
