"""Small FP8 checkpoints, quantised here as DeepSeek-V3.2 and GLM-5 ship: float8_e4m3fn, float32 scales by block."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
    """The same checkpoint without quantisation: block by block, each number times its scale in float32, then cast."""
    out.mkdir(parents=True)
    tensors = load_file(directory / "model.safetensors")
    plain = {}
    for name, tensor in tensors.items():
        if not name.endswith("_scale_inv"):
            values = tensor.float()
            if (scale := tensors.get(f"{name}_scale_inv")) is not None:
                for (i, j), rows, columns in blocks(values):
                    values[rows, columns] = values[rows, columns] * scale[i, j]
            plain[name] = values.to(dtype)
    save_file(plain, out / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    return out
