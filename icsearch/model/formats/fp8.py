"""FP8: weights in float8 with one scale for each block; DeepSeek-V3.2, GLM-5."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from icsearch.model.formats.format import Format, expect, powers


def fp8(block: tuple[int, int]) -> Format:
    """By the block size of the config: a weight need be no multiple of it, such as the 576 rows of kv_a_proj."""
    return Format(
        name="float8",
        numbers="weight",
        kinds=("F8_E4M3", "F8_E5M2"),
        # as transformers writes it, as DeepSeek-V4's own files do, as Mistral-Large-4's
        beside={"scale": ("weight_scale_inv", "scale", "qscale_weight")},
        values=lambda parts: values(parts, block),
    )


def values(parts: Mapping[str, torch.Tensor], block: tuple[int, int]) -> torch.Tensor:
    """numbers [R, C] times the scale of its block, [ceil(R / block), ceil(C / block)], in float32.

    The last blocks may be cut off.
    """
    numbers, scales = parts["numbers"], powers(parts["scale"])
    rows, columns = numbers.shape
    shape = [-(-rows // block[0]), -(-columns // block[1])]
    expect(scales, shape, f"a weight {[rows, columns]} in blocks of {block[0]} x {block[1]} (weight_block_size)")
    found = numbers.to(torch.float32, copy=True)  # it is worked on in place
    of_rows = scales.float().repeat_interleave(block[0], dim=0)[:rows]  # [R, ceil(C / block)]
    whole = columns // block[1]
    found[:, : whole * block[1]].unflatten(-1, (whole, block[1])).mul_(of_rows[:, :whole].unsqueeze(-1))
    found[:, whole * block[1] :].mul_(of_rows[:, whole:])
    return found
