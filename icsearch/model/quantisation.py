"""How a checkpoint's weights are stored, by its config.json: in which formats, and in how many bytes. No torch here.

`formats` reads them. A format that is not known is refused here, before anything is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icsearch.core.errors import ModelError
from icsearch.core.jsonfile import list_of, read_object, shown, whole
from icsearch.model.config import language_config

KEY = "quantization_config"
BESIDE = "hf_quant_config.json"  # where older checkpoints of modelopt say it
FP8, MODELOPT, COMPRESSED = "fp8", "modelopt", "compressed-tensors"
INT4_BITS = 4
NVFP4, NVFP4_PACKED, PACKED = "NVFP4", "nvfp4-pack-quantized", "pack-quantized"
MX_BLOCK, NV_BLOCK = 32, 16  # weights with one scale
_BLOCK = [128, 128]  # of FP8, where the config does not say
_KNOWN = (
    f"expected {FP8!r} (a scale for each block of 128 x 128 weights, experts in MXFP4 too), {MODELOPT!r} with "
    f"quant_algo {NVFP4}, {COMPRESSED!r} with format {NVFP4_PACKED} or {PACKED} (4 bits, "
    f"symmetric, in order), or no {KEY}"
)


@dataclass(frozen=True)
class Quantisation:
    """What a quantization_config says.

    `block` is FP8's: rows and columns of weights with one scale. `expert_bytes` and `other_bytes` are what a weight of
    a routed expert and another one of a decoder layer take on disk, scales counted; None: not quantised.
    """

    method: str
    label: str
    expert_bytes: float
    other_bytes: float | None = None
    block: tuple[int, int] = (128, 128)


def with_quantisation(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The config, with what modelopt wrote into a file beside it; raises ModelError."""
    if settings_of(config, str(directory)) or not (path := directory / BESIDE).exists():
        return config
    beside = read_object(path, expected="modelopt's settings", advice="download it again", error=ModelError)
    settings = beside.get("quantization")
    if not isinstance(settings, dict):
        raise ModelError(f"{path} has quantization {shown(settings)}: expected an object; download it again")
    return {**config, KEY: {"quant_method": MODELOPT, **settings}}


def settings_of(config: Mapping[str, Any], name: str) -> Any:
    """`quantization_config`, of the whole or of the language model; whatever JSON value it is."""
    return config.get(KEY) or language_config(config, f"config.json of {name}").get(KEY)


def dtype_name(config: Mapping[str, Any], name: str) -> str:
    """The type of a checkpoint's weights as its config names it, its own or its language model's.

    Where it names none: bfloat16 for weights that are quantised, which are dequantised to it, else float32. It need
    not be one that is known here; whatever JSON value it is, it comes as text.
    """
    for keys in (config, language_config(config, name)):
        if stated := keys.get("dtype") or keys.get("torch_dtype"):
            return str(stated)
    return "bfloat16" if settings_of(config, name) else "float32"


def other_bytes(found: Quantisation | None, plain: int) -> float:
    """Bytes on disk of a weight that is none of a routed expert's, where one that is not quantised takes `plain`."""
    return (found and found.other_bytes) or plain


def quantisation(config: Mapping[str, Any], name: str) -> Quantisation | None:
    """How the weights of a checkpoint, called `name`, are stored; None where they are not quantised.

    Raises ModelError for a format that is not known.
    """
    settings = settings_of(config, name)
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise ModelError(
            f"{name} has {KEY} {shown(settings)}: expected an object with quant_method, such as {FP8!r}, or none; "
            "use the config that belongs to the weights"
        )
    method = settings.get("quant_method")
    if method == FP8:
        return _fp8(settings, config, name)
    if method == MODELOPT:
        if (algorithm := settings.get("quant_algo")) == NVFP4:
            return Quantisation(MODELOPT, "NVFP4", _scaled(4, NV_BLOCK, 8))
        raise _unknown(name, f"{shown(method)} with quant_algo {shown(algorithm)}")
    if method == COMPRESSED:
        return _compressed(settings, name)
    raise _unknown(name, shown(method))


def _fp8(settings: Mapping[str, Any], config: Mapping[str, Any], name: str) -> Quantisation:
    block = settings.get("weight_block_size", _BLOCK)
    if not list_of(whole(1), 2).fits(block):
        raise ModelError(
            f"{KEY} of {name} has weight_block_size {shown(block)}: expected two sizes, such as [128, 128]; "
            "convert it to bfloat16 first"
        )
    rows, columns = block
    # A float32 scale for each block; it may take a byte in place of four, which a config does not say: 0.02% less.
    eight = _scaled(8, rows * columns, 32)
    kinds = [keys.get("expert_dtype") for keys in (settings, config, language_config(config, name))]
    if "fp4" in kinds:
        return Quantisation(FP8, "FP8 with MXFP4 experts", _scaled(4, MX_BLOCK, 8), eight, (rows, columns))
    return Quantisation(FP8, "FP8", eight, eight, (rows, columns))


def _compressed(settings: Mapping[str, Any], name: str) -> Quantisation:
    """By its groups of weights, which must all be of one format that is known."""
    groups = settings.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    formats = {group.get("format") or settings.get("format") for group in groups or [{}]}
    found = min(formats, key=str)
    if len(formats) > 1 or found not in (NVFP4_PACKED, PACKED):
        raise _unknown(name, f"{COMPRESSED!r} with format {' and '.join(sorted(map(shown, formats)))}")
    if found == NVFP4_PACKED:
        return Quantisation(COMPRESSED, "NVFP4", _scaled(4, NV_BLOCK, 8))
    weights = [group["weights"] for group in groups if isinstance(group.get("weights"), dict)]
    for each in weights:
        for key, expected in (("num_bits", {INT4_BITS}), ("symmetric", {True, None}), ("actorder", {False, None})):
            if (value := each.get(key)) not in expected:
                raise _unknown(name, f"{COMPRESSED!r} with format {PACKED} and {key} {shown(value)}")
    sizes = [each["group_size"] for each in weights if whole(1).fits(each.get("group_size"))]
    return Quantisation(COMPRESSED, "int4", _scaled(INT4_BITS, min(sizes, default=128), 16))


def _scaled(bits: int, weights: int, scale_bits: int) -> float:
    """Bytes of a weight, where so many share one scale."""
    return (bits + scale_bits / weights) / 8


def _unknown(name: str, what: str) -> ModelError:
    return ModelError(f"{name} is quantised by {what}: {_KNOWN}; convert it to bfloat16 first")
