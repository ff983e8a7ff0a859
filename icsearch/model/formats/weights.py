"""A checkpoint's weights, by name, however each of them is stored: what the rest of the program reads.

A weight that lies in several tensors appears as one, in float32, which is made when it is read. What loads the weights
casts it to the type of its parameter: that is one rounding, as transformers' own dequantisation has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from icsearch.core.errors import ModelError
from icsearch.model.checkpoint import Checkpoint
from icsearch.model.formats.format import Format
from icsearch.model.formats.fp4 import MXFP4, NVFP4_COMPRESSED, NVFP4_MODELOPT
from icsearch.model.formats.fp8 import fp8
from icsearch.model.formats.packed import INT4
from icsearch.model.quantisation import COMPRESSED, FP8, Quantisation, quantisation
from icsearch.model.shards import Shards, StoredTensor

# Of activations and of the cache, which stay as they are computed here.
_UNUSED = (".input_scale", ".input_global_scale", ".activation_scale", ".qscale_act", ".k_scale", ".v_scale")


@dataclass(frozen=True)
class QuantisedWeight:
    """One weight in several tensors. It answers as `StoredTensor` does."""

    name: str
    format: Format
    parts: Mapping[str, StoredTensor]

    def get_dtype(self) -> str:
        return "F32"

    def get_shape(self) -> list[int]:
        return list(self.on_meta().shape)

    def __getitem__(self, everything: Any) -> torch.Tensor:
        """float32, on the CPU, whatever part of it is asked for. Raises ModelError."""
        return self._values({part: stored[...] for part, stored in self.parts.items()})

    def on_meta(self) -> torch.Tensor:
        """Shape and type alone; raises ModelError where its tensors do not belong together."""
        return self._values({part: stored.on_meta() for part, stored in self.parts.items()})

    def _values(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        try:
            if (dimensions := parts["numbers"].ndim) != 2:
                raise ValueError(f"it has {dimensions} dimensions, expected 2")
            return self.format.values(parts)
        except ValueError as error:
            directory = self.parts["numbers"].shard.path.parent
            raise ModelError(
                f"{self.name} of {directory} cannot be dequantised from {self.format.name}: {error}; use the config "
                "that belongs to the weights, or download them again"
            ) from None


Weights = Mapping[str, StoredTensor | QuantisedWeight]


def weights_of(checkpoint: Checkpoint, shards: Shards) -> Weights:
    """The checkpoint's weights by name. Raises ModelError for numbers that no known format makes a weight of."""
    settings = quantisation(checkpoint.config, checkpoint.name)
    formats = _formats(settings)
    found: dict[str, StoredTensor | QuantisedWeight] = dict(shards)
    for name, stored in shards.items():
        if settings and name.endswith(_UNUSED):
            del found[name]
        for layout in formats:
            try:
                parts = layout.parts(name, stored.get_dtype(), shards)
            except ValueError as error:
                raise ModelError(f"tensor {name} of {checkpoint.name} {error}: download the checkpoint again") from None
            if parts:
                for part in parts.values():
                    found.pop(part, None)
                weight = layout.weight(name)
                found[weight] = QuantisedWeight(weight, layout, {part: shards[one] for part, one in parts.items()})
    for name, left in found.items():
        if (kind := left.get_dtype()).startswith("F8_"):
            says = f"no format of {settings.label} holds it" if settings else "config.json has no quantization_config"
            raise ModelError(
                f"tensor {name} of {checkpoint.name} is {kind}, but {says}: use the config that belongs to the weights"
            )
    return found


def _formats(settings: Quantisation | None) -> tuple[Format, ...]:
    if settings is None:
        return ()
    if settings.method == FP8:
        return fp8(settings.block), MXFP4
    return (NVFP4_COMPRESSED, INT4) if settings.method == COMPRESSED else (NVFP4_MODELOPT,)
