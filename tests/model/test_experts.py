"""Experts by chunks of tokens against experts on all tokens at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_sweep import random_batches, sweep_all
from torch import nn

import tiny
from icsearch.core.pattern import Pattern
from icsearch.model import kernels as experts
from icsearch.model import loading, shape
from icsearch.model.checkpoint import open_checkpoint
from icsearch.sweep.sweep import naive_nll


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("experts") / "model")


def modules(path: Path) -> list[nn.Module]:
    model = loading.load(open_checkpoint(str(path)), dtype="float32", device="cpu")
    return experts.find_experts(model.layers)


def calls(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(tokens, 32, generator=generator)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(tokens)])
    return states, index, torch.rand(tokens, 2, generator=generator)


def test_the_layers_with_experts_are_found(path: Path) -> None:
    assert len(modules(path)) == 3  # of six layers, the first three are dense


@torch.inference_mode()
@pytest.mark.parametrize("size", [1, 7, 16, 50])
def test_chunks_are_calls_of_their_own(path: Path, size: int) -> None:
    module, inputs = modules(path)[0], calls(50)
    by_hand = torch.cat([module(*(tensor[a : a + size] for tensor in inputs)) for a in range(0, 50, size)])
    assert torch.equal(experts.by_chunks(module.forward, size, *inputs), by_hand)
    torch.testing.assert_close(by_hand, module(*inputs))


@torch.inference_mode()
def test_within_the_block_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chunked is seen from the sizes of the calls that the experts' own forward gets."""
    module, inputs, seen = modules(path)[0], calls(20), []
    own = type(module).forward
    monkeypatch.setattr(type(module), "forward", lambda self, *args: (seen.append(len(args[0])), own(self, *args))[1])
    monkeypatch.setattr(shape, "EXPERT_CHUNK_TOKENS", 8)
    with experts.chunked([module]):
        module(*inputs)
    module(*inputs)
    assert seen == [8, 8, 4, 20]


def losses(path: Path, kernels: int | None) -> dict[str, list[float]]:
    """Of a sweep, which must be those of whole forwards."""
    dsa = loading.load(open_checkpoint(str(path)), dtype="float32", device="cpu", block_elements=kernels)
    batches, patterns = random_batches(), [Pattern("FFFFFF"), Pattern("FSFSFS")]
    swept = sweep_all(dsa, patterns, [batches])
    assert swept == {str(pattern): naive_nll(dsa, pattern, batches) for pattern in patterns}
    return swept


def test_sweep_by_chunks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as naive, close to a sweep without chunks; transformers' own modules have none."""
    whole, reference = losses(path, 2**19), losses(path, None)
    monkeypatch.setattr(shape, "EXPERT_CHUNK_TOKENS", 24)
    chunked = losses(path, 2**19)
    assert losses(path, None) == reference
    for pattern, nll in whole.items():
        assert chunked[pattern] == pytest.approx(nll, rel=1e-6)
