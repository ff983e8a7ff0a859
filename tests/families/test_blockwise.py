"""The block-wise arithmetic in the families that it knows, with transformers' own modules as its judge."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from family_batches import Made, random_batches, random_ids
from test_bits import all_patterns
from test_commands import BLOCKWISE
from torch.nn import functional
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaIndexer

from icsearch.core.pattern import Pattern
from icsearch.model import loading, ops, shape
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.layout import inspect
from icsearch.model.model import DsaModel
from icsearch.sweep.similarity import SimilaritySweep
from icsearch.sweep.sweep import Sweeper, naive_nll
from ties import broken_by_our_rule

OTHERS = sorted(BLOCKWISE - {"deepseek_v32", "glm_moe_dsa"})  # these two have tests of their own


def load(directory: Path, block_elements: int | None, dtype: str = "float32") -> DsaModel:
    return loading.load(open_checkpoint(str(directory)), dtype=dtype, block_elements=block_elements)


@pytest.fixture(params=["gathered", "dense"])
def _side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides of the choice by cost."""
    monkeypatch.setattr(shape, "gathering_pays", lambda *_: request.param == "gathered")


@pytest.mark.usefixtures("_side")
@pytest.mark.parametrize("family", OTHERS)
def test_losses_are_the_reference_modules(made: Made, family: str) -> None:
    """Under one rule for ties, within rounding; and the sweep's are those of whole forwards, bit for bit."""
    reference, ours = load(made(family), None), load(made(family), 2000)
    batches, patterns = random_batches(), all_patterns(ours)
    swept = Sweeper(ours).sweep(patterns, batches).nll
    for pattern in patterns:
        with broken_by_our_rule(reference):
            expected = naive_nll(reference, pattern, batches)
        assert swept[pattern.letters] == pytest.approx(expected, rel=1e-5), pattern
        assert swept[pattern.letters] == naive_nll(ours, pattern, batches)


@pytest.mark.usefixtures("_side")
@pytest.mark.parametrize("family", OTHERS)
def test_similarity_is_the_reference_modules(made: Made, family: str) -> None:
    """Heard in another way: the core of each layer by itself, and not its attention module run again."""
    reference, ours, (batch,) = load(made(family), None), load(made(family), 2000), random_batches(2)
    with broken_by_our_rule(reference):
        expected = SimilaritySweep(reference, 8).run([batch])[0]
    found = SimilaritySweep(ours, 8).run([batch])[0]
    for layer in range(len(ours.slots)):
        assert found.cosine[layer] == pytest.approx(expected.cosine[layer], rel=1e-5)
        assert found.overlap[layer] == pytest.approx(expected.overlap[layer], rel=1e-9)


@pytest.mark.parametrize("family", OTHERS)
def test_bfloat16_and_memory(made: Made, family: str) -> None:
    ours, (batch, *_) = load(made(family), 2000, "bfloat16"), random_batches(2)
    cheapest = Pattern("F" + "S" * (len(ours.slots) - 1))
    assert Sweeper(ours).sweep([cheapest], [batch]).nll[cheapest.letters] == naive_nll(ours, cheapest, [batch])
    for call in ours.capture_calls(batch.input_ids):
        tensors = [value for value in call.kwargs.values() if isinstance(value, torch.Tensor)]
        assert all(tensor.numel() <= batch.input_ids.numel() for tensor in tensors)


def test_layers_without_rope(made: Made) -> None:
    """Where the first layer turns nothing, another one tells the layout; where none does, none is needed."""
    for which in ([0, 1, 0, 1], [0, 0, 0, 0]):
        directory, batches = made("mistral_large4", no_rope_layers=which), random_batches(2)
        reference, ours = load(directory, None), load(directory, 2000)
        for pattern in (Pattern("FFFF"), Pattern("FSFS")):
            with broken_by_our_rule(reference):
                expected = naive_nll(reference, pattern, batches)
            assert naive_nll(ours, pattern, batches) == pytest.approx(expected, rel=1e-5)


def test_an_indexer_that_scores_otherwise_gets_the_reference(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts are there, by the same names, and another choice comes out: `auto` must not use our arithmetic."""
    source = open_checkpoint(str(made("glm_moe_dsa")))
    assert inspect(source).has_arithmetic
    own = GlmMoeDsaIndexer.forward

    @functools.wraps(own)
    def reversed_choice(self: Any, hidden_states: torch.Tensor, q_resid: torch.Tensor, *rest: Any, **more: Any) -> Any:
        return own(self, hidden_states, -q_resid, *rest, **more)

    monkeypatch.setattr(GlmMoeDsaIndexer, "forward", reversed_choice)
    assert not inspect(source).has_arithmetic


@pytest.mark.parametrize("window", [1, 3, 16, 17, 100])
@pytest.mark.parametrize("length", [1, 16, 40])
def test_windows(window: int, length: int) -> None:
    generator = torch.Generator().manual_seed(window)
    query, key, value = (torch.randn(2, 3, length, size, generator=generator) for size in (8, 8, 4))
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    mask = (distance >= 0) & (distance < window)
    expected = functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(ops.window_attention(query, key, value, window, 0.3), expected)


def test_windows_are_those_of_transformers(made: Made) -> None:
    """A layer with a sliding window by itself, its mask against ours."""
    reference, ours, ids = load(made("dots3_note"), None), load(made("dots3_note"), 2000), random_ids()
    with torch.inference_mode():
        states = reference.embed(ids)
        outputs = [
            dsa.run_layer(1, states, dsa.capture_calls(ids)[1], None)  # type: ignore[arg-type]
            for dsa in (reference, ours)
        ]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
