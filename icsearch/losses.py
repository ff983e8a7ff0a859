"""Losses of final hidden states, as one float64 sum per sequence. Pure functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

# Tokens per LM-head product. A constant, not what fits at the moment: the bits of a product follow its shape.
HEAD_CHUNK_TOKENS = 1024


def sequence_nll(
    hidden_states: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    input_ids: torch.Tensor,
    counted: torch.Tensor,
) -> torch.Tensor:
    """Summed next-token NLL of each sequence, in nats.

    hidden_states: [B, T, D] after the final norm; input_ids: int64 [B, T]; counted: bool [B, T], True where the
    prediction of that token counts (position 0 is never predicted). Logits are float32, sums float64.
    Returns float64 [B].
    """
    batch, length, _ = hidden_states.shape
    states = hidden_states[:, :-1].reshape(batch * (length - 1), -1)  # [B*(T-1), D]
    targets = input_ids[:, 1:].reshape(-1)  # [B*(T-1)]
    chunks = [
        functional.cross_entropy(lm_head(chunk).float(), target, reduction="none")
        for chunk, target in zip(states.split(HEAD_CHUNK_TOKENS), targets.split(HEAD_CHUNK_TOKENS), strict=True)
    ]
    nll = torch.cat(chunks).double().view(batch, length - 1)
    return torch.where(counted[:, 1:], nll, 0.0).sum(dim=1)
