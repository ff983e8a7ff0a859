"""What an indexer's scores are made of, in the families whose scores the block-wise arithmetic knows.

A lightning indexer multiplies queries of several heads with one key for each token. Queries come from the attention's
query latent, or from the hidden states where there is none; some layers turn nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_CALLED_WITH = {"hidden_states", "position_embeddings", "attention_mask"}
_PARTS = ("wq_b", "wk", "k_norm", "weights_proj", "n_heads", "head_dim", "qk_rope_head_dim", "softmax_scale")


def has_scores(indexer: nn.Module) -> bool:
    """Whether an indexer has the parts that scores are made of here, and is called with what they come from."""
    taken = arguments(indexer).keys()
    source = "q_resid" in taken or hasattr(indexer, "q_input_norm")
    return source and taken >= _CALLED_WITH and all(hasattr(indexer, name) for name in _PARTS)


def arguments(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What a call of the module takes, by name."""
    return inspect.signature(module.forward).parameters


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the module, by name."""
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments


def index_queries(indexer: Any, call: Mapping[str, Any]) -> torch.Tensor:
    """An indexer's queries [B, S, H, D] before RoPE, of the named arguments of a call."""
    hidden_states = call["hidden_states"]
    source = call["q_resid"] if "q_resid" in call else indexer.q_input_norm(hidden_states)
    queries = indexer.wq_b(source).view(*hidden_states.shape[:2], indexer.n_heads, indexer.head_dim)
    if hasattr(indexer, "softmax_scaling"):  # grows with the position, by what each head has learned
        queries = indexer.softmax_scaling(queries, call["position_ids"], head_dim_first=False)
    return queries


def turns(indexer: Any) -> bool:
    """Whether RoPE turns this layer's queries and keys: some families have layers without."""
    return bool(getattr(indexer, "use_rope", True))
