"""The block-wise arithmetic against slow, obvious twins."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from icsearch.model import ops

BLOCKS = (1, 300, 1 << 20)  # one smallest block after the other, a few, all in one


def naive_selection(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """[B, S, S] scores to [B, S, k]: sort each query's causal tokens by (-score, token), then the tokens."""
    batch, length, _ = scores.shape
    rows = []
    for row, query in itertools.product(range(batch), range(length)):
        line = scores[row, query].tolist()
        order = sorted(range(length), key=lambda token: (token > query, -line[token] if token <= query else 0, token))
        rows.append(sorted(order[:topk]))
    return torch.tensor(rows, dtype=torch.int32).view(batch, length, topk)


def naive_scores(queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    per_head = torch.einsum("bshd,btd->bsht", queries, keys).relu()
    return torch.einsum("bsh,bsht->bst", weights, per_head)


def integers(*shape: int, seed: int, low: int = -2, high: int = 3) -> torch.Tensor:
    """Small whole numbers: sums are exact in any order, and ties are everywhere."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block_elements", BLOCKS)
@pytest.mark.parametrize(("length", "topk"), [(40, 8), (33, 1), (40, 39), (40, 40), (40, 100), (17, 16)])
def test_selection_under_ties_everywhere(length: int, topk: int, block_elements: int) -> None:
    queries, keys = integers(2, length, 3, 4, seed=1), integers(2, length, 4, seed=2)
    weights = integers(2, length, 3, seed=3)
    expected = naive_selection(naive_scores(queries, keys, weights), min(topk, length))
    assert torch.equal(ops.select(queries, keys, weights, topk, block_elements), expected)


def rectified(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys (each token's twice) and weights of one head, of no whole numbers: half of all scores are zero."""
    tokens = normal(batch, length // 2, 4, seed=5).repeat(1, 2, 1)
    keys = tokens[:, torch.randperm(length, generator=torch.Generator().manual_seed(5))]
    return normal(batch, length, 1, 4, seed=4), keys, normal(batch, length, 1, seed=6).abs()


def whole_numbers(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return integers(batch, length, 2, 4, seed=4), integers(batch, length, 4, seed=5), integers(batch, length, 2, seed=6)


# The rectified ones are cut among their zeros: scores of equal keys that are not zero can differ in the last bit by
# the shape of the product, and then they are no ties.
@pytest.mark.parametrize(("make", "topk"), [(whole_numbers, 7), (rectified, 38)])
def test_selection_under_ties_does_not_depend_on_batch_or_block(make: Callable[..., Any], topk: int) -> None:
    queries, keys, weights = make(4, 50)
    whole = ops.select(queries, keys, weights, topk, 1 << 18)
    scores = naive_scores(queries, keys, weights)
    assert torch.equal(whole, naive_selection(scores, topk))
    if make is rectified:
        assert (scores.gather(-1, whole.long())[:, topk:] == 0).any(-1).all()
    for row, block_elements in itertools.product(range(4), (100, 1000, 1 << 18)):
        one = slice(row, row + 1)
        assert torch.equal(ops.select(queries[one], keys[one], weights[one], topk, block_elements), whole[one])


def test_scores_equal_the_formula() -> None:
    queries, keys, weights = normal(2, 9, 5, 8, seed=1), normal(2, 30, 8, seed=2), normal(2, 9, 5, seed=3)
    torch.testing.assert_close(ops.index_scores(queries, keys, weights), naive_scores(queries, keys, weights))


@given(st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 1.5]), min_size=2, max_size=40), st.data())
@settings(max_examples=200, deadline=None)
def test_top_tokens_are_the_first_of_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    topk = data.draw(st.integers(1, len(values)))
    scores = torch.tensor([values, values[::-1]])
    order = [sorted(range(len(row)), key=lambda i: (-row[i], i))[:topk] for row in scores.tolist()]
    assert ops.top_tokens(scores, topk).tolist() == [sorted(row) for row in order]


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 9), st.booleans())
@settings(max_examples=100, deadline=None)
def test_competing_by_groups_changes_nothing(seed: int, topk: int, more: int, tied: bool) -> None:
    """Rows so long that groups compete first, with a rest that fills no group; with ties and without."""
    length = 2 * ops.GROUP * (topk + 1) + more
    make = integers if tied else normal
    scores = make(2, length, seed=seed)
    values, tokens = ops.highest(scores, topk)
    assert torch.equal(values, scores.sort(dim=-1, descending=True).values[:, :topk])
    assert torch.equal(scores.gather(-1, tokens), values)
    assert all(len(set(row)) == topk for row in tokens.tolist())
    order = [sorted(range(length), key=lambda i: (-row[i], i))[:topk] for row in scores.tolist()]
    assert ops.top_tokens(scores, topk).tolist() == [sorted(row) for row in order]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=3, max_size=30))
@settings(max_examples=200, deadline=None)
def test_keys_order_as_the_scores_do(values: list[float]) -> None:
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:2]
    assert sorted(ops.earliest_top_tokens(torch.tensor([values]), 2)[0].tolist()) == sorted(expected)


def test_rotations_turn_each_pair_by_its_angle() -> None:
    """Both layouts against complex multiplication."""
    states, angles = normal(2, 7, 3, 6, seed=1), normal(2, 7, 3, seed=2)
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(2)
    pairs = torch.view_as_complex(states.unflatten(-1, (3, 2)).contiguous()) * turn
    halves = torch.complex(*states.chunk(2, dim=-1)) * turn
    for rotate, expected in ((ops.rotate_interleaved, pairs), (ops.rotate_half_split, halves)):
        torch.testing.assert_close(rotate(states, cos, sin), torch.cat([expected.real, expected.imag], dim=-1))


def attention_inputs(length: int = 40, topk: int = 8) -> dict[str, torch.Tensor]:
    """Random inputs of 2 sequences, 3 heads of 4 + 2 (RoPE) dimensions, values of 5, latents of 6."""
    scores = normal(2, length, length, seed=9)
    return {
        "query": normal(2, 3, length, 6, seed=1),
        "latents": normal(2, length, 8, seed=2),
        "selection": naive_selection(scores, topk),
        "up_key": normal(3, 4, 6, seed=3),
        "up_value": normal(3, 5, 6, seed=4),
    }


def naive_attention(inputs: dict[str, torch.Tensor], scaling: float) -> torch.Tensor:
    """One query and head at a time, in float64, over the selected tokens that it may see."""
    double = {name: value.double() for name, value in inputs.items()}
    batch, heads, length, _ = inputs["query"].shape
    output = torch.zeros(batch, length, heads, 5, dtype=torch.float64)
    for row, head, at in itertools.product(range(batch), range(heads), range(length)):
        tokens = [token for token in inputs["selection"][row, at].tolist() if token <= at]
        latents = double["latents"][row, tokens]  # [n, L + R]
        keys = torch.cat([latents[:, :6] @ double["up_key"][head].T, latents[:, 6:]], dim=-1)  # [n, N + R]
        weights = (keys @ double["query"][row, head, at] * scaling).softmax(0)
        output[row, at, head] = weights @ (latents[:, :6] @ double["up_value"][head].T)
    return output


@pytest.mark.parametrize("block_elements", BLOCKS)
@pytest.mark.parametrize("topk", [1, 8, 40])
def test_gathered_attention_equals_the_formula(topk: int, block_elements: int) -> None:
    inputs = attention_inputs(topk=topk)
    output = ops.gather_attention(**inputs, scaling=0.3, block_elements=block_elements)
    torch.testing.assert_close(output.double(), naive_attention(inputs, 0.3), rtol=1e-5, atol=1e-5)


def naive_weights(inputs: dict[str, torch.Tensor], scaling: float) -> list[list[dict[int, float]]]:
    """For each sequence and query the weight of each selected token that it may see, in float64, mean over heads."""
    double = {name: value.double() for name, value in inputs.items()}
    found: list[list[dict[int, float]]] = []
    for row, chosen in enumerate(inputs["selection"].tolist()):
        found.append([])
        for at, selected in enumerate(chosen):
            tokens = [token for token in selected if token <= at]
            latents = double["latents"][row, tokens]
            weights = torch.zeros(len(tokens), dtype=torch.float64)
            for head, up in enumerate(double["up_key"]):
                keys = torch.cat([latents[:, :6] @ up.T, latents[:, 6:]], dim=-1)
                weights += (keys @ double["query"][row, head, at] * scaling).softmax(0) / len(double["up_key"])
            found[-1].append(dict(zip(tokens, weights.tolist(), strict=True)))
    return found


@pytest.mark.parametrize("block_elements", BLOCKS)
@pytest.mark.parametrize("topk", [1, 8, 40])
def test_weights_and_what_another_selection_keeps_of_them(topk: int, block_elements: int) -> None:
    inputs = attention_inputs(topk=topk)
    own, other = inputs["selection"], naive_selection(normal(2, 40, 40, seed=10), 6)
    expected = naive_weights(inputs, 3.0)
    del inputs["up_value"]
    weights = ops.attention_weights(**inputs, scaling=3.0, block_elements=block_elements)
    kept = ops.kept_mass(weights, own, other, 40, block_elements)
    for row, at in itertools.product(range(2), range(40)):
        found = dict(zip(own[row, at].tolist(), weights[row, at].tolist(), strict=True))
        assert found == pytest.approx({token: expected[row][at].get(token, 0.0) for token in found}, abs=1e-6)
        common = set(own[row, at].tolist()) & set(other[row, at].tolist())
        assert float(kept[row, at]) == pytest.approx(sum(expected[row][at].get(t, 0.0) for t in common), abs=1e-6)


def test_bfloat16_loses_no_more_than_its_inputs_and_outputs() -> None:
    """Scores in float32: what is left is the rounding of weights and sums, not that of scores of size 10."""
    inputs = {name: value if name == "selection" else value.bfloat16() for name, value in attention_inputs().items()}
    exact = naive_attention(inputs, 3.0)
    error = (ops.gather_attention(**inputs, scaling=3.0, block_elements=300).double() - exact).pow(2).mean().sqrt()
    assert error < 4.6e-3 * exact.pow(2).mean().sqrt()


@pytest.mark.parametrize("block_elements", BLOCKS)
@pytest.mark.parametrize("topk", [1, 8, 40])
def test_dense_attention_equals_the_formula(topk: int, block_elements: int) -> None:
    inputs = attention_inputs(topk=topk)
    latents, rope = inputs["latents"].split([6, 2], dim=-1)
    no_rope = torch.einsum("btl,hnl->bhtn", latents, inputs["up_key"])
    key = torch.cat([no_rope, rope.unsqueeze(1).expand(-1, 3, -1, -1)], dim=-1)
    value = torch.einsum("btl,hvl->bhtv", latents, inputs["up_value"])
    output = ops.dense_attention(inputs["query"], key, value, inputs["selection"], 0.3, block_elements)
    torch.testing.assert_close(output.double(), naive_attention(inputs, 0.3), rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes():
            self.numel = max(self.numel, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_no_buffer_grows_with_the_square_of_the_length() -> None:
    largest = []
    for length in (512, 1024, 2048):
        with LargestTensor() as seen:
            selection = ops.select(
                normal(1, length, 2, 4, seed=1), normal(1, length, 4, seed=2), normal(1, length, 2, seed=3), 4, 4096
            )
            ops.gather_attention(
                normal(1, 2, length, 6, seed=4),
                normal(1, length, 6, seed=5),
                selection,
                normal(2, 4, 4, seed=6),
                normal(2, 4, 4, seed=7),
                0.5,
                4096,
            )
        largest.append(seen.numel)
    assert largest[2] <= 16 * 2048 * 2  # the smallest block: 16 queries, and pairs of 32-bit halves
    assert largest[2] <= 2.1 * largest[1] <= 2.1**2 * largest[0]
