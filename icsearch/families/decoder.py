"""Where a model's decoder layers are, and whether a search can run them one by one."""

from __future__ import annotations

from typing import Any

from torch import nn

from icsearch.errors import ModelError


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a transformers model's language model, in order; none where it has no list of them."""
    found = layer_list(model)
    return [] if found is None else list(found)


def layer_list(model: Any) -> nn.ModuleList | None:
    """The list of decoder layers: the decoder's `layers`, or its only list of modules by another name."""
    decoder = model.get_decoder()
    named = getattr(decoder, "layers", None)
    if isinstance(named, nn.ModuleList):
        return named
    others = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return others[0] if len(others) == 1 else None


def check_layers_stand_alone(config: Any) -> None:
    """Raise ModelError where a layer takes more of earlier ones than hidden states and the selection.

    A branch of a search forks at a layer; what else layers leave for later ones would have to fork with it.
    """
    modes = getattr(config, "kv_sharing_modes", None) or []
    if reusing := [index for index, mode in enumerate(modes) if str(mode).startswith("reuse")]:
        raise ModelError(
            f"decoder layer {reusing[0]} uses keys and values of an earlier layer (kv_source_layers in config.json): "
            "expected layers that make their own; sharing of both selections and keys cannot be searched yet"
        )
