"""The block-wise arithmetic inside the models, with transformers' own modules as its judge."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from icsearch.core.errors import ModelError
from icsearch.core.files import demo_checkpoint
from icsearch.core.pattern import Pattern
from icsearch.model import kernels, loading, model, ops, shape
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.families.attention import Core
from icsearch.model.layout import inspect
from icsearch.model.slot import SelectionStore
from icsearch.sweep.branches import Batch, cut_batches
from icsearch.sweep.sweep import Sweeper, naive_nll
from ties import broken_by_our_rule

LENGTH = 60
ROTATIONS = {"glm_moe_dsa": ops.rotate_interleaved, "deepseek_v32": ops.rotate_half_split}


def load(directory: Path, block_elements: int | None, dtype: str = "float32") -> model.DsaModel:
    return loading.load(open_checkpoint(str(directory)), dtype=dtype, block_elements=block_elements)


@pytest.fixture(scope="module")
def reference(family_checkpoint: Path) -> model.DsaModel:
    return load(family_checkpoint, None)


@pytest.fixture(scope="module")
def blockwise(family_checkpoint: Path) -> model.DsaModel:
    return load(family_checkpoint, 2000)


def random_batches(sequences: int = 4, batch_size: int = 2, length: int = LENGTH, seed: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, tiny.VOCABULARY, (sequences, length), generator=generator)
    return cut_batches(ids, torch.ones_like(ids, dtype=torch.bool), batch_size)


def some_patterns(seed: int = 0) -> list[Pattern]:
    chance = random.Random(seed)
    return [Pattern.full(6), *(Pattern("F" + "".join(chance.choices("FS", k=5))) for _ in range(6))]


@pytest.fixture(params=["gathered", "dense"])
def side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both sides of the choice by cost."""
    monkeypatch.setattr(shape, "gathering_pays", lambda *args: request.param == "gathered")
    return str(request.param)


def test_layouts_are_found(blockwise: model.DsaModel) -> None:
    assert blockwise.blockwise is not None
    assert blockwise.blockwise.rotate is ROTATIONS[blockwise.config.model_type]


def test_loss_is_the_reference_under_the_same_tie_rule(
    reference: model.DsaModel, blockwise: model.DsaModel, side: str
) -> None:
    batches = random_batches()
    for pattern in some_patterns():
        with broken_by_our_rule(reference):
            expected = naive_nll(reference, pattern, batches)
        assert naive_nll(blockwise, pattern, batches) == pytest.approx(expected, rel=1e-5), pattern


def selections_and_outputs(dsa: model.DsaModel, batch: Batch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Each layer's selection and core-attention output in one pass of the all-F model."""
    outputs: list[torch.Tensor] = []
    selections: list[torch.Tensor] = []

    def observe(output: torch.Tensor, selection: torch.Tensor, _: Core) -> None:
        outputs.append(output)
        selections.append(selection.sort(dim=-1).values)

    calls, states = dsa.capture_calls(batch.input_ids), dsa.embed(batch.input_ids)
    store = SelectionStore(dsa.start_pattern)
    with torch.inference_mode(), dsa.observed(observe):
        for index, call in enumerate(calls):
            states = dsa.run_layer(index, states, call, store)
    return selections, outputs


def test_core_attention_is_the_reference_within_rounding(
    reference: model.DsaModel, blockwise: model.DsaModel, side: str
) -> None:
    (batch,) = random_batches(2, 2)
    with broken_by_our_rule(reference):
        expected = selections_and_outputs(reference, batch)
    found = selections_and_outputs(blockwise, batch)
    for layer in range(6):
        choosing = slice(blockwise.slots[0].index_topk, None)  # before, the reference names tokens at random
        assert torch.equal(found[0][layer][:, choosing], expected[0][layer][:, choosing]), layer
        torch.testing.assert_close(found[1][layer], expected[1][layer], rtol=1e-4, atol=1e-5)


def test_selections_differ_from_stock_at_ties_only(reference: model.DsaModel, blockwise: model.DsaModel) -> None:
    """A token that only one of the two chose has the score of one that only the other chose. First layer."""
    (batch,) = random_batches(2, 2)
    scores: list[torch.Tensor] = []
    plain = torch.Tensor.topk

    def listen(values: torch.Tensor, k: int, dim: int = -1) -> Any:
        scores.append(values)
        return plain(values, k, dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "topk", listen)
        stock, _ = selections_and_outputs(reference, batch)
    ours, _ = selections_and_outputs(blockwise, batch)
    index_scores = next(values for values in scores if values.shape[-1] == LENGTH)  # [B, S, S], layer 0
    for row in range(2):
        for query in range(blockwise.slots[0].index_topk, LENGTH):
            mine, theirs = set(ours[0][row, query].tolist()), set(stock[0][row, query].tolist())
            values = [index_scores[row, query, sorted(tokens)] for tokens in (mine - theirs, theirs - mine)]
            torch.testing.assert_close(values[0].sort().values, values[1].sort().values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sweep_equals_naive_bit_for_bit(family_checkpoint: Path, side: str, dtype: str) -> None:
    dsa, batches, patterns = load(family_checkpoint, 2000, dtype), random_batches(3), some_patterns(1)
    swept = [Sweeper(dsa).sweep(patterns, [batch]).nll for batch in batches]
    for pattern in patterns:
        joined = [value for result in swept for value in result[str(pattern)]]
        assert joined == naive_nll(dsa, pattern, batches), pattern
    assert len({tuple(swept[0][str(pattern)]) for pattern in patterns}) == len(set(patterns))


def test_block_size_changes_no_selection_and_hardly_a_loss(family_checkpoint: Path) -> None:
    (batch,) = random_batches(2, 2)
    losses = [naive_nll(load(family_checkpoint, size), Pattern.full(6), [batch]) for size in (1024, 5000, 2**20)]
    for loss in losses[1:]:
        assert loss == pytest.approx(losses[0], rel=1e-5)


def test_the_model_is_its_own_again_afterwards(blockwise: model.DsaModel, family_checkpoint: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(family_checkpoint, attn_implementation="sdpa").eval()
    (batch,) = random_batches(2, 2)
    naive_nll(blockwise, Pattern.full(6), [batch])
    with pytest.raises(ZeroDivisionError), blockwise.observed(lambda *_: 1 / 0):  # type: ignore[func-returns-value]
        blockwise.final_hidden_states(batch.input_ids, Pattern.full(6))
    with torch.inference_mode():
        expected = plain(batch.input_ids, use_cache=False).logits
        assert torch.equal(blockwise.model(batch.input_ids, use_cache=False).logits, expected)
        tokens = blockwise.model.generate(batch.input_ids[:1], max_new_tokens=4, do_sample=False)
        assert torch.equal(tokens, plain.generate(batch.input_ids[:1], max_new_tokens=4, do_sample=False))


def test_no_mask_of_all_pairs_is_made(blockwise: model.DsaModel) -> None:
    (batch,) = random_batches(1, 1)
    for call in blockwise.capture_calls(batch.input_ids):
        tensors = [value for value in call.kwargs.values() if isinstance(value, torch.Tensor)]
        assert all(tensor.numel() <= LENGTH for tensor in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("changes", [{}, {"index_n_heads": 1}, {"index_head_dim": 64}], ids=str)
def test_layouts_are_found_however_little_turns(
    tmp_path: Path, changes: dict[str, int], scale: float, dtype: str
) -> None:
    """With one head, small rotated parts, and rounding: a wrong layout would go unnoticed in a loss."""
    for family, rotate in ROTATIONS.items():
        dsa = load(tiny.save_checkpoint(tmp_path / family, family, **changes), None, dtype)
        for slot in dsa.slots:
            indexer: Any = slot.inner
            rope = indexer.qk_rope_head_dim
            indexer.wk.weight.data[:rope] *= scale
            indexer.wq_b.weight.data.view(indexer.n_heads, indexer.head_dim, -1)[:, :rope] *= scale
            assert kernels.find_rotation(indexer) is rotate


def test_layouts_of_trained_indexers_are_found() -> None:
    dsa = load(demo_checkpoint(), None)
    assert all(kernels.find_rotation(slot.inner) is ops.rotate_interleaved for slot in dsa.slots)


def test_native_shared_layers(tmp_path: Path) -> None:
    types = ["full", "full", "shared", "full", "shared", "shared"]
    checkpoint = tiny.save_checkpoint(tmp_path / "native", indexer_types=types)
    assert inspect(open_checkpoint(str(checkpoint))).has_arithmetic
    reference, blockwise = load(checkpoint, None), load(checkpoint, 2000)
    batches = random_batches()
    for pattern in (blockwise.start_pattern, blockwise.start_pattern.flip(3)):
        with broken_by_our_rule(reference):
            expected = naive_nll(reference, pattern, batches)
        found = naive_nll(blockwise, pattern, batches)
        assert found == pytest.approx(expected, rel=1e-5)
        assert found == [x for batch in batches for x in Sweeper(blockwise).sweep([pattern], [batch]).nll[str(pattern)]]


def test_attention_that_asks_for_more_is_refused(blockwise: model.DsaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = random_batches(1, 1)
    attention: Any = blockwise.owners[2]
    own = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **kwargs: own(*args, **kwargs, s_aux=torch.ones(2)))
    with pytest.raises(ModelError, match=r"s_aux.*--kernels reference"):
        naive_nll(blockwise, Pattern.full(6), [batch])


def test_indexers_that_do_something_else_are_refused(family_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dsa = load(family_checkpoint, None)
    indexer: Any = dsa.slots[0].inner

    @functools.wraps(indexer.forward)
    def farthest(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.arange(indexer.index_topk, dtype=torch.int32).expand(*hidden_states.shape[:2], -1)

    monkeypatch.setattr(indexer, "forward", farthest)
    with pytest.raises(ModelError, match="--kernels reference"):
        kernels.find_rotation(indexer)
    assert indexer.index_topk == tiny.SIZES["index_topk"]


@torch.no_grad()
def test_attention_prepared_for_many_selections_is_the_same(
    tmp_path: Path, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; blocks of queries that see no more than a selection holds are not computed again."""
    dsa = load(tiny.save_checkpoint(tmp_path, index_topk=20), 2000)  # 60 tokens in blocks of 16: one has no choice
    heard: list[tuple[torch.Tensor, torch.Tensor, Core]] = []
    with dsa.observed(lambda *found: heard.append(found)):
        Sweeper(dsa).sweep([Pattern.full(6)], random_batches(2))
    (_, other, _), (output, own, core) = heard[2], heard[4]
    assert isinstance(core, kernels.LatentAttention)
    prepared, blocks = core.prepared(output, own), list[int]()
    name = "gather_block" if side == "gathered" else "dense_block"
    block, first = getattr(ops, name), 3 if side == "gathered" else 4
    monkeypatch.setattr(ops, name, lambda *args: blocks.append(args[first]) or block(*args))
    assert torch.equal(prepared(other), core(other))
    assert blocks == [16, 32, 48, 0, 16, 32, 48]
    assert torch.equal(prepared(own), output) and not torch.equal(prepared(other), output)
