"""Losses of final hidden states, as one float64 sum per sequence. Pure functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from icsearch.model.block_sizes import HEAD_CHUNK_TOKENS


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
    chunks = [
        functional.cross_entropy(lm_head(states).float(), targets, reduction="none")
        for states, targets in zip(_chunks(hidden_states), _target_chunks(input_ids), strict=True)
    ]
    return per_sequence(torch.cat(chunks), counted)


def token_measures(
    hidden_states: torch.Tensor,
    reference_states: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    input_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per predicted token: NLL, KL(reference || model), both in nats, and whether the most likely token is the same.

    Shapes as in `sequence_nll`; `reference_states` are those of the all-F model. Each result is flat [B*(T-1)],
    float32, float32, bool. The NLL has the bits of `sequence_nll`: the LM head sees the same chunks.
    """
    nll, kl, agree = [], [], []
    chunks = zip(_chunks(hidden_states), _chunks(reference_states), _target_chunks(input_ids), strict=True)
    for states, references, targets in chunks:
        logits, reference = lm_head(states).float(), lm_head(references).float()  # [chunk, V]
        nll.append(functional.cross_entropy(logits, targets, reduction="none"))
        log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
        kl.append(functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
        agree.append(logits.argmax(-1) == reference.argmax(-1))
    return torch.cat(nll), torch.cat(kl), torch.cat(agree)


def per_sequence(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Sums over the counted tokens of each sequence: flat [B*(T-1)] values to float64 [B]."""
    table = values.double().view(len(counted), -1)
    return torch.where(counted[:, 1:], table, 0.0).sum(dim=1)


def selection_overlap(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """|first & second| / |first| for each query, float64 [B, T] (IndexCache paper, Appendix A).

    Selections of any family: indices [B, T, k], in which negative ones hold nothing and each other one stands once;
    [B, H, T, k] for so many groups of heads, over which it is the mean; or a bool mask [B, 1, T, T]. 0 / 0 is NaN.
    """
    if first.dtype == torch.bool:
        common, size = (first & second).sum(-1), first.sum(-1)
    else:
        merged = torch.cat([first, second], dim=-1).sort(dim=-1).values  # [..., 2k]
        common = ((merged[..., 1:] == merged[..., :-1]) & (merged[..., 1:] >= 0)).sum(dim=-1)
        size = (first >= 0).sum(-1)
    share = common.double() / size
    return share if share.dim() == 2 else share.mean(1)


def _chunks(hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The states that predict, [B, T, D] without the last position, in the LM head's chunks."""
    return hidden_states[:, :-1].reshape(-1, hidden_states.shape[-1]).split(HEAD_CHUNK_TOKENS)


def _target_chunks(input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return input_ids[:, 1:].reshape(-1).split(HEAD_CHUNK_TOKENS)
