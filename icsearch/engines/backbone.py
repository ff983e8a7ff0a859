"""The decoder layers that a config.json describes: how many, and which of them have an indexer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icsearch.errors import PatternError
from icsearch.jsonfile import MAX_LAYERS, FieldError, Kind, check_fields, list_of, optional, read_object, shown, whole

INDEXED_TYPES = ("indexed_attention", "compressed_sparse_attention", "minimax_m3_sparse")
FULL_ATTENTION = (
    "full_attention"  # of DSA layers beside linear or sliding ones in older configs, of dense ones elsewhere
)
ALIKE_TYPES = ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "mistral_large4")
MIXED_TYPES = ("dots3_note", "deepseek_v4", "glm5_next", "minimax_m3_vl", "qwen4_exp")
INDEX_KEYS = ("index", "sparse_attention")  # how keys of indexers begin
C4 = 4  # the compression of DeepSeek V4's layers that have an indexer
MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers")

_STRING = Kind("text", lambda value: isinstance(value, str))
_FIELDS = {
    "num_hidden_layers": whole(1, MAX_LAYERS),
    "layer_types": optional(list_of(_STRING)),
    "compress_ratios": optional(list_of(whole(0))),
    "model_type": optional(_STRING),
    **{key: optional(whole(0, MAX_LAYERS)) for key in MTP_KEYS},
}


class EngineConfigError(PatternError):
    """A config, an override or a file of an engine that cannot be read as a pattern."""


@dataclass(frozen=True)
class Backbone:
    """`num_layers` decoder layers, those of multi-token prediction (`mtp_layers`) not among them.

    `layer_indices` are those with an indexer; `wrapper`: the text model's config sits in text_config. `keys` is the
    text model's config, empty where it is not known.
    """

    num_layers: int
    layer_indices: tuple[int, ...]
    model_type: str | None = None
    mtp_layers: int = 0
    wrapper: bool = False
    keys: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def alike(cls, num_layers: int) -> Backbone:
        """That many layers, each with an indexer."""
        return cls(num_layers, tuple(range(num_layers)))

    @classmethod
    def of_model(cls, num_layers: int, layer_indices: Sequence[int], config: Mapping[str, Any]) -> Backbone:
        """The layers that a model was seen to have, with what its config.json says beside them."""
        keys = text_keys(config)
        model_type = config.get("model_type") or keys.get("model_type")
        return cls(num_layers, tuple(layer_indices), model_type, mtp_layers(keys), keys is not config, keys)


def inner_config(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """The keys of the text model, and whether they sit in text_config; EngineConfigError where that is no object."""
    inner = config.get("text_config")
    if inner is None:
        return config, False
    if not isinstance(inner, dict):
        raise EngineConfigError(f"text_config is {shown(inner)}: expected an object; use the model's own config.json")
    return inner, True


def text_keys(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """As `inner_config`, of any JSON object: what is no text model's config is left alone."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def read_backbone(config: Mapping[str, Any], name: str) -> Backbone:
    """The decoder layers of a config.json, called `name` in messages; raises EngineConfigError."""
    inner, wrapper = inner_config(config)
    try:
        check_fields(inner, _FIELDS)
    except FieldError as error:
        raise EngineConfigError(f"{name} cannot be used ({error}): use the model's own config.json") from None
    model_type = config.get("model_type") or inner.get("model_type")
    if not isinstance(model_type, str | None):
        raise EngineConfigError(f"{name} has model_type {shown(model_type)}: use the model's own config.json")
    known = str(model_type).removesuffix("_text") in (*ALIKE_TYPES, *MIXED_TYPES)
    if not known and not any(key.startswith(INDEX_KEYS) for key in inner):
        raise EngineConfigError(
            f"{name} is of a {model_type or 'nameless'} model and has no indexers: expected that of a "
            "DeepSeek-Sparse-Attention model, such as deepseek_v32 or glm_moe_dsa"
        )
    num_layers = inner["num_hidden_layers"]
    return Backbone(
        num_layers,
        _layer_indices(inner, num_layers, str(model_type), name),
        model_type,
        mtp_layers(inner),
        wrapper,
        inner,
    )


def mtp_layers(keys: Mapping[str, Any]) -> int:
    """Layers of multi-token prediction behind the decoder's, by the text model's config."""
    return next((keys[key] for key in MTP_KEYS if keys.get(key)), 0)


def load_config(path: Path) -> dict[str, Any]:
    """The object in a config.json, or in that of a checkpoint directory; raises EngineConfigError."""
    return read_object(
        path / "config.json" if path.is_dir() else path,
        expected="a model's config.json",
        advice="give the checkpoint's own",
        error=EngineConfigError,
    )


def _layer_indices(config: Mapping[str, Any], num_layers: int, model_type: str, name: str) -> tuple[int, ...]:
    """The layers that have an indexer, by the kinds that the config lists, else all of them."""
    kinds = config.get("layer_types") or _kinds_of_older_keys(config)
    if not kinds:
        if model_type.removesuffix("_text") in MIXED_TYPES:
            raise EngineConfigError(
                f"{name} does not say which layers of this {model_type} model have an indexer: expected layer_types; "
                "use the config.json of the checkpoint"
            )
        return tuple(range(num_layers))
    named = [index for index, kind in enumerate(kinds[:num_layers]) if kind in INDEXED_TYPES]
    found = named or [index for index, kind in enumerate(kinds[:num_layers]) if kind == FULL_ATTENTION]
    if not found or (not named and "minimax" in model_type):
        raise EngineConfigError(f"no layer of {name} has an indexer: expected one of {', '.join(INDEXED_TYPES)}")
    return tuple(found)


def _kinds_of_older_keys(config: Mapping[str, Any]) -> list[str]:
    """Layer types from the keys that DeepSeek V4 and MiniMax M3 were first released with; empty without them."""
    if config.get("compress_ratios"):
        return ["compressed_sparse_attention" if ratio == C4 else "other" for ratio in config["compress_ratios"]]
    sparse = config.get("sparse_attention_config")
    frequencies = sparse.get("sparse_attention_freq") if isinstance(sparse, dict) else None
    return ["minimax_m3_sparse" if one else "other" for one in frequencies] if isinstance(frequencies, list) else []
