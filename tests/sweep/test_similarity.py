"""Similarity and overlap against a slow direct computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_sweep import random_batches

from icsearch.core.pattern import Pattern
from icsearch.model import loading, model
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.slot import SelectionStore
from icsearch.sweep.similarity import SimilaritySweep, direct_similarity, smallest_index_type
from icsearch.sweep.sweep import Sweeper, selection_overlap

TOPK = 8


@pytest.fixture(scope="module")
def dsa(family_checkpoint: Path) -> model.DsaModel:
    return loading.load(open_checkpoint(str(family_checkpoint)))


@pytest.mark.parametrize("on_cpu", [False, True])
def test_cosine_equals_the_direct_computation(dsa: model.DsaModel, on_cpu: bool) -> None:
    (batch,) = random_batches(sequences=2, batch_size=2)
    found = SimilaritySweep(dsa, TOPK, on_cpu).run([batch])[0].cosine
    assert [len(row) for row in found] == list(range(6))
    for layer in range(1, 6):
        for source in range(layer):
            assert found[layer][source] == direct_similarity(dsa, batch, TOPK, layer, source), (layer, source)


def test_overlap_equals_sets(dsa: model.DsaModel) -> None:
    (batch,) = random_batches(sequences=2, batch_size=2)
    found = SimilaritySweep(dsa, TOPK).run([batch])[0].overlap
    store, selections = SelectionStore(Pattern.full(6)), []
    with torch.inference_mode():
        calls, states = dsa.capture_calls(batch.input_ids), dsa.embed(batch.input_ids)
        for index in range(6):
            states = dsa.run_layer(index, states, calls[index], store)
            selections.append(store.selection.tolist())
    for i in range(6):
        for j in range(i):
            shares = [
                len(set(own) & set(other)) / TOPK
                for a, b in zip(selections[i], selections[j], strict=True)
                for own, other in list(zip(a, b, strict=True))[TOPK:]
            ]
            assert found[i][j] == pytest.approx(sum(shares))


def test_kascade_equals_whole_attention(family_checkpoint: Path) -> None:
    """Attention of every head to every token, in float64, masked by sets; and the states in front and behind."""
    blockwise = loading.load(open_checkpoint(str(family_checkpoint)), block_elements=2000)
    (batch,) = random_batches(sequences=2, batch_size=2)
    found = SimilaritySweep(blockwise, TOPK).run([batch])[0]
    heard: list[tuple[torch.Tensor, torch.Tensor]] = []  # each layer's selection, and attention scores [B, H, T, T]

    def hear(output: torch.Tensor, selection: torch.Tensor, core: Any) -> None:
        key, _ = type(core.owner).expand_kv(core.owner, core.latents, core.rope_keys)
        heard.append((selection, core.query.double() @ key.double().transpose(2, 3) * core.scaling))

    store, importance = SelectionStore(Pattern.full(6)), []
    with torch.inference_mode():
        calls, states = blockwise.capture_calls(batch.input_ids), blockwise.embed(batch.input_ids)
        for index in range(6):
            before = states.double()
            with blockwise.observed(hear):
                states = blockwise.run_layer(index, states, calls[index], store)
            cosine = (before * states).sum(-1) / before.norm(dim=-1) / states.double().norm(dim=-1)
            importance.append(float((1 - cosine)[:, TOPK:].mean(1).sum()))
    assert found.importance == pytest.approx(importance, rel=1e-5)
    queries = range(TOPK, batch.input_ids.shape[1])
    for i, (own, scores) in enumerate(heard):
        masked = torch.full_like(scores, -torch.inf).scatter(-1, own[:, None].long().expand(*scores.shape[:3], -1), 0.0)
        weights = (masked + scores)[:, :, TOPK:].softmax(-1).mean(1)  # [B, T - TOPK, T]
        for j, (other, _) in enumerate(heard[:i]):
            kept = [[float(weights[b, q - TOPK, other[b, q].long()].sum()) for q in queries] for b in range(2)]
            assert found.kept[i][j] == pytest.approx(sum(min(of_sequence) for of_sequence in kept), abs=1e-6), (i, j)


def test_without_attention_weights_there_is_no_score(dsa: model.DsaModel) -> None:
    events = SimilaritySweep(dsa, TOPK).events(random_batches(sequences=2, batch_size=2), lambda _: None)
    assert not {"kept", "importance"} & events[0].keys()


def test_observing_changes_nothing(dsa: model.DsaModel) -> None:
    batches = random_batches(sequences=2, batch_size=2)
    before = Sweeper(dsa).sweep([Pattern.full(6)], batches).nll
    SimilaritySweep(dsa, TOPK).run(batches[:1])
    assert Sweeper(dsa).sweep([Pattern.full(6)], batches).nll == before


def test_short_prefixes_overlap_wholly() -> None:
    first = torch.tensor([[[3, 1, 2], [0, 5, 9]]])
    second = torch.tensor([[[1, 2, 3], [9, 8, 7]]])
    assert selection_overlap(first, second).tolist() == [[1.0, 1 / 3]]


@pytest.mark.parametrize(
    ("length", "expected"), [(256, torch.uint8), (257, torch.int16), (32768, torch.int16), (32769, torch.int32)]
)
def test_smallest_index_type(length: int, expected: torch.dtype) -> None:
    assert smallest_index_type(length) == expected
