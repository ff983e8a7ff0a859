"""FP8 checkpoints: weights in float8 with one scale for each block, dequantised as they are read.

transformers' own conversion does it all but for one op. The one it has takes the size of a block from the ratio of the
shapes: it refuses a weight that is no multiple of its blocks, such as kv_a_proj_with_mqa of DeepSeek-V3.2 and GLM-5
with 576 rows in blocks of 128, misplaces the blocks where the ratio happens to be whole, and leaves weights that have
no scale in the type that they have on disk. The op here goes by the block size of the config.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config

from icsearch.core.errors import ModelError
from icsearch.core.text import first_line
from icsearch.model.checkpoint import Checkpoint
from icsearch.model.config import fp8_block, quantization
from icsearch.model.shards import Shards

_EXPONENTS = torch.float8_e8m0fnu  # powers of two
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, _EXPONENTS)
_WEIGHT, _SCALE = "weight", "weight_scale_inv"


class Dequantize(ConversionOps):
    """(weight, scale) pairs to weights of the type that the model's parameter has; other weights get that type too."""

    def __init__(self, hf_quantizer: FineGrainedFP8HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # by this name transformers knows that it must not cast what comes here

    def __deepcopy__(self, memo: dict[int, Any]) -> Dequantize:
        """Itself, for it has no state: transformers copies a converter for each tensor that it meets."""
        return self

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **context: Any
    ) -> dict[str, Any]:
        """Lists of tensors by source pattern to the dequantised weights among them; raises ValueError."""
        target = context["full_layer_name"]
        dtype = context["model"].get_parameter_or_buffer(target).dtype
        block = self.hf_quantizer.quantization_config.weight_block_size
        converted: dict[str, list[torch.Tensor]] = {}
        for pattern, weights in input_dict.items():
            if pattern.endswith(_WEIGHT):
                scales = input_dict.get(pattern.removesuffix(_WEIGHT) + _SCALE, [None] * len(weights))
                if len(scales) != len(weights):
                    raise ValueError(
                        f"{len(weights)} weights but {len(scales)} {_SCALE}; download the checkpoint again"
                    )
                made = converted.setdefault(target if pattern == _WEIGHT else pattern, [])
                for weight, scale in zip(weights, scales, strict=True):
                    if scale is not None:
                        made.append(dequantized(weight, scale, block, dtype))
                    elif weight.dtype in _FP8:
                        raise ValueError(f"a float8 weight without its {_SCALE}; download the checkpoint again")
                    else:
                        made.append(weight.to(dtype))
        return converted

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("a dequantised model is saved as it is")


def dequantized(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """weight [..., R, C] times the scale of its block, [..., ceil(R / block), ceil(C / block)], in float32, then cast.

    The last blocks may be cut off. Scales may be floating-point numbers of any type, or bytes, which are exponents
    then. Raises ValueError for scales of another shape or type.
    """
    rows, columns = weight.shape[-2:]
    expected = [*weight.shape[:-2], -(-rows // block[0]), -(-columns // block[1])]
    if list(scale.shape) != expected:
        raise ValueError(
            f"{_SCALE} has shape {list(scale.shape)}, expected {expected} for a weight {list(weight.shape)} in blocks "
            f"of {block[0]} x {block[1]}; check weight_block_size of quantization_config"
        )
    values = weight.to(torch.float32, copy=True)  # it is worked on in place
    if scale.dtype == torch.uint8:
        scale = scale.view(_EXPONENTS)  # some checkpoints store their exponents (ue8m0) as bytes
    if not scale.is_floating_point():
        raise ValueError(f"{_SCALE} has type {scale.dtype}: expected floating-point scales, or their exponents as U8")
    of_rows = scale.float().repeat_interleave(block[0], dim=-2)[..., :rows, :]  # [..., R, ceil(C / block)]
    whole = columns // block[1]
    values[..., : whole * block[1]].unflatten(-1, (whole, block[1])).mul_(of_rows[..., :whole].unsqueeze(-1))
    values[..., whole * block[1] :].mul_(of_rows[..., whole:])
    return values.to(dtype)


class Quantizer(FineGrainedFP8HfQuantizer):
    """transformers' quantizer of FP8 checkpoints, with the op above. It never asks for a GPU: nothing runs in FP8."""

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": Dequantize}


def make_quantizer(checkpoint: Checkpoint) -> Quantizer | None:
    """What dequantises this checkpoint, None where it is not quantised; raises ModelError for another quantisation."""
    if fp8_block(checkpoint.config, checkpoint.name) is None:
        return None
    settings = quantization(checkpoint.config, checkpoint.name)
    try:
        return Quantizer(FineGrainedFP8Config.from_dict({**settings, "dequantize": True}), pre_quantized=True)
    except (ValueError, AttributeError, TypeError) as error:  # other settings that transformers does not know
        raise ModelError(
            f"transformers cannot use the quantization_config of {checkpoint.name} ({first_line(error)}): "
            "use the config that belongs to the weights"
        ) from error


def check_none_quantised(checkpoint: Checkpoint, shards: Shards) -> None:
    """Raise ModelError where float8 weights come without a quantization_config that says how they are scaled."""
    for name, stored in shards.items():
        if (kind := stored.get_dtype()).startswith("F8_"):
            raise ModelError(
                f"tensor {name} of {checkpoint.name} is {kind}, but config.json has no quantization_config: use the "
                "config that belongs to the weights"
            )
