"""Counted work against sums done by hand, token by token, and by torch; the estimate against published speeds."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from icsearch.core.errors import ModelError, PatternError
from icsearch.core.pattern import Pattern
from icsearch.model.model import DsaModel
from icsearch.model.shape import ModelShape
from icsearch.planning.modelfile import open_model_file
from icsearch.planning.work import (
    PAPER_RATES,
    Breakdown,
    Rates,
    Widths,
    Work,
    cost_rows,
    decode_work,
    layer_work,
    pair_cost,
    prefill_work,
)
from plan_fixtures import GLM
from tiny import FAMILIES, SIZES

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

from published import GLM_FLASH_DSA, check_estimate, fit_rates

# Sizes that no two formulas confuse: all different primes, but for small counts.
SMALL = ModelShape(
    hidden_size=11, layers=3, dsa_layers=3, heads=2, q_lora_rank=7, kv_lora_rank=5, qk_nope_head_dim=3,
    qk_rope_head_dim=4, v_head_dim=13, index_heads=3, index_head_dim=17, index_topk=4, intermediate_size=19,
    dense_layers=1, moe_intermediate_size=23, routed_experts=6, experts_per_token=2, shared_experts=1, vocab_size=29,
)  # fmt: skip


def matmul(rows: int, inner: int, columns: int) -> int:
    """FLOPs of [rows, inner] @ [inner, columns]."""
    return 2 * rows * inner * columns


def by_hand(letters: str, tokens: range) -> dict[str, int]:
    """FLOPs of new tokens at these positions (from 1), one matrix product after the other."""
    parts = dict.fromkeys(("index_projections", "index_scores", "attention", "projections", "mlp"), 0)
    for layer, letter in enumerate(letters):
        for t in tokens:
            if letter == "F":
                parts["index_projections"] += matmul(1, 7, 3 * 17) + matmul(1, 11, 17) + matmul(1, 11, 3)
                parts["index_scores"] += matmul(3, 17, t) + matmul(1, 3, t)
            kept = min(4, t)
            parts["attention"] += 2 * (matmul(1, 5 + 4, kept) + matmul(1, kept, 5))  # two heads
            parts["projections"] += matmul(1, 11, 7) + matmul(1, 7, 2 * (3 + 4)) + matmul(1, 11, 5 + 4)
            parts["projections"] += 2 * (matmul(1, 3, 5) + matmul(1, 5, 13)) + matmul(1, 2 * 13, 11)
            if layer == 0:
                parts["mlp"] += 2 * matmul(1, 11, 19) + matmul(1, 19, 11)
            else:
                parts["mlp"] += (2 + 1) * (2 * matmul(1, 11, 23) + matmul(1, 23, 11)) + matmul(1, 11, 6)
    return {**parts, "lm_head": matmul(1, 11, 29)}


def flops(work: Breakdown) -> dict[str, float]:
    names = ("index_projections", "index_scores", "attention", "projections", "mlp", "lm_head")
    return {name: getattr(work, name).flops for name in names}


@pytest.mark.parametrize("letters", ["FFF", "FSS", "FSF"])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 30])
def test_flops_equal_a_count_by_hand(letters: str, length: int) -> None:
    assert flops(prefill_work(SMALL, Pattern(letters), length)) == by_hand(letters, range(1, length + 1))
    assert flops(decode_work(SMALL, Pattern(letters), length)) == by_hand(letters, range(length, length + 1))


def test_bytes_of_a_small_decode_by_hand() -> None:
    widths = Widths(weights=2, latents=2, index_keys=1, scores=4, indices=4)
    work = decode_work(SMALL, Pattern("FSF"), 10, widths)
    indexer = 7 * 51 + 11 * 17 + 11 * 3
    assert work.index_projections.bytes == 2 * (2 * indexer + 17)  # two F layers: weights, the new key
    assert work.index_scores.bytes == 2 * (10 * 17 + 10 * 4)
    assert work.index_topk == Work(0, 2 * (10 * 4 + 4 * 4))
    assert work.attention.bytes == 3 * 4 * (9 * 2 + 4)
    attention = 11 * 7 + 7 * 14 + 11 * 9 + 2 * 5 * (3 + 13) + 26 * 11
    assert work.projections.bytes == 3 * (2 * attention + 9 * 2)
    assert work.mlp.bytes == 2 * (3 * 11 * 19) + 2 * 2 * (3 * 11 * 23 * 3 + 11 * 6)
    assert work.lm_head.bytes == 2 * 11 * 29


def test_a_prefill_reads_each_expert_once_and_every_score_twice() -> None:
    work = prefill_work(SMALL, Pattern("FSS"), 9)
    assert work.mlp.bytes == 2 * (3 * 11 * 19) + 2 * 2 * (3 * 11 * 23 * (6 + 1) + 11 * 6)
    assert work.index_scores.bytes + work.index_topk.bytes == 9 * 17 + 45 * (4 + 4) + (1 + 2 + 3 + 4 * 6) * 4


def test_parts_add_up() -> None:
    work = prefill_work(SMALL, Pattern("FFS"), 12)
    assert work.total.flops == sum(flops(work).values())
    assert work.total == work.indexer + work.rest
    assert work.indexer_share == work.indexer.flops / work.total.flops


# -- against torch, on the reference modules ---------------------------------------------------------------------


def counted_by_torch(model: DsaModel, pattern: Pattern, length: int) -> int:
    ids = torch.arange(length)[None] % SIZES["vocab_size"]
    with FlopCounterMode(display=False) as counter, torch.no_grad(), model.running(pattern):
        model.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return counter.get_total_flops()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def reference(request: pytest.FixtureRequest) -> DsaModel:
    """Eager attention and experts, so that every product is one that torch counts."""
    torch.manual_seed(0)
    config = FAMILIES[request.param](**SIZES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    return DsaModel(model.eval())


@pytest.mark.parametrize("length", [5, 33])
def test_an_indexer_costs_what_torch_counts(reference: DsaModel, length: int) -> None:
    """The reference indexer scores all L² pairs, future ones too; the formula counts the L(L+1)/2 visible ones."""
    shape = ModelShape.from_config(reference.config.to_dict())
    full, shared = Pattern("FFFFFF"), Pattern("FSFSSF")
    counted = counted_by_torch(reference, full, length) - counted_by_torch(reference, shared, length)
    work = prefill_work(shape, Pattern("FSSSSS"), length)
    dense_scores = work.index_scores.flops * length**2 / (length * (length + 1) / 2)
    assert counted == 3 * (work.index_projections.flops + dense_scores)


def test_everything_else_costs_what_torch_counts(reference: DsaModel) -> None:
    """But for core attention: the reference expands keys and values, and attends to all L² pairs.

    Expanding a token's latent takes as many products as absorbing the same matrices, so projections agree.
    """
    length, shape = 33, ModelShape.from_config(reference.config.to_dict())
    full = Pattern.full(6)
    work = prefill_work(shape, full, length)
    dense_scores = work.index_scores.flops * length**2 / (length * (length + 1) / 2)
    head = shape.qk_nope_head_dim + shape.qk_rope_head_dim + shape.v_head_dim
    dense_attention = 6 * 2 * shape.heads * head * length**2
    expected = work.index_projections.flops + dense_scores + dense_attention
    expected += work.projections.flops + work.mlp.flops + work.lm_head.flops
    assert counted_by_torch(reference, full, length) == expected


# -- shapes from configs -----------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {**SIZES, "n_shared_experts": 1}


def test_a_config_gives_the_shape() -> None:
    shape = ModelShape.from_config(CONFIG)
    assert (shape.layers, shape.dsa_layers, shape.dense_layers, shape.routed_experts) == (6, 6, 3, 4)
    assert ModelShape.from_config({"model_type": "wrapper", "text_config": CONFIG}) == shape
    for family in FAMILIES.values():
        assert ModelShape.from_config(family(**SIZES).to_dict()) == shape


def test_listed_layers_beat_counts() -> None:
    types = ["linear_attention", "indexed_attention"] * 3
    config = {**CONFIG, "layer_types": types, "mlp_layer_types": ["dense"] + ["sparse"] * 5}
    shape = ModelShape.from_config(config)
    assert (shape.dsa_layers, shape.dense_layers) == (3, 1)
    assert ModelShape.from_config(config, dsa_layers=2).dsa_layers == 2
    assert ModelShape.from_config({**CONFIG, "moe_layer_freq": 2}).dense_layers == 5  # all but 4


def test_a_dense_model_has_no_experts() -> None:
    moe = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
    shape = ModelShape.from_config({key: value for key, value in CONFIG.items() if key not in moe})
    assert (shape.dense_layers, shape.routed_experts) == (6, 0)
    assert decode_work(shape, Pattern.full(6), 20).mlp.flops == 6 * 6 * 32 * 48


@pytest.mark.parametrize("change", [{"kv_lora_rank": None}, {"index_topk": 0}, {"v_head_dim": "16"}])
def test_a_config_that_cannot_be_counted_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(change))):
        ModelShape.from_config({**CONFIG, **change})


def test_pooled_index_keys_are_refused() -> None:
    with pytest.raises(ModelError, match="index_kpool"):
        ModelShape.from_config({**CONFIG, "index_kpool": 16})


def test_bad_calls_are_refused() -> None:
    with pytest.raises(PatternError, match="4 letters, the model has 3"):
        prefill_work(SMALL, Pattern("FSSS"), 5)
    with pytest.raises(ModelError, match="context length 0"):
        decode_work(SMALL, Pattern("FSS"), 0)


def test_layers_of_another_kind_have_no_core_attention() -> None:
    mixed = replace(SMALL, dsa_layers=1)
    work = prefill_work(mixed, Pattern("F"), 9)
    assert work.projections == prefill_work(SMALL, Pattern("FFF"), 9).projections
    assert work.attention.times(3) == prefill_work(SMALL, Pattern("FFF"), 9).attention


# -- rows --------------------------------------------------------------------------------------------------------


def test_the_removed_share_is_that_of_s_layers_at_every_length() -> None:
    for row in cost_rows(GLM_FLASH_DSA, Pattern.uniform(47, Fraction(1, 4)), [1, 5000, 10**6]):
        assert row.removed_share == pytest.approx(35 / 47, rel=1e-12)


def test_all_f_saves_nothing_and_gains_grow_with_the_context() -> None:
    (row,) = cost_rows(SMALL, Pattern("FFF"), [100])
    assert (row.removed_share, row.prefill_speedup_estimate, row.decode_speedup_estimate) == (0, 1, 1)
    rows = cost_rows(GLM_FLASH_DSA, Pattern.uniform(47, Fraction(1, 4)), [2_000, 20_000, 200_000])
    assert rows == sorted(rows, key=lambda r: r.prefill_speedup_estimate)
    assert rows == sorted(rows, key=lambda r: r.decode_speedup_estimate)
    assert all(1 < row.prefill_speedup_estimate < 47 / 12 for row in rows)


def test_a_native_s_layer_is_no_saving() -> None:
    native = Pattern("FSF")
    (row,) = cost_rows(SMALL, Pattern("FSS"), [50], baseline=native)
    assert row.removed_share == pytest.approx(1 / 2)
    assert cost_rows(SMALL, native, [50], baseline=native)[0].prefill_speedup_estimate == 1


def test_equal_rates_make_the_estimate_a_ratio_of_counts() -> None:
    (row,) = cost_rows(SMALL, Pattern("FSS"), [50], rates=Rates(1, 1))
    full, shared = (prefill_work(SMALL, Pattern(p), 50).total for p in ("FFF", "FSS"))
    assert row.prefill_speedup_estimate == full.flops / shared.flops


# -- the estimate against what was published ---------------------------------------------------------------------


def errors(prefill_at: int = 200_000, shape: ModelShape = GLM_FLASH_DSA) -> dict[tuple[str, str, int], float]:
    """Percent, of the figures that no constant was fitted on."""
    rows = check_estimate(prefill_at, shape)
    return {(r.model, r.phase, r.context): round(100 * r.error, 1) for r in rows if not r.fitted}


def test_the_default_rates_are_those_fitted_on_200k() -> None:
    fitted = fit_rates()
    assert fitted.prefill == pytest.approx(PAPER_RATES.prefill, rel=2e-3)
    assert fitted.decode == pytest.approx(PAPER_RATES.decode, rel=2e-3)


def test_two_constants_meet_two_figures_and_the_others_are_reported_as_missed() -> None:
    fitted = [row for row in check_estimate() if row.fitted]
    assert [(row.phase, row.context) for row in fitted] == [("prefill", 200_000), ("decode", 200_000)]
    assert all(math.isclose(row.predicted, row.published) for row in fitted)
    assert errors() == {
        ("30B", "prefill", 10_000): -15.7,
        ("30B", "prefill", 60_000): 0.7,
        ("30B", "prefill", 120_000): 3.0,
        ("GLM-5", "prefill", 128_000): -13.1,
        ("GLM-5", "decode", 64_000): -16.6,
    }


@pytest.mark.parametrize("prefill_at", [60_000, 120_000])
def test_another_length_to_fit_on_tells_the_same(prefill_at: int) -> None:
    assert fit_rates(prefill_at=prefill_at).prefill == pytest.approx(PAPER_RATES.prefill, rel=0.1)
    found = errors(prefill_at)
    assert all(abs(e) < 3.5 for (model, _, context), e in found.items() if model == "30B" and context > 10_000)


def test_no_constant_fits_10k_and_the_rest() -> None:
    assert min(e for (model, *_), e in errors(10_000).items() if model == "30B") > 50


def test_the_assumed_index_heads_hardly_matter_for_the_30b_model_but_for_others_they_do() -> None:
    few, many = (replace(GLM_FLASH_DSA, index_heads=heads) for heads in (16, 64))
    for context in (10_000, 60_000, 120_000):
        assert errors(shape=few)["30B", "prefill", context] == pytest.approx(
            errors(shape=many)["30B", "prefill", context], abs=0.15
        )
    assert fit_rates(few).prefill == pytest.approx(4 * fit_rates(many).prefill, rel=1e-2)


def test_the_papers_81_percent_and_its_speedup_disagree() -> None:
    """Quoted in the module's docstring: 81% would make 2.5, the measured 1.82 implies 61%, counted FLOPs say 79%."""
    removed = 35 / 47
    assert 1 / (1 - 0.81 * removed) == pytest.approx(2.5, abs=0.05)
    assert (1 - 10.7 / 19.5) / removed == pytest.approx(0.61, abs=0.005)
    assert prefill_work(GLM_FLASH_DSA, Pattern.full(47), 200_000).indexer_share == pytest.approx(0.785, abs=0.001)


# -- layer by layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letters", ["FFF", "FSS", "FSF"])
def test_a_prefill_is_its_layers_and_the_head(letters: str) -> None:
    whole = prefill_work(SMALL, Pattern(letters), 30)
    layers = [layer_work(SMALL, index, letter == "F", 30) for index, letter in enumerate(letters)]
    for name in ("index_projections", "index_scores", "index_topk", "attention", "projections", "mlp"):
        added = sum((getattr(layer, name) for layer in layers), Work())
        assert added == getattr(whole, name), name
    assert sum(layer.total.flops for layer in layers) == whole.total.flops - whole.lm_head.flops


def test_parameters_are_those_of_the_model() -> None:
    """Norms included, biases not; an S layer of the checkpoint's own has no indexer."""
    for name, family in FAMILIES.items():
        config = family(**SIZES)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        shape = ModelShape.from_config(config.to_dict())
        found = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
        assert [shape.layer_parameters(index) for index in range(6)] == found, name
        indexer = sum(p.numel() for p in model.model.layers[0].self_attn.indexer.parameters())
        assert shape.layer_parameters(0) - shape.layer_parameters(0, with_indexer=False) == indexer
        assert shape.embedding_weights == model.lm_head.weight.numel() == model.model.embed_tokens.weight.numel()


def test_what_a_pair_costs_is_a_layers_attention() -> None:
    """Of GLM-5 at 16K tokens, by hand: 64 heads, 2,048 tokens of 576 + 512 numbers, and 512 x 256 up to a head."""
    shape, length = open_model_file(GLM).shape, 16384
    selected = 2048 * 2049 // 2 + (length - 2048) * 2048
    flops = 2 * 64 * (selected * (576 + 512) + length * 512 * 256)
    whole = prefill_work(shape, Pattern.full(78), length)
    layer = (whole.total.flops - whole.lm_head.flops) / 78
    assert pair_cost(shape, length) == pytest.approx(flops / layer)
    assert 0.1 < pair_cost(shape, length) < 0.5
