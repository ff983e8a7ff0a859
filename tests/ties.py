"""transformers' own indexers with ties broken by our rule: of equal scores, the earliest token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from icsearch.model.model import DsaModel


def stable_topk(scores: torch.Tensor, k: int, dim: int = -1) -> Any:
    """`Tensor.topk` by a stable sort, which keeps the order of equal values."""
    values, indices = torch.sort(scores, dim=dim, descending=True, stable=True)
    return torch.return_types.topk((values[..., :k], indices[..., :k]))


@contextlib.contextmanager
def broken_by_our_rule(dsa: DsaModel) -> Iterator[None]:
    """Within the block, the model's own indexers choose by stable sort. The experts' router keeps its own top-k."""
    indexers = [slot.inner for slot in dsa.slots if slot.inner is not None]

    def wrapped(forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with mock.patch.object(torch.Tensor, "topk", stable_topk):
                return forward(*args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        for indexer in indexers:
            stack.enter_context(mock.patch.object(indexer, "forward", wrapped(indexer.forward)))
        yield
