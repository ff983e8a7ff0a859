"""Equal index scores at the edge of the top-k: how many there are, and what the rule for them does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from icsearch.model.kernels import Blockwise, find_rotation
from icsearch.model.shape import BLOCK_ELEMENTS
from stock import StockModel, Tokens

TopTokens = Callable[[torch.Tensor, int], torch.Tensor]


def latest_of_equal(top_tokens: TopTokens) -> TopTokens:
    """The opposite of our rule, made of it: what it chooses among the scores in reverse."""

    def latest(scores: torch.Tensor, topk: int) -> torch.Tensor:
        return (scores.shape[-1] - 1 - top_tokens(scores.flip(-1), topk)).flip(-1)

    return latest


def nudge(model: StockModel) -> None:
    """From now on the states that enter the first layer are off by one part in 2^23, up or down at random (seeded)."""
    generator = torch.Generator().manual_seed(0)

    def off(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        signs = torch.randint(0, 2, args[0].shape, generator=generator) * 2 - 1
        return args[0] * (1 + 2.0**-23 * signs), *args[1:]

    model.model.model.layers[0].register_forward_pre_hook(off)


class Overheard(TorchFunctionMode):
    """Remembers the scores that `topk` is called on."""

    scores: torch.Tensor

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.topk:
            self.scores = args[0]
        return function(*args, **(kwargs or {}))


class Compared(nn.Module):
    """A stock indexer whose ties are broken by our rule, and which counts where others choose other tokens."""

    def __init__(self, indexer: Any, ours: Blockwise, counts: Counter[str], rounding: float) -> None:
        super().__init__()
        self.indexer, self.ours, self.counts, self.rounding = indexer, ours, counts, rounding

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with Overheard() as overheard:
            stock = self.indexer(*args, **kwargs)
        topk = stock.shape[-1]
        order = overheard.scores.sort(dim=-1, descending=True, stable=True)
        earliest = order.indices[..., :topk].to(stock.dtype)
        ours = self.ours.select(self.indexer, *args, **kwargs)
        choosing = slice(topk, None)  # the queries before see no more than they may select
        self.counts["queries"] += stock[:, choosing, 0].numel()
        edge = order.values[:, choosing, topk - 1]
        tied = edge == order.values[:, choosing, topk]
        self.counts["tied_at_the_edge"] += int(tied.sum())
        scores = overheard.scores[:, choosing]
        gap = edge - order.values[:, choosing, topk]
        self.counts["within_rounding_of_a_tie"] += int((~tied & (gap <= self.rounding * _largest(scores))).sum())
        for name, theirs in (("stock", stock), ("earliest", earliest)):
            self._count(name, theirs[:, choosing], ours[:, choosing], scores, edge, tied)
        return earliest

    def _count(
        self,
        name: str,
        theirs: torch.Tensor,  # [B, q, k]
        ours: torch.Tensor,
        scores: torch.Tensor,  # [B, q, T]
        edge: torch.Tensor,  # [B, q]: the score of the last token in
        tied: torch.Tensor,
    ) -> None:
        """Queries whose selection is another one; of those the exact ties, and those that rounding explains."""
        differs = (theirs.sort(dim=-1).values != ours.sort(dim=-1).values).any(dim=-1)
        self.counts[f"{name}_differs"] += int(differs.sum())
        self.counts[f"{name}_differs_exact_tie"] += int((differs & tied).sum())
        rows = scores[differs]  # [n, T]
        only_one = _members(theirs[differs], rows) ^ _members(ours[differs], rows)
        away = torch.where(only_one, (rows - edge[differs].unsqueeze(-1)).abs(), 0.0).amax(-1)
        self.counts[f"{name}_differs_within_rounding"] += int((away <= self.rounding * _largest(rows)).sum())


def _largest(scores: torch.Tensor) -> torch.Tensor:
    """[..., T] scores to the largest finite size of each query's."""
    return torch.where(scores.isfinite(), scores.abs(), 0.0).amax(-1)


def _members(chosen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen.long(), True)


def count_differences(directory: Path, tokens: Tokens, rounding: float) -> dict[str, int]:
    """One all-F stock forward of the first sequence, ties by our rule; each layer's choices on the same inputs.

    `queries` that have a choice, over all layers; those with a tie at the edge; those where the last token in and the
    first one out are no more than `rounding` apart, so that another order of adding may turn them over. Then those
    where stock's own selection, and the one with ties broken by our rule, is not ours: exact ties, and what float32
    rounding explains (the tokens in question are within `rounding` of the edge) are parts of these. `rounding` is
    relative to the query's largest score.
    """
    model = StockModel(directory)
    names = ("stock_differs", "earliest_differs")
    counts = Counter({f"{name}{part}": 0 for name in names for part in ("", "_exact_tie", "_within_rounding")})
    ours = Blockwise(find_rotation(model.roles[0].indexer), BLOCK_ELEMENTS["cpu"])
    for role in model.roles:
        role.indexer = Compared(role.indexer, ours, counts, rounding)
    model.nll("F" * len(model.roles), tokens.input_ids[:1], tokens.counted[:1])
    return dict(counts)
