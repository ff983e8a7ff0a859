"""What a format of stored weights is: which tensors make a weight, and how. Each of the others is one module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

EXPONENTS = torch.float8_e8m0fnu  # powers of two


@dataclass(frozen=True)
class Format:
    """A weight as several tensors of a checkpoint, whose names differ in their ends.

    `numbers` is what the name of the main one ends with, in place of `weight`, and `kinds` the types that it may have,
    as safetensors writes them. `beside` are the others, by what `values` calls them: the ends that each may have.
    `values` gets all of them, by that name, and makes the weight in float32; it raises ValueError for shapes and types
    that do not belong together, which it does on meta too.
    """

    name: str
    numbers: str
    kinds: tuple[str, ...]
    beside: Mapping[str, tuple[str, ...]]
    values: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]

    def parts(self, name: str, kind: str, tensors: Collection[str]) -> dict[str, str] | None:
        """The names of the tensors that make the weight whose main one this is, by part; None for another format.

        Raises ValueError where one of them is missing.
        """
        stem = name.removesuffix(self.numbers)
        if kind not in self.kinds or stem == name:
            return None
        found = {"numbers": name}
        for part, ends in self.beside.items():
            if not (there := [stem + end for end in ends if stem + end in tensors]):
                raise ValueError(f"is {self.name}, but its {part}, {stem}{ends[0]}, is missing")
            found[part] = there[0]
        return found

    def weight(self, name: str) -> str:
        """What the weight is called."""
        return name.removesuffix(self.numbers) + "weight"


def expect(scales: torch.Tensor, shape: list[int], weight: str) -> None:
    """Raise ValueError where scales are not of that shape; `weight` says what they should belong to."""
    if list(scales.shape) != shape:
        raise ValueError(f"its scales have shape {list(scales.shape)}, expected {shape} for {weight}")
    if not scales.is_floating_point():
        raise ValueError(f"its scales have type {scales.dtype}: expected floating-point ones")


def powers(scales: torch.Tensor) -> torch.Tensor:
    """Scales that are stored as bytes are exponents (ue8m0)."""
    return scales.view(EXPONENTS) if scales.dtype == torch.uint8 else scales
