"""Counted work and bytes of one pass, by part, and what a pattern saves at a context length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from icsearch.core.errors import ModelError, PatternError
from icsearch.core.pattern import Pattern
from icsearch.model.shape import ModelShape


@dataclass(frozen=True)
class Widths:
    """Bytes per value. The defaults: BF16 weights and latents, FP8 index keys, float32 scores.

    Index keys are FP8 in DeepSeek's and the engines' kernels; their scales (3%) are not counted.
    """

    weights: float = 2
    latents: float = 2
    index_keys: float = 1
    scores: float = 4
    indices: float = 4


@dataclass(frozen=True)
class Work:
    """Counted work: floating-point operations, and bytes to and from memory."""

    flops: float = 0
    bytes: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: int) -> Work:
        return Work(self.flops * count, self.bytes * count)


@dataclass(frozen=True)
class Breakdown:
    """The work of one pass by part, summed over layers."""

    index_projections: Work
    index_scores: Work
    index_topk: Work
    attention: Work
    projections: Work
    mlp: Work
    lm_head: Work

    @property
    def indexer(self) -> Work:
        return self.index_projections + self.index_scores + self.index_topk

    @property
    def rest(self) -> Work:
        return self.attention + self.projections + self.mlp + self.lm_head

    @property
    def total(self) -> Work:
        return self.indexer + self.rest

    @property
    def indexer_share(self) -> float:
        """Indexer FLOPs / all FLOPs: counted, not a share of time."""
        return self.indexer.flops / self.total.flops


@dataclass(frozen=True)
class _Pass:
    """What the formulas need of a pass: new tokens, cached keys, visible pairs, pairs that core attention keeps."""

    tokens: int
    keys: int
    visible: int
    selected: int


def prefill_work(shape: ModelShape, pattern: Pattern, length: int, widths: Widths | None = None) -> Breakdown:
    """Work of a prefill of `length` tokens, one sequence."""
    return _of_pattern(shape, pattern, _prefill(shape, length), widths)


def decode_work(shape: ModelShape, pattern: Pattern, context: int, widths: Widths | None = None) -> Breakdown:
    """Work of one new token that sees `context` tokens, itself included; one sequence."""
    return _of_pattern(shape, pattern, _Pass(1, context, context, min(shape.index_topk, context)), widths)


def layer_work(shape: ModelShape, index: int, full: bool, length: int, widths: Widths | None = None) -> Breakdown:
    """Work of one DSA layer on `length` tokens of one sequence, with its own indexer or without; no LM head.

    Dense layers are taken to be the first ones, as they are in DeepSeek-V3.2 and GLM-5.
    """
    dense = int(index < shape.dense_layers)
    return _count(shape, _prefill(shape, length), widths or Widths(), int(full), 1, dense, 1 - dense, 0)


def pair_cost(shape: ModelShape, length: int) -> float:
    """What a layer's core attention under another's selection costs, in runs of a layer: FLOPs, all layers F.

    With its outcome brought from latents to heads; queries are brought to latents once for all selections.
    """
    whole = prefill_work(shape, Pattern.full(shape.dsa_layers), length)
    up = 2 * length * shape.heads * shape.kv_lora_rank * shape.v_head_dim
    layer = (whole.total.flops - whole.lm_head.flops) / shape.layers
    return (whole.attention.flops / shape.dsa_layers + up) / layer


def _prefill(shape: ModelShape, length: int) -> _Pass:
    short = min(length, shape.index_topk)
    selected = short * (short + 1) // 2 + (length - short) * shape.index_topk
    return _Pass(length, length, length * (length + 1) // 2, selected)


def _of_pattern(shape: ModelShape, pattern: Pattern, one: _Pass, widths: Widths | None) -> Breakdown:
    if len(pattern) != shape.dsa_layers:
        raise PatternError(
            f"pattern has {len(pattern)} letters, the model has {shape.dsa_layers} DSA layers: give one per layer"
        )
    full, sparse = len(pattern.full_layers), shape.layers - shape.dense_layers
    return _count(shape, one, widths or Widths(), full, shape.dsa_layers, shape.dense_layers, sparse, 1)


def _count(
    shape: ModelShape, one: _Pass, widths: Widths, full: int, dsa: int, dense: int, sparse: int, heads: int
) -> Breakdown:
    """Of so many indexers, layers with core attention, layers with a dense MLP and with experts, and LM heads."""
    if one.keys < 1:
        raise ModelError(f"context length {one.keys} is out of range: give a number of tokens of at least 1")
    per_score = 2 * shape.index_heads * (shape.index_head_dim + 1)
    per_selected = 2 * shape.heads * (shape.latent + shape.kv_lora_rank)
    keys = shape.index_head_dim * widths.index_keys  # bytes of a token's index key
    dense_mlp = 3 * shape.hidden_size * shape.intermediate_size
    active = shape.expert_weights * (shape.experts_per_token + shape.shared_experts) + shape.router_weights
    touched = min(shape.routed_experts, one.tokens * shape.experts_per_token)
    read = shape.expert_weights * (touched + shape.shared_experts) + shape.router_weights

    def product(weights: int, read: int, written: float = 0) -> Work:
        """Every token times so many weights, of which so many are read, and bytes that are kept of the outcome."""
        return Work(2 * one.tokens * weights, widths.weights * read + written)

    return Breakdown(
        index_projections=product(shape.index_weights, shape.index_weights, one.tokens * keys).times(full),
        index_scores=Work(one.visible * per_score, one.keys * keys + one.visible * widths.scores).times(full),
        index_topk=Work(0, one.visible * widths.scores + one.selected * widths.indices).times(full),
        attention=Work(
            one.selected * per_selected, one.selected * (shape.latent * widths.latents + widths.indices)
        ).times(dsa),
        projections=product(
            shape.projection_weights, shape.projection_weights, one.tokens * shape.latent * widths.latents
        ).times(dense + sparse),
        mlp=product(dense_mlp, dense_mlp).times(dense) + product(active, read).times(sparse),
        lm_head=Work(2 * shape.embedding_weights, widths.weights * shape.embedding_weights).times(heads),
    )


@dataclass(frozen=True)
class Rates:
    """ρ of the estimate: the price of a unit of indexer work (prefill: FLOP, decode: byte) relative to the rest."""

    prefill: float
    decode: float


# Fitted on the paper's figures of the 30B model at 200K: benchmarks/published.py; a test fits them again.
PAPER_RATES = Rates(prefill=0.420, decode=3.52)


@dataclass(frozen=True)
class CostRow:
    """What a pattern saves at one context length (tokens).

    Counted: `indexer_share_full` and `indexer_share_pattern`, indexer FLOPs / all FLOPs of a prefill under the
    baseline and under the pattern; `removed_share`, the part of the baseline's indexer work that the pattern
    removes. All indexers are of one size, so that part is the same in FLOPs and in bytes, in prefill and in decode,
    at every length. Estimated: the two speed-ups over the baseline, (rest + ρ · indexer) before / after, with `Rates`.
    """

    context: int
    indexer_share_full: float
    indexer_share_pattern: float
    removed_share: float
    prefill_speedup_estimate: float
    decode_speedup_estimate: float


def cost_rows(
    shape: ModelShape,
    pattern: Pattern,
    contexts: Iterable[int],
    *,
    baseline: Pattern | None = None,
    rates: Rates = PAPER_RATES,
    widths: Widths | None = None,
) -> list[CostRow]:
    """One row per context length, against all-F unless the model's own start pattern is given as `baseline`."""
    reference, rows = baseline or Pattern.full(shape.dsa_layers), []
    for context in contexts:
        before, after = (prefill_work(shape, p, context, widths) for p in (reference, pattern))
        old, new = (decode_work(shape, p, context, widths) for p in (reference, pattern))
        row = CostRow(
            context=context,
            indexer_share_full=before.indexer_share,
            indexer_share_pattern=after.indexer_share,
            removed_share=1 - after.indexer.flops / before.indexer.flops,
            prefill_speedup_estimate=(before.rest.flops + rates.prefill * before.indexer.flops)
            / (after.rest.flops + rates.prefill * after.indexer.flops),
            decode_speedup_estimate=(old.rest.bytes + rates.decode * old.indexer.bytes)
            / (new.rest.bytes + rates.decode * new.indexer.bytes),
        )
        rows.append(row)
    return rows
