"""A launch command that is pasted: which of its flags hold a pattern, and how each engine's own parser reads them.

vLLM's and LMDeploy's parsers (`FlexibleArgumentParser` in vllm/utils/argparse_utils.py and lmdeploy/cli/utils.py) take
`_` for `-` in an option's name, and one key at a time behind a dot: `--hf-overrides.text_config.index_topk_freq 4`.
All such keys together make one object, which they put behind everything else that was typed. The parsers of SGLang
and Megatron-LM know an option by its own name alone.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from icsearch.engines.backbone import EngineConfigError
from icsearch.engines.keys import MEGATRON_FREQ, MEGATRON_OFFSET
from icsearch.errors import did_you_mean
from icsearch.jsonfile import AmbiguityError, shown, unambiguous

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
