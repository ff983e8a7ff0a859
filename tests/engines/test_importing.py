"""What an engine is given today, read by its own rule; and what no engine would run as it is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icsearch.core.errors import IcsearchError, PatternError
from icsearch.core.files import published_patterns
from icsearch.core.jsonfile import write_object
from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import PatternFile, load_pattern_file
from icsearch.engines.check import check_config
from icsearch.engines.export import with_config
from icsearch.engines.read import import_pattern, is_engine_source
from icsearch.engines.table import ENGINES
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.config import INDEXED_TYPES, Backbone, EngineConfigError, load_config, read_backbone
from icsearch.planning.modelfile import open_model_file

GLM = {"model_type": "glm_moe_dsa", "num_hidden_layers": 6}
SIX = Backbone.alike(6)


def read(keys: dict[str, Any], engine: str, backbone: Backbone | None = SIX) -> tuple[str, list[str]]:
    found = import_pattern(json.dumps(keys), engine, backbone)
    return found.pattern.letters, list(found.notes)


# --- configs --------------------------------------------------------------------------------------------------------


def test_indexer_types_win_over_letters_and_these_over_numbers() -> None:
    numbers = {"index_topk_freq": 3, "index_skip_topk_offset": 1}
    letters = {"index_topk_pattern": "FFSFFS", **numbers}
    types = {"indexer_types": ["full", "shared"] * 3, **letters}
    for keys, expected in ((types, "FSFSFS"), (letters, "FFSFFS"), (numbers, "FSSFSS")):
        assert read({**GLM, **keys}, "transformers", None)[0] == expected
    notes = read({**GLM, **types}, "transformers", None)[1]
    assert notes == [
        "index_topk_pattern says something else: transformers goes by indexer_types",
        "index_topk_freq says something else: transformers goes by indexer_types",
    ]


def test_vllm_and_sglang_do_not_look_at_indexer_types() -> None:
    keys = {"use_index_cache": True, "indexer_types": ["full", "shared"] * 3, "index_topk_pattern": "FFSFFS"}
    for engine in ("vllm", "sglang"):
        letters, notes = read(keys, engine)
        assert letters == "FFSFFS"
        assert any("indexer_types says something else" in note for note in notes)
    letters, notes = read({"indexer_types": ["full", "shared"] * 3}, "sglang")
    assert letters == "FFFFFF"
    assert notes == ["no key that SGLang reads (it does not read indexer_types): every layer is F"]


def test_transformers_reads_as_transformers_does() -> None:
    from transformers import GlmMoeDsaConfig, HYV4Config, MistralLarge4TextConfig

    cases: list[dict[str, Any]] = [
        {},
        {"index_topk_freq": 4},
        {"index_topk_freq": 3, "index_skip_topk_offset": 1},
        {"index_topk_pattern": "FFSSFSSFF", "index_topk_freq": 4},
        {"index_topk_pattern": ["full", "shared"] * 4 + ["full"]},
        {"indexer_types": ["full"] * 8 + ["shared"], "index_topk_pattern": "FFSSFSSFF"},
    ]
    for kind in (GlmMoeDsaConfig, HYV4Config, MistralLarge4TextConfig):
        for keys in cases:
            config = kind.from_dict({"num_hidden_layers": 9, **keys})
            expected = "".join("F" if one == "full" else "S" for one in config.indexer_types)
            name = kind.model_type.removesuffix("_text")
            ours = read({"model_type": name, "num_hidden_layers": 9, **keys}, "transformers", None)[0]
            assert ours == expected, (name, keys)


def test_types_that_an_engine_is_not_known_to_share_for() -> None:
    config = {"model_type": "deepseek_v32", "num_hidden_layers": 6, "index_topk_pattern": "FSSFSS"}
    letters, notes = read(config, "transformers", None)
    assert letters == "FSSFSS"
    assert notes == [
        "transformers is not known to read index_topk_pattern for deepseek_v32: it may run every layer as F"
    ]
    assert read({"model_type": "hy_v4", "num_hidden_layers": 6}, "vllm", None)[0] == "FFFFFF"


def test_glm_5_2_as_shipped_is_the_published_pattern() -> None:
    """With the keys that its config.json has, by every engine that is known to share for it."""
    file = load_pattern_file(published_patterns() / "glm-5.2-native.json")
    keys = {"indexer_types": ["full" if file.pattern.is_full(i) else "shared" for i in range(78)], "index_topk": 2048}
    config = {
        **{"model_type": "glm_moe_dsa", "num_hidden_layers": 78, "num_nextn_predict_layers": 1, **keys},
        **{"index_topk_freq": 4, "index_skip_topk_offset": 3, "index_topk_pattern": None},
    }
    for engine in ("transformers", "vllm", "sglang", "trtllm", "lmdeploy", "atom", "vllm-ascend", "llamacpp"):
        assert read(config, engine, None)[0] == file.pattern.letters, engine


def test_models_without_indexers_are_none() -> None:
    with pytest.raises(PatternError, match="is of a llama model and has no indexers"):
        read({"model_type": "llama", "num_hidden_layers": 6}, "vllm", None)
    assert read({"model_type": "new_dsa", "num_hidden_layers": 2, "index_topk": 8}, "vllm", None)[0] == "FF"


def test_wrapped_configs_and_what_stands_beside() -> None:
    wrapped = {"model_type": "mistral_large4", "text_config": {"num_hidden_layers": 3, "index_topk_pattern": "FSF"}}
    assert read(wrapped, "transformers", None) == ("FSF", [])
    letters, notes = read({**wrapped, "index_topk_pattern": "FSS"}, "transformers", None)
    assert letters == "FSF"
    assert notes == ["index_topk_pattern stands beside text_config, where the text model does not read it: left out"]


WRAPPED = Backbone(6, tuple(range(6)), "mistral_large4", wrapper=True)
SWITCHED = {"use_index_cache": True, "index_topk_pattern": "FFSSFS"}


@pytest.mark.parametrize("engine", ["vllm", "vllm-ascend", "transformers"])
def test_overrides_beside_the_text_model_of_a_wrapper_are_not_seen(engine: str) -> None:
    letters, notes = read(SWITCHED, engine, WRAPPED)
    assert letters == "FFFFFF"
    assert "index_topk_pattern, use_index_cache stands outside text_config" in notes[0]
    assert 'needs {"text_config": {...}}' in notes[0]
    letters, notes = read({"text_config": SWITCHED}, engine, WRAPPED)
    assert letters == "FFSSFS"
    assert not any("text_config" in note for note in notes)
    assert import_pattern(f"{engine}:freq:3", None, WRAPPED).pattern.letters == "FFSSFS"  # no keys, so nothing nests


@pytest.mark.parametrize("engine", ["sglang", "lmdeploy", "atom", "trtllm"])
def test_where_it_is_not_known_what_an_engine_sees_of_a_wrapper(engine: str) -> None:
    for keys in (SWITCHED, {"text_config": SWITCHED}):
        letters, notes = read(keys, engine, WRAPPED)
        assert letters == "FFSSFS"
        assert any("not known here" in note or "not verified" in note for note in notes)


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(
    ("engine", "own", "override", "letters", "stays"),
    [
        ("vllm", {"index_topk_freq": 4, "index_skip_topk_offset": 3}, {"index_topk_freq": 4}, "FFFSSSF",
         "index_skip_topk_offset"),
        ("vllm", {"index_topk_pattern": "FSFSFSF"}, {"use_index_cache": True, "index_topk_freq": 4}, "FSFSFSF",
         "index_topk_pattern"),
        ("transformers", {"indexer_types": ["full"] * 7}, {"index_topk_pattern": "FSSSSSS"}, "FFFFFFF",
         "indexer_types"),
        ("atom", {"use_index_cache": False, "index_skip_topk_offset": 1}, {"index_topk_freq": 4}, "FFFFFFF",
         "index_skip_topk_offset, use_index_cache"),
        ("vllm", {"index_topk_freq": 2, "use_index_cache": True}, {"index_topk_pattern": "FSSSSSS"}, "FSSSSSS", ""),
    ],
)  # fmt: skip
def test_overrides_lie_on_top_of_the_models_own_config(
    engine: str, own: dict[str, Any], override: dict[str, Any], letters: str, stays: str, wrap: bool
) -> None:
    inner = {"model_type": "glm_moe_dsa", "num_hidden_layers": 7, **own}
    config = {"model_type": "glm_moe_dsa", "text_config": inner} if wrap else inner
    typed = {"text_config": override} if wrap else override
    found, notes = read(typed, engine, read_backbone(config, "config.json"))
    assert found == letters
    on_top = [note for note in notes if note.startswith("on top of the model's own config")]
    assert ([stays in note for note in on_top] == [True]) if stays else (on_top == [])
    assert found == read({**inner, **override}, engine, None)[0]  # the merged config.json itself


def test_freq_without_the_name_of_a_key_says_it_all() -> None:
    backbone = read_backbone({**GLM, "index_topk_pattern": "FSFSFS", "index_skip_topk_offset": 3}, "config.json")
    assert import_pattern("vllm:freq:4", None, backbone).pattern.letters == "FFSSSF"


def test_layers_of_multi_token_prediction_are_no_part_of_it() -> None:
    config = {**GLM, "num_nextn_predict_layers": 1, "indexer_types": ["full", "shared"] * 3 + ["full"]}
    letters, notes = read(config, "transformers", None)
    assert letters == "FSFSFS"
    assert notes == ["indexer_types has 7 letters, the last 1 of multi-token prediction: left out"]


def test_only_layers_with_an_indexer_have_letters() -> None:
    kinds = ["sliding_attention", "indexed_attention", "sliding_attention", "indexed_attention", "indexed_attention"]
    config = {"model_type": "dots3_note", "num_hidden_layers": 5, "layer_types": kinds, "index_topk_pattern": "SFSSF"}
    found = import_pattern(json.dumps(config), "vllm")
    assert (found.pattern.letters, found.backbone.layer_indices) == ("FSF", (1, 3, 4))
    assert any("layers 0, 2 have no indexer: S says nothing there" in note for note in found.notes)


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"model_type": "deepseek_v4", "compress_ratios": [0, 0, 4, 128, 4, 128]}, (2, 4)),
        ({"model_type": "glm5_next", "layer_types": ["linear_attention"] * 5 + ["full_attention"]}, (5,)),
        ({"model_type": "minimax_m3_vl", "sparse_attention_config": {"sparse_attention_freq": [0, 1] * 3}}, (1, 3, 5)),
        ({"model_type": "qwen4_exp", "layer_types": ["linear_attention", "indexed_attention"] * 3}, (1, 3, 5)),
    ],
)
def test_which_layers_have_an_indexer(keys: dict[str, Any], layers: tuple[int, ...]) -> None:
    found = import_pattern(json.dumps({"num_hidden_layers": 6, **keys}), "transformers")
    assert found.backbone.layer_indices == layers


def test_older_names_of_kinds_are_those_that_transformers_maps() -> None:
    """As configs were released, or saved by an older transformers; full_attention counts where none is named so."""
    from transformers.configuration_utils import _LEGACY_LAYER_TYPE_REMAP

    older = {name for name, kind in _LEGACY_LAYER_TYPE_REMAP.items() if kind == "indexed_attention"}
    assert older and older == set(INDEXED_TYPES) & set(_LEGACY_LAYER_TYPE_REMAP)
    for name in older:
        kinds = ["full_attention", name, "sliding_attention", name]
        for keys in ({"layer_types": kinds}, {"text_config": {"num_hidden_layers": 4, "layer_types": kinds}}):
            config = {"model_type": "dots3_note", "num_hidden_layers": 4, **keys}
            overrides = '{"use_index_cache": true, "index_topk_pattern": "FFSS"}'
            found = import_pattern(overrides, "sglang", read_backbone(config, "config.json"))
            assert (found.pattern.letters, found.backbone.layer_indices) == ("FS", (1, 3))


def test_a_family_that_mixes_kinds_must_say_where() -> None:
    with pytest.raises(PatternError, match="does not say which layers of this glm5_next model have an indexer"):
        read({"model_type": "glm5_next", "num_hidden_layers": 6}, "vllm", None)


# --- overrides ----------------------------------------------------------------------------------------------------


def test_the_switch() -> None:
    pattern = {"index_topk_pattern": "FSSFSS"}
    assert read({**pattern, "use_index_cache": True}, "atom") == ("FSSFSS", [])
    for engine in ("vllm", "vllm-ascend", "sglang", "trtllm"):  # these never read it
        assert read(pattern, engine) == ("FSSFSS", [])
        letters, notes = read({**pattern, "use_index_cache": False}, engine)
        assert letters == "FSSFSS"
        assert "does not read use_index_cache, false here: the pattern runs all the same" in notes[0]
    for keys in (pattern, {**pattern, "use_index_cache": False}):
        letters, notes = read(keys, "atom")
        assert letters == "FFFFFF"
        assert any("with use_index_cache true alone: as given, every layer is F" in note for note in notes)
    assert read({"index_topk_freq": 3}, "atom") == ("FFSSFS", [])  # a freq above 1 is a switch by itself


def test_a_pattern_that_is_shorter_or_longer_than_the_model() -> None:
    for engine in ("vllm", "sglang", "trtllm"):
        assert read({"use_index_cache": True, "index_topk_pattern": "FSS"}, engine)[0] == "FSSFFF"
        letters, notes = read({"use_index_cache": True, "index_topk_pattern": "FSSFSSSS"}, engine)
        assert letters == "FSSFSS"
        assert any("reads no further" in note for note in notes)
    for engine in ("transformers", "lmdeploy", "xllm"):
        key = {"indexer_types": ["full", "shared"], "index_topk_pattern": "FS"}
        with pytest.raises(PatternError, match="has 2 letters, the model 6"):
            read(key, engine)


def test_a_pattern_that_is_a_list_has_each_engines_own_names() -> None:
    words, letters = ["full", "shared"] * 3, ["F", "S"] * 3
    switch = {"use_index_cache": True}
    for engine in ("transformers", "lmdeploy"):
        assert read({"index_topk_pattern": words}, engine)[0] == "FSFSFS"
        with pytest.raises(PatternError, match="index_topk_pattern has 'F' for layer 0: expected full or shared"):
            read({"index_topk_pattern": letters}, engine)
    for engine in ("vllm", "vllm-ascend", "sglang", "trtllm", "atom", "paddlefleet"):
        for backbone in (SIX, Backbone(6, tuple(range(6)), "deepseek_v4")):
            assert read({**switch, "index_topk_pattern": letters}, engine, backbone)[0] == "FSFSFS"
            with pytest.raises(PatternError, match="index_topk_pattern has 'full' for layer 0: expected F or S"):
                read({**switch, "index_topk_pattern": words}, engine, backbone)


def test_transformers_takes_a_list_of_letters_as_all_full() -> None:
    """Which is why it is refused here: nobody means that."""
    from transformers import GlmMoeDsaConfig

    types = GlmMoeDsaConfig(num_hidden_layers=2, index_topk_pattern=["F", "S"]).indexer_types
    assert types == ["F", "S"] and "shared" not in types  # its layers ask for "shared"


def test_tensorrt_llm_takes_layer_0_as_full() -> None:
    letters, notes = read({"index_topk_pattern": "SSFSFS"}, "trtllm")
    assert letters == "FSFSFS"
    assert notes == ["TensorRT-LLM takes layer 0 as F, whatever is given"]
    with pytest.raises(PatternError, match="vLLM would be given a pattern it cannot run: pattern starts with S"):
        read({"use_index_cache": True, "index_topk_pattern": "SSFSFS"}, "vllm")


def test_deepseek_v4_in_both_encodings() -> None:
    v4 = Backbone(8, (2, 4, 6), "deepseek_v4")
    all_layers = {"use_index_cache": True, "index_topk_pattern": "FFFFSFSF"}
    assert read(all_layers, "atom", v4)[0] == "FSS"
    assert read({"use_index_cache": True, "index_topk_pattern": "FSS"}, "vllm-ascend", v4) == ("FSS", [])
    assert read({"use_index_cache": True, "index_topk_freq": 2}, "vllm-ascend", v4)[0] == "FFS"
    assert read({"index_topk_pattern": "FSS"}, "vllm", v4)[0] == "FSS"
    assert read({"indexcache_topk_pattern": "fSS"}, "paddlefleet", v4) == ("FSS", [])
    with pytest.raises(PatternError, match="how vLLM reads index_topk_freq for deepseek_v4 is not known"):
        read({"index_topk_freq": 2}, "vllm", v4)


def test_atom_counts_letters_by_all_layers_of_deepseek_v4_and_freq_by_those_with_an_indexer() -> None:
    v4 = Backbone(12, (2, 4, 6, 8, 10), "deepseek_v4")
    freq = {"use_index_cache": True, "index_topk_freq": 4}
    assert read(freq, "atom", v4) == ("FSSSF", [])
    assert read({**freq, "index_skip_topk_offset": 3}, "atom", v4)[0] == "FSSSF"  # not read
    assert read({**freq, "index_topk_pattern": "FFFFSFSFFFSF"}, "atom", v4)[0] == "FSSFS"
    assert read({"index_topk_freq": 4}, "atom", v4)[0] == "FFFFF"  # the switch is needed


def test_tensorrt_llm_is_lenient_as_its_code_is() -> None:
    assert read({"index_topk_pattern": "fsSFss"}, "trtllm")[0] == "FSSFSS"
    assert read({"index_topk_freq": None}, "trtllm")[0] == "FFFFFF"
    assert read({"model_kwargs": {"index_topk_pattern": "FFSFSS"}}, "trtllm")[0] == "FFSFSS"
    with pytest.raises(PatternError, match="index_topk_freq is None"):
        read({"index_topk_freq": None}, "vllm")


def test_xllm_takes_no_offset_and_0_alike() -> None:
    for offset in ({}, {"index_skip_topk_offset": 0}, {"index_skip_topk_offset": 2}):
        assert read({"index_topk_freq": 4, **offset}, "xllm")[0] == "FFSSSF"
    assert read({"index_topk_freq": 4, "index_skip_topk_offset": 1}, "xllm")[0] == "FSSSFS"
    assert read({"index_topk_pattern": "fsssfs"}, "xllm")[0] == "FSSSFS"


def test_the_table_of_prime_rl(tmp_path: Path) -> None:
    text = '[trainer.model.index_cache]\ntopk_pattern = "FFSFSS"\n'
    assert import_pattern(text, None, SIX).pattern.letters == "FFSFSS"
    (tmp_path / "rl.toml").write_text(f"max_steps = 3\n[trainer.model]\nname = 'x'\n{text}[orchestrator]\nseed = 1\n")
    found = import_pattern(f"{tmp_path}/rl.toml", None, SIX)
    assert (found.pattern.letters, found.engine) == ("FFSFSS", ENGINES["prime-rl"])
    own = {"model_type": "glm_moe_dsa", "num_hidden_layers": 6, "indexer_types": ["full", "full", *["shared"] * 4]}
    assert read(own, "prime-rl", SIX)[0] == "FFSSSS"  # where there is no such table
    for bad, words in (
        ("[model]\nname = 1", "no table index_cache: prime-rl goes by the model's config.json then"),
        ("[model\n", "the text is not TOML"),
        ("[model.index_cache]\ntopk_freq = 2", "how prime-rl reads topk_freq is not known here"),
        ("prime-rl:freq:2", "how prime-rl reads topk_freq is not known here"),
        ("paddlefleet:freq:2", "how PaddleFleet reads index_topk_freq is not known here"),
        (f"vllm:{tmp_path}/rl.toml", "is what prime-rl reads, not vLLM: name no engine"),
        (text + '[orchestrator.index_cache]\ntopk_pattern = "FFFFFF"\n', "several tables index_cache, which differ"),
        (f"{tmp_path}/nowhere.toml", "cannot read .*nowhere.toml"),
    ):
        with pytest.raises(PatternError, match=words):
            import_pattern(bad, None, SIX)


def test_freq_and_offset_by_each_engines_rule() -> None:
    for text, expected in (
        ("vllm:freq:4", "FFSSSF"),
        ("vllm:freq:4,offset:3", "FFFSSS"),
        ("megatron:freq:4", "FSSSFS"),
        ("megatron:freq:4,offset:3", "FFFSSS"),
        ("atom:freq:4,offset:3", "FFFFSS"),
    ):
        assert import_pattern(text, None, SIX).pattern.letters == expected
    assert import_pattern("megatron:freq:4", None, SIX).notes == ()


@pytest.mark.parametrize(
    ("text", "backbone", "names"),
    [
        ('{"use_index_cache": true, "index_topk_pattern": "FS"}', None,
         "transformers, vllm, sglang, trtllm, lmdeploy, atom, vllm-ascend, xllm, paddlefleet"),
        ('{"index_topk_pattern": "FS"}', Backbone(2, (0, 1), "deepseek_v32"), "vllm, sglang, atom, vllm-ascend"),
        ('{"text_config": {"indexer_types": ["full"]}}', None, "transformers, lmdeploy, atom, llamacpp, prime-rl"),
        ('{"glm-dsa.attention.indexer.types": [true, false]}', None, "llamacpp"),
        ('{"dsa_indexer_topk_freq": 2}', SIX, "megatron"),
        ('{"model_type": "hy_v4", "num_hidden_layers": 6}', None, "transformers"),
        ("freq:4", SIX, "transformers, vllm, sglang, trtllm, lmdeploy, atom, vllm-ascend, megatron, xllm"),
        ("freq:4", Backbone(6, (2, 4), "minimax_m3_vl"), "vllm, atom"),
        ('{"hidden_size": 4}', Backbone(6, (0, 1), "axk2"), "transformers, .* paddlefleet"),
    ],
)  # fmt: skip
def test_an_engine_must_be_named_and_those_that_could_be_meant_are(
    text: str, backbone: Backbone | None, names: str
) -> None:
    with pytest.raises(PatternError, match=f"none is named: give --engine NAME, or NAME: in front, one of {names}$"):
        import_pattern(text, None, backbone)


def test_two_engines_are_one_too_many() -> None:
    assert import_pattern("vllm:freq:4", "vllm", SIX).pattern.letters == "FFSSSF"
    with pytest.raises(PatternError, match="megatron: in front and --engine vllm are two engines"):
        import_pattern("megatron:freq:4", "vllm", SIX)


def test_letters_need_no_engine() -> None:
    found = import_pattern("ffsf")
    assert (found.pattern.letters, found.engine, found.backbone) == ("FFSF", None, Backbone.alike(4))
    mixed = import_pattern("FSF", None, Backbone(6, (1, 3, 4), "dots3_note"))
    assert mixed.pattern_file("FSF").layer_indices == (1, 3, 4)
    with pytest.raises(PatternError, match="pattern has 3 letters, the model has 6 DSA layers"):
        import_pattern("FSF", None, SIX)
    for text, engine in (("vllm:FSF", None), ("FSF", "vllm")):
        with pytest.raises(PatternError, match="these letters are a pattern already, whatever the engine"):
            import_pattern(text, engine)


# --- command lines --------------------------------------------------------------------------------------------------

DOCKER = """docker run --gpus all \\
  -p 8000:8000 \\
  vllm/vllm-openai:nightly \\
  -lc "
    pip install -U transformers && \\
    vllm serve MODEL \\
      --hf-overrides '{\\"use_index_cache\\": true, \\"index_topk_pattern\\": \\"FFSFSSFS\\"}' \\
      --trust-remote-code
  "
"""
COMPOSE = """services:
  glm:
    command:
      - --model=MODEL
      - --hf_overrides={"index_topk_pattern": "FFS"}
"""
OBJECT, MEGATRON = "the JSON object behind --hf-overrides alone, as one argument, and --engine NAME", "freq:N,offset:M"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (DOCKER, OBJECT),
        (COMPOSE, OBJECT),
        ("--hf-overrides '{\"index_topk_freq\": 4}'", OBJECT),
        ("--hf-overrides", OBJECT),
        ("--hf-overrides '{", OBJECT),
        ("vllm serve M --hf_overrides.index_topk_freq=4", OBJECT),
        ("# our flags\n--hf-overrides=$OVERRIDES", OBJECT),
        ("python -m sglang.launch_server --json-model-override-args '{}'", "behind --json-model-override-args alone"),
        ("--dsa-indexer-topk-freq 4 --dsa-indexer-skip-topk-offset 2", MEGATRON),
        ("torchrun pretrain.py --dsa-indexer-topk-freq=4", MEGATRON),
        ("vllm serve x -tp 8", "the JSON object that it lays over the model's config, as one argument, or that"),
        ("vllm serve x", "the JSON object that it lays over the model's config"),
        ("vllm serve x --hf-override '{}'", "the JSON object that it lays over the model's config"),
        ("--port 80", "the JSON object that it lays over the model's config"),
        ("command: [vllm, serve, x, --port, 80]", "the JSON object that it lays over the model's config"),
    ],
)
def test_a_command_line_is_refused_with_the_part_to_give(text: str, part: str) -> None:
    for spec in (text, f"vllm:{text}"):
        with pytest.raises(PatternError) as caught:
            import_pattern(spec, None, SIX)
        assert str(caught.value).startswith("a command line is not read here: give ")
        assert part in str(caught.value) and "\n" not in str(caught.value)
        assert is_engine_source(spec)


def test_names_with_dashes_are_files(tmp_path: Path) -> None:
    path = tmp_path / "vllm serve -tp 8.json"
    write_object(path, {"index_topk_pattern": "FFS"})
    assert import_pattern(str(path), "sglang").pattern.letters == "FFS"


# --- files ----------------------------------------------------------------------------------------------------------


def test_files_and_directories(tmp_path: Path) -> None:
    write_object(tmp_path / "config.json", {**GLM, "index_topk_freq": 4})
    write_object(tmp_path / "overrides.json", {"use_index_cache": True, "index_topk_pattern": "FSSFSS"})
    assert import_pattern(str(tmp_path / "config.json"), "transformers").pattern.letters == "FFSSSF"
    assert import_pattern(str(tmp_path), "vllm").pattern.letters == "FFSSSF"
    assert import_pattern(str(tmp_path / "overrides.json"), "vllm").pattern.letters == "FSSFSS"
    assert import_pattern(f"vllm:{tmp_path / 'overrides.json'}").pattern.letters == "FSSFSS"
    assert is_engine_source(str(tmp_path)) and is_engine_source(str(tmp_path / "overrides.json"))


def test_our_own_files_are_none(tmp_path: Path) -> None:
    own = published_patterns() / "glm-5.2-native.json"
    assert not is_engine_source(str(own))
    with pytest.raises(PatternError, match="a file of icsearch itself"):
        import_pattern(str(own))


def test_a_config_of_another_size_is_refused() -> None:
    with pytest.raises(PatternError, match="has 6 layers, the model 7"):
        import_pattern(json.dumps({**GLM, "index_topk_freq": 4}), "vllm", Backbone.alike(7))


def test_overrides_may_cut_the_model(tmp_path: Path) -> None:
    """What does not name its type is no config of its own: it lies on top of the model's, layers included."""
    typed = {"num_hidden_layers": 4, "use_index_cache": True, "index_topk_freq": 2}
    path = tmp_path / "overrides.json"
    write_object(path, typed)
    kinds = ["full_attention", "indexed_attention"] * 6
    for keys, letters in (({}, "FFSF"), ({"layer_types": kinds}, "FF"), ({"index_skip_topk_offset": 1}, "FSFS")):
        model = read_backbone({**GLM, "num_hidden_layers": 12, **keys}, "config.json")
        for text in (json.dumps(typed), str(path)):
            found = import_pattern(text, "vllm", model)
            assert (found.pattern.letters, found.backbone.num_layers) == (letters, 4)
    wrapped = read_backbone({"model_type": "mistral_large4", "text_config": {**GLM, "num_hidden_layers": 12}}, "M")
    assert import_pattern(json.dumps({"text_config": typed}), "vllm", wrapped).pattern.letters == "FFSF"
    with pytest.raises(PatternError, match="the text has 4 layers, the model 6: expected the same model"):
        import_pattern(json.dumps(typed), "vllm", SIX)
    with pytest.raises(PatternError, match="num_hidden_layers is 0"):
        import_pattern(json.dumps({"text_config": {**typed, "num_hidden_layers": 0}}), "vllm", wrapped)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("freq:0", "index_topk_freq is 0: expected an integer from 1"),
        ("freq:4,offset:0", "starts with S"),
        ("freq:four", "expected freq:4 or freq:4,offset:2"),
        ("freq:4;offset:2", "expected freq:4 or freq:4,offset:2"),
        ("{", "is not JSON"),
        ('{"index_topk_freq": null}', "index_topk_freq is None: expected an integer from 1"),
        ('{"index_topk_freq": 2.5}', "expected an integer from 1"),
        ('{"index_topk_freq": true}', "expected an integer from 1"),
        ('{"index_topk_freq": 4, "index_skip_topk_offset": "2"}', "index_skip_topk_offset is '2'"),
        ('{"index_topk_pattern": "ffss"}', "'f' at position 0: expected F and S in capitals"),
        ('{"index_topk_pattern": ""}', "expected the letters F and S"),
        ('{"index_topk_pattern": 4}', "expected the letters F and S"),
        ('{"index_topk_pattern": ["full", "S"]}', "has 'S' for layer 1: expected full or shared"),
        ('{"indexer_types": ["F", "S"]}', "transformers takes a list of anything else as all full"),
        ('{"indexer_types": "FS"}', "expected a list of full and shared"),
        ('{"indexer_types": []}', "expected a list of full and shared"),
        ('{"text_config": 3}', "has text_config 3: expected an object"),
        ('{"num_hidden_layers": 0}', "num_hidden_layers is 0"),
        ('{"num_hidden_layers": 3, "model_type": []}', "model_type"),
        ("[1, 2]", "no file"),
        ("nowhere.json", "no file nowhere.json"),
        ("nowhere.gguf", "cannot read nowhere.gguf"),
        ("tgi:freq:4", "no file"),
        ("\0", "cannot use the path"),
        ("x" * 300, "cannot use the path"),
    ],
)
def test_what_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(PatternError, match=words) as caught:
        import_pattern(text, "transformers", SIX if "num_hidden_layers" not in text else None)
    assert "\n" not in str(caught.value)


def test_numbers_need_to_know_how_many_layers() -> None:
    with pytest.raises(PatternError, match="does not say how many layers there are: give --layers N"):
        import_pattern("vllm:freq:4")


KEYS = ["indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset", "use_index_cache",
        "text_config", "num_hidden_layers", "layer_types", "compress_ratios", "model_type",
        "num_nextn_predict_layers", "sparse_attention_config", "glm-dsa.attention.indexer.types",
        "dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset"]  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5000) | st.floats() | st.sampled_from(["F", "FS", "full", "shared"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)


@given(
    keys=st.dictionaries(st.sampled_from(KEYS), anything),
    engine=st.sampled_from([None, "transformers", "vllm", "trtllm", "atom", "vllm-ascend", "llamacpp", "megatron"]),
    known=st.booleans(),
)
def test_any_json_is_read_or_refused_in_one_line(keys: dict[str, Any], engine: str | None, known: bool) -> None:
    try:
        found = import_pattern(json.dumps(keys), engine, SIX if known else None)
    except IcsearchError as error:
        assert "\n" not in str(error)
    else:
        assert found.pattern.letters[0] == "F"
        assert len(found.pattern) == len(found.backbone.layer_indices)


V41 = {  # as DeepSeek-V4.1-Flash says it, with fewer layers
    "model_type": "deepseek_v41_text", "num_hidden_layers": 10, "index_topk": 8,
    "compress_ratios": [0, 0, 2, 2, 2, 1, 1, 1, 1, 1],
    "index_source_layer_ids": [2, 5, 7], "kv_source_layer_ids": [2, 5], "candidate_source_layer_id": 5,
}  # fmt: skip


def test_the_three_modes_of_deepseek_v41(tmp_path: Path) -> None:
    """Who selects is F, whatever the engine; the layers that do so by keys of another are named."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "deepseek_v41", "text_config": V41}))
    for engine in (None, "vllm"):
        found = import_pattern(str(path), engine)
        assert found.pattern.letters == "FSSFSFSS" and found.backbone.layer_indices == tuple(range(2, 10))
        (note,) = found.notes
        assert "layers 2, 5 are Full, 7 Reindex" in note and found.engine is None


def test_they_are_refused_by_name_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "deepseek_v41", "text_config": V41}))
    file = PatternFile(Pattern("FSSFSFSS"), tuple(range(2, 10)), "imported", model={"model_type": "deepseek_v41"})
    modes = r"three modes \(2 layers Full, 1 Reindex, 5 Reuse\)"
    for refuse in (
        lambda: check_config(load_config(path), "M"),
        lambda: open_checkpoint(str(tmp_path)),
        lambda: open_model_file(str(path)),
        lambda: with_config(file, load_config(path), "M"),
    ):
        with pytest.raises(IcsearchError, match=modes):
            refuse()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index_source_layer_ids": None}, "index_source_layer_ids is missing"),
        ({"index_source_layer_ids": [3]}, "its index_source_layer_ids are of another model"),
        ({"compress_ratios": "2"}, "compress_ratios is '2'"),
    ],
)
def test_modes_that_cannot_be_read(change: dict[str, Any], message: str) -> None:
    keys = {key: value for key, value in {**V41, **change}.items() if value is not None}
    with pytest.raises(EngineConfigError, match=message):
        import_pattern(json.dumps({**keys, "model_type": "deepseek_v41"}))
