"""Whole numbers packed into int32, with a scale for a group of columns: pack-quantized of compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from icsearch.model.formats.format import Format, expect
from icsearch.model.quantisation import INT4_BITS as BITS


def values(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Eight numbers of -8 to 7 to an int32 [R, C / 8], the first in the lowest bits; scales [R, groups]."""
    packed, scales = parts["numbers"], parts["scale"]
    rows, columns = packed.shape[0], packed.shape[1] * 32 // BITS
    groups = scales.shape[-1] if scales.ndim == 2 else 1
    expect(scales, [rows, groups], f"a weight {[rows, columns]}")
    if columns % groups:
        raise ValueError(f"it has {columns} columns: expected a multiple of its {groups} groups")
    shape = parts["shape"]
    if shape.device.type != "meta" and shape.tolist() != [rows, columns]:
        raise ValueError(f"it is said to have shape {shape.tolist()}, and its numbers are {[rows, columns]}")
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32, device=packed.device)
    numbers = ((packed.unsqueeze(-1) >> shifts) & (2**BITS - 1)) - 2 ** (BITS - 1)  # [R, C / 8, 8]
    return numbers.float().view(rows, groups, -1).mul_(scales.float().unsqueeze(-1)).view(rows, columns)


INT4 = Format(
    name="int4",
    numbers="weight_packed",
    kinds=("I32",),
    beside={"scale": ("weight_scale",), "shape": ("weight_shape",)},
    values=values,
)
