"""Quantised checkpoints, judged against dequantising by hand and by others; and all ways in which they can be wrong."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file
from test_reader import differing, tensors_of, transformers_own
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import tiny
import tiny_families
from icsearch.core.errors import ModelError
from icsearch.core.pattern import Pattern
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.formats.fp4 import NVFP4_COMPRESSED
from icsearch.model.formats.fp8 import values
from icsearch.model.formats.packed import INT4
from icsearch.model.layout import inspect
from icsearch.model.model import DsaModel
from icsearch.model.shape import DISK
from icsearch.model.shards import Shards
from icsearch.planning.modelfile import open_model_file
from icsearch.sweep.branches import cut_batches
from icsearch.sweep.sweep import Sweeper
from quantised_fixtures import (
    LAYOUTS,
    blocks,
    dequantize_by_hand,
    edit_config,
    quantise_file,
    quantize,
    save_experts_quantised,
    save_quantized,
    store_scales,
)

loading.quiet_transformers()


FP8 = [f"FP8 {family}" for family in sorted(tiny.FAMILIES)]


@pytest.fixture(scope="module", params=[*FP8, *LAYOUTS])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it in FP8, or the experts in another format."""
    directory = tmp_path_factory.mktemp("quantised")
    if request.param in FP8:
        return save_quantized(directory, request.param.removeprefix("FP8 "))
    return save_experts_quantised(directory, request.param)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_quantized(tmp_path_factory.mktemp("fp8"))


def load(directory: Path, **options: Any) -> DsaModel:
    checkpoint = open_checkpoint(str(directory))
    inspect(checkpoint)
    return loading.load(checkpoint, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dequantised_as_by_hand(quantized: Path, tmp_path: Path, dtype: str) -> None:
    """Experts too, and what is not quantised gets the compute type."""
    by_hand = dequantize_by_hand(quantized, tmp_path / "plain", getattr(torch, dtype))
    dsa = load(quantized, dtype=dtype)
    assert differing(tensors_of(dsa.model), tensors_of(transformers_own(by_hand, dtype))) == []
    assert not hasattr(dsa.model.config, "quantization_config")


def test_streamed_and_resident_alike(quantized: Path) -> None:
    ids = torch.randint(0, tiny.VOCABULARY, (4, 30), generator=torch.Generator().manual_seed(0))
    batches = cut_batches(ids, torch.ones_like(ids, dtype=torch.bool), 2)
    patterns = [Pattern("FFFFF"), Pattern("FSFSS")]
    resident, streamed = load(quantized), load(quantized, offload=DISK)
    swept = Sweeper(streamed).sweep(patterns, batches)
    assert replace(swept, weight_bytes=0) == Sweeper(resident).sweep(patterns, batches)


@pytest.mark.parametrize("kind", [torch.float8_e8m0fnu, torch.uint8])
def test_scales_that_are_stored_as_exponents(fp8: Path, tmp_path: Path, kind: torch.dtype) -> None:
    """The same bits as with those scales in float32, resident and streamed; the layout is the same, the bytes fewer."""
    plain = store_scales(fp8, tmp_path / "plain", torch.float32)
    small = store_scales(fp8, tmp_path / "small", kind)
    settings(small, scale_fmt="ue8m0")  # as such checkpoints say it
    names = {"F8_E8M0" if kind == torch.float8_e8m0fnu else "U8"}
    scales = [
        tensor.entry for name, tensor in Shards([small / "model.safetensors"]).items() if name.endswith("_scale_inv")
    ]
    assert {entry.dtype for entry in scales} == names and all(entry.bytes == math.prod(entry.shape) for entry in scales)
    assert inspect(open_checkpoint(str(small))) == inspect(open_checkpoint(str(plain)))
    expected, found, streamed = load(plain), load(small), load(small, offload=DISK)
    assert differing(tensors_of(found.model), tensors_of(expected.model)) == []
    ids = torch.randint(0, tiny.VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    batches = cut_batches(ids, torch.ones_like(ids, dtype=torch.bool), 2)
    losses = [Sweeper(one).sweep([Pattern("FSFSS")], batches).nll for one in (expected, found, streamed)]
    assert losses[0] == losses[1] == losses[2]


def test_every_exponent_is_exact() -> None:
    """All 255 powers of two, from 2^-127 on, which float32 holds as a subnormal number; the last byte is no number."""
    stored = torch.arange(255, dtype=torch.uint8).view(255, 1)
    powers = torch.tensor([[2.0 ** (one - 127)] for one in range(255)], dtype=torch.float64).float()
    ones = torch.ones(255, 1)
    for scale in (stored, stored.view(torch.float8_e8m0fnu)):
        assert torch.equal(values({"numbers": ones, "scale": scale}, (1, 1)), powers)
    last = torch.full((1, 1), 255, dtype=torch.uint8)
    assert values({"numbers": ones[:1], "scale": last}, (1, 1)).isnan().all()


def test_modules_that_are_not_converted(tmp_path: Path) -> None:
    keep = ["model.layers.1.self_attn.kv_b_proj", "model.layers.3.mlp.shared_experts"]
    directory = save_quantized(tmp_path / "fp8", keep=keep)
    kept = load_file(directory / "model.safetensors")["model.layers.1.self_attn.kv_b_proj.weight"]
    by_hand = dequantize_by_hand(directory, tmp_path / "plain", torch.bfloat16)
    dsa = load(directory)
    assert kept.dtype == torch.bfloat16
    assert torch.equal(dsa.model.get_parameter("model.layers.1.self_attn.kv_b_proj.weight"), kept)
    assert differing(tensors_of(dsa.model), tensors_of(transformers_own(by_hand, "bfloat16"))) == []


def test_layout_counts_numbers_not_scales(quantized: Path, tmp_path: Path) -> None:
    by_hand = dequantize_by_hand(quantized, tmp_path / "plain", torch.bfloat16)
    assert inspect(open_checkpoint(str(quantized))) == inspect(open_checkpoint(str(by_hand)))


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1, 1), (130, 5), (5, 130), (192, 160), (300, 257)])
def test_each_block_gets_its_own_scale(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored, scale = quantize("w", weight).values()
    expected = stored.float()
    for (i, j), rows, columns in blocks(expected):
        expected[rows, columns] = expected[rows, columns] * scale[i, j]
    assert torch.equal(values({"numbers": stored, "scale": scale}, (128, 128)), expected)


@pytest.mark.parametrize("family", ["deepseek_v4", "glm_moe_dsa"])
def test_mxfp4_as_transformers_dequantises_it(family: str, tmp_path: Path) -> None:
    """DeepSeek-V4 with the tensors' published names, and a family beside it; FP8 where transformers' blocks fit."""
    tiny_families.save_checkpoint(tmp_path / "m", family, hidden_size=128, q_lora_rank=128, moe_intermediate_size=64)
    path = tmp_path / "m" / "model.safetensors"
    quantise_file(tmp_path / "m", *LAYOUTS["mxfp4"], fp8_rest=False)
    tensors = load_file(path)
    fits = [n for n, t in tensors.items() if ("wq_a" in n or "q_a_proj" in n) and t.shape == (128, 128)]
    for name in fits:
        stored, scale = quantize(name, tensors.pop(name)).values()
        tensors |= {name: stored, name.removesuffix("weight") + "scale": scale}
    save_file(tensors, path, {"format": "pt"})
    kinds = {tensor.dtype for tensor in tensors.values()}
    assert fits and {torch.int8, torch.float8_e8m0fnu, torch.float8_e4m3fn} <= kinds
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    found = tensors_of(load(tmp_path / "m").model)
    # transformers 5.23 leaves what is not quantised in the type that it has on disk
    expected = {name: tensor.to(found[name].dtype) for name, tensor in tensors_of(theirs).items()}
    assert differing(found, expected) == []


@pytest.mark.parametrize("layout", ["nvfp4 of compressed-tensors", "int4"])
def test_as_compressed_tensors_dequantises_it(layout: str) -> None:
    """A weight that they have compressed, decompressed by them in float32, and by us."""
    settings = LAYOUTS[layout][1]
    scheme = QuantizationScheme(**settings["config_groups"]["group_0"])
    assert scheme.weights is not None
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0)) * 0.1
    groups = weight.abs().unflatten(-1, (-1, scheme.weights.group_size)).amax(-1)
    given = {"weight": weight, "weight_scale": groups / 7}
    if layout.startswith("nvfp4"):
        whole = 6 * 448 / weight.abs().max().reshape(1)
        given = {"weight": weight, "weight_scale": (groups / 6 * whole).to(torch.float8_e4m3fn).float()}
        given["weight_global_scale"] = whole
    compressed = BaseCompressor.get_value_from_registry(settings["format"]).compress(given, scheme)
    parts = {"numbers": compressed["weight_packed"], "scale": compressed["weight_scale"]}
    if layout == "int4":
        numbers = unpack_from_int32(parts["numbers"], 4, weight.shape)
        theirs = dequantize(numbers, parts["scale"], args=scheme.weights, dtype=torch.float32)
        found = INT4.values({**parts, "shape": torch.tensor(weight.shape)})
    else:
        numbers = unpack_fp4_from_uint8(parts["numbers"], *weight.shape, dtype=torch.float32)
        scales = parts["scale"].float()
        theirs = dequantize(numbers, scales, args=scheme.weights, dtype=torch.float32, global_scale=whole)
        found = NVFP4_COMPRESSED.values({**parts, "whole scale": whole})
    assert (found - weight).abs().max() < 0.05 and torch.equal(found, theirs)


def test_what_modelopt_wrote_beside_the_config(tmp_path: Path) -> None:
    """Its older checkpoints say it in hf_quant_config.json alone: read by a run and by `plan`."""
    directory = save_experts_quantised(tmp_path / "m", "nvfp4 of modelopt")
    expected = load(directory)
    planned = open_model_file(str(directory))
    settings = open_checkpoint(str(directory)).config["quantization_config"]
    edit_config(directory, quantization_config=None)
    with pytest.raises(ModelError, match="is F8_E4M3, but config.json has no quantization_config"):
        load(directory)
    (directory / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": settings}))
    assert differing(tensors_of(load(directory).model), tensors_of(expected.model)) == []
    assert open_model_file(str(directory)) == planned and planned.quantisation
    (directory / "hf_quant_config.json").write_text("[]")
    with pytest.raises(ModelError, match="hf_quant_config.json"):
        load(directory)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_on_disk_as_planned(layout: str, tmp_path: Path) -> None:
    """Of a model whose experts are most of it; what is kept in a larger type is not known to the plan."""
    directory = save_experts_quantised(tmp_path / "m", layout, moe_intermediate_size=640, n_routed_experts=16)
    planned = open_model_file(str(directory)).stored_model_bytes
    assert planned == pytest.approx((directory / "model.safetensors").stat().st_size, rel=0.1)


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def settings(directory: Path, **changes: Any) -> None:
    known = open_checkpoint(str(directory)).config["quantization_config"]
    edit_config(directory, quantization_config={**known, **changes})


DENSE = "model.layers.0.self_attn.q_a_proj.weight_scale_inv"
EXPERT = "model.layers.3.mlp.experts.2.up_proj.weight_scale_inv"
GATE = "model.layers.3.mlp.gate.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no scale of a dense weight": (
        lambda d: edit_weights(d, lambda t: t.pop(DENSE)),
        "q_a_proj.weight of .* is float8, but its scale, .*weight_scale_inv, is missing: download",
    ),
    "no scale of an expert": (
        lambda d: edit_weights(d, lambda t: t.pop(EXPERT)),
        "experts.2.up_proj.weight of .* but its scale, ",
    ),
    "no scales at all": (
        lambda d: edit_weights(d, lambda t: [t.pop(name) for name in list(t) if name.endswith("scale_inv")]),
        "is float8, but its scale, .*weight_scale_inv, is missing",
    ),
    "scales that are whole numbers": (
        lambda d: edit_weights(d, lambda t: t.update({DENSE: t[DENSE].to(torch.int32)})),
        "q_a_proj.weight of .* from float8: its scales have type torch.int32: expected floating-point ones; use",
    ),
    "weights that are exponents": (
        lambda d: edit_weights(d, lambda t: t.update({GATE: t[GATE].abs().to(torch.float8_e8m0fnu)})),
        "gate.weight of .* is F8_E8M0, but no format of FP8 holds it: use",
    ),
    "another block size": (
        lambda d: settings(d, weight_block_size=[64, 64]),
        "scales have .* in blocks of 64 x 64",
    ),
    "a block size that is none": (
        lambda d: settings(d, weight_block_size=None),
        "weight_block_size None: expected two",
    ),
    "a negative block size": (
        lambda d: settings(d, weight_block_size=[-128, 128]),
        "weight_block_size a list: expected",
    ),
    "another method": (lambda d: settings(d, quant_method="awq"), "is quantised by 'awq': expected 'fp8'"),
    "no method": (lambda d: settings(d, quant_method=None), "is quantised by None: expected 'fp8'"),
    "settings that are none": (lambda d: edit_config(d, quantization_config="fp8!"), "quantization_config .fp8!.: exp"),
    "scales that are missing in one format, not the other": (
        lambda d: settings(d, quant_method="modelopt", quant_algo="NVFP4"),
        "is F8_E4M3, but no format of NVFP4 holds it",
    ),
    "no settings": (lambda d: edit_config(d, quantization_config=None), "is F8_E4M3, but config.json has no"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(tmp_path: Path, fp8: Path, case: str) -> None:
    copy = Path(shutil.copytree(fp8, tmp_path / "copy"))
    edit, expected = BROKEN[case]
    edit(copy)
    with pytest.raises(ModelError, match=expected) as caught:
        load(copy)
    assert "\n" not in str(caught.value) and caught.value.exit_status == 2


def test_nan_scales_are_refused(tmp_path: Path, fp8: Path) -> None:
    copy = Path(shutil.copytree(fp8, tmp_path / "copy"))
    edit_weights(copy, lambda tensors: tensors[EXPERT].fill_(float("nan")))
    with pytest.raises(ModelError, match="values of model.layers.3.mlp.experts.gate_up_proj .* NaN or infinite"):
        load(copy)
