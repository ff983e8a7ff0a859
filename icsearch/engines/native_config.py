"""The config.json that makes a pattern a checkpoint's own: every key that some engine reads, and all of them agreed.

Rules, from what engines and transformers do with these keys: `indexer_types` and `index_topk_pattern` say the same, one
entry for each decoder layer without multi-token-prediction layers; freq and offset stand beside them only where they
reproduce the pattern, and nothing is null. `use_index_cache` is the switch that vLLM and ROCm ATOM ask for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from icsearch.engines.engine import FREQ, OFFSET, PATTERN, SWITCH, TYPES
from icsearch.engines.keys import config_keys
from icsearch.engines.reading import read_letters
from icsearch.engines.table import TRANSFORMERS
from icsearch.errors import ModelError
from icsearch.jsonfile import MAX_LAYERS, shown, whole
from icsearch.pattern import SHARED
from icsearch.weights.configfile import language_config

KEYS = (TYPES, PATTERN, SWITCH, FREQ, OFFSET)
TEXT_CONFIG = "text_config"


@dataclass(frozen=True)
class NativeConfig:
    """An edited config.json: which keys it got, which it lost, and where they are."""

    document: dict[str, Any]
    written: tuple[str, ...]
    removed: tuple[str, ...]
    nested: bool  # the keys are in text_config


def native_keys(letters: str) -> dict[str, Any]:
    """The keys for one letter F or S a decoder layer."""
    return {**config_keys(letters), **({SWITCH: True} if SHARED in letters else {})}


def edit_config(config: Mapping[str, Any], name: str, letters: str) -> NativeConfig:
    """The config with the keys of a pattern, in its text_config where it wraps a language model; others stay as are.

    Raises ModelError, which names the checkpoint, for a text_config that is none.
    """
    inner, nested, keys = language_config(config, name), bool(config.get(TEXT_CONFIG)), native_keys(letters)
    removed = [key for key in KEYS if key in inner and key not in keys]
    edited = {**{key: value for key, value in inner.items() if key not in removed}, **keys}
    if not nested:
        return NativeConfig(edited, tuple(keys), tuple(removed), nested)
    removed += [key for key in KEYS if key in config and key not in removed]  # outside, where they could contradict
    outside = {key: value for key, value in config.items() if key not in KEYS}
    return NativeConfig({**outside, TEXT_CONFIG: edited}, tuple(keys), tuple(removed), nested)


def num_hidden_layers(config: Mapping[str, Any], name: str) -> int:
    """Decoder layers, without those of multi-token prediction; raises ModelError."""
    found = language_config(config, name).get("num_hidden_layers")
    kind = whole(1, MAX_LAYERS)
    if not kind.fits(found):
        raise ModelError(
            f"config.json of {name} has num_hidden_layers {shown(found)}: expected {kind.name}; download it again"
        )
    return int(found)  # type: ignore[arg-type]  # it fits


def declared_shared(config: Mapping[str, Any], name: str) -> set[int]:
    """The decoder layers that a config itself shares, as transformers reads it; raises EngineConfigError."""
    keys, layers = language_config(config, name), num_hidden_layers(config, name)
    model_type = config.get("model_type")
    found = read_letters(keys, TRANSFORMERS, layers, model_type=model_type if isinstance(model_type, str) else None)
    return {layer for layer, letter in enumerate(found.letters) if letter == SHARED}
