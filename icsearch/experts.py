"""Routed experts by chunks of tokens: what a long sequence's experts take no longer grows with its length.

transformers' `grouped_mm` makes a row of hidden size for each (token, expert) pair, twice in float32: 26 GB for one
layer of GLM-5 at 64K tokens. What experts do to a token follows from that token and its routing alone, so any cut gives
the same result but for the rounding of products of other shapes; the cut is a constant, so the bits follow nothing
else.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from icsearch import block_sizes
from icsearch.families.calls import instead_of_forward

_TAKES = ["hidden_states", "top_k_index", "top_k_weights"]
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def find_experts(layers: Iterable[nn.Module]) -> list[Any]:
    """The modules that take states of single tokens and each one's experts, as transformers' fused experts do."""
    return [module for layer in layers for module in layer.modules() if _is_experts(module)]


def _is_experts(module: nn.Module) -> bool:
    return list(inspect.signature(type(module).forward).parameters)[1:] == _TAKES


@contextlib.contextmanager
def chunked(experts: Iterable[Any]) -> Iterator[None]:
    """Within the block these modules work on EXPERT_CHUNK_TOKENS tokens at once; of no more they see one call."""
    with contextlib.ExitStack() as stack:
        for module in experts:
            by_so_many = partial(by_chunks, module.forward, block_sizes.EXPERT_CHUNK_TOKENS)
            stack.enter_context(instead_of_forward(module, by_so_many))
        yield


def by_chunks(
    forward: Experts, size: int, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`forward` on [N, D] states, [N, e] experts and their weights [N, e], at most `size` tokens at once: [N, D]."""
    if len(hidden_states) <= size:
        return forward(hidden_states, top_k_index, top_k_weights)
    output = torch.empty_like(hidden_states)
    for first in range(0, len(hidden_states), size):
        part = slice(first, first + size)
        output[part] = forward(hidden_states[part], top_k_index[part], top_k_weights[part])
    return output
