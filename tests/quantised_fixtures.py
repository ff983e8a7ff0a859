"""Small quantised checkpoints, made here as the published ones are, and dequantised by hand.

FP8 as DeepSeek-V3.2 and GLM-5 ship (float8_e4m3fn, float32 scales by block); experts in MXFP4 (DeepSeek-V4), NVFP4
(modelopt, compressed-tensors) or int4.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import tiny

BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn
# No width is a multiple of 128; 192 rows in 2 blocks are 128 and 64, not 96 and 96.
SIZES: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 192,
    "moe_intermediate_size": 144,
    "kv_lora_rank": 136,
    "q_lora_rank": 152,
    "num_hidden_layers": 5,
    "first_k_dense_replace": 2,
    "initializer_range": 0.1,
}
_KEPT = ("norm", ".gate.", "weights_proj", "embed_tokens", "lm_head")  # as in the checkpoints that are shipped


def save_quantized(directory: Path, family: str = "glm_moe_dsa", keep: Sequence[str] = (), **changes: Any) -> Path:
    """A quantised random checkpoint; `keep` names modules that stay bfloat16, and are listed so in the config."""
    tiny.save_checkpoint(directory, family, **{**SIZES, **changes})
    path = directory / "model.safetensors"
    found: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path).items():
        quantized = tensor.ndim == 2 and not any(part in name for part in (*_KEPT, *keep))
        found.update(quantize(name, tensor) if quantized else {name: tensor.bfloat16()})
    save_file(found, path, {"format": "pt"})
    settings = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    settings |= {"weight_block_size": [BLOCK, BLOCK], **({"modules_to_not_convert": list(keep)} if keep else {})}
    edit_config(directory, dtype="bfloat16", quantization_config=settings)
    return directory


EXPERTS = ".experts."
FOUR_BITS: dict[str, Any] = {"moe_intermediate_size": 160}  # a multiple of all groups, as 160 columns are


def save_experts_quantised(directory: Path, layout: str, family: str = "glm_moe_dsa", **changes: Any) -> Path:
    """A random checkpoint whose routed experts are in a format of LAYOUTS; the rest is FP8 for MXFP4, else bfloat16."""
    tiny.save_checkpoint(directory, family, **{**SIZES, **FOUR_BITS, **changes})
    made, settings = LAYOUTS[layout]
    quantise_file(directory, made, settings, fp8_rest=layout == "mxfp4")
    return directory


def quantise_file(directory: Path, made: Callable[..., Any], settings: dict[str, Any], fp8_rest: bool) -> None:
    path = directory / "model.safetensors"
    found: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path).items():
        if EXPERTS in name and name.endswith(".weight"):
            found |= made(name.removesuffix("weight"), tensor)
        elif fp8_rest and tensor.ndim == 2 and not any(part in name for part in _KEPT):
            found |= quantize(name, tensor)
        else:
            found[name] = tensor.bfloat16()
    save_file(found, path, {"format": "pt"})
    edit_config(directory, dtype="bfloat16", quantization_config=settings)


def mxfp4(stem: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """int8 with two numbers each, and a power of two for 32 of them, stored as its exponent."""
    by_block = weight.float().unflatten(-1, (-1, 32))
    scale = (by_block.abs().amax(-1) / 6).log2().ceil().exp2()
    codes = nearest(by_block / scale.unsqueeze(-1)).flatten(-2)
    return {f"{stem}weight": pairs(codes).view(torch.int8), f"{stem}scale": scale.to(torch.float8_e8m0fnu)}


def nvfp4(stem: str, weight: torch.Tensor, divide: bool) -> dict[str, torch.Tensor]:
    """uint8 with two numbers each, a float8 for 16 of them, and a number for all, which multiplies or divides."""
    by_block = weight.float().unflatten(-1, (-1, 16))
    whole = by_block.abs().max() / (6 * LARGEST)
    scale = (by_block.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    codes = pairs(nearest(by_block / (scale.float() * whole).unsqueeze(-1)).flatten(-2))
    if divide:
        names = (f"{stem}weight_packed", f"{stem}weight_global_scale", f"{stem}input_global_scale")
        return {
            names[0]: codes,
            f"{stem}weight_scale": scale,
            names[1]: (1 / whole).reshape(1),
            names[2]: torch.ones(1),
        }
    names = (f"{stem}weight", f"{stem}weight_scale_2", f"{stem}input_scale")
    return {names[0]: codes, f"{stem}weight_scale": scale, names[1]: whole, names[2]: torch.ones(())}


def int4(stem: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """int32 with eight numbers each, and a bfloat16 scale for 32 columns."""
    by_group = weight.float().unflatten(-1, (-1, 32))
    scale = (by_group.abs().amax(-1) / 7).bfloat16()
    numbers = (by_group / scale.float().unsqueeze(-1)).round().clamp(-8, 7).flatten(-2).to(torch.int64) + 8
    packed = (numbers.unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    shape = torch.tensor(list(weight.shape))
    return {f"{stem}weight_packed": packed, f"{stem}weight_scale": scale, f"{stem}weight_shape": shape}


def nearest(numbers: torch.Tensor) -> torch.Tensor:
    """The code of e2m1 whose number is nearest: sign, two bits of exponent, one of mantissa."""
    known = torch.tensor([e2m1(code) for code in range(16)])
    return (numbers.unsqueeze(-1) - known).abs().argmin(-1)


def e2m1(code: int) -> float:
    """By its definition, where the product has a table."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    value = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
    return -value if sign else value


def pairs(codes: torch.Tensor) -> torch.Tensor:
    """Two codes to a byte, the first in its lower half."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


_GROUP = {"num_bits": 4, "group_size": 32, "symmetric": True, "type": "int", "strategy": "group"}
_COMPRESSED = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}
_FLOAT = {"num_bits": 4, "group_size": 16, "symmetric": True, "type": "float", "strategy": "tensor_group"}
LAYOUTS: dict[str, tuple[Callable[..., dict[str, torch.Tensor]], dict[str, Any]]] = {
    "mxfp4": (
        mxfp4,
        {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [BLOCK, BLOCK]}
        | {"activation_scheme": "dynamic", "expert_dtype": "fp4"},
    ),
    "nvfp4 of modelopt": (
        lambda stem, weight: nvfp4(stem, weight, divide=False),
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]},
    ),
    "nvfp4 of compressed-tensors": (
        lambda stem, weight: nvfp4(stem, weight, divide=True),
        _COMPRESSED
        | {"format": "nvfp4-pack-quantized"}
        | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": _FLOAT}}},
    ),
    "int4": (
        int4,
        _COMPRESSED
        | {"format": "pack-quantized"}
        | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": _GROUP}}},
    ),
}


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def quantize(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weight in float8 and its scales, by block."""
    scale = torch.zeros(-(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK))
    scaled = torch.empty_like(weight)
    for (i, j), rows, columns in blocks(weight):
        scale[i, j] = weight[rows, columns].abs().max() / LARGEST
        scaled[rows, columns] = weight[rows, columns] / scale[i, j]
    return {name: scaled.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def store_scales(directory: Path, out: Path, kind: torch.dtype) -> Path:
    """A copy whose scales are powers of two, stored as float32, as float8_e8m0fnu, or as that type's bytes (uint8)."""
    shutil.copytree(directory, out)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            rounded = tensor.log2().ceil().exp2()
            exact = rounded.to(torch.float8_e8m0fnu)
            assert torch.equal(exact.float(), rounded)
            tensors[name] = {torch.float32: rounded, torch.uint8: exact.view(torch.uint8)}.get(kind, exact.to(kind))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def blocks(weight: torch.Tensor) -> Iterator[tuple[tuple[int, int], slice, slice]]:
    """Number, rows and columns of each block."""
    for i in range(-(-weight.shape[0] // BLOCK)):
        for j in range(-(-weight.shape[1] // BLOCK)):
            yield (i, j), slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)


def dequantize_by_hand(directory: Path, out: Path, dtype: torch.dtype) -> Path:
    """The same checkpoint without quantisation: number by number, times its scale in float32, then cast."""
    out.mkdir(parents=True)
    tensors = load_file(directory / "model.safetensors")
    plain = {name: values.to(dtype) for name, values in by_hand(tensors).items()}
    save_file(plain, out / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    return out


_SCALES = ("_scale_inv", ".scale", "_scale", "_scale_2", "_global_scale", "input_scale", "weight_shape")


def by_hand(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """float32 weights by name."""
    found = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix("weight_packed").removesuffix("weight")
        scale = tensors.get(f"{stem}weight_scale", tensors.get(f"{stem}scale"))
        if (blocked := tensors.get(f"{name}_scale_inv")) is not None:
            values = tensor.float()
            for (i, j), rows, columns in blocks(values):
                values[rows, columns] = values[rows, columns] * blocked[i, j].float()
            found[name] = values
        elif tensor.dtype in (torch.int8, torch.uint8) and scale is not None:
            codes = tensor.view(torch.uint8).numpy()
            number = np.vectorize(e2m1)(np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1))
            factor = scale.float()
            if f"{stem}weight_scale_2" in tensors:
                factor = factor * tensors[f"{stem}weight_scale_2"]
            elif f"{stem}weight_global_scale" in tensors:
                factor = factor / tensors[f"{stem}weight_global_scale"]
            size = number.shape[1] // factor.shape[1]
            found[f"{stem}weight"] = torch.from_numpy(number).float() * factor.repeat_interleave(size, 1)
        elif tensor.dtype == torch.int32 and scale is not None:
            codes = np.array(
                [[int(word) % 2**32 >> 4 * place & 15 for word in row for place in range(8)] for row in tensor.numpy()]
            )
            number = torch.from_numpy(codes - 8).float()
            found[f"{stem}weight"] = number * scale.float().repeat_interleave(number.shape[1] // scale.shape[1], 1)
        elif not name.endswith(_SCALES):
            found[name] = tensor.float()
    return found
