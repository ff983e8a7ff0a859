"""Where branch states rest while no layer works on them: where they were computed, or in CPU memory.

A state moves in before a layer call and its successor out behind it, as copies, which changes no bit. On CUDA what
rests in CPU memory is pinned, so that copies run at the link's rate; they are waited for.
"""

from __future__ import annotations

from typing import Any

import torch

from icsearch.families.handed import map_tensors


class OnDevice:
    """States stay where they were computed."""

    def lay(self, value: Any) -> Any:
        """A state behind a layer call: hidden states, a selection of any family, or None."""
        return value

    def take(self, value: Any) -> Any:
        """A resting state on the device, for a layer call."""
        return value


class InCpuMemory(OnDevice):
    """States rest in CPU memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def lay(self, value: Any) -> Any:
        return map_tensors(value, self._copy)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = self._device.type == "cuda"
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned).copy_(tensor)

    def take(self, value: Any) -> Any:
        return map_tensors(value, lambda tensor: tensor.to(self._device))
