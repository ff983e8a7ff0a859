"""FP4: two numbers to a byte, the first in the lower half, each with one bit of mantissa (e2m1).

MXFP4 has a power of two for 32 of them (DeepSeek-V4's experts), NVFP4 a float8 for 16 and one float32 for the tensor
(modelopt multiplies by that, compressed-tensors divides).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from icsearch.model.formats.format import Format, expect, powers
from icsearch.model.quantisation import MX_BLOCK, NV_BLOCK

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Parts = Mapping[str, torch.Tensor]


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """float32 [R, 2 C] of bytes [R, C]."""
    one = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    pairs = torch.stack([one.repeat(16), one.repeat_interleave(16)], -1).to(packed.device)  # [256, 2], by byte
    return pairs[packed.view(torch.uint8).int()].flatten(-2)


def _scaled(packed: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """float32 [R, 2 C]: each number times the scale of its block, scales [R, 2 C / block]."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    if columns % block:
        raise ValueError(f"it has {columns} columns: expected a multiple of {block}")
    expect(scales, [rows, columns // block], f"a weight {[rows, columns]} with a scale for {block} each")
    return unpacked(packed).unflatten(-1, (-1, block)).mul_(scales.float().unsqueeze(-1)).flatten(-2)


def _whole(parts: Parts) -> torch.Tensor:
    """float32 [], the scale of the whole tensor."""
    found = parts["whole scale"]
    if found.numel() != 1:
        raise ValueError(f"its scale of the whole has shape {list(found.shape)}: expected one number")
    return found.float().reshape(())


MXFP4 = Format(
    name="MXFP4",
    numbers="weight",
    kinds=("I8",),
    beside={"scale": ("weight_scale_inv", "scale")},
    values=lambda parts: _scaled(parts["numbers"], powers(parts["scale"]), MX_BLOCK),
)
NVFP4_MODELOPT = Format(
    name="NVFP4",
    numbers="weight",
    kinds=("U8",),
    beside={"scale": ("weight_scale",), "whole scale": ("weight_scale_2",)},
    values=lambda parts: _scaled(parts["numbers"], parts["scale"].float() * _whole(parts), NV_BLOCK),
)
NVFP4_COMPRESSED = Format(
    name="NVFP4",
    numbers="weight_packed",
    kinds=("U8",),
    beside={"scale": ("weight_scale",), "whole scale": ("weight_global_scale",)},
    values=lambda parts: _scaled(parts["numbers"], parts["scale"].float() / _whole(parts), NV_BLOCK),
)
