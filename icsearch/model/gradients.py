"""One decoder layer differentiated by its entry and by its core attention, for many cotangents at once.

A layer runs again from the states at its entry, under the selection that it had, and only activations get gradients:
weights have none (`loading.load`), and a selection is discrete. There is never a graph of more than this one layer, and
with the block-wise arithmetic never one of attention as a whole: its output is a leaf there, and what comes back to it
goes on to queries and latents by blocks of queries (`ops.pull_back`), all cotangents through one recomputation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from icsearch.core.errors import ModelError
from icsearch.core.text import first_line
from icsearch.model import ops
from icsearch.model.families.attention import Core
from icsearch.model.families.calls import LayerCall, hand_on, map_tensors, take_up, tensors_of
from icsearch.model.kernels import LatentAttention
from icsearch.model.model import DsaModel
from icsearch.model.slot import SelectionStore

# Of one cotangent of what a layer returns: gradients of the hidden states at its entry, and of what earlier layers
# handed on to it (latents, in families whose layers share them), in the order of `tensors_of`.
Cotangent = list[torch.Tensor]


@dataclass(frozen=True)
class CoreAttention:
    """A DSA layer's: its `output` [B, T, H, V], the gradient there of each cotangent, and it under other selections."""

    output: torch.Tensor
    gradients: list[torch.Tensor]
    under: Core


@dataclass(frozen=True)
class DifferentiatedLayer:
    """Of one layer: `entry[r]` is the r-th cotangent taken back to its entry."""

    entry: list[Cotangent]
    core: CoreAttention | None = None  # of a DSA layer


def floating(states: torch.Tensor, handed: Any) -> list[torch.Tensor]:
    """The tensors of a state that have gradients: hidden states, and what else is no selection."""
    return [states, *(tensor for tensor in tensors_of(handed) if tensor.is_floating_point())]


def differentiate(
    dsa: DsaModel,
    index: int,
    states: torch.Tensor,
    handed: Any,
    selection: Any,
    call: LayerCall,
    cotangents: list[Cotangent],
) -> DifferentiatedLayer:
    """Run a decoder layer again from its entry, under the `selection` that it had, and take cotangents back through it.

    `states` [B, T, D] and `handed` are what it ran from (`families.calls.hand_on`); each cotangent is like `floating`
    of what it returned, and is taken off the list, so that it goes as what becomes of it comes. Raises ModelError in a
    family whose layers cannot be differentiated.
    """
    heard: list[tuple[torch.Tensor, Core]] = []
    states, handed = (map_tensors(each, _leaf) for each in (states, handed))
    entry, found = floating(states, handed), list[Cotangent]()
    with _differentiable(dsa, index):
        with torch.enable_grad(), dsa.observed(lambda output, _, core: heard.append((output, core))):
            returned = _run_again(dsa, index, states, handed, selection, call)
        while cotangents:
            cotangent, attended = cotangents.pop(0), [output for output, _ in heard]
            found.append(ops.gradients(returned, entry, cotangent, needed=attended))
    del returned  # with the graph of all that comes behind attention
    if not heard:
        return DifferentiatedLayer(found)
    ((own, core),) = heard
    attention = [gradients.pop() for gradients in found]
    if isinstance(core, LatentAttention):  # its output was a leaf: the rest of the way to the entry
        pulled = core.pull_back(selection, attention)
        for number, gradients in enumerate(found):
            rest = ops.gradients(core.inputs, entry, pulled.pop(0))
            found[number] = [a + b for a, b in zip(gradients, rest, strict=True)]
        own = own.detach()
        return DifferentiatedLayer(found, CoreAttention(own, attention, core.detached().prepared(own, selection)))
    with torch.no_grad():  # the attention function may have another kernel where gradients are wanted
        return DifferentiatedLayer(found, CoreAttention(core(selection), attention, core))


def _run_again(
    dsa: DsaModel, index: int, states: torch.Tensor, handed: Any, selection: Any, call: LayerCall
) -> list[torch.Tensor]:
    """What a layer returns and hands on, as `floating`."""
    store = take_up(SelectionStore(dsa.start_pattern, replayed=True), handed)
    store.selection = selection
    output = dsa.run_layer(index, states, call, store)
    return floating(output, hand_on(store, handed))


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


@contextlib.contextmanager
def _differentiable(dsa: DsaModel, index: int) -> Iterator[None]:
    """Within the block, an operation without a derivative is an error that names the layer and what is missing."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if not any(word in str(error) for word in ("derivative", "autograd", "require grad")):
            raise
        raise ModelError(
            f"decoder layer {index} of this {dsa.config.model_type} model cannot be differentiated "
            f"({first_line(error)}): expected modules that autograd can follow; search with greedy instead"
        ) from error
