"""The engines, one entry each. What is not known of one is said, not guessed."""

from __future__ import annotations

from icsearch.core.pattern import FULL
from icsearch.core.text import did_you_mean
from icsearch.engines import engine
from icsearch.engines.engine import (
    ASCEND_V4,
    ATOM,
    ATOM_V4,
    CARRIED,
    MEGATRON,
    MINIMAX_M3,
    SEPARATE,
    XLLM,
    Engine,
    ExportError,
    Reader,
    config_json,
    json_flag,
)
from icsearch.engines.pipeline import split_front, split_vllm
from icsearch.model.config import FREQ, KINDS, MODEL_TYPES, PATTERN, TYPES

MAY_IGNORE = "For other types it may ignore the pattern and run every layer as F without a word: check."
NOT_KNOWN = "Whether it reads the pattern for other types is not known here: check."

TRANSFORMERS = Engine(
    name="transformers",
    title="transformers",
    how="put these keys into the checkpoint's config.json, in place of what is there under the same names",
    settings=engine.config_keys,
    render=config_json,
    model_types=("glm_moe_dsa", "hy_v4", "hy_v4_vl", "mistral_large4"),
    on_other_types="For other types transformers 5.24 ignores these keys, or (glm5_next) fails on the first S layer.",
    wrapper_note="the config wraps a text model: the keys belong into text_config, as written",
    nested_alone=True,
    stages=CARRIED,
    carried="its layers hand it on, on whatever devices they are",
    writes="config.json",
    without_indexers=(("glm_moe_dsa", ""), ("hy_v4", ""), ("hy_v4_vl", ""), ("mistral_large4", "")),
    readers=tuple(
        (kind, Reader(order=MODEL_TYPES[kind].heeded, default_freq=MODEL_TYPES[kind].freq))
        for kind in ("hy_v4", "hy_v4_vl")
    ),
)
VLLM = Engine(
    name="vllm",
    title="vLLM",
    how="add this flag to vllm serve",
    settings=engine.vllm_keys,
    render=json_flag("--hf-overrides"),
    model_types=("deepseek_v32", "glm_moe_dsa", "minimax_m3_vl"),
    on_other_types=MAY_IGNORE,
    wrapper_note="the config wraps a text model: the override is nested in text_config, as vLLM needs it",
    nested_alone=True,
    notes=(
        (
            "minimax_m3_vl",
            "vLLM shares in MiniMax M3 on ROCm alone (vllm-project/vllm pull request 47269), by two numbers over the "
            "sparse layers; elsewhere it runs every layer as F",
        ),
        (
            "deepseek_v4",
            "vLLM shares in DeepSeek V4 by an open pull request alone (vllm-project/vllm pull request 51209), whose "
            "letters count the layers with an indexer (C4)",
        ),
    ),
    dsa_letters_only=("minimax_m3_vl", "deepseek_v4"),
    split=split_vllm,
    partition_variable="VLLM_PP_LAYER_PARTITION",
    stages=SEPARATE,
    without_indexers=(("glm_moe_dsa", "from #45895 on"), ("deepseek_v32", "from #45895 on")),
    reader=Reader(order=(PATTERN, FREQ), past_the_end=True, words=False),
    readers=(
        ("minimax_m3_vl", Reader(order=(FREQ,), schedule=MINIMAX_M3, needs_switch=True, words=False)),
        ("deepseek_v4", Reader(order=(PATTERN,), unknown=(TYPES, FREQ), words=False)),
    ),
)
SGLANG = Engine(
    name="sglang",
    title="SGLang",
    how="add this flag to python -m sglang.launch_server",
    settings=lambda letters, _: {PATTERN: letters},
    render=json_flag("--json-model-override-args"),
    model_types=("deepseek_v32", "glm_moe_dsa"),
    on_other_types=MAY_IGNORE,
    wrapper_note=(
        "the config wraps a text model: that SGLang merges a nested text_config is not verified; "
        "should it fail, put index_topk_pattern into the text_config of config.json"
    ),
    notes=(
        (
            "minimax_m3_vl",
            "on MiniMax M3 SGLang is told how many sparse layers share by SGLANG_MINIMAX_M3_INDEX_TOPK_FREQ (on ROCm; "
            "sgl-project/sglang pull request 36527), not by a pattern",
        ),
    ),
    split=split_front,
    stages=CARRIED,
    carried="since sgl-project/sglang pull request 28532, June 2026; older ones need F there",
    without_indexers=(("glm_moe_dsa", "from #30531 on"), ("deepseek_v32", "from #30531 on")),
    reader=Reader(order=(PATTERN, FREQ), past_the_end=True, words=False),
)
TRTLLM = Engine(
    name="trtllm",
    title="TensorRT-LLM",
    how=(
        "put these keys into the checkpoint's config.json, or index_topk_pattern, which is what it reads, under "
        "model_kwargs into the YAML file of --extra_llm_api_options"
    ),
    settings=engine.config_keys,
    render=config_json,
    model_types=("glm_moe_dsa",),
    on_other_types=NOT_KNOWN,
    wrapper_note="the config wraps a text model: whether TensorRT-LLM looks into text_config is not known here: check",
    writes="config.json",
    inside="model_kwargs",
    without_indexers=(("glm_moe_dsa", ""),),
    reader=Reader(
        order=(PATTERN, FREQ), past_the_end=True, first_is_full=True, words=False, any_case=True, null_is_one=True
    ),
)
LMDEPLOY = Engine(
    name="lmdeploy",
    title="LMDeploy",
    how="add this flag to lmdeploy serve api_server (PyTorch backend)",
    settings=lambda letters, _: {TYPES: [KINDS[letter] for letter in letters]},
    render=json_flag("--hf-overrides"),
    model_types=("glm_moe_dsa",),
    on_other_types="It reads indexer_types for glm_moe_dsa alone.",
    wrapper_note="the config wraps a text model: whether LMDeploy merges a nested text_config is not known here: check",
    stages=SEPARATE,
    without_indexers=(("glm_moe_dsa", ""),),
)
ATOM_ENGINE = Engine(
    name="atom",
    title="ATOM",
    how="add this flag where ATOM is started (ROCm; also as vLLM's plugin)",
    settings=lambda letters, model_type: {  # it takes indexer_types over the letters, and a loaded GLM config has them
        **engine.switched_pattern(letters),
        **({TYPES: [KINDS[letter] for letter in letters]} if model_type == "glm_moe_dsa" else {}),
    },
    render=json_flag("--hf-overrides"),
    model_types=("deepseek_v32", "glm_moe_dsa", "deepseek_v4", "minimax_m3_vl"),
    on_other_types=NOT_KNOWN,
    wrapper_note="the config wraps a text model: whether ATOM merges a nested text_config is not known here: check",
    outside_types=("minimax_m3_vl",),
    notes=(
        (
            "glm_moe_dsa",
            "ATOM takes indexer_types over index_topk_pattern (ROCm/ATOM pull request 1260), so both are given; for "
            "layers that are shared it then builds no indexer, and whether it loads a checkpoint that still has their "
            "weights is not known here",
        ),
        ("deepseek_v4", "on DeepSeek V4 ATOM's letters count all layers, vllm-ascend's only those with an indexer"),
        (
            "minimax_m3_vl",
            "on MiniMax M3 ATOM's letters count the sparse layers (ROCm/ATOM pull request 1354); its own server hands "
            "these keys on to the text model, and an override of text_config would replace that as a whole (as vLLM's "
            "plugin: not verified)",
        ),
    ),
    dsa_letters_only=("minimax_m3_vl",),
    stages=CARRIED,
    carried="since ROCm/ATOM pull request 1882, August 2026; older ones need F there",
    without_indexers=(("glm_moe_dsa", "from #1260 on"),),
    reader=Reader(schedule=ATOM, past_the_end=True, needs_switch=True, switched_by_freq=True, words=False),
    readers=(
        (
            "deepseek_v4",
            Reader(
                order=(PATTERN, FREQ),
                schedule=ATOM_V4,
                freq_counts_indexed=True,
                past_the_end=True,
                needs_switch=True,
                words=False,
            ),
        ),
        (
            "minimax_m3_vl",
            Reader(order=(PATTERN, FREQ), schedule=MINIMAX_M3, past_the_end=True, needs_switch=True, words=False),
        ),
    ),
)
VLLM_ASCEND = Engine(
    name="vllm-ascend",
    title="vllm-ascend",
    how="add this flag to vllm serve",
    settings=engine.switched_pattern,
    render=json_flag("--hf-overrides"),
    model_types=("deepseek_v32", "glm_moe_dsa", "deepseek_v4"),
    on_other_types=MAY_IGNORE,
    wrapper_note="the config wraps a text model: the override is nested in text_config, as vLLM needs it",
    nested_alone=True,
    notes=(
        (
            "deepseek_v4",
            "on DeepSeek V4 vllm-ascend's letters count the layers with an indexer (C4), ATOM's all layers",
        ),
    ),
    dsa_letters_only=("deepseek_v4",),
    split=split_vllm,
    partition_variable="VLLM_PP_LAYER_PARTITION",
    stages=SEPARATE,
    without_indexers=(("glm_moe_dsa", "from #11363 on"),),
    reader=Reader(order=(PATTERN, FREQ), past_the_end=True, words=False),
    readers=(
        (
            "deepseek_v4",
            Reader(order=(PATTERN, FREQ), schedule=ASCEND_V4, past_the_end=True, needs_switch=True, words=False),
        ),
    ),
)
LLAMACPP = Engine(
    name="llamacpp",
    title="llama.cpp",
    how=(
        "set this bool array in the GGUF (icsearch export ... --gguf OLD.gguf --out NEW.gguf does), or convert a "
        "checkpoint whose config.json has the keys of --engine transformers: the converter reads indexer_types"
    ),
    settings=lambda letters, _: {engine.GGUF_KEY: [letter == FULL for letter in letters]},
    render=config_json,
    model_types=("glm_moe_dsa",),
    on_other_types="The key belongs to the architecture glm-dsa.",
    nests=False,
    stages=CARRIED,
    carried="one graph runs all layers, on whatever devices they are",
    writes="GGUF",
    reader=Reader(order=(engine.GGUF_KEY, TYPES)),
)
MEGATRON_ENGINE = Engine(
    name="megatron",
    title="Megatron-LM",
    how="add these flags (TransformerConfig's dsa_indexer_topk_freq and dsa_indexer_skip_topk_offset)",
    settings=engine.megatron_keys,
    render=lambda settings: " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items()),
    model_types=("glm_moe_dsa",),
    on_other_types=NOT_KNOWN,
    notes=(("", "Megatron-LM raises where a pipeline stage would start on S: give --serve-pp if you cut it"),),
    nests=False,
    all_layers_alike=True,
    stages=SEPARATE,
    reader=Reader(
        order=(engine.MEGATRON_FREQ,), schedule=MEGATRON, freq=engine.MEGATRON_FREQ, offset=engine.MEGATRON_OFFSET
    ),
)
XLLM_ENGINE = Engine(
    name="xllm",
    title="xLLM",
    how="put these keys into the checkpoint's config.json; it reads index_topk_pattern",
    settings=engine.config_keys,
    render=config_json,
    model_types=("glm_moe_dsa",),
    on_other_types=NOT_KNOWN,
    writes="config.json",
    wrapper_note="the config wraps a text model: whether xLLM looks into text_config is not known here: check",
    without_indexers=(("glm_moe_dsa", ""),),
    reader=Reader(order=(PATTERN, FREQ), schedule=XLLM, words=False, any_case=True),
)
PRIME_RL = Engine(
    name="prime-rl",
    title="prime-rl",
    how="put this table into the TOML file of the run (a trainer; without it, it goes by the config's indexer_types)",
    settings=lambda letters, _: {engine.PRIME_RL_PATTERN: letters},
    render=engine.toml("trainer.model.index_cache"),
    model_types=("glm_moe_dsa",),
    on_other_types=NOT_KNOWN,
    nests=False,
    inside="index_cache",
    reader=Reader(
        order=(engine.PRIME_RL_PATTERN, TYPES), freq=engine.PRIME_RL_FREQ, unknown=(engine.PRIME_RL_FREQ, FREQ, PATTERN)
    ),
)
PADDLEFLEET = Engine(
    name="paddlefleet",
    title="PaddleFleet",
    how="put this key into the model's config.json (a trainer; its letters count the layers with an indexer)",
    settings=lambda letters, _: {engine.PADDLE_PATTERN: letters},
    render=config_json,
    model_types=("deepseek_v4",),
    on_other_types="It shares in DeepSeek V4 alone.",
    nests=False,
    dsa_letters_only=("deepseek_v4",),
    stages=CARRIED,
    carried="in its plain schedule, without virtual stages",
    reader=Reader(order=(engine.PADDLE_PATTERN, PATTERN), unknown=(TYPES, FREQ), words=False, any_case=True),
)

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        TRANSFORMERS, VLLM, SGLANG, TRTLLM, LMDEPLOY, ATOM_ENGINE, VLLM_ASCEND, LLAMACPP, MEGATRON_ENGINE, XLLM_ENGINE,
        PRIME_RL, PADDLEFLEET,
    )
}  # fmt: skip


def find_engine(name: str) -> Engine:
    """The table's entry for an engine; raises ExportError with the known names."""
    engine = ENGINES.get(name.strip().lower())
    if engine is None:
        raise ExportError(f"unknown engine {name!r}: {did_you_mean(name, ENGINES)}expected one of {', '.join(ENGINES)}")
    return engine
