"""Pipeline stages: how engines cut the layers, where a stage would start on S, and what is advised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_files import pattern_file
from icsearch.core.pattern import Pattern
from icsearch.engines.engine import ExportError
from icsearch.engines.export import export
from icsearch.engines.pipeline import (
    aligned_partition,
    serving_sizes,
    split_front,
    split_vllm,
    stage_starts,
    stages_on_shared,
)

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


def test_one_short_warning_of_the_usual_numbers_of_stages() -> None:
    assert export(pattern_file("FFFFSFFF"), "vllm").warnings == (
        "cut into 2 or 4 or 8 pipeline stages, one would start on S: give --serve-pp 2 if you serve it so",
    )
    assert export(pattern_file("FFSFFFFF"), "sglang").warnings == ()  # its stages get the selection
    assert export(pattern_file("FFFFSFFF"), "transformers").warnings == (
        "no index_topk_freq and index_skip_topk_offset give this pattern: remove both keys from config.json where "
        "they are present (do not set them to null)",
    )
    assert export(pattern_file("FFFFFFFF"), "vllm").warnings == ()


def test_the_stages_that_are_warned_of_are_the_engines_own() -> None:
    kept = Pattern.from_full_layers({0, 19, 39, 59}, 78).letters  # 19+20+20+19 layers
    assert export(pattern_file(kept), "vllm").warnings[0].startswith("cut into 8 pipeline stages")


def test_the_layers_to_keep_are_positions_in_the_pattern() -> None:
    assert stage_starts((1, 3, 4, 7), [2, 2, 2, 2]) == [1, 2, 3]
    assert stage_starts((3, 7), [2, 2, 2, 2]) == [1]


@given(patterns, st.integers(1, 4))
def test_an_aligned_partition_starts_every_stage_on_full(letters: str, stages: int) -> None:
    pattern = Pattern(letters)
    if stages > len(pattern):
        return
    sizes = aligned_partition(pattern, range(len(pattern)), split_front(len(pattern), stages))
    assert (sizes is None) == (len(pattern.full_layers) < stages)
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
        ("two", "expected a number of stages, as 2, or first layers, as 0,4"),
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
    with pytest.raises(ExportError, match="TensorRT-LLM cuts 8 layers into 2 stages is not known.*as --serve-pp 0,4$"):
        serving_sizes("2", 8, "TensorRT-LLM", None)
    with pytest.raises(ExportError, match="as --serve-pp 0,3,5$"):
        serving_sizes("3", 7, "TensorRT-LLM", None)
