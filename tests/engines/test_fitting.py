"""A pattern beside the config.json of the checkpoint that will be served, and that config with the keys in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine_files import LETTERS, pattern_file
from icsearch.commands.export import engine_settings
from icsearch.commands.requests import ExportRequest
from icsearch.core.files import published_patterns
from icsearch.core.jsonfile import write_object
from icsearch.core.pattern_file import PatternFile, load_pattern_file
from icsearch.engines.engine import ExportError
from icsearch.engines.export import export, with_config, write_file

N = len(LETTERS)
CONFIG = {"model_type": "glm_moe_dsa", "num_hidden_layers": N, "hidden_size": 64}


def fitted(file: PatternFile | None = None, **config: Any) -> tuple[PatternFile, list[str]]:
    return with_config(file or pattern_file(num_hidden_layers=None), {**CONFIG, **config}, "config.json")


def test_the_config_says_what_the_file_does_not() -> None:
    file, notes = fitted()
    assert file.model["num_hidden_layers"] == N
    assert notes == []
    assert not any("does not say how many" in warning for warning in export(file, "vllm").warnings)


def test_multi_token_prediction() -> None:
    assert fitted(num_nextn_predict_layers=1)[1] == [
        "the checkpoint has 1 layer of multi-token prediction: not in the pattern, they stay F"
    ]
    with pytest.raises(ExportError, match="16 letters, config.json 15 layers and 1 of multi-token prediction"):
        fitted(num_hidden_layers=N - 1, num_nextn_predict_layers=1)


def test_native_shared_layers_are_those_without_indexer_weights() -> None:
    native = [i for i, letter in enumerate(LETTERS) if letter == "S"][:2]
    weights = set(range(N)) - set(native)
    file, notes = with_config(pattern_file(), CONFIG, "model", weights)
    assert (file.model["native_shared"], notes) == (native, [])
    assert any("2 S layers are the checkpoint's own" in warning for warning in export(file, "vllm").warnings)
    file, _ = with_config(pattern_file(), CONFIG, "model", weights - {LETTERS.rindex("F")})
    with pytest.raises(ExportError, match="only F to S edits are possible"):
        export(file, "vllm")


def test_keys_of_a_config_take_no_weights_away() -> None:
    """FFSSSF..., where the pattern has F at 3: a warning, as a config says nothing of weights."""
    file, notes = fitted(index_topk_freq=4)
    assert export(file, "vllm").pattern.letters == LETTERS
    assert notes == [
        "config.json itself shares layers 2, 3, 4, 6, 7, 8, ...: should the checkpoint have no indexer weights there, "
        "they cannot be F; give its directory with --model-config, and that is checked"
    ]
    file, notes = with_config(pattern_file(), {**CONFIG, "index_topk_freq": 4}, "model", set(range(N)))
    assert (file.model["native_shared"], notes) == ([], [])
    searched = pattern_file(native_shared=[1])  # by a run, which has seen the weights
    assert fitted(searched, index_topk_freq=4)[0].model["native_shared"] == [1]


def test_a_config_that_export_wrote_takes_another_pattern(tmp_path: Path) -> None:
    config, new = tmp_path / "g78.json", tmp_path / "g78n.json"
    write_object(config, {"model_type": "glm_moe_dsa", "num_hidden_layers": 78})
    quarter, half = (published_patterns() / f"glm-5-{name}.json" for name in ("1-4", "1-2"))
    result = engine_settings(ExportRequest(engine="transformers", model_config=config, out=new), quarter)
    write_file(result, config, None, new)
    again = engine_settings(ExportRequest(engine="vllm", model_config=new), half)
    assert again.pattern == load_pattern_file(half).pattern
    assert "itself shares layers" in again.warnings[0]


@pytest.mark.parametrize("index", [False, True])
def test_a_checkpoint_directory_says_which_layers_have_indexers(tmp_path: Path, index: bool) -> None:
    names = [f"model.layers.{layer}.self_attn.indexer.wk.weight" for layer in range(N) if layer != 1]
    if index:
        write_object(tmp_path / "model.safetensors.index.json", {"weight_map": dict.fromkeys(names, "a.safetensors")})
    else:
        save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    write_object(tmp_path / "config.json", {**CONFIG, "index_topk_freq": 4})
    request = ExportRequest(engine="vllm", model_config=tmp_path)
    assert any(
        "1 S layers are the checkpoint's own" in one for one in engine_settings(request, pattern_file()).warnings
    )
    with pytest.raises(ExportError, match=r"no indexer weights at positions \[1\]"):
        engine_settings(request, pattern_file("F" * N))


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    write_object(tmp_path / "config.json", CONFIG)
    write_object(tmp_path / "model.safetensors.index.json", {"weight_map": []})
    with pytest.raises(ExportError, match="has no weight_map: download it again"):
        engine_settings(ExportRequest(engine="vllm", model_config=tmp_path), pattern_file())


def test_a_wrapped_config() -> None:
    config = {"model_type": "mistral_large4", "text_config": {"num_hidden_layers": N}}
    file, _ = with_config(pattern_file(model_type=None, num_hidden_layers=None), config, "config.json")
    assert export(file, "vllm").settings["text_config"]["index_topk_pattern"] == LETTERS


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": N + 1}, "16 letters for layers 0 to 15, config.json has 17 layers with an indexer"),
        ({"model_type": "deepseek_v32"}, "for model_type glm_moe_dsa, config.json has deepseek_v32"),
        ({"layer_types": ["sliding_attention"] + ["indexed_attention"] * 15}, "do not belong together"),
    ],
)
def test_what_does_not_belong_together(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        fitted(pattern_file(), **config)


# --- the config written anew ----------------------------------------------------------------------------------------


def test_a_config_is_written_with_consistent_keys(tmp_path: Path) -> None:
    from transformers import GlmMoeDsaConfig

    stale = {**CONFIG, "index_topk_freq": 4, "index_skip_topk_offset": 3, "index_topk_pattern": None}
    write_object(tmp_path / "config.json", stale)
    result = export(pattern_file(), "transformers")
    assert write_file(result, tmp_path / "config.json", None, tmp_path / "new.json") == []
    written = json.loads((tmp_path / "new.json").read_text())
    assert written == {**CONFIG, **result.settings, "use_index_cache": True}
    kinds = GlmMoeDsaConfig.from_dict(written).indexer_types
    assert "".join("F" if kind == "full" else "S" for kind in kinds) == LETTERS
    assert json.loads((tmp_path / "config.json").read_text()) == stale


def test_a_wrapped_config_is_written_inside(tmp_path: Path) -> None:
    config = {"model_type": "mistral_large4", "text_config": {"num_hidden_layers": N, "index_topk_freq": 4}, "a": 1}
    write_object(tmp_path / "config.json", config)
    result = export(pattern_file(model_type="mistral_large4", wrapper_config=True), "trtllm")
    write_file(result, tmp_path, None, tmp_path / "new.json")
    written = json.loads((tmp_path / "new.json").read_text())
    inner = {"num_hidden_layers": N, **result.settings["text_config"], "use_index_cache": True}
    assert written == {**config, "text_config": inner}


def test_files_that_are_not_written(tmp_path: Path) -> None:
    write_object(tmp_path / "config.json", CONFIG)
    for engine, words in (
        ("vllm", "vLLM reads no file of ours: leave --out away"),
        ("llamacpp", "give that one with --gguf"),
        ("transformers", "give the original with --model-config"),
    ):
        with pytest.raises(ExportError, match=words):
            write_file(export(pattern_file(), engine), None, None, tmp_path / "new")
    with pytest.raises(ExportError, match="exists: give another --out"):
        write_file(export(pattern_file(), "transformers"), tmp_path / "config.json", None, tmp_path / "config.json")
