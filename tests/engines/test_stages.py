"""Pipeline stages: how engines cut the layers, where a stage would start on S, and what is advised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_files import pattern_file
from icsearch.engines.export import export
from icsearch.engines.letters import ExportError
from icsearch.engines.stages import (
    aligned_partition,
    serving_sizes,
    split_front,
    split_vllm,
    stage_starts,
    stages_on_shared,
)
from icsearch.pattern import Pattern

patterns = st.text("FS", max_size=20).map(lambda tail: "F" + tail)


def test_splits() -> None:
    assert split_front(78, 4) == [20, 20, 19, 19]
    assert split_vllm(78, 4) == [19, 20, 20, 19]
    assert split_vllm(61, 4) == [15, 15, 16, 15]
    assert split_vllm(62, 8) == [7, 8, 8, 8, 8, 8, 8, 7]


def test_stages_that_would_start_on_shared() -> None:
    assert stages_on_shared(Pattern("FSFSSSFS"), range(8), [2, 2, 2, 2]) == [(3, 4)]
    # layers 0 and 2 have no indexer: the second stage begins with a layer that does not matter, then an S
    assert stages_on_shared(Pattern("FS"), (1, 3), [2, 2]) == [(2, 3)]


def test_stage_warnings_say_which_and_how_to_avoid_it() -> None:
    warnings = export(pattern_file("FFFFSFFF"), "vllm").warnings
    assert warnings == (
        "with 2 pipeline stages (4+4 layers), stage 2 would start on S (layer 4), with no selection to reuse; "
        "VLLM_PP_LAYER_PARTITION=3,5 makes every stage start on F",
        "with 4 pipeline stages (2+2+2+2 layers), stage 3 would start on S (layer 4), with no selection to reuse; "
        "VLLM_PP_LAYER_PARTITION=2,1,3,2 makes every stage start on F",
        "with 8 pipeline stages (1+1+1+1+1+1+1+1 layers), stage 5 would start on S (layer 4), with no selection to "
        "reuse; search with --keep-full 1,2,3,4,5,6,7",
    )
    assert export(pattern_file("FFFFSFFF"), "transformers").warnings == (
        "no index_topk_freq and index_skip_topk_offset give this pattern: remove both keys from config.json where "
        "they are present (do not set them to null)",
    )
    assert export(pattern_file("FFFFFFFF"), "vllm").warnings == ()


def test_the_layers_to_keep_are_the_starts_of_the_engines_own_stages() -> None:
    letters = "F" + "S" * 77
    advice = {
        engine: next(w for w in export(pattern_file(letters), engine).warnings if "with 4 pipeline stages" in w)
        for engine in ("vllm", "sglang")
    }
    assert advice["vllm"].endswith("; search with --keep-full 19,39,59")  # 19+20+20+19
    assert advice["sglang"].endswith("; search with --keep-full 20,40,59")  # 20+20+19+19
    kept = Pattern.from_full_layers({0, 19, 39, 59}, 78).letters
    assert not any("with 4 pipeline stages" in warning for warning in export(pattern_file(kept), "vllm").warnings)


def test_the_layers_to_keep_are_positions_in_the_pattern() -> None:
    assert stage_starts((1, 3, 4, 7), [2, 2, 2, 2]) == [1, 2, 3]
    assert stage_starts((3, 7), [2, 2, 2, 2]) == [1]


def test_a_stage_that_starts_on_a_native_shared_layer_cannot_be_mended_by_a_search() -> None:
    warnings = export(pattern_file("FSSS", native_shared=[2]), "vllm").warnings
    assert any("stage 2 " in warning and "use another number of stages" in warning for warning in warnings)


@given(patterns, st.integers(1, 4))
def test_an_aligned_partition_starts_every_stage_on_full(letters: str, stages: int) -> None:
    pattern = Pattern(letters)
    if stages > len(pattern):
        return
    sizes = aligned_partition(pattern, range(len(pattern)), split_front(len(pattern), stages))
    if sizes is not None:
        assert sum(sizes) == len(pattern)
        assert min(sizes) > 0
        assert stages_on_shared(pattern, range(len(pattern)), sizes) == []


def test_a_serving_layout_as_typed() -> None:
    assert serving_sizes("4", 78, "vLLM", split_vllm) == [19, 20, 20, 19]
    assert serving_sizes("0, 20,40", 78, "vLLM", split_vllm) == [20, 20, 38]
    assert serving_sizes("0,20", 78, "TensorRT-LLM", None) == [20, 58]
    assert serving_sizes("1", 78, "TensorRT-LLM", None) == [78]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", "give 1 to 8 stages"),
        ("9", "give 1 to 8 stages"),
        ("two", "expected a number of stages, as 4, or first layers"),
        ("", "expected a number of stages"),
        ("-1", "expected a number of stages"),
        ("1,4", "begin with 0, increase, and stay below 8"),
        ("0,4,4", "begin with 0, increase"),
        ("0,4,8", "stay below 8"),
        ("0,,4", "expected a number of stages"),
    ],
)
def test_layouts_that_do_not_fit(text: str, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        serving_sizes(text, 8, "vLLM", split_vllm)


def test_how_an_engine_cuts_must_be_known() -> None:
    with pytest.raises(ExportError, match="how TensorRT-LLM cuts 8 layers into 2 stages is not known"):
        serving_sizes("2", 8, "TensorRT-LLM", None)
