"""Which layers a checkpoint itself shares, by its config.json: transformers' rule, without transformers or torch.

Whoever loads a checkpoint gets what transformers makes of these keys; `icsearch plan` gets it from here. So what is
refused here is refused in front of a load as well: what transformers fails on, takes for all full, or cuts off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icsearch.engines.backbone import mtp_layers
from icsearch.engines.engine import FREQ, OFFSET, PATTERN, TYPES, family
from icsearch.engines.keys import LETTERS
from icsearch.engines.schedule import COMMON
from icsearch.errors import ModelError
from icsearch.jsonfile import MAX_COUNT, shown, whole
from icsearch.pattern import FULL, SHARED, Pattern
from icsearch.weights.configfile import language_config

_READ_BY = ("glm_moe_dsa", "mistral_large4")  # types whose code in transformers 5.23 goes by the keys in this way
_ALL_FULL = ("deepseek_v32", "axk2")  # those that run every indexer: engines may read the keys, transformers does not
_NUMBER = whole(-MAX_COUNT)


def start_pattern(config: Mapping[str, Any], name: str) -> Pattern:
    """All F but for the layers that the checkpoint, called `name`, shares; each decoder layer has an indexer.

    As listed, else by letters, else by freq and offset. A type that transformers does not have is read so, too.
    Raises ModelError.
    """
    inner = language_config(config, name)
    layers = inner["num_hidden_layers"]
    if _type(config) in _ALL_FULL:
        return Pattern.full(layers)
    key = next((key for key in (TYPES, PATTERN) if inner.get(key) is not None), FREQ)
    letters = _by_numbers(inner, name, layers) if key == FREQ else _listed(inner[key], key, name)
    if len(letters) not in (layers, layers + mtp_layers(inner)):
        raise _wrong(name, f"{key} has {len(letters)} letters for {layers} layers: expected one a layer")
    if not letters.startswith(FULL):
        raise _wrong(name, f"{key} makes layer 0 S (shared): expected full first, for no indexers run before it")
    return Pattern(letters[:layers])


def check_sharing(config: Mapping[str, Any], name: str) -> None:
    """Raise ModelError where transformers reads these keys and would fail, or silently read something else."""
    if _type(config) in _READ_BY and language_config(config, name).get("num_hidden_layers") is not None:
        start_pattern(config, name)


def _type(config: Mapping[str, Any]) -> str:
    return family(str(config.get("model_type")))


def _listed(value: Any, key: str, name: str) -> str:
    """The letters of a list of full and shared, or of a text of F and S."""
    as_text = isinstance(value, str) and key == PATTERN
    known = {FULL: FULL, SHARED: SHARED} if as_text else LETTERS
    if not as_text and not isinstance(value, list):
        raise _wrong(name, f"{key} is {shown(value)}: expected {'letters, or ' * (key == PATTERN)}a list")
    for position, one in enumerate(value):
        if not isinstance(one, str) or one not in known:
            raise _wrong(name, f"{key} has {shown(one)} at position {position}: expected {' or '.join(known)}")
    return "".join(known[one] for one in value)


def _by_numbers(inner: Mapping[str, Any], name: str, layers: int) -> str:
    numbers = {FREQ: inner.get(FREQ, 1), OFFSET: inner.get(OFFSET, COMMON.default_offset)}
    for key, value in numbers.items():
        if not _NUMBER.fits(value):
            raise _wrong(name, f"{key} is {shown(value)}: expected a whole number, or no such key")
    return COMMON.letters(layers, max(numbers[FREQ], 1), numbers[OFFSET])


def _wrong(name: str, what: str) -> ModelError:
    return ModelError(f"config.json of {name}: {what}; use the config that belongs to the weights")
