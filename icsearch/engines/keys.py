"""The keys that engines read, made from letters."""

from __future__ import annotations

from typing import Any

from icsearch.engines.engine import FREQ, OFFSET, PATTERN, SWITCH, TYPES
from icsearch.engines.letters import ExportError
from icsearch.engines.schedule import COMMON, MEGATRON, MINIMAX_M3, Schedule
from icsearch.pattern import FULL, SHARED

KINDS = {FULL: "full", SHARED: "shared"}
LETTERS = {kind: letter for letter, kind in KINDS.items()}
GGUF_KEY = "glm-dsa.attention.indexer.types"
MEGATRON_FREQ, MEGATRON_OFFSET = "dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset"


def config_keys(letters: str, _: str | None = None) -> dict[str, Any]:
    """All keys of a config.json, consistent, so that a reader of any one of them sees the same pattern.

    `indexer_types` wins in transformers; freq and offset only where they reproduce the pattern.
    """
    settings: dict[str, Any] = {TYPES: [KINDS[letter] for letter in letters], PATTERN: letters}
    if pair := COMMON.fit(letters):
        settings |= {FREQ: pair[0], OFFSET: pair[1]}
    return settings


def pattern_key(letters: str, _: str | None = None) -> dict[str, Any]:
    """The letters alone."""
    return {PATTERN: letters}


def switched_pattern(letters: str, _: str | None = None) -> dict[str, Any]:
    """The letters, and the switch that makes an engine look at them."""
    return {SWITCH: True, PATTERN: letters}


def atom_keys(letters: str, model_type: str | None) -> dict[str, Any]:
    """ATOM takes `indexer_types` over the letters, and a GLM config always has them once it is loaded."""
    types = {TYPES: [KINDS[letter] for letter in letters]} if model_type == "glm_moe_dsa" else {}
    return {**switched_pattern(letters), **types}


def types_key(letters: str, _: str | None = None) -> dict[str, Any]:
    """The list of full and shared alone."""
    return {TYPES: [KINDS[letter] for letter in letters]}


def gguf_key(letters: str, _: str | None = None) -> dict[str, Any]:
    """The bool array of a GGUF file: true where the layer has an indexer of its own."""
    return {GGUF_KEY: [letter == FULL for letter in letters]}


def vllm_keys(letters: str, model_type: str) -> dict[str, Any]:
    """The letters, or for MiniMax M3, where vLLM reads none, two numbers; ExportError where none give the pattern."""
    if model_type != "minimax_m3_vl":
        return switched_pattern(letters)
    freq, offset = two_numbers(letters, MINIMAX_M3, "vLLM reads no letters for MiniMax M3")
    return {SWITCH: True, FREQ: freq, OFFSET: offset}


def megatron_keys(letters: str, _: str | None = None) -> dict[str, Any]:
    """Megatron's two numbers; raises ExportError, with the nearest pattern, where none give these letters."""
    freq, offset = two_numbers(letters, MEGATRON, "Megatron-LM has no list of layers")
    return {MEGATRON_FREQ: freq, MEGATRON_OFFSET: offset}


def two_numbers(letters: str, schedule: Schedule, lack: str) -> tuple[int, int]:
    """(freq, offset) that give the letters; raises ExportError, with the nearest that two numbers can give, for none.

    `lack` says why numbers it must be.
    """
    if pair := schedule.fit(letters):
        return pair
    freq, offset = schedule.nearest(letters)
    nearest = schedule.letters(len(letters), freq, offset)
    differs = sum(a != b for a, b in zip(letters, nearest, strict=True))
    raise ExportError(
        f"{lack}, and no freq and offset give this pattern: the nearest that they can "
        f"give is {nearest} (freq {freq}, offset {offset}; {differs} of {len(letters)} letters differ, "
        f"{nearest.count(FULL)} F for {letters.count(FULL)}); evaluate that one, and export it"
    )
