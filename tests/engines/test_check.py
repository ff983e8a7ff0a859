"""`icsearch check`: what each engine runs with a config, what is wrong with it, and the exit code that says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import in_process
import native_fixtures
from icsearch.core.errors import IcsearchError
from icsearch.engines.check import Check, check_config
from icsearch.engines.table import find_engine

NATIVE = "FFFSSSFSSSFS"  # of a model of 12 layers, as GLM-5.2 ships
TYPES = [{"F": "full", "S": "shared"}[letter] for letter in NATIVE]
WHOLE: dict[str, Any] = {"indexer_types": TYPES, "index_topk_pattern": NATIVE, "use_index_cache": True}


def glm(**keys: Any) -> dict[str, Any]:
    return {"model_type": "glm_moe_dsa", "num_hidden_layers": 12, "index_topk": 8, **keys}


def patterns(found: Check) -> dict[str, str | None]:
    return {verdict.engine.name: verdict.letters for verdict in found.verdicts}


def test_a_config_that_every_engine_reads_alike() -> None:
    found = check_config(glm(**WHOLE), "M")
    assert not found.problems and set(patterns(found).values()) == {NATIVE}
    assert {"transformers", "vllm", "sglang", "xllm", "prime-rl"} <= patterns(found).keys()
    assert not {"megatron", "paddlefleet"} & patterns(found).keys()  # told elsewhere, of another family
    first, engines, pattern = found.lines()
    assert first == "M: glm_moe_dsa, 12 layers, all with an indexer"
    assert engines.endswith("prime-rl: 5 of 12 layers F") and pattern.startswith(f"{NATIVE}: transformers, vLLM")


def test_nothing_shared_is_clean_and_short() -> None:
    found = check_config(glm(num_nextn_predict_layers=1), "M")
    assert not found.problems and set(patterns(found).values()) == {"F" * 12}
    first, engines = found.lines()
    assert first.endswith("all with an indexer, and 1 of multi-token prediction")
    assert engines.endswith("prime-rl: every layer F")


def test_a_key_that_some_engines_do_not_read() -> None:
    """A GLM-5.2 config with indexer_types alone: who reads letters only runs every layer."""
    found = check_config(glm(indexer_types=TYPES), "M")
    read = patterns(found)
    assert read["transformers"] == read["llamacpp"] == NATIVE and read["vllm"] == read["atom"] == "F" * 12
    (problem,) = found.problems
    assert problem.startswith("transformers, LMDeploy, llama.cpp, prime-rl (5 F) and most (12 F) differ in 7 layers")
    lines = list(found.lines())
    assert "ATOM: every layer F; it looks at indexer_types with use_index_cache true alone" in lines
    assert not check_config(glm(indexer_types=TYPES), "M", engine=find_engine("vllm")).problems


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"indexer_types": TYPES[:8], "index_topk_pattern": NATIVE}, "indexer_types has 8 for 12 layers: write one"),
        ({"index_topk_pattern": "S" + NATIVE[1:]}, "index_topk_pattern begins with S, and no selection comes before"),
        ({"index_topk_freq": None}, "index_topk_freq is null, on which transformers and vLLM fail: remove it"),
        (
            {"index_topk_pattern": NATIVE + "S", "num_nextn_predict_layers": 1},
            "index_topk_pattern marks layers of multi-token prediction S",
        ),
        ({**WHOLE, "use_index_cache": False}, "use_index_cache is false, which some engines do not read"),
        ({"index_topk_pattern": "ffsf" * 3}, "index_topk_pattern is 'ffsfffsfffsf': expected full and shared, or F"),
        ({"indexer_types": ["F", 1] * 6}, "indexer_types is a list: expected full and shared, or F"),
        ({"index_topk_pattern": 3}, "index_topk_pattern is 3: expected full and shared"),
    ],
)
def test_what_is_malformed(keys: dict[str, Any], expected: str) -> None:
    found = check_config(glm(**keys), "M")
    assert found.problems[0].startswith(expected)
    assert not any("\n" in line for line in found.lines())
    assert json.loads(json.dumps(found.document()))["problems"] == list(found.problems)


def test_who_fails_is_named_once_for_each_reason() -> None:
    found = check_config(glm(index_topk_pattern="S" + NATIVE[1:]), "M")
    (failing,) = [problem for problem in found.problems if "it cannot run" in problem]
    assert failing.startswith("transformers, vLLM, SGLang, LMDeploy, vllm-ascend, xLLM: it would be given a pattern")
    read = patterns(found)
    assert read["trtllm"] == NATIVE  # layer 0 is F there, whatever is given
    unknown = next(verdict for verdict in found.verdicts if verdict.engine.name == "prime-rl")
    assert unknown.letters is None and not unknown.known and unknown.says in "\n".join(found.lines())


def test_a_wrapper_with_its_keys_outside() -> None:
    inner = {"model_type": "mistral_large4_text", "num_hidden_layers": 12, "index_topk": 8}
    found = check_config({"model_type": "mistral_large4", "text_config": inner, "index_topk_pattern": NATIVE}, "M")
    assert found.problems[0] == (
        "index_topk_pattern stands beside text_config, where the language model does not see it: move it in"
    )
    assert patterns(found)["transformers"] == "F" * 12


def test_weights_that_are_missing_for_f_layers() -> None:
    """A checkpoint without the indexers of S layers, under a config that an engine reads as every layer F."""
    there = [layer for layer, letter in enumerate(NATIVE) if letter == "F"]
    assert not check_config(glm(**WHOLE), "M", there).problems
    found = check_config(glm(indexer_types=TYPES), "M", there)
    assert found.problems[-1] == (
        "the weights hold no indexer for layers that are F with vLLM, SGLang, TensorRT-LLM, ATOM, vllm-ascend, xLLM: "
        "3, 4, 5, 7, 8, 9, 11"
    )


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    return in_process.run(capsys, "check", *words)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint with its weights, a config alone, JSON, and exit code 2 for what is not clean."""
    checkpoint = native_fixtures.save_native(tmp_path / "m", "glm_moe_dsa")
    status, out, err = run(capsys, checkpoint)
    assert (status, err) == (0, "") and "every layer F" in out
    path = tmp_path / "config.json"
    path.write_text(json.dumps(glm(indexer_types=TYPES)))
    status, out, err = run(capsys, path)
    assert (status, err) == (2, "") and out.splitlines()[-1].startswith("wrong: transformers")
    status, out, _ = run(capsys, path, "--json")
    document = json.loads(out)
    assert (
        status == 2 and document["format"] == "icsearch.check/1" and document["engines"]["vllm"]["pattern"] == "F" * 12
    )
    assert run(capsys, path, "--engine", "vllm")[0] == 0


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.write_text('{"num_hidden_layers": 2}'), "has no indexers"),
        (lambda path: path.write_text("["), "expected"),
        (lambda path: None, "nothing at"),
    ],
)
def test_no_config_of_such_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], object], expected: str
) -> None:
    make(tmp_path / "config.json")
    status, out, err = run(capsys, tmp_path / "config.json")
    assert (status, out, err.count("\n")) == (2, "", 1) and expected in err


def test_an_engine_that_nobody_knows() -> None:
    with pytest.raises(IcsearchError, match="unknown engine 'vlm': .*vllm"):
        find_engine("vlm")
