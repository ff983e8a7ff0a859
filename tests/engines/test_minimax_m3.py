"""MiniMax M3 in ATOM and vLLM: letters and numbers over the sparse layers, held against the rules written out here."""

from __future__ import annotations

import json
import re
import shlex
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_files import part_read, pattern_file
from icsearch.core.errors import PatternError
from icsearch.engines.engine import ExportError
from icsearch.engines.export import Export, export
from icsearch.engines.native import notes
from icsearch.engines.read import import_pattern
from icsearch.model.config import Backbone, read_backbone

M3 = "minimax_m3_vl"
DENSE_FIRST = Backbone(8, (2, 3, 4, 6, 7), M3, wrapper=True)


def vllm_shares(keys: dict[str, Any], sparse: tuple[int, ...], layer: int) -> bool:
    """Two numbers, over the place of a layer among the sparse ones."""
    if layer not in sparse or not keys.get("use_index_cache", False):
        return False
    place = sum(other < layer for other in sparse)
    return max(place - keys.get("index_skip_topk_offset", 0), 0) % keys.get("index_topk_freq", 1) != 0


def atom_shares(keys: dict[str, Any], sparse: tuple[int, ...], layer: int) -> bool:
    """Letters before numbers."""
    if "index_topk_pattern" not in keys:
        return vllm_shares(keys, sparse, layer)
    if layer not in sparse or not keys.get("use_index_cache", False):
        return False
    place = sum(other < layer for other in sparse)
    return place < len(keys["index_topk_pattern"]) and keys["index_topk_pattern"][place] == "S"


RULES = {"atom": atom_shares, "vllm": vllm_shares}


def run_by(engine: str, keys: dict[str, Any], sparse: tuple[int, ...]) -> str:
    return "".join("S" if RULES[engine](keys, sparse, layer) else "F" for layer in sparse)


def as_given(engine: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Overrides of a config that wraps the text model, where each engine looks for them."""
    return {"text_config": keys} if engine == "vllm" else keys


def numbers(freq: int, offset: int) -> dict[str, Any]:
    return {"use_index_cache": True, "index_topk_freq": freq, "index_skip_topk_offset": offset}


layouts = st.integers(1, 8).flatmap(
    lambda layers: st.sets(st.integers(0, layers - 1), min_size=1).map(
        lambda sparse: Backbone(layers, tuple(sorted(sparse)), M3, wrapper=True)
    )
)
overrides = st.fixed_dictionaries(
    {},
    optional={
        "use_index_cache": st.booleans(),
        "index_topk_pattern": st.text("FS", max_size=9).map(lambda tail: "F" + tail),
        "index_topk_freq": st.integers(1, 5),
        "index_skip_topk_offset": st.integers(0, 5),
    },
)


@pytest.mark.parametrize("engine", RULES)
@given(layout=layouts, keys=overrides)
def test_what_is_given_is_read_by_the_engines_rule(engine: str, layout: Backbone, keys: dict[str, Any]) -> None:
    found = import_pattern(json.dumps(as_given(engine, keys)), engine, layout)
    assert found.pattern.letters == run_by(engine, keys, layout.layer_indices)
    assert found.backbone.layer_indices == layout.layer_indices


@pytest.mark.parametrize("engine", RULES)
def test_freq_and_offset_without_keys(engine: str) -> None:
    for freq, offset in product(range(1, 7), range(5)):
        found = import_pattern(f"{engine}:freq:{freq},offset:{offset}", None, DENSE_FIRST)
        assert found.pattern.letters == run_by(engine, numbers(freq, offset), DENSE_FIRST.layer_indices)
    assert import_pattern(f"{engine}:freq:4", None, DENSE_FIRST).pattern.letters == "FSSSF"
    with pytest.raises(PatternError, match="and none is named: .* one of vllm, atom$"):
        import_pattern("freq:4", None, DENSE_FIRST)


# --- export ---------------------------------------------------------------------------------------------------------


def every(length: int) -> list[str]:
    """All patterns of so many sparse layers."""
    return ["F" + "".join(rest) for rest in product("FS", repeat=length - 1)]


def exported(letters: str, engine: str, **model: Any) -> Export:
    """For a model whose sparse layers are every other one, behind a dense one."""
    sparse = tuple(range(1, 2 * len(letters), 2))
    known = {"model_type": M3, "num_hidden_layers": 2 * len(letters), "wrapper_config": True}
    return export(pattern_file(letters, sparse, **{**known, **model}), engine)


def by_numbers(length: int) -> set[str]:
    """Every pattern that vLLM's two numbers give, by trying all that can differ."""
    return {
        run_by("vllm", numbers(freq, offset), tuple(range(length)))
        for freq, offset in product(range(1, length + 2), range(length))
    }


@pytest.mark.parametrize("length", range(1, 8))
def test_atom_is_given_the_letters_of_the_sparse_layers(length: int) -> None:
    for letters in every(length):
        result = exported(letters, "atom")
        assert result.settings == {"use_index_cache": True, "index_topk_pattern": letters}
        assert run_by("atom", result.settings, tuple(range(1, 2 * length, 2))) == letters


@pytest.mark.parametrize("length", range(1, 8))
def test_vllm_is_given_two_numbers_where_they_give_the_pattern(length: int) -> None:
    possible = by_numbers(length)
    for letters in every(length):
        if letters in possible:
            keys = exported(letters, "vllm").settings["text_config"]
            assert set(keys) == {"use_index_cache", "index_topk_freq", "index_skip_topk_offset"}
            assert run_by("vllm", keys, tuple(range(1, 2 * length, 2))) == letters
        else:
            refused_with_the_nearest(letters, possible)


def refused_with_the_nearest(letters: str, possible: set[str]) -> None:
    with pytest.raises(
        ExportError, match="^vLLM reads no letters for MiniMax M3, and no freq and offset give"
    ) as refused:
        exported(letters, "vllm")
    said = re.search(
        r"they can give is (\w+) \(freq (\d+), offset (\d+); (\d+) of \d+ letters differ", str(refused.value)
    )
    assert said
    nearest, freq, offset, differs = said[1], int(said[2]), int(said[3]), int(said[4])
    assert run_by("vllm", numbers(freq, offset), tuple(range(len(letters)))) == nearest
    distances = {other: sum(a != b for a, b in zip(letters, other, strict=True)) for other in possible}
    assert distances[nearest] == differs == min(distances.values())


@pytest.mark.parametrize("engine", RULES)
def test_both_ways(engine: str) -> None:
    for letters in ("F", "FSSSF", "FFSFS", "FFFFF"):
        text = part_read(exported(letters, engine))
        layout = Backbone(2 * len(letters), tuple(range(1, 2 * len(letters), 2)), M3, wrapper=True)
        assert import_pattern(text, engine, layout).pattern.letters == letters


def test_what_is_said_beside_it() -> None:
    uniform, atom = exported("FSS", "atom").warnings
    assert uniform.startswith("a uniform pattern that nobody measured on this checkpoint")
    assert "ROCm/ATOM pull request 1354" in atom and "override of text_config would replace" in atom
    _, rocm, *_, nested = exported("FSS", "vllm").warnings
    assert "on ROCm alone (vllm-project/vllm pull request 47269)" in rocm
    assert "nested in text_config" in nested
    assert any("SGLANG_MINIMAX_M3_INDEX_TOPK_FREQ" in warning for warning in exported("FSS", "sglang").warnings)


# --- a config that wraps the text model -----------------------------------------------------------------------------

KINDS = {"sparse_attention_config": {"sparse_attention_freq": [0, 0, 1, 1, 1, 0, 1, 1]}}
CONFIG: dict[str, Any] = {"model_type": M3, "text_config": {"num_hidden_layers": 8, **KINDS}}
SWITCHED = {"use_index_cache": True, "index_topk_pattern": "FSSFS", "index_topk_freq": 2}


def test_atom_hands_on_what_stands_outside() -> None:
    assert import_pattern(json.dumps(SWITCHED), "atom", DENSE_FIRST).pattern.letters == "FSSFS"
    with pytest.raises(PatternError, match="ATOM would put this text_config in the place of the model's own"):
        import_pattern(json.dumps({"text_config": SWITCHED}), "atom", DENSE_FIRST)
    inside = {**CONFIG, "text_config": {**CONFIG["text_config"], **SWITCHED}}
    assert import_pattern(json.dumps(inside), "atom").pattern.letters == "FSSFS"
    both = import_pattern(json.dumps({**inside, "index_topk_pattern": "FFFFS"}), "atom")
    assert both.pattern.letters == "FFFFS"  # the outer one wins


def test_vllm_sees_what_stands_inside() -> None:
    found = import_pattern(json.dumps(SWITCHED), "vllm", DENSE_FIRST)
    assert found.pattern.letters == "FFFFF" and "stands outside text_config" in found.notes[0]
    found = import_pattern(json.dumps({"text_config": SWITCHED}), "vllm", DENSE_FIRST)
    assert found.pattern.letters == "FSFSF"
    assert found.notes == ("index_topk_pattern says something else: vLLM goes by index_topk_freq",)
    letters_alone = {"text_config": {"use_index_cache": True, "index_topk_pattern": "FSSFS"}}
    found = import_pattern(json.dumps(letters_alone), "vllm", DENSE_FIRST)
    assert found.pattern.letters == "FFFFF"
    assert "it does not read index_topk_pattern, use_index_cache" in found.notes[0]


@pytest.mark.parametrize("engine", RULES)
def test_the_models_own_config_says_where_the_sparse_layers_are(engine: str) -> None:
    layout = read_backbone(CONFIG, "config.json")
    assert layout == DENSE_FIRST
    assert import_pattern(f"{engine}:freq:2", None, layout).pattern.letters == "FSFSF"
    text = export(pattern_file("FSFSF", layout.layer_indices, model_type=M3, num_hidden_layers=8), engine).text
    assert shlex.split(text)[0] == "--hf-overrides"


def test_a_copy_of_the_checkpoint_says_who_would_misread_it() -> None:
    found = list(notes(M3, "FFFSSFSS", dropped=False, has_params=False))
    assert not any("no engine is known" in note or "known to read it" in note for note in found)
    for title, name in (("vLLM", "vllm"), ("ATOM", "atom")):
        (note,) = [one for one in found if one.startswith(f"{title} counts only the layers with an indexer")]
        assert note.endswith(f"icsearch export --engine {name} prints")
