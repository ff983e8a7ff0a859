"""What selections of each form hold, and take in memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from icsearch.core.errors import ModelError
from icsearch.model.families.selection import index_heads, read_form
from icsearch.sweep.sweep import selection_overlap


@pytest.mark.parametrize(
    ("numbers", "kept", "at_100", "at_10000", "plain"),
    [
        ({"index_topk": 2048}, 2048, 400, 8192, True),
        ({"index_topk": 2048, "index_kpool": 16}, 2063, 8252, 8252, False),
        ({"index_topk": 512, "compress_rate": 4}, 2051, 200, 4096, False),
        ({"topk_blocks": 16, "block_size": 128, "num_heads": 4}, 2048, 32, 512, False),
        ({"token_budget": 2048, "compress_ratio": 32}, 2079, 100, 10000, False),
    ],
)
def test_forms(numbers: dict[str, int], kept: int, at_100: int, at_10000: int, plain: bool) -> None:
    form = read_form(SimpleNamespace(**numbers))
    assert (form.kept, form.plain) == (kept, plain)
    assert (form.bytes_per_query(100), form.bytes_per_query(10000)) == (at_100, at_10000)


@pytest.mark.parametrize("wrong", [0, -1, True, 2.0, None, "8"])
def test_numbers_that_are_no_counts(wrong: Any) -> None:
    with pytest.raises(ModelError, match="expected positive numbers"):
        read_form(SimpleNamespace(index_topk=wrong))
    with pytest.raises(ModelError, match="expected positive numbers"):
        index_heads(SimpleNamespace(n_heads=wrong))


def test_heads() -> None:
    assert index_heads(SimpleNamespace(index_n_heads=4, index_head_dim=16)) == (4, 16)
    assert index_heads(SimpleNamespace()) == (0, 0)


def test_bytes_are_what_a_selection_takes(checkpoint: Any, dsa: Any) -> None:
    from family_batches import LENGTH, random_batches

    from icsearch.model.checkpoint import open_checkpoint
    from icsearch.model.layout import inspect
    from icsearch.sweep.sweep import Sweeper

    (batch,), form = random_batches(2), inspect(open_checkpoint(str(checkpoint))).selection
    selections: list[torch.Tensor] = []
    with dsa.observed(lambda _, selection, __: selections.append(selection)):
        Sweeper(dsa).sweep([dsa.start_pattern], [batch])
    for selection in selections:
        assert selection.numel() * selection.element_size() == form.bytes_per_query(LENGTH) * 2 * LENGTH


def test_overlap_of_indices_with_gaps() -> None:
    """Negative ones hold nothing, on either side."""
    first = torch.tensor([[[0, 1, -1, -1], [4, 3, 2, 1]]])
    second = torch.tensor([[[1, 7, 8, -1], [1, 2, -1, -1]]])
    assert selection_overlap(first, second).tolist() == [[0.5, 0.5]]


def test_overlap_of_groups_of_heads_is_their_mean() -> None:
    first = torch.tensor([[[[0, 1]], [[2, 3]]]])  # [B, H, T, k]
    second = torch.tensor([[[[0, 1]], [[3, 4]]]])
    assert selection_overlap(first, second).tolist() == [[0.75]]


def test_overlap_of_masks() -> None:
    first = torch.tensor([[[[True, True, False, False]]]])  # [B, 1, T, T]
    second = torch.tensor([[[[False, True, True, True]]]])
    assert selection_overlap(first, second).tolist() == [[0.5]]
