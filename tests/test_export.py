"""Export: what each engine is given, its warnings, and transformers' own reading of it."""

from __future__ import annotations

import json
import shlex
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icsearch.errors import PatternError
from icsearch.export import (
    ENGINES,
    ExportError,
    aligned_partition,
    decoder_letters,
    export,
    freq_and_offset,
    split_front,
    split_vllm,
    stage_starts,
    stages_on_shared,
)
from icsearch.pattern import Pattern, PatternFile
from icsearch.runs import results
from run_fixtures import MadeUpRun, write_run

LETTERS = "FSFFSSFSSSSFFSSS"
patterns = st.text("FS", max_size=20).map(lambda tail: "F" + tail)


def pattern_file(letters: str = LETTERS, indices: tuple[int, ...] | None = None, **model: Any) -> PatternFile:
    known = {"model_type": "glm_moe_dsa", "num_hidden_layers": len(letters)}
    return PatternFile(
        pattern=Pattern(letters),
        layer_indices=indices or tuple(range(len(letters))),
        method="greedy",
        model={**known, **model},
    )


def scheduled(num_layers: int, freq: int, offset: int) -> str:
    return "".join("F" if max(i - offset + 1, 0) % freq == 0 else "S" for i in range(num_layers))


def pasted(text: str) -> tuple[str, Any]:
    """(flag, JSON argument) as a POSIX shell hands them on."""
    flag, argument = shlex.split(text)
    return flag, json.loads(argument)


def test_vllm_flag_survives_the_shell() -> None:
    flag, overrides = pasted(export(pattern_file(), "vllm").text)
    assert flag == "--hf-overrides"
    assert overrides == {"use_index_cache": True, "index_topk_pattern": LETTERS}


def test_sglang_flag_survives_the_shell() -> None:
    flag, overrides = pasted(export(pattern_file(), "sglang").text)
    assert flag == "--json-model-override-args"
    assert overrides == {"index_topk_pattern": LETTERS}


def test_engine_names_in_any_case_and_unknown_ones() -> None:
    assert export(pattern_file(), "vLLM").engine == "vllm"
    with pytest.raises(ExportError, match="unknown engine 'tgi': expected one of transformers, vllm, sglang"):
        export(pattern_file(), "tgi")


def test_transformers_reads_back_the_same_layers() -> None:
    from transformers import GlmMoeDsaConfig

    keys = json.loads(export(pattern_file(), "transformers").text)
    config = GlmMoeDsaConfig.from_dict({"num_hidden_layers": len(LETTERS), **keys})
    expected = ["full" if letter == "F" else "shared" for letter in LETTERS]
    assert config.indexer_types == expected == keys["indexer_types"]
    del keys["indexer_types"]
    assert GlmMoeDsaConfig.from_dict({"num_hidden_layers": len(LETTERS), **keys}).indexer_types == expected


@pytest.mark.parametrize("letters", ["FFSSSFSSSFSS", "FSSSFSSSFSSS", "FFFFFF", "FSSSSS", "FFFSFSFSFS", "FFFFSSSS"])
def test_freq_and_offset_where_they_exist_are_transformers_own(letters: str) -> None:
    from transformers import GlmMoeDsaConfig

    keys = json.loads(export(pattern_file(letters), "transformers").text)
    assert set(keys) == {"indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"}
    schedule = {key: keys[key] for key in ("index_topk_freq", "index_skip_topk_offset")}
    config = GlmMoeDsaConfig.from_dict({"num_hidden_layers": len(letters), **schedule})
    assert config.indexer_types == keys["indexer_types"]


def test_freq_and_offset_are_left_out_where_they_do_not_exist() -> None:
    result = export(pattern_file("FSFFS"), "transformers")
    assert set(json.loads(result.text)) == {"indexer_types", "index_topk_pattern"}
    assert "null" not in result.text
    assert any("remove both keys" in warning for warning in result.warnings)


@given(patterns | st.builds(scheduled, st.integers(1, 20), st.integers(1, 6), st.integers(1, 6)))
def test_freq_and_offset_reproduce_the_pattern_or_do_not_exist(letters: str) -> None:
    pair = freq_and_offset(letters)
    if pair:
        assert scheduled(len(letters), *pair) == letters
    else:
        sizes = range(1, len(letters) + 1)
        assert not any(scheduled(len(letters), freq, offset) == letters for freq in sizes for offset in sizes)


def test_the_default_offset_is_preferred() -> None:
    assert freq_and_offset("FFSSSFSSSF") == (4, 2)
    assert freq_and_offset("FSSSFSSSF") == (4, 1)
    assert freq_and_offset("FFFF") == (1, 2)


# --- layers without an indexer --------------------------------------------------------------------------------------


def test_layers_without_an_indexer_become_full() -> None:
    assert decoder_letters(Pattern("FSS"), (1, 3, 4), 6) == "FFFSSF"
    result = export(pattern_file("FSS", (1, 3, 4), num_hidden_layers=6, model_type="dots3_note"), "vllm")
    assert pasted(result.text)[1]["index_topk_pattern"] == "FFFSSF"
    assert any("3 of the 6 decoder layers have no indexer" in warning for warning in result.warnings)


def test_unclear_layers_are_refused() -> None:
    with pytest.raises(ExportError, match="does not say how many"):
        decoder_letters(Pattern("FSS"), (1, 3, 4), None)
    with pytest.raises(ExportError, match="expected smaller indices"):
        decoder_letters(Pattern("FSS"), (1, 3, 4), 4)
    with pytest.raises(ExportError, match="not increasing"):
        decoder_letters(Pattern("FSS"), (1, 4, 3), 6)
    with pytest.raises(ExportError, match="2 layer_indices for 3 letters"):
        decoder_letters(Pattern("FSS"), (1, 4), 6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "model",
    [
        {"num_hidden_layers": 10**11},
        {"num_hidden_layers": "16"},
        {"num_hidden_layers": True},
        {"num_hidden_layers": 0},
        {"native_shared": 3},
        {"native_shared": ["1"]},
        {"native_shared": [-1]},
        {"model_type": []},
        {"wrapper_config": "yes"},
    ],
)
def test_a_damaged_model_is_refused(engine: str, model: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match="model is damaged .*: write the file again"):
        export(pattern_file(**model), engine)


def test_a_file_without_the_number_of_layers_is_taken_with_a_warning() -> None:
    result = export(pattern_file(num_hidden_layers=None), "vllm")
    assert any("right if it is 16" in warning for warning in result.warnings)


# --- native S layers, wrappers, model types -------------------------------------------------------------------------


def test_native_shared_layers_stay_shared() -> None:
    result = export(pattern_file("FFSSF", native_shared=[2, 3]), "vllm")
    assert any("2 S layers are the checkpoint's own" in warning for warning in result.warnings)
    with pytest.raises(ExportError, match=r"no indexer weights at positions \[1\]"):
        export(pattern_file("FFSSF", native_shared=[1, 2]), "vllm")


@pytest.mark.parametrize("engine", ENGINES)
def test_wrapper_configs_are_nested(engine: str) -> None:
    result = export(pattern_file(wrapper_config=True), engine)
    document = json.loads(result.text) if engine == "transformers" else pasted(result.text)[1]
    assert document["text_config"]["index_topk_pattern"] == LETTERS
    assert any("text_config" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("engine", "model_type", "warned"),
    [
        ("transformers", "glm_moe_dsa", False),
        ("transformers", "deepseek_v32", True),
        ("transformers", "glm5_next", True),
        ("vllm", "deepseek_v32", False),
        ("vllm", "deepseek_v4", True),
        ("sglang", None, True),
    ],
)
def test_types_that_an_engine_may_ignore(engine: str, model_type: str | None, warned: bool) -> None:
    result = export(pattern_file(model_type=model_type), engine)
    assert any("known to share selections" in warning for warning in result.warnings) is warned


# --- pipeline stages ------------------------------------------------------------------------------------------------


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


# --- patterns of a run ----------------------------------------------------------------------------------------------


def test_an_earlier_pattern_of_the_run(tmp_path: Any) -> None:
    file = results.pattern_file(write_run(tmp_path, MadeUpRun()))
    half = export(file, "vllm", Fraction(1, 2))
    assert len(half.pattern.full_layers) == 8
    assert half.pattern.letters == file.steps[7].pattern
    with pytest.raises(PatternError, match="no pattern with 2 F layers"):
        export(file, "vllm", Fraction(1, 8))
