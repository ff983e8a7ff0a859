"""What to look out for when a pattern goes to an engine: model types, layers without an indexer, pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence

from icsearch.engines.engine import Engine, family
from icsearch.engines.schedule import COMMON
from icsearch.engines.stages import aligned_partition, cut_in_words, usual_sizes_on_shared
from icsearch.engines.table import TRANSFORMERS, TRTLLM
from icsearch.pattern import Pattern, PatternFile


def find_warnings(engine: Engine, pattern: Pattern, file: PatternFile, letters: str, layout_known: bool) -> list[str]:
    """All warnings for a pattern of a file in these letters.

    Where the serving layout is not known, the usual numbers of stages are looked at, if it is known how the engine
    cuts.
    """
    model_type = file.model.get("model_type")
    found = [
        *_type_warnings(engine, model_type),
        *_layer_warnings(engine, pattern, file, letters),
        *[note for of_type, note in engine.notes if of_type in ("", family(model_type))],
    ]
    if not layout_known:
        found += _usual_stages(engine, pattern, file)
    if file.model.get("wrapper_config") and engine.nests_for(model_type) and engine.wrapper_note:
        found.append(engine.wrapper_note)
    if engine in (TRANSFORMERS, TRTLLM) and COMMON.fit(letters) is None:
        found.append(
            "no index_topk_freq and index_skip_topk_offset give this pattern: remove both keys from config.json "
            "where they are present (do not set them to null)"
        )
    return found


def _type_warnings(engine: Engine, model_type: str | None) -> list[str]:
    if engine.serves(model_type):
        return []
    found = f"model_type {model_type}" if model_type else "a model whose model_type the file does not say"
    return [
        f"{engine.title} is known to share selections for {', '.join(engine.model_types)}; this file is for {found}. "
        f"{engine.on_other_types}"
    ]


def _layer_warnings(engine: Engine, pattern: Pattern, file: PatternFile, letters: str) -> list[str]:
    found = []
    model_type = file.model.get("model_type")
    if len(letters) != len(pattern):
        found.append(
            f"{len(letters) - len(pattern)} of the {len(letters)} decoder layers have no indexer; {engine.title} "
            "counts all decoder layers, so these are written as F: check that this engine version counts them too"
        )
    if file.model.get("num_hidden_layers") is None and not engine.counts_indexed(model_type):
        found.append(
            f"the file does not say how many decoder layers the model has: the pattern is right if it is {len(letters)}"
        )
    if file.model.get("native_shared"):
        count = len(file.model["native_shared"])
        found.append(f"{count} S layers are the checkpoint's own and have no indexer weights: they cannot become F")
    return found


def _usual_stages(engine: Engine, pattern: Pattern, file: PatternFile) -> list[str]:
    if engine.split is None:
        return []
    num_layers = file.model.get("num_hidden_layers") or len(pattern)
    wrong = usual_sizes_on_shared(pattern, file.layer_indices, num_layers, engine.split)
    return [f"{cut_in_words(wrong)}: give --serve-pp {wrong[0]} if you serve it so"] if wrong else []


def partition_setting(
    engine: Engine, pattern: Pattern, layer_indices: Sequence[int], sizes: Sequence[int]
) -> str | None:
    """The variable that moves the engine's cuts to F layers of the pattern; None where there is none."""
    aligned = aligned_partition(pattern, layer_indices, sizes) if engine.partition_variable else None
    return f"{engine.partition_variable}={','.join(map(str, aligned))}" if aligned else None
