"""Launch flags as people paste them, in every spelling that the engine's own parser takes; and those that none does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icsearch.core.errors import IcsearchError, PatternError
from icsearch.engines.read import HF_OVERRIDES, SGLANG_ARGS, has_flag, import_pattern, is_engine_source, parse_flags
from icsearch.model.config import Backbone

FOUR = Backbone.alike(4)
SERVE = "vllm serve MODEL -tp 8"
JSON = '{"use_index_cache": true, "index_topk_pattern": "FFSS"}'
SPELLINGS = [
    f"--hf-overrides '{JSON}'",
    f"--hf-overrides='{JSON}'",
    f"--hf_overrides '{JSON}'",
    f"--hf_overrides='{JSON}'",
    f"--hf-overrides '{JSON}' --port 80",
    "--hf-overrides.index_topk_pattern FFSS --hf-overrides.use_index_cache true",
    "--hf_overrides.index_topk_pattern=FFSS --port 80 --hf-overrides.use_index_cache=true",
    "--hf-overrides.index_topk_freq 4 --hf-overrides.use_index_cache true",
]


@pytest.mark.parametrize("flags", SPELLINGS)
@pytest.mark.parametrize("command", [SERVE, "", "python -m vllm.entrypoints.openai.api_server --model MODEL"])
def test_spellings_that_vllm_takes(command: str, flags: str) -> None:
    text = f"{command} {flags}".strip()
    found = import_pattern(text, None, FOUR)
    assert is_engine_source(text)
    assert (found.pattern.letters, found.engine.name) == ("FFSS", "vllm")
    assert found.notes == ()  # no engine that takes this flag runs another pattern


def test_dotted_keys_make_one_object() -> None:
    for text, keys in (
        ("--hf-overrides.text_config.index_topk_freq 4", {"text_config": {"index_topk_freq": 4}}),
        ("--hf-overrides.a.b 1 --hf-overrides.a.c 2", {"a": {"b": 1, "c": 2}}),
        ("--hf-overrides.a.b 1 --hf-overrides.a '{\"c\": [2]}'", {"a": {"b": 1, "c": [2]}}),
        ("--hf-overrides.a 1 --hf-overrides.a 2", {"a": 2}),
        ("--hf-overrides.a 1 --hf-overrides.a.b 2", {"a": {"b": 2}}),
        ("--hf-overrides.a+ full --hf-overrides.a+=shared,full", {"a": ["full", "shared", "full"]}),
        ("--hf-overrides.a '[\"x\"]' --hf-overrides.a+ y", {"a": ["x", "y"]}),
        ("--hf-overrides.a 1.5 --hf-overrides.b null --hf-overrides.c FF", {"a": 1.5, "b": None, "c": "FF"}),
        ("--hf-overrides.under_score 1 --hf_overrides.under_score=2", {"under_score": 2}),
        (f"--hf-overrides.a {'9' * 5000}", {"a": "9" * 5000}),
    ):
        found = parse_flags(text)
        assert (found.flag, found.keys, found.notes) == (HF_OVERRIDES, keys, ())


def test_what_is_given_twice_is_said() -> None:
    """Dotted keys stand behind all else that was typed, so they replace a whole object; of two, the last is read."""
    found = parse_flags(f"--hf-overrides.index_topk_freq 2 --hf-overrides '{JSON}'")
    assert found.keys == {"index_topk_freq": 2}
    assert found.notes == (
        "--hf-overrides beside '--hf-overrides.index_topk_freq' is not read: the dotted keys take its place",
    )
    text = f"--hf-overrides '{{}}' --hf_overrides '{JSON}'"
    assert parse_flags(text).keys == json.loads(JSON)
    assert import_pattern(text, "vllm").notes == ("--hf-overrides is given 2 times: engines read the last one alone",)


def test_lmdeploy_takes_the_same_spellings() -> None:
    found = import_pattern("lmdeploy serve api_server M --hf_overrides.indexer_types+ full,shared")
    assert (found.pattern.letters, found.engine.name) == ("FS", "lmdeploy")


def test_a_wrapped_config_by_dotted_keys() -> None:
    wrapped = Backbone(4, tuple(range(4)), "mistral_large4", wrapper=True)
    text = "--hf-overrides.text_config.index_topk_pattern FFSS --hf-overrides.text_config.use_index_cache true"
    assert import_pattern(text, None, wrapped).pattern.letters == "FFSS"


@pytest.mark.parametrize("text", [f"{SGLANG_ARGS}='{JSON}'", f"{SGLANG_ARGS} '{JSON}'", f'{SGLANG_ARGS}="{{}}"'])
def test_sglangs_own_spelling(text: str) -> None:
    found = import_pattern(f"python -m sglang.launch_server --model-path M {text} --tp 8", None, FOUR)
    assert (found.pattern.letters, found.engine.name) == ("FFFF" if "{}" in text else "FFSS", "sglang")


def test_megatrons_flags_by_themselves() -> None:
    found = import_pattern("--dsa-indexer-skip-topk-offset=2 --dsa-indexer-topk-freq 4", None, FOUR)
    assert (found.pattern.letters, found.engine.name) == ("FFSS", "megatron")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--json_model_override_args '{}'", "SGLang's parser knows --json-model-override-args alone; write it so"),
        ("--json-model-override-args.index_topk_freq 4", "SGLang's parser knows --json-model-override-args alone"),
        ("--dsa_indexer_topk_freq 4", "Megatron-LM's parser knows --dsa-indexer-topk-freq alone"),
        ("--dsa-indexer-skip-topk-offset 3", "no key that Megatron-LM reads"),
        ("--hf-overrides.index_topk_pattern", "has no value: give it behind a space or an equals sign"),
        ("--hf-overrides.=4", "names no key: expected one such as --hf-overrides.index_topk_pattern"),
        ("--hf-overrides.text_config..a 4", "names no key"),
        ("--hf-overrides.+ 4", "names no key"),
        ("--hf-overrides.use_index_cache True", "has True, which engines read as a text: write true, as JSON does"),
        ('--hf-overrides.text_config \'{"a": 1, "a": 2}\'', "has 'a' twice: give it once"),
        ("--hf-overrides.index_topk_freq 1k", "index_topk_freq is '1k': expected an integer"),
        ("--hf-overrides.index_topk_freq NaN", "index_topk_freq is nan: expected an integer"),
        ("--hf-overrides.index-topk-pattern FFSS", "no key that vLLM reads"),
        (f"--hf-overrides.a {'[' * 100000}", "no key that vLLM reads"),
    ],
)
def test_forms_that_cannot_be_read(text: str, words: str) -> None:
    backbone = FOUR if "freq" in text else None
    with pytest.raises(PatternError, match=words) as caught:
        import_pattern(text, None, backbone)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_what_is_no_flag_of_a_pattern() -> None:
    for text in ("config.json", "--hf-overridesx 4", "x--hf-overrides 4", "--port 80", "hf-overrides.json"):
        assert not has_flag(text)


FORMS: Any = st.sampled_from(["--hf-overrides", "--hf_overrides", SGLANG_ARGS, "--dsa-indexer-topk-freq"])
PATHS: Any = st.just("") | st.text("ab.+= \n", max_size=4).map(".'{}'".format)


@given(st.lists(st.tuples(FORMS, PATHS, st.text("FS4{}[]\"',:. \n", max_size=8)), min_size=1, max_size=4))
def test_any_flags_are_read_or_refused_in_one_line(flags: list[tuple[str, str, str]]) -> None:
    text = " ".join(f"{flag}{path} {value}" for flag, path, value in flags)
    try:
        import_pattern(f"vllm serve M {text}", None, FOUR)
    except IcsearchError as error:
        assert "\n" not in str(error)
