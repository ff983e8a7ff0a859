"""What a model's own forward calls its decoder layers with, heard without running them.

Masks, positions, rotary embeddings: without padding they follow from the shape of a batch alone. Token ids do not;
where a family's layers take them too (hashed experts, n-gram embeddings), they are filled in batch by batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from icsearch.errors import ModelError

TOKEN_ARGUMENTS = ("input_ids", "ple_input_ids")  # what layers may take a batch's token ids as


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one decoder layer beside the hidden states, as the model's own forward passed them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def on(self, input_ids: torch.Tensor) -> LayerCall:
        """The call on these [B, T] token ids: another one only where the layer takes them."""
        tokens = {name: input_ids for name in TOKEN_ARGUMENTS if name in self.kwargs}
        return replace(self, kwargs={**self.kwargs, **tokens}) if tokens else self


@contextlib.contextmanager
def embedding_nothing(model: Any) -> Iterator[None]:
    """Within the block, the model's embedding makes zeros of any token ids, and needs no weights for it."""
    embedding = model.get_input_embeddings()
    if getattr(embedding, "weight", None) is None:
        raise ModelError(
            f"the input embedding of {type(model).__name__} has no weight: expected a table with a row for each token; "
            "this family cannot be searched"
        )
    width, dtype = embedding.weight.shape[1], embedding.weight.dtype

    def zeros(input_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, dtype=dtype, device=input_ids.device).expand(*input_ids.shape, width)

    with instead_of_forward(embedding, zeros):
        yield


@contextlib.contextmanager
def recorded(layers: Sequence[nn.Module]) -> Iterator[list[LayerCall]]:
    """Within the block, layers do nothing but leave their call in the list; the last one ends the forward.

    A family that hands the selection from layer to layer as an argument gets None there: the slots supply it. Raises
    ModelError where the forward does not call each layer once, in order.
    """
    calls: list[LayerCall] = []

    def record(index: int, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if index != len(calls):
            raise _out_of_order(len(calls), f"layer {index}")
        calls.append(LayerCall(args, kwargs))
        if len(calls) == len(layers):
            raise LastLayerReached
        return hidden_states.as_subclass(LayerOutput)

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(LastLayerReached))
        for index, layer in enumerate(layers):
            stack.enter_context(instead_of_forward(layer, partial(record, index)))
        yield calls
        raise _out_of_order(len(calls), "none of the others")


def _out_of_order(done: int, then: str) -> ModelError:
    return ModelError(
        f"the model's own forward calls {done} decoder layers in order and then {then}: expected each layer once; this "
        "family cannot be searched layer by layer"
    )


@contextlib.contextmanager
def all_instead(layers: Sequence[nn.Module], function: Callable[..., Any]) -> Iterator[None]:
    """Within the block, calling any of the layers calls the function."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(instead_of_forward(layer, function))
        yield


@contextlib.contextmanager
def instead_of_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block, calling the module calls the function."""
    before = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class LayerOutput(torch.Tensor):
    """States as a decoder layer of any family returns them: alone, or first of a pair with the layer's selection."""

    def __iter__(self) -> Iterator[torch.Tensor | None]:
        return iter((self, None))

    def __getitem__(self, item: Any) -> torch.Tensor:
        return self if isinstance(item, int) and item == 0 else super().__getitem__(item)


class LastLayerReached(Exception):
    """Ends a forward when all layers have been called."""


class FirstLayerReached(Exception):
    """Carries the embedded states out of the model's forward."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states
