"""A pattern file beside the config.json of the checkpoint that is to be served: do they fit, and what it adds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from icsearch.engines.backbone import Backbone, inner_config, read_backbone
from icsearch.engines.letters import ExportError
from icsearch.engines.reading import read_letters
from icsearch.engines.table import TRANSFORMERS
from icsearch.pattern import SHARED, PatternFile


def with_config(
    file: PatternFile, config: Mapping[str, Any], name: str, with_indexer: Collection[int] | None = None
) -> tuple[PatternFile, list[str]]:
    """The file with what its checkpoint's config.json (`name`) says of the model, and notes on it.

    That is the number of decoder layers, and whether it wraps a text model. `with_indexer` are the decoder layers that
    the checkpoint has indexer weights for, so that all others must stay S; None where that is not known: keys of a
    config share layers, but take no weights away.
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
    if with_indexer is None:
        native = file.model.get("native_shared")
        notes = _declared_notes(config, backbone, name) if native is None else []
    else:
        native = [position for position, layer in enumerate(backbone.layer_indices) if layer not in with_indexer]
        notes = []
    model = {
        **file.model,
        "model_type": known or backbone.model_type,
        "num_hidden_layers": backbone.num_layers,
        "wrapper_config": backbone.wrapper,
        "native_shared": native,
    }
    return replace(file, model=model), [*notes, *_mtp_notes(backbone.mtp_layers)]


def _declared_notes(config: Mapping[str, Any], backbone: Backbone, name: str) -> list[str]:
    """On the layers that transformers builds no indexer for, of the families that it reads this for."""
    if backbone.model_type not in TRANSFORMERS.model_types:
        return []
    keys, _ = inner_config(config)
    letters = read_letters(keys, TRANSFORMERS, backbone.num_layers, backbone.mtp_layers, backbone.model_type).letters
    shared = [layer for layer in backbone.layer_indices if letters[layer] == SHARED]
    if not shared:
        return []
    return [
        f"{name} itself shares layers {_span(shared)}: should the checkpoint have no indexer weights there, they "
        "cannot be F; give its directory with --model-config, and that is checked"
    ]


def _mtp_notes(mtp_layers: int) -> list[str]:
    if not mtp_layers:
        return []
    plural = "s" if mtp_layers > 1 else ""
    return [f"the checkpoint has {mtp_layers} layer{plural} of multi-token prediction: not in the pattern, they stay F"]


def _span(layers: Sequence[int]) -> str:
    """Layers in short: a range where they follow one another."""
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers[:6])) + (", ..." if len(layers) > 6 else "")
