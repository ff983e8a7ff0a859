"""Export: what each engine is given, its warnings, and transformers' own reading of it."""

from __future__ import annotations

import json
import shlex
from fractions import Fraction
from typing import Any

import pytest

from engine_files import LETTERS, pattern_file
from icsearch.core.errors import PatternError
from icsearch.core.pattern import Pattern
from icsearch.engines.engine import ExportError, decoder_letters
from icsearch.engines.export import export
from icsearch.engines.table import ENGINES
from icsearch.runs import results
from run_fixtures import MadeUpRun, write_run


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


@pytest.mark.parametrize("engine", ["transformers", "vllm", "sglang", "trtllm", "lmdeploy", "atom", "vllm-ascend"])
def test_wrapper_configs_are_nested(engine: str) -> None:
    plain, nested = export(pattern_file(), engine), export(pattern_file(wrapper_config=True), engine)
    document = json.loads(nested.text) if nested.text.startswith("{") else pasted(nested.text)[1]
    assert document == {"text_config": plain.settings} == nested.settings
    assert any("text_config" in warning for warning in nested.warnings)


def test_what_is_no_config_is_not_nested() -> None:
    for engine in ("llamacpp", "megatron"):
        assert "text_config" not in export(pattern_file("FFSSSF", wrapper_config=True), engine).text


# --- each engine's form ---------------------------------------------------------------------------------------------


def test_tensorrt_llm_gets_the_consistent_keys_of_a_config() -> None:
    result = export(pattern_file(), "trtllm")
    assert result.settings == export(pattern_file(), "transformers").settings
    assert "under model_kwargs" in result.how


def test_lmdeploy_gets_the_list_alone() -> None:
    flag, overrides = pasted(export(pattern_file("FSF"), "lmdeploy").text)
    assert (flag, overrides) == ("--hf-overrides", {"indexer_types": ["full", "shared", "full"]})
    assert "glm_moe_dsa alone" in export(pattern_file("FSF", model_type="deepseek_v32"), "lmdeploy").warnings[0]


def test_atom_is_given_the_list_too_where_it_would_win() -> None:
    letters = {"use_index_cache": True, "index_topk_pattern": "FSF"}
    assert export(pattern_file("FSF", model_type="deepseek_v32"), "atom").settings == letters
    glm = export(pattern_file("FSF"), "atom")
    assert glm.settings == {**letters, "indexer_types": ["full", "shared", "full"]}
    assert any("indexer_types over index_topk_pattern" in warning for warning in glm.warnings)


def test_deepseek_v4_has_two_encodings() -> None:
    file = pattern_file("FSS", (2, 4, 6), num_hidden_layers=8, model_type="deepseek_v4")
    atom, ascend = export(file, "atom"), export(file, "vllm-ascend")
    assert atom.settings["index_topk_pattern"] == "FFFFSFSF"
    assert ascend.settings["index_topk_pattern"] == "FSS"
    assert any("count all layers" in warning for warning in atom.warnings)
    assert any("layers with an indexer (C4)" in warning for warning in ascend.warnings)
    other = pattern_file("FSS", (2, 4, 6), num_hidden_layers=8, model_type="dots3_note")
    assert export(other, "vllm-ascend").settings["index_topk_pattern"] == "FFFFSFSF"


def test_llama_cpp_gets_a_bool_array() -> None:
    text = export(pattern_file("FSF"), "llamacpp").text
    assert json.loads(text) == {"glm-dsa.attention.indexer.types": [True, False, True]}


def test_megatron_gets_two_numbers_from_layer_one() -> None:
    text = export(pattern_file("FFFSSSFSSSF"), "megatron").text
    assert text == "--dsa-indexer-topk-freq 4 --dsa-indexer-skip-topk-offset 3"
    assert export(pattern_file("FFFF"), "megatron").settings == {
        "dsa_indexer_topk_freq": 1,
        "dsa_indexer_skip_topk_offset": 1,
    }


def test_what_megatron_cannot_express_is_refused_with_the_nearest() -> None:
    with pytest.raises(ExportError, match=r"nearest .* is FFFSSSFSSSF \(freq 4, offset 3; 1 of 11 .*5 F for 4\)"):
        export(pattern_file("FFSSSSFSSSF"), "megatron")


def test_megatron_needs_an_indexer_on_every_layer() -> None:
    file = pattern_file("FSS", (1, 3, 4), num_hidden_layers=6, model_type="dots3_note")
    with pytest.raises(ExportError, match="how Megatron-LM numbers layers .* is not known here"):
        export(file, "megatron")


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


# --- patterns of a run ----------------------------------------------------------------------------------------------


def test_an_earlier_pattern_of_the_run(tmp_path: Any) -> None:
    file = results.pattern_file(write_run(tmp_path, MadeUpRun()))
    half = export(file, "vllm", Fraction(1, 2))
    assert len(half.pattern.full_layers) == 8
    assert half.pattern.letters == file.steps[7].pattern
    with pytest.raises(PatternError, match="no pattern with 2 F layers"):
        export(file, "vllm", Fraction(1, 8))
