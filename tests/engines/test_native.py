"""Checkpoints that hold a pattern: transformers loads them whole, and they compute what our slots compute."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import icsearch
import quantised_fixtures
import tiny
from icsearch.core.errors import IcsearchError
from icsearch.core.pattern_file import load_pattern_file
from icsearch.engines.native import export_checkpoint
from icsearch.model.checkpoint import INDEX_NAME, fingerprint, open_checkpoint
from native_fixtures import LAYERS, LETTERS, NATIVE, auto_class, save_native, save_pattern

SHARED = [layer for layer, letter in enumerate(LETTERS) if letter == "S"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """Each family as one file and as many; those of one family have the same weights."""
    made = {}
    for family in NATIVE:
        for sharded in (False, True):
            folder = tmp_path_factory.mktemp(f"{family}-{sharded}")
            made[family, sharded] = save_native(folder / "model", family, "40KB" if sharded else "5GB")
            save_pattern(folder / "pattern.json", folder / "model")
    return made


def exported(checkpoint: Path, out: Path, **options: Any) -> Any:
    return export_checkpoint(checkpoint.parent / "pattern.json", out, **options)


def results(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and loss on random tokens, more of them than are selected."""
    ids = torch.randint(0, tiny.VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model.eval().requires_grad_(False)(input_ids=ids, labels=ids)
    return output.logits, output.loss


def load(family: str, directory: Path) -> tuple[Any, dict[str, Any]]:
    model, info = auto_class(family).from_pretrained(directory, output_loading_info=True)
    return model, info


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: one for path in sorted(directory.glob("*.safetensors")) for name, one in load_file(path).items()}


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    same = first.dtype == second.dtype and first.shape == second.shape
    return same and torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("drop", [False, True], ids=["kept", "dropped"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize("family", NATIVE)
def test_the_copy_computes_what_the_slots_do(
    checkpoints: dict[tuple[str, bool], Path], tmp_path: Path, family: str, sharded: bool, drop: bool
) -> None:
    source = checkpoints[family, sharded]
    exported(source, tmp_path / "out", drop_indexers=drop)
    model, info = load(family, tmp_path / "out")
    assert not info["missing_keys"] and not info["mismatched_keys"]
    unread = {name.split("layers.")[1].split(".")[0] for name in info["unexpected_keys"] if ".indexer." in name}
    assert unread == (set() if drop else {str(layer) for layer in SHARED})
    assert all(".indexer." in name for name in info["unexpected_keys"])
    patched = icsearch.apply_pattern(load(family, source)[0], LETTERS)
    for found, expected in zip(results(model), results(patched), strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(results(model)[1], results(icsearch.restore(patched))[1]), "the pattern changes nothing"


@pytest.mark.parametrize("family", NATIVE)
def test_only_the_indexers_of_s_layers_are_gone(
    checkpoints: dict[tuple[str, bool], Path], tmp_path: Path, family: str
) -> None:
    source = checkpoints[family, True]
    result = exported(source, tmp_path / "out", drop_indexers=True)
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    gone = before.keys() - after.keys()
    assert gone == {n for n in before if ".indexer." in n and int(n.split("layers.")[1].split(".")[0]) in SHARED}
    assert all(same_bits(after[name], before[name]) for name in after)
    assert result.bytes_saved == sum(before[name].nbytes for name in gone)
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in after.values())
    assert index["metadata"]["total_parameters"] == load(family, tmp_path / "out")[0].num_parameters()
    assert index["weight_map"].keys() == after.keys()
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / shard)


def test_shards_that_lose_nothing_are_links(checkpoints: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    source = checkpoints["glm_moe_dsa", True]
    exported(source, tmp_path / "out", drop_indexers=True)
    for path in sorted((tmp_path / "out").iterdir()):
        original = source / path.name
        loses = path.suffix == ".safetensors" and load_file(path).keys() != load_file(original).keys()
        linked = original.exists() and path.samefile(original)
        assert linked == (path.suffix == ".safetensors" and not loses), path.name


@pytest.mark.parametrize("family", NATIVE)
def test_the_config_says_the_pattern_in_every_key(
    checkpoints: dict[tuple[str, bool], Path], tmp_path: Path, family: str
) -> None:
    source = checkpoints[family, False]
    exported(source, tmp_path / "out")
    before, after = (json.loads((place / "config.json").read_text()) for place in (source, tmp_path / "out"))
    inner = after["text_config"] if "text_config" in before else after
    assert inner["indexer_types"] == ["shared" if letter == "S" else "full" for letter in LETTERS]
    assert inner["index_topk_pattern"] == LETTERS
    assert inner["use_index_cache"] is True
    assert "index_topk_freq" not in inner and "index_skip_topk_offset" not in inner
    for name in ("indexer_types", "index_topk_pattern", "use_index_cache"):
        del inner[name]
        before.get("text_config", before).pop(name, None)
    assert after == before


def test_the_pattern_travels_along(checkpoints: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    source = checkpoints["glm_moe_dsa", False]
    exported(source, tmp_path / "out")
    assert load_pattern_file(tmp_path / "out" / "pattern.json") == load_pattern_file(source.parent / "pattern.json")


def test_an_earlier_pattern_of_the_run(checkpoints: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    source = checkpoints["glm_moe_dsa", False]
    result = exported(source, tmp_path / "out", retention=Fraction(2, 3))
    assert str(result.pattern) == "FFSFSF"
    travelling = load_pattern_file(tmp_path / "out" / "pattern.json")
    assert (str(travelling.pattern), travelling.loss, len(travelling.steps)) == ("FFSFSF", 2.25, 2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["index_topk_pattern"], config["index_topk_freq"]) == ("FFSFSF", 2)
    whole = exported(source, tmp_path / "all", retention=Fraction(1))
    assert (str(whole.pattern), whole.notes) == ("FFFFFF", ())
    assert load_pattern_file(tmp_path / "all" / "pattern.json").loss == 2.0


def test_a_copy_is_the_model_that_our_own_loader_reads(
    checkpoints: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    source = checkpoints["glm_moe_dsa", True]
    exported(source, tmp_path / "out", drop_indexers=True)
    native = icsearch.load(str(tmp_path / "out"), device="cpu")
    slots = icsearch.load(str(source), LETTERS, device="cpu")
    assert torch.equal(results(native)[0], results(slots)[0])


def test_fp8_scales_go_with_their_weights(tmp_path: Path) -> None:
    letters = "FSFSF"
    source = quantised_fixtures.save_quantized(tmp_path / "model", indexer_types=["full"] * 5)
    save_pattern(tmp_path / "pattern.json", source, letters)
    exported(source, tmp_path / "out", drop_indexers=True)
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    gone = before.keys() - after.keys()
    assert any(name.endswith("_scale_inv") for name in gone)
    assert gone == {name for name in before if ".indexer." in name and name.split(".")[2] in "13"}
    assert all(same_bits(after[name], before[name]) for name in after)
    native, slots = (icsearch.load(str(path), device="cpu") for path in (tmp_path / "out", source))
    assert torch.equal(results(native)[0], results(icsearch.apply_pattern(slots, letters))[0])


def test_indexers_of_multi_token_prediction_stay(tmp_path: Path) -> None:
    source = save_native(tmp_path / "model", "glm_moe_dsa", num_nextn_predict_layers=1)
    tensors = load_file(source / "model.safetensors")
    extra = {name.replace("layers.5.", f"layers.{LAYERS}."): one + 1 for name, one in tensors.items() if "s.5." in name}
    extra["mtp.layers.0.self_attn.indexer.wk.weight"] = torch.ones(3)
    extra["model.mtp_layers.2.self_attn.indexer.wk.weight"] = torch.ones(3)
    save_file({**tensors, **extra}, source / "model.safetensors", {"format": "pt"})
    save_pattern(tmp_path / "pattern.json", source)
    exported(source, tmp_path / "out", drop_indexers=True)
    after = all_tensors(tmp_path / "out")
    assert extra.keys() <= after.keys()
    assert not any(f"model.layers.{layer}.self_attn.indexer" in name for name in after for layer in SHARED)


def test_native_s_layers_can_only_become_more(tmp_path: Path) -> None:
    types = ["full", "full", "shared", "full", "full", "full"]
    source = save_native(tmp_path / "model", "hy_v4", indexer_types=types)
    save_pattern(tmp_path / "pattern.json", source, "FFSFSS", native_shared=[2])
    exported(source, tmp_path / "out", drop_indexers=True)
    model, info = load("hy_v4", tmp_path / "out")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    patched = icsearch.apply_pattern(load("hy_v4", source)[0], "FFSFSS")
    assert torch.equal(results(model)[0], results(patched)[0])
    for known in ({"native_shared": [2]}, {"native_shared": []}, {"native_shared": None}):
        save_pattern(tmp_path / "pattern.json", source, "FFFFSS", **known)
        with pytest.raises(IcsearchError, match=r"no indexers of its own in decoder layers 2, .* only F to S edits"):
            exported(source, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_second_export_from_an_export(checkpoints: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    exported(checkpoints["glm_moe_dsa", True], tmp_path / "first", drop_indexers=True)
    save_pattern(tmp_path / "pattern.json", tmp_path / "first", "FSSFSS", native_shared=SHARED)
    export_checkpoint(tmp_path / "pattern.json", tmp_path / "second", drop_indexers=True)
    info = load("glm_moe_dsa", tmp_path / "second")[1]
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert json.loads((tmp_path / "second" / "config.json").read_text())["index_topk_freq"] == 3


def test_layers_without_an_indexer_are_full(tmp_path: Path) -> None:
    """A pattern of some layers only, as in families that mix kinds: letters go where `layer_indices` says."""
    source = save_native(tmp_path / "model", "glm_moe_dsa")
    tensors = load_file(source / "model.safetensors")
    kept = {name: one for name, one in tensors.items() if ".indexer." not in name or name.split(".")[2] in "024"}
    save_file(kept, source / "model.safetensors", {"format": "pt"})
    path = save_pattern(tmp_path / "pattern.json", source, "FSF", num_hidden_layers=LAYERS)
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "layer_indices": [0, 2, 4]}))
    exported(source, tmp_path / "out", drop_indexers=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["index_topk_pattern"] == "FFSFFF"
    assert {n.split(".")[2] for n in all_tensors(tmp_path / "out") if ".indexer." in n} == {"0", "4"}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkpoint with its pattern file beside it."""
    source = save_native(tmp_path / "model", "glm_moe_dsa")
    save_pattern(tmp_path / "pattern.json", source)
    return source


REFUSALS = {
    "another model": ({"model_type": "deepseek_v32"}, {}, "is for model_type deepseek_v32"),
    "another depth": ({"num_hidden_layers": 7}, {}, "is for 7 decoder layers"),
    "other weights": ({"fingerprint": "0" * 64}, {}, "was searched on other weights, .* --other-weights"),
    "unknown weights": ({"fingerprint": None}, {}, "does not say which weights"),
    "no model": ({"name_or_path": None}, {}, "does not say which checkpoint .* give --model"),
    "nothing there": ({"name_or_path": "/nowhere/at/all"}, {}, "no checkpoint at /nowhere/at/all"),
    "no such retention": ({}, {"retention": Fraction(1, 6)}, "no pattern with 1 F"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_belong_together_is_refused(small: Path, tmp_path: Path, case: str) -> None:
    model, options, reason = REFUSALS[case]
    save_pattern(tmp_path / "pattern.json", small, **model)
    with pytest.raises(IcsearchError, match=reason) as caught:
        exported(small, tmp_path / "out", **options)
    assert caught.value.exit_status == 2 and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_other_weights_are_let_through_when_asked(small: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(small, tuned)
    tensors = load_file(tuned / "model.safetensors")
    save_file({name: one * 2 for name, one in tensors.items()}, tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(IcsearchError, match="other weights"):
        exported(small, tmp_path / "out", model=str(tuned))
    exported(small, tmp_path / "out", model=str(tuned), other_weights=True)
    assert (tmp_path / "out" / "model.safetensors").samefile(tuned / "model.safetensors")


@pytest.mark.parametrize("family", ["deepseek_v32", "axk2"])
def test_what_transformers_ignores_is_said(small: Path, tmp_path: Path, family: str) -> None:
    """The keys are written all the same; dropping is refused where nobody is known to load the result."""
    path = small / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": family}))
    save_pattern(tmp_path / "pattern.json", small)
    result = exported(small, tmp_path / "out")
    assert any(f"does not read the pattern of a {family} config" in note for note in result.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["index_topk_pattern"] == LETTERS
    if family == "axk2":
        with pytest.raises(IcsearchError, match="nothing is known to load a model of type axk2"):
            exported(small, tmp_path / "dropped", drop_indexers=True)
    else:
        assert any("random indexers" in note for note in exported(small, tmp_path / "d", drop_indexers=True).notes)


def test_a_model_without_indexer_names_keeps_all(small: Path, tmp_path: Path) -> None:
    tensors = {name: one for name, one in load_file(small / "model.safetensors").items() if ".indexer." not in name}
    save_file(tensors, small / "model.safetensors", {"format": "pt"})
    save_pattern(tmp_path / "pattern.json", small)
    with pytest.raises(IcsearchError, match="named as an indexer's: leave out --drop-indexers"):
        exported(small, tmp_path / "out", drop_indexers=True)
    assert not (tmp_path / "out").exists()


KEYS = ["indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset", "text_config", "model_type"]
KEYS += ["num_hidden_layers", "quantization_config", "x"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "y"]), inner, max_size=3),
    max_leaves=6,
)


@given(
    config=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3),
    metadata=st.dictionaries(st.sampled_from(["total_size", "total_parameters", "x"]), json_values) | json_values,
    drop=st.booleans(),
    native=st.sampled_from([None, [], [2]]),
)
@settings(max_examples=80, deadline=None)
def test_whatever_config_and_index_say_it_is_whole_or_one_line(
    checkpoints: dict[tuple[str, bool], Path],
    tmp_path_factory: pytest.TempPathFactory,
    config: dict[str, Any],
    metadata: Any,
    drop: bool,
    native: list[int] | None,
) -> None:
    source = checkpoints["glm_moe_dsa", True]
    base = tmp_path_factory.mktemp("any")
    hostile = Path(shutil.copytree(source, base / "model", copy_function=os.link))
    for name, changes in (("config.json", config), (INDEX_NAME, {"metadata": metadata})):
        document = json.loads((hostile / name).read_text())
        (hostile / name).unlink()
        (hostile / name).write_text(json.dumps({**document, **changes}))
    pattern = load_pattern_file(source.parent / "pattern.json")
    replace(pattern, model={**pattern.model, "native_shared": native}).save(base / "pattern.json")
    try:
        exported(hostile, base / "out", model=str(hostile), drop_indexers=drop, other_weights=True)
    except IcsearchError as error:
        assert "\n" not in str(error) and error.exit_status == 2
        assert {path.name for path in base.iterdir()} == {"model", "pattern.json"}
        return
    written = json.loads((base / "out" / "config.json").read_text())
    assert (written.get("text_config") or written)["index_topk_pattern"] == LETTERS
    open_checkpoint(str(base / "out"))


@pytest.mark.parametrize("levels", [100, 900, *range(940, 1000, 4), 100_000])
def test_a_config_of_many_levels(small: Path, tmp_path: Path, levels: int) -> None:
    """Where reading ends and where writing ends is Python's matter: between them it must be one line too."""
    path = small / "config.json"
    path.write_text(path.read_text().rstrip().removesuffix("}") + f', "deep": {"[" * levels}{"]" * levels}}}')
    try:
        exported(small, tmp_path / "out", model=str(small), other_weights=True)
    except IcsearchError as error:
        assert levels > 100 and "nested too deeply" in str(error)
        assert not (tmp_path / "out").exists()


def test_the_source_is_as_it_was(small: Path, tmp_path: Path) -> None:
    before = fingerprint(open_checkpoint(str(small)))
    names = sorted(path.name for path in small.iterdir())
    exported(small, tmp_path / "out", drop_indexers=True)
    assert fingerprint(open_checkpoint(str(small))) == before
    assert sorted(path.name for path in small.iterdir()) == names
