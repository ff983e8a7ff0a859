"""Who reads a pattern from a checkpoint's config.json, and who loads one without the indexers of S layers.

From the sources of transformers 5.23 and from engines' code and pull requests as read in November 2026; an engine that
is not listed may do as well. docs/native-checkpoints.md names the sources.
"""

from __future__ import annotations

from collections.abc import Iterator

from icsearch.engines.letters import ExportError
from icsearch.engines.stages import cut_in_words, split_vllm, usual_sizes_on_shared
from icsearch.engines.table import ENGINES, TRANSFORMERS, VLLM
from icsearch.pattern import SHARED, PatternFile

# The numbers are of pull requests, in each project's own repository.
_VLLM_AND_SGLANG = ("vLLM from #45895 on", "SGLang from #30531 on")
# By model_type: those that make no indexer for an S layer, and so do not miss its weights.
LOAD_WITHOUT_INDEXERS = {
    "glm_moe_dsa": (TRANSFORMERS.title, *_VLLM_AND_SGLANG, "ATOM from #1260 on", "vllm-ascend from #11363 on"),
    "hy_v4": (TRANSFORMERS.title,),
    "mistral_large4": (TRANSFORMERS.title,),
    "deepseek_v32": _VLLM_AND_SGLANG,
}


def check_droppable(model_type: str) -> None:
    """Raise ExportError where nobody is known to load this kind of model without the indexers of its S layers."""
    if model_type not in LOAD_WITHOUT_INDEXERS:
        raise ExportError(
            f"--drop-indexers: nothing is known to load a model of type {model_type} without the S layers' indexers "
            f"(known for {', '.join(LOAD_WITHOUT_INDEXERS)}): leave the option out"
        )


def notes(model_type: str, letters: str, dropped: bool, has_params: bool) -> Iterator[str]:
    """What to know before one uses a checkpoint whose config has these letters."""
    if SHARED not in letters:
        return
    yield from _reader_notes(model_type)
    yield from _weight_notes(model_type, dropped)
    if has_params:
        yield "params.json is copied as it is: an engine that reads it in place of config.json sees no pattern"


def _reader_notes(model_type: str) -> Iterator[str]:
    if model_type in TRANSFORMERS.model_types:
        return
    if model_type == "glm5_next":
        yield "transformers 5.23 reads the pattern of a glm5_next config, and then fails in its first S layer"
    else:
        yield f"transformers 5.23 does not read the pattern of a {model_type} config: it runs every layer as F"
    known = [one for one in ENGINES.values() if one.nests and one.serves(model_type)]
    misreading = [one for one in known if one.counts_indexed(model_type)]
    if readers := [one.title for one in known if one not in misreading]:
        yield f"known to read it: {', '.join(readers)}"
    elif not misreading:
        yield f"no engine is known to read the pattern of a {model_type} config: try it before you rely on it"
    for one in misreading:
        yield (
            f"{one.title} counts only the layers with an indexer there, and would misread these keys: give it what "
            f"icsearch export --engine {one.name} prints"
        )


def _weight_notes(model_type: str, dropped: bool) -> Iterator[str]:
    known = LOAD_WITHOUT_INDEXERS.get(model_type, ())
    if dropped:
        yield (
            f"without the S layers' indexers it is known to load in {', '.join(known)}; what still builds them misses "
            "these weights"
        )
        if TRANSFORMERS.title not in known:
            yield "transformers 5.23 loads it with random indexers in the S layers: serve it elsewhere"
    elif TRANSFORMERS.title in known:
        yield (
            "the S layers' indexer weights are still there: transformers leaves them unread and lists them as "
            "unexpected, vllm-ascend may refuse them; --drop-indexers leaves them out"
        )


def stage_notes(file: PatternFile, model_type: str, num_layers: int) -> Iterator[str]:
    """Where vLLM, which checks nothing, would start a pipeline stage on S."""
    if model_type not in VLLM.model_types:
        return
    if wrong := usual_sizes_on_shared(file.pattern, file.layer_indices, num_layers, split_vllm):
        yield f"vLLM: {cut_in_words(wrong)}; icsearch export --engine vllm --serve-pp {wrong[0]} says what to do"
