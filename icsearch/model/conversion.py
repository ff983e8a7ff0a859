"""From a checkpoint's tensors to a model's parameters, in parts: by transformers' own conversion, not a table of ours.

What a tensor is called, which experts are fused into one parameter, what type a parameter gets: all of that is in the
mapping that `from_pretrained` uses. Here it is applied to the tensors of one decoder layer at a time, wherever in the
shards they lie, and beforehand once to all of them without any data, so that a checkpoint that does not fit its config
is refused before anything is read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from icsearch.core.errors import ModelError
from icsearch.model.checkpoint import Checkpoint
from icsearch.model.config import language_config, mtp_layers
from icsearch.model.families.decoder import layer_list
from icsearch.model.formats.weights import Weights
from icsearch.model.model import native_types

Tensors = Mapping[str, Any]  # by name: tensors, or stored ones


class Conversion:
    """The conversion for one model of transformers, whose parameters are on meta until they are filled."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        self._model = model
        mapping: Any = [copy.copy(step) for step in get_model_conversion_mapping(model)]
        for step in mapping:
            if getattr(step, "force_cpu", False):
                step.force_cpu = False  # it runs where we say: on the CPU, and in rehearsal on meta
        self._settings = LoadStateDictConfig(
            device_map={"": "cpu"},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),  # what a family keeps in float32
            weight_mapping=mapping,
        )

    def fill(self, tensors: Tensors) -> None:
        """Convert these tensors and set the parameters and buffers that they make, on the CPU.

        Tensors that make one parameter together must come together. Raises RuntimeError where a conversion fails that
        went well in rehearsal, as it does when memory runs out.
        """
        errors = self._apply(tensors, "cpu").conversion_errors
        for name, text in errors.items():
            raise RuntimeError(f"{_reason(text)}, while {name} was made")

    def rehearse(self, weights: Weights) -> Any:
        """Convert all tensors without their data; afterwards every parameter on meta has the type that it will have."""
        return self._apply({name: stored.on_meta() for name, stored in weights.items()}, "meta")

    def _apply(self, tensors: Tensors, device: str) -> Any:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        settings = replace(self._settings, device_map={"": device})
        info, _ = convert_and_load_state_dict_in_model(self._model, dict(tensors), settings)
        self._model.requires_grad_(False)
        return info

    def targets(self, names: Iterable[str]) -> dict[str, str]:
        """For each name in the checkpoint the parameter that it goes into, or the first one where it is split."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = self._settings.weight_mapping or []
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        prefix, state = self._model.base_model_prefix, self._model.state_dict()
        found = {}
        for name in names:
            target, _ = rename_source_key(name, renamings, converters, prefix, state)
            found[name] = name if target not in state and name in state else target
        return found


def layer_prefix(model: Any) -> str:
    """What the names of all decoder layers' parameters begin with, such as `model.layers.`."""
    layers = layer_list(model)
    return next(f"{name}." for name, module in model.named_modules() if module is layers)


def check_rehearsed(checkpoint: Checkpoint, model: Any, info: Any) -> tuple[set[str], list[int]]:
    """Refuse what transformers only warns of: it fills missing weights at random. Raises ModelError.

    Returns the parameters that the checkpoint does not hold because they are tied to others, and its layers of
    multi-token prediction, which are left out.
    """
    tied, config = set(info.missing_keys), model.config.get_text_config()
    predicting = _prediction_layers(config.num_hidden_layers, checkpoint, info.unexpected_keys)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)  # takes tied ones from the missing
    model._adjust_missing_and_unexpected_keys(info)  # and what the family says is no loss
    if info.conversion_errors:
        name, text = sorted(info.conversion_errors.items())[0]
        raise ModelError(f"the tensors of {checkpoint.name} that make {name} do not fit together: {_reason(text)}")
    if mismatched := sorted(info.mismatched_keys):
        name, found, expected = mismatched[0]
        raise ModelError(
            f"{len(mismatched)} tensors of {checkpoint.name} disagree with config.json: {name} has shape "
            f"{list(found)}, expected {list(expected)}; use the config that belongs to these weights"
        )
    if missing := sorted(info.missing_keys):
        raise ModelError(
            f"{len(missing)} tensors that config.json calls for are not in the weights of {checkpoint.name}, such as "
            f"{missing[0]}: use the config that belongs to these weights, or download the missing shard"
        )
    native = native_types(config)
    unexpected = []
    for name in sorted(info.unexpected_keys):
        layer, part = _of_layer(name)
        if layer not in predicting and not ("indexer." in part and native.get(layer) == "shared"):
            unexpected.append(name)
    if unexpected:
        raise ModelError(
            f"{len(unexpected)} tensors of {checkpoint.name} have no place in the model that config.json describes, "
            f"such as {unexpected[0]}: use the config that belongs to these weights"
        )
    return tied, predicting


def _reason(text: str) -> str:
    """What went wrong, of what transformers says of it: a traceback, the message, and what was being made."""
    lines = text.rsplit("\nError", 1)[0].strip().splitlines()
    return next((line for line in lines if "DefaultCPUAllocator" in line), lines[-1])


_LAYER = re.compile(r"(?:.*?\.)?layers\.(\d{1,6})\.(.+)")
_OF_PREDICTION = ("eh_proj.", "enorm.", "hnorm.")  # what a layer of multi-token prediction alone has


def _of_layer(name: str) -> tuple[int, str]:
    """The decoder layer that a tensor is of, and its name in there; -1 for none."""
    match = _LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else (-1, "")


def _prediction_layers(layers: int, checkpoint: Checkpoint, names: Iterable[str]) -> list[int]:
    """The layers of multi-token prediction among these tensors, which have no place behind so many decoder layers.

    That is one which the config counts as such, or whose tensors show it.
    """
    counted = layers + mtp_layers(language_config(checkpoint.config, f"config.json of {checkpoint.name}"))
    behind = [(layer, part) for layer, part in map(_of_layer, names) if layer >= layers]
    return sorted({layer for layer, part in behind if layer < counted or part.startswith(_OF_PREDICTION)})


def check_finite(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ModelError for a NaN or an infinity; the smallest and the largest value tell, without a copy."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if not all(torch.isfinite(edge) for edge in torch.aminmax(tensor)):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{bad} of {tensor.numel()} values of {name} in {checkpoint.name} are NaN or infinite: "
                "expected finite weights; download or convert the checkpoint again"
            )
