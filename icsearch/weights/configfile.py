"""What this package itself reads of a checkpoint's config.json, checked: plain JSON, whoever needs it. No torch.

Values that only transformers reads are its own to refuse; what is missing or null has its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icsearch.engines.backbone import MTP_KEYS
from icsearch.errors import ModelError
from icsearch.jsonfile import MAX_LAYERS, FieldError, Kind, check_fields, list_of, one_of, optional, shown, whole

FP8 = "fp8"
_BLOCK = [128, 128]  # of weights with one scale, where the config does not say
_ALWAYS = {
    "num_hidden_layers": whole(1, MAX_LAYERS),
    **dict.fromkeys(MTP_KEYS, whole(0, MAX_LAYERS)),
    "indexer_types": list_of(one_of("full", "shared")),  # transformers takes any other word for full
}


def check_config(config: Mapping[str, Any], name: str, kinds: Mapping[str, Kind] | None = None) -> None:
    """Raise ModelError, which names the checkpoint, for what does not have its kind in the language model's part."""
    expected = {key: optional(kind) for key, kind in {**_ALWAYS, **(kinds or {})}.items()}
    try:
        check_fields(language_config(config, name), expected)
    except FieldError as error:
        raise ModelError(f"config.json of {name}: {error}; use the config that belongs to the weights") from None


def language_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The part that describes the language model: all of it, or `text_config` of a wrapper; raises ModelError."""
    inner = config.get("text_config")
    if inner is not None and not isinstance(inner, dict):
        raise ModelError(f"config.json of {name} has text_config {shown(inner)}: expected an object; download it again")
    return inner or dict(config)


def fp8_block(config: Mapping[str, Any], name: str) -> tuple[int, int] | None:
    """Rows and columns of the blocks that have one scale, None where weights are not quantised.

    Raises ModelError for another quantisation than FP8 in blocks.
    """
    settings = quantization(config, name)
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise ModelError(
            f"{name} has quantization_config {shown(settings)}: expected an object with quant_method {FP8!r}, or none; "
            "use the config that belongs to the weights"
        )
    if settings.get("quant_method") != FP8:
        raise ModelError(
            f"{name} is quantised by {shown(settings.get('quant_method'))}: expected {FP8!r}, with a scale for each "
            "block of 128 x 128 weights, or no quantization_config at all; convert it to bfloat16 first"
        )
    block = settings.get("weight_block_size", _BLOCK)
    if not list_of(whole(1), 2).fits(block):
        raise ModelError(
            f"quantization_config of {name} has weight_block_size {shown(block)}: expected two sizes, such "
            "as [128, 128]; convert it to bfloat16 first"
        )
    rows, columns = block
    return rows, columns


def quantization(config: Mapping[str, Any], name: str) -> Any:
    """`quantization_config`, of the whole or of the language model; whatever JSON value it is."""
    return config.get("quantization_config") or language_config(config, name).get("quantization_config")
