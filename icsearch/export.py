"""What to give a serving engine so that it runs a pattern: launch flags or config.json keys, with warnings.

Every engine counts all decoder layers of the backbone from 0, without multi-token-prediction layers. A layer that
has no indexer of its own is written as F: there is nothing to skip there, and past the end of a pattern the
engines take F as well.
"""

from __future__ import annotations

import json
import shlex
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any

from icsearch.errors import IcsearchError
from icsearch.jsonfile import FieldError, check_fields
from icsearch.pattern import FULL, MODEL_FIELDS, SHARED, Pattern, PatternFile

PIPELINE_SIZES = (2, 4, 8)
DEFAULT_OFFSET = 2  # what every engine takes when index_skip_topk_offset is not given


class ExportError(IcsearchError):
    """A pattern that cannot be written for an engine."""


@dataclass(frozen=True)
class Export:
    """One engine's form of a pattern. `text` is what to paste, `how` says where, `warnings` what to look out for."""

    engine: str
    title: str
    text: str
    how: str
    pattern: Pattern
    decoder_letters: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """How one engine reads a pattern. `split` gives the layers of each pipeline stage, None where it has no stages."""

    name: str
    title: str
    how: str
    settings: Callable[[str], dict[str, Any]]
    render: Callable[[dict[str, Any]], str]
    model_types: tuple[str, ...]
    on_other_types: str
    wrapper_note: str
    split: Callable[[int, int], list[int]] | None = None
    partition_variable: str | None = None


def export(pattern_file: PatternFile, engine: str, retention: Fraction | None = None) -> Export:
    """The pattern of a pattern.json for one engine; with `retention`, an earlier pattern of the same run.

    Raises ExportError for an unknown engine or a pattern that the checkpoint cannot run, PatternError where the
    run holds no pattern of that retention.
    """
    target = find_engine(engine)
    pattern = pattern_file.pattern if retention is None else pattern_file.at_retention(retention)
    _check_model(pattern_file.model)
    _check_native(pattern, pattern_file.model)
    letters = decoder_letters(pattern, pattern_file.layer_indices, pattern_file.model.get("num_hidden_layers"))
    settings = target.settings(letters)
    if pattern_file.model.get("wrapper_config"):
        settings = {"text_config": settings}
    return Export(
        engine=target.name,
        title=target.title,
        text=target.render(settings),
        how=target.how,
        pattern=pattern,
        decoder_letters=letters,
        warnings=tuple(_warnings(target, pattern, pattern_file, letters)),
    )


def find_engine(name: str) -> Engine:
    """The table's row for an engine; raises ExportError with the known names."""
    engine = ENGINES.get(name.strip().lower())
    if engine is None:
        raise ExportError(f"unknown engine {name!r}: expected one of {', '.join(ENGINES)}")
    return engine


def decoder_letters(pattern: Pattern, layer_indices: Sequence[int], num_hidden_layers: int | None) -> str:
    """One letter for each decoder layer: the pattern's at `layer_indices`, F where a layer has no indexer."""
    indices = list(layer_indices)
    if len(indices) != len(pattern):
        raise ExportError(f"{len(indices)} layer_indices for {len(pattern)} letters: expected as many; mend the file")
    if indices != sorted(set(indices)) or indices[0] < 0:
        raise ExportError(f"layer_indices {indices} are not increasing layer numbers: write the file again")
    if num_hidden_layers is None:
        if indices != list(range(len(pattern))):
            raise ExportError(
                "the pattern covers only some decoder layers, and the file does not say how many there are: "
                "add model.num_hidden_layers from the checkpoint's config.json"
            )
        return pattern.letters
    if indices[-1] >= num_hidden_layers:
        raise ExportError(
            f"layer_indices reach {indices[-1]}, but model.num_hidden_layers is {num_hidden_layers}: "
            "expected smaller indices; write the file again"
        )
    letters = [FULL] * num_hidden_layers
    for index, letter in zip(indices, pattern.letters, strict=True):
        letters[index] = letter
    return "".join(letters)


def freq_and_offset(letters: str) -> tuple[int, int] | None:
    """(index_topk_freq, index_skip_topk_offset) that reproduce the letters, or None where no such pair does.

    Engines and transformers take layer i as F iff max(i - offset + 1, 0) % freq == 0, with i from 0.
    """
    if SHARED not in letters:
        return 1, DEFAULT_OFFSET
    offset = letters.index(SHARED)  # the first S can only be at i = offset, and the first F behind it freq - 1 further
    following = letters.find(FULL, offset)
    freq = (following if following >= 0 else len(letters)) - offset + 1
    fits = all((max(i - offset + 1, 0) % freq == 0) == (letter == FULL) for i, letter in enumerate(letters))
    return (freq, offset) if fits else None


# --- pipeline stages ----------------------------------------------------------------------------------------------


def split_front(num_layers: int, stages: int) -> list[int]:
    """Layers per stage, as even as can be, the larger stages first."""
    size, rest = divmod(num_layers, stages)
    return [size + (stage < rest) for stage in range(stages)]


def split_vllm(num_layers: int, stages: int) -> list[int]:
    """Layers per stage as vLLM divides them: left-over layers go to the stages before the last one, backwards."""
    size, rest = divmod(num_layers, stages)
    sizes = [size] * stages
    for back in range(2, rest + 2):
        sizes[-back] += 1
    return sizes


def stage_starts(layer_indices: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The position in the pattern of each stage's first DSA layer, without position 0, which is F anyway."""
    starts = []
    for first in list(accumulate(sizes))[:-1]:
        position = bisect_left(layer_indices, first)
        if 0 < position < len(layer_indices) and position not in starts:
            starts.append(position)
    return starts


def stages_on_shared(pattern: Pattern, layer_indices: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(stage from 1, decoder layer) of each stage whose first DSA layer is S: it would have no selection to reuse."""
    found = []
    first = 0
    for stage, size in enumerate(sizes, start=1):
        inside = [(i, p) for p, i in enumerate(layer_indices) if first <= i < first + size]
        if inside and not pattern.is_full(inside[0][1]):
            found.append((stage, inside[0][0]))
        first += size
    return found


def aligned_partition(pattern: Pattern, layer_indices: Sequence[int], sizes: Sequence[int]) -> list[int] | None:
    """Stage sizes near `sizes` where every stage begins on an F layer, or None if the F layers do not allow it."""
    full = [layer_indices[position] for position in pattern.full_layers]
    starts = [0]
    for start in list(accumulate(sizes))[:-1]:
        free = [layer for layer in full if layer > starts[-1]]
        if not free:
            return None
        starts.append(min(free, key=lambda layer: (abs(layer - start), layer)))
    return [end - start for start, end in zip(starts, [*starts[1:], sum(sizes)], strict=True)]


# --- warnings -----------------------------------------------------------------------------------------------------


def _check_model(model: dict[str, Any]) -> None:
    try:
        check_fields(model, MODEL_FIELDS)
    except FieldError as error:
        raise ExportError(f"the file's model is damaged ({error}): write the file again") from None


def _check_native(pattern: Pattern, model: dict[str, Any]) -> None:
    native = model.get("native_shared") or []
    wrong = [layer for layer in native if layer >= len(pattern) or pattern.is_full(layer)]
    if wrong:
        raise ExportError(
            f"the checkpoint has no indexer weights at positions {wrong} (it shares these layers itself), but the "
            "pattern does not have S there: only F to S edits are possible on this checkpoint"
        )


def _warnings(engine: Engine, pattern: Pattern, file: PatternFile, letters: str) -> list[str]:
    found = [
        *_type_warnings(engine, file.model.get("model_type")),
        *_layer_warnings(pattern, file, letters),
        *_stage_warnings(engine, pattern, file, len(letters)),
    ]
    if file.model.get("wrapper_config"):
        found.append(engine.wrapper_note)
    if engine.name == "transformers" and freq_and_offset(letters) is None:
        found.append(
            "no index_topk_freq and index_skip_topk_offset give this pattern: remove both keys from config.json "
            "where they are present (do not set them to null)"
        )
    return found


def _type_warnings(engine: Engine, model_type: str | None) -> list[str]:
    if model_type in engine.model_types:
        return []
    found = f"model_type {model_type}" if model_type else "a model whose model_type the file does not say"
    return [
        f"{engine.title} is known to share selections for {', '.join(engine.model_types)}; this file is for {found}. "
        f"{engine.on_other_types}"
    ]


def _layer_warnings(pattern: Pattern, file: PatternFile, letters: str) -> list[str]:
    found = []
    if len(letters) != len(pattern):
        found.append(
            f"{len(letters) - len(pattern)} of the {len(letters)} decoder layers have no indexer; the engines count "
            "all decoder layers, so these are written as F: check that this engine version counts them too"
        )
    if file.model.get("num_hidden_layers") is None:
        found.append(
            f"the file does not say how many decoder layers the model has: the pattern is right if it is {len(letters)}"
        )
    if file.model.get("native_shared"):
        count = len(file.model["native_shared"])
        found.append(f"{count} S layers are the checkpoint's own and have no indexer weights: they cannot become F")
    return found


def _stage_warnings(engine: Engine, pattern: Pattern, file: PatternFile, num_layers: int) -> list[str]:
    if engine.split is None:
        return []
    found = []
    for size in PIPELINE_SIZES:
        if size > num_layers:
            continue
        sizes = engine.split(num_layers, size)
        if wrong := stages_on_shared(pattern, file.layer_indices, sizes):
            found.append(_stage_warning(engine, pattern, file, sizes, wrong))
    return found


def _stage_warning(
    engine: Engine, pattern: Pattern, file: PatternFile, sizes: Sequence[int], wrong: list[tuple[int, int]]
) -> str:
    stages = ", ".join(str(stage) for stage, _ in wrong)
    layers = ", ".join(str(layer) for _, layer in wrong)
    plural = "s" if len(wrong) > 1 else ""
    text = (
        f"with {len(sizes)} pipeline stages ({'+'.join(map(str, sizes))} layers), stage{plural} {stages} would start "
        f"on S (layer{plural} {layers}), with no selection to reuse"
    )
    aligned = aligned_partition(pattern, file.layer_indices, sizes)
    if aligned and engine.partition_variable:
        return f"{text}; {engine.partition_variable}={','.join(map(str, aligned))} makes every stage start on F"
    starts = stage_starts(file.layer_indices, sizes)
    native = set(file.model.get("native_shared") or []) & set(starts)
    if native:
        return f"{text}; the checkpoint shares such a layer itself: use another number of stages"
    return f"{text}; search with --keep-full {','.join(map(str, starts))}"


# --- the engines --------------------------------------------------------------------------------------------------


def _pattern_key(letters: str) -> dict[str, Any]:
    return {"index_topk_pattern": letters}


def _vllm_settings(letters: str) -> dict[str, Any]:
    return {"use_index_cache": True, **_pattern_key(letters)}


def _transformers_settings(letters: str) -> dict[str, Any]:
    # Both spellings, so that a reader of either one sees the same pattern; indexer_types wins in transformers.
    types = {FULL: "full", SHARED: "shared"}
    settings = {"indexer_types": [types[letter] for letter in letters], **_pattern_key(letters)}
    if pair := freq_and_offset(letters):
        settings |= {"index_topk_freq": pair[0], "index_skip_topk_offset": pair[1]}
    return settings


def _flag(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda settings: f"{name} {shlex.quote(json.dumps(settings))}"


def _config_json(settings: dict[str, Any]) -> str:
    """One key a line; a list stays on its line, as one letter each would fill pages."""
    lines = []
    for key, value in settings.items():
        text = _config_json(value).replace("\n", "\n  ") if isinstance(value, dict) else json.dumps(value)
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}"


ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            name="transformers",
            title="transformers",
            how="put these keys into the checkpoint's config.json, in place of what is there under the same names",
            settings=_transformers_settings,
            render=_config_json,
            model_types=("glm_moe_dsa", "hy_v4", "mistral_large4"),
            on_other_types=(
                "For other types transformers 5.23 ignores these keys, or (glm5_next) fails on the first S layer."
            ),
            wrapper_note="the config wraps a text model: the keys belong into text_config, as written",
        ),
        Engine(
            name="vllm",
            title="vLLM",
            how="add this flag to vllm serve",
            settings=_vllm_settings,
            render=_flag("--hf-overrides"),
            model_types=("deepseek_v32", "glm_moe_dsa"),
            on_other_types="For other types it may ignore the pattern and run every layer as F without a word: check.",
            wrapper_note="the config wraps a text model: the override is nested in text_config, as vLLM needs it",
            split=split_vllm,
            partition_variable="VLLM_PP_LAYER_PARTITION",
        ),
        Engine(
            name="sglang",
            title="SGLang",
            how="add this flag to python -m sglang.launch_server",
            settings=_pattern_key,
            render=_flag("--json-model-override-args"),
            model_types=("deepseek_v32", "glm_moe_dsa"),
            on_other_types="For other types it may ignore the pattern and run every layer as F without a word: check.",
            wrapper_note=(
                "the config wraps a text model: that SGLang merges a nested text_config is not verified; "
                "should it fail, put index_topk_pattern into the text_config of config.json"
            ),
            split=split_front,
            partition_variable="SGLANG_PP_LAYER_PARTITION",
        ),
    )
}
