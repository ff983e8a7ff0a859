"""Core attention of a layer on its own: run again under other selections, with the Q/K/V projections done once.

transformers looks its attention functions up by name, and hands all names but its own dense ones the selection as
the keyword `indices`. Under a name of ours the model's attention module therefore projects once and asks us; each
run with a selection then builds the mask that the reference modules build, and calls the same dense function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from icsearch.model import ATTENTION, DsaModel

NAME = "icsearch_core_attention"

# Core attention under a [B, T, k] selection: [B, T, H, D_v], heads not yet projected.
Core = Callable[[torch.Tensor], torch.Tensor]
# Hears of each layer: the core-attention output under its own selection, that selection, and `Core`.
Observer = Callable[[torch.Tensor, torch.Tensor, Core], None]


@contextlib.contextmanager
def observed(model: DsaModel, observer: Observer) -> Iterator[None]:
    """Within the block, every attention layer that runs reports to `observer`; its result stays what it was."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    dense = ALL_ATTENTION_FUNCTIONS[ATTENTION]

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, indices: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        def core(selection: torch.Tensor) -> torch.Tensor:
            mask = restrict(attention_mask, selection)
            return dense(module, query, key, value, mask, indices=None, **kwargs)[0]

        output = core(indices)
        observer(output, indices, core)
        return output, None

    own = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = attend
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = own
        del ALL_ATTENTION_FUNCTIONS[NAME]


def restrict(attention_mask: torch.Tensor, selection: torch.Tensor) -> torch.Tensor:
    """The bool mask [B, 1, T, T], True where a query may look, narrowed to a [B, T, k] selection."""
    selected = torch.zeros_like(attention_mask[:, 0]).expand(len(selection), -1, -1).clone()
    selected.scatter_(-1, selection.long(), True)
    return attention_mask & selected.unsqueeze(1)
