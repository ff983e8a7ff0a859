"""Core attention of any family under any selection: the attention module run again, with the selection borrowed.

How a selection becomes a mask is each family's own business, and stays it: indices scattered by the module, a method
of the indexer, columns put behind those of a sliding window. What is heard is what the attention function returns:
[B, T, H, D], before gates and projections.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from icsearch.core.errors import ModelError
from icsearch.core.pattern import FULL, SHARED, Pattern
from icsearch.model.slot import IndexerSlot, SelectionStore

# Core attention under a selection: [B, T, H, D_v], heads not yet projected.
Core = Callable[[Any], torch.Tensor]
# Hears of each layer: the core-attention output under its own selection, that selection, and `Core`.
Observer = Callable[[torch.Tensor, Any, Core], None]


def run_observed(
    layer: nn.Module,
    owner: nn.Module,
    config: Any,
    slot: IndexerSlot,
    store: SelectionStore,
    run: Callable[[], Any],
    observer: Observer,
) -> Any:
    """What `run` returns, which runs this DSA layer under the store; the observer hears of its core attention.

    Raises ModelError where the layer's attention is not one call of one of transformers' attention functions.
    """
    module = next((child for child in layer.children() if owner in child.modules()), layer)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        with heard(config) as outputs:
            result = run()
    finally:
        hook.remove()
    if len(calls) != 1 or len(outputs) != 1:
        raise ModelError(
            f"{type(module).__name__} called transformers' attention functions {len(outputs)} times in one layer, "
            "expected once: there is no core-attention output to compare; search with greedy instead"
        )
    args, kwargs = calls[0]

    def core(selection: Any) -> torch.Tensor:
        # This layer is S, unless it is the first, and reads the selection.
        before, slot.store = slot.store, SelectionStore(Pattern(FULL + SHARED * slot.position), selection)
        try:
            with heard(config) as again:
                module(*args, **kwargs)
        finally:
            slot.store = before
        return again[0]

    observer(outputs[0], store.selection, core)
    return result


@contextlib.contextmanager
def heard(config: Any) -> Iterator[list[torch.Tensor]]:
    """Within the block, the list gets what each call of the model's attention function returns."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name, outputs = config._attn_implementation, []
    own = ALL_ATTENTION_FUNCTIONS.get(name)  # eager is no entry: each family's module brings its own

    def listen(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        function = own or sys.modules[type(module).__module__].eager_attention_forward
        returned = function(module, *args, **kwargs)
        outputs.append(returned[0])
        return returned

    ALL_ATTENTION_FUNCTIONS[name] = listen
    try:
        yield outputs
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
