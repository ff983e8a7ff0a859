"""FP8 checkpoints, judged against dequantising by hand; and every way in which they can be wrong."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_reader import differing, tensors_of, transformers_own

import tiny
from fp8_fixtures import blocks, dequantize_by_hand, edit_config, quantize, save_quantized, store_scales
from icsearch.core.errors import ModelError
from icsearch.core.pattern import Pattern
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.fp8 import dequantized
from icsearch.model.layout import inspect
from icsearch.model.model import DsaModel
from icsearch.model.shape import DISK
from icsearch.model.shards import Shards
from icsearch.sweep.branches import cut_batches
from icsearch.sweep.sweep import Sweeper

loading.quiet_transformers()


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_quantized(tmp_path_factory.mktemp("fp8"), request.param)


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
def test_scales_that_are_stored_as_exponents(quantized: Path, tmp_path: Path, kind: torch.dtype) -> None:
    """The same bits as with those scales in float32, resident and streamed; the layout is the same, the bytes fewer."""
    plain = store_scales(quantized, tmp_path / "plain", torch.float32)
    small = store_scales(quantized, tmp_path / "small", kind)
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
        assert torch.equal(dequantized(ones, scale, (1, 1), torch.float32), powers)
    last = torch.full((1, 1), 255, dtype=torch.uint8)
    assert dequantized(ones[:1], last, (1, 1), torch.float32).isnan().all()


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_block_gets_its_own_scale(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored, scale = quantize("w", weight).values()
    expected = stored.float()
    for (i, j), rows, columns in blocks(expected):
        expected[rows, columns] = expected[rows, columns] * scale[i, j]
    found = dequantized(stored, scale, (128, 128), dtype)
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))
    together = dequantized(torch.stack([stored, stored]), torch.stack([scale, 2 * scale]), (128, 128), dtype)
    assert torch.equal(together[0], found) and torch.equal(together[1], (2 * expected).to(dtype))


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
        "q_a_proj.* float8 weight without",
    ),
    "no scale of an expert": (lambda d: edit_weights(d, lambda t: t.pop(EXPERT)), "experts.* 4 weights but 3"),
    "no scales at all": (
        lambda d: edit_weights(d, lambda t: [t.pop(name) for name in list(t) if name.endswith("scale_inv")]),
        "float8 weight without its weight_scale_inv",
    ),
    "scales that are whole numbers": (
        lambda d: edit_weights(d, lambda t: t.update({DENSE: t[DENSE].to(torch.int32)})),
        "weight_scale_inv has type torch.int32: expected floating-point scales, or their exponents as U8",
    ),
    "weights that are exponents": (
        lambda d: edit_weights(d, lambda t: t.update({GATE: t[GATE].abs().to(torch.float8_e8m0fnu)})),
        "gate.* float8 weight without its weight_scale_inv",
    ),
    "another block size": (lambda d: settings(d, weight_block_size=[64, 64]), r"has shape .* in blocks of 64 x 64"),
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
    "an unknown scheme": (lambda d: settings(d, activation_scheme="odd"), "cannot use the quantization_config .*odd"),
    "no settings": (lambda d: edit_config(d, quantization_config=None), "is F8_E4M3, but config.json has no"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(tmp_path: Path, quantized: Path, case: str) -> None:
    copy = Path(shutil.copytree(quantized, tmp_path / "copy"))
    edit, expected = BROKEN[case]
    edit(copy)
    with pytest.raises(ModelError, match=expected) as caught:
        load(copy)
    assert "\n" not in str(caught.value) and caught.value.exit_status == 2


def test_nan_scales_are_refused(tmp_path: Path, quantized: Path) -> None:
    copy = Path(shutil.copytree(quantized, tmp_path / "copy"))
    edit_weights(copy, lambda tensors: tensors[EXPERT].fill_(float("nan")))
    with pytest.raises(ModelError, match="values of model.layers.3.mlp.experts.gate_up_proj .* NaN or infinite"):
        load(copy)
