"""The second-order table of every family against its slow twin: whole forwards, whole logits, plain autograd."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_batches import Made, random_ids
from test_commands import BLOCKWISE
from test_handed import SHARING
from test_native_layers import natively
from test_unknown import save_toy

import tiny_families
from icsearch.core.errors import ModelError
from icsearch.model import loading, shape
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.model import DsaModel
from icsearch.runs.arrays import square_of
from icsearch.sweep.branches import Batch, cut_batches
from icsearch.sweep.fisher import FisherSweep, direct_table, table_of
from native_fixtures import NATIVE
from ties import broken_by_our_rule

DRAWS, SEED = 2, 5
# Of the largest entry: float32 through a whole model.
CLOSE = 1e-5


def load(directory: Path, block_elements: int | None = None) -> DsaModel:
    return loading.load(open_checkpoint(str(directory)), dtype="float32", block_elements=block_elements)


def masked(sequences: int) -> Batch:
    """Random tokens, of which some do not count."""
    ids = random_ids(sequences)
    counted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(8)) < 0.8
    return cut_batches(ids, counted, sequences)[0]


def swept(dsa: DsaModel, batch: Batch) -> Any:
    """Of the batch's last sequence: [draws + 1, N, N]."""
    table = table_of(FisherSweep(dsa, DRAWS, SEED).run([batch])[0].rows, len(dsa.slots))
    return np.stack([square_of(triangle) for triangle in [*table.drawn[-1], table.true[-1]]])


def twin(dsa: DsaModel, batch: Batch) -> Any:
    last = Batch(batch.last - 1, batch.input_ids[-1:], batch.counted[-1:])
    return direct_table(dsa, last, DRAWS, SEED)


def assert_close(found: Any, expected: Any) -> None:
    """Within float32's rounding, and no empty statement: every pair of layers differs, under labels of every kind."""
    layers = range(expected.shape[-1])
    assert all(expected[r, i, j] != 0 for r in range(DRAWS + 1) for i in layers for j in range(i))
    assert np.abs(found - expected).max() < CLOSE * np.abs(expected).max()


def test_the_reference_modules(dsa: DsaModel) -> None:
    assert_close(swept(dsa, masked(2)), twin(dsa, masked(2)))


@pytest.mark.parametrize("gathers", [True, False], ids=["gathered", "dense"])
@pytest.mark.parametrize("family", sorted(BLOCKWISE))
def test_the_blockwise_arithmetic(made: Made, family: str, gathers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's backward by blocks of queries, with transformers' own modules as its judge."""
    reference, ours = load(made(family)), load(made(family), 2000)
    monkeypatch.setattr(shape, "gathering_pays", lambda *_: gathers)
    with broken_by_our_rule(reference):
        expected = twin(reference, masked(2))
    assert_close(swept(ours, masked(2)), expected)


@pytest.mark.parametrize("changes", SHARING, ids=["two kinds", "replaced"])
@pytest.mark.parametrize("block_elements", [None, 2000])
def test_layers_that_share_keys_and_values(made: Made, changes: dict[str, Any], block_elements: int | None) -> None:
    """What reaches the latents that a layer handed on goes back through the layer that made them."""
    directory = made("mistral_large4", **changes)
    reference = load(directory)
    with broken_by_our_rule(reference) if block_elements else contextlib.nullcontext():
        expected = twin(reference, masked(2))
    assert_close(swept(load(directory, block_elements), masked(2)), expected)


def test_layers_that_take_token_ids(made: Made) -> None:
    dsa = load(made("qwen4_exp", **tiny_families.NGRAMS))
    assert_close(swept(dsa, masked(2)), twin(dsa, masked(2)))


@pytest.mark.parametrize("family", NATIVE)
def test_native_sharing(made: Made, tmp_path: Path, family: str) -> None:
    """A native S layer is told apart from what it has: borrowing what it borrows anyway changes exactly nothing."""
    dsa = load(natively(made(family), tmp_path / "native", "FSFS", (0, 1, 2, 3)))
    found, expected = swept(dsa, masked(2)), twin(dsa, masked(2))
    assert np.abs(found - expected).max() < CLOSE * np.abs(expected).max()
    for layer, source in ((1, 0), (3, 2)):
        assert not found[:, layer, source].any()
    assert (found[:, 2, 0] == found[:, 2, 1]).all()  # layer 1 has layer 0's selection
    for layer, source in ((2, 0), (2, 1), (3, 0), (3, 1)):
        assert found[:, layer, source].all()


@pytest.mark.parametrize("twist", ["no_grad", "detached", "custom"])
def test_a_family_that_cannot_be_differentiated(made: Made, twist: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers without gradients, by what they do within; the others, and losses, are as ever."""
    dsa = load(made("glm_moe_dsa"))
    attention: Any = dsa.layers[2].self_attn
    own = attention.forward

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        if twist == "no_grad":
            with torch.no_grad():
                return own(*args, **kwargs)
        output, *rest = own(*args, **kwargs)
        return (output.detach() if twist == "detached" else Opaque.apply(output), *rest)

    monkeypatch.setattr(attention, "forward", spoilt)
    with pytest.raises(ModelError) as caught:
        swept(dsa, masked(1))
    line = str(caught.value)
    assert "decoder layer 2 of this glm_moe_dsa model cannot be differentiated (" in line
    assert "search with greedy instead" in line and "\n" not in line


class Opaque(torch.autograd.Function):
    """An operation without a derivative."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
        return states.clone()


def test_attention_that_cannot_be_heard(tmp_path: Path) -> None:
    """As dp-baseline: there is no core attention to differentiate by."""
    toy = loading.load(open_checkpoint(str(save_toy(tmp_path / "toy"))), trust_remote_code=True)
    with pytest.raises(ModelError, match="called transformers' attention functions 0 times .* greedy instead"):
        FisherSweep(toy, DRAWS, SEED).run([masked(1)])
