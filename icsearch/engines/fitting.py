"""A pattern file beside the config.json of the checkpoint that is to be served: do they fit, and what it adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from icsearch.engines.backbone import inner_config, read_backbone
from icsearch.engines.letters import ExportError
from icsearch.engines.reading import read_letters
from icsearch.engines.table import TRANSFORMERS
from icsearch.pattern import SHARED, PatternFile


def with_config(file: PatternFile, config: Mapping[str, Any], name: str) -> tuple[PatternFile, list[str]]:
    """The file with what its checkpoint's config.json (`name`) says of the model, and notes on it.

    That is the number of decoder layers, those that the checkpoint itself shares, and whether it wraps a text model.
    Raises ExportError where the pattern is for other layers or another type of model.
    """
    backbone = read_backbone(config, name)
    found = len(file.pattern)
    if found == len(backbone.layer_indices) + backbone.mtp_layers and backbone.mtp_layers:
        raise ExportError(
            f"the pattern has {found} letters, {name} {found - backbone.mtp_layers} layers and {backbone.mtp_layers} "
            "of multi-token prediction: a pattern has no letters for those, leave them out"
        )
    if found != len(backbone.layer_indices) or file.layer_indices != backbone.layer_indices:
        raise ExportError(
            f"the pattern has {found} letters for layers {_span(file.layer_indices)}, {name} has "
            f"{len(backbone.layer_indices)} layers with an indexer ({_span(backbone.layer_indices)}): they do not "
            "belong together; give the checkpoint's own config.json"
        )
    known = file.model.get("model_type")
    if known and backbone.model_type and known != backbone.model_type:
        raise ExportError(
            f"the pattern is for model_type {known}, {name} has {backbone.model_type}: give the right one"
        )
    model = {
        **file.model,
        "model_type": known or backbone.model_type,
        "num_hidden_layers": backbone.num_layers,
        "wrapper_config": backbone.wrapper,
        "native_shared": _native_shared(config, backbone.layer_indices, backbone.num_layers, backbone.model_type),
    }
    return replace(file, model=model), _mtp_notes(backbone.mtp_layers)


def _native_shared(
    config: Mapping[str, Any], layer_indices: tuple[int, ...], num_layers: int, model_type: str | None
) -> list[int]:
    """Positions of the layers that transformers builds no indexer for, of the families that it reads this for."""
    if model_type not in TRANSFORMERS.model_types:
        return []
    letters = read_letters(inner_config(config)[0], TRANSFORMERS, num_layers, 0, model_type).letters
    return [position for position, layer in enumerate(layer_indices) if letters[layer] == SHARED]


def _mtp_notes(mtp_layers: int) -> list[str]:
    if not mtp_layers:
        return []
    plural = "s" if mtp_layers > 1 else ""
    return [f"the checkpoint has {mtp_layers} layer{plural} of multi-token prediction: not in the pattern, they stay F"]


def _span(layers: tuple[int, ...]) -> str:
    """Layers in short: a range where they follow one another."""
    if layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers[:6])) + (", ..." if len(layers) > 6 else "")
