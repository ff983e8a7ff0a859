"""Counted work: FLOPs and bytes of one pass, by part. Exact, by these formulas.

A multiply-add is 2 FLOPs. Elementwise work (norms, rotary embedding, softmax, activations) and the comparisons
of the top-k are not counted. One sequence. Letters: H hidden size, h heads, q and c the ranks of the query and
key-value projections, n and r the parts of a head without and with rotary embedding, v the value dimension;
I indexer heads, D their dimension, K `index_topk`; V vocabulary; E experts, e of them per token, s shared ones,
m their intermediate size, d that of a dense layer.

A prefill of L tokens has T = L new tokens and P = L(L+1)/2 visible (query, key) pairs, of which core attention
keeps Q = Σ_{t=1..L} min(K, t). Decoding one token that sees L tokens, itself included, has T = 1, P = L and
Q = min(K, L).

| part | FLOPs per layer | bytes per layer (w, a, i, f: width of weight, cached latent, index key, score) |
|---|---|---|
| indexer projections | 2T(qID + HD + HI) | w(qID + HD + HI) + iTD: weights, new keys written |
| indexer scores | P(2ID + 2I): dot products, weighted sum over heads | iLD + fP: keys read once, scores written |
| indexer top-k | – | fP + 4Q: scores read, 32-bit indices written |
| core attention | 2Qh(2c + r): MLA with absorbed projections | Q(a(c + r) + 4): a latent and an index per pair |
| projections | 2T(Hq + qh(n+r) + H(c+r) + hnc + hcv + hvH) | w(the same bracket) + aT(c + r) |
| MLP | dense 6THd; MoE 2T(3Hm(e + s) + HE) | dense 3wHd; MoE w(3Hm(min(E, Te) + s) + HE) |
| LM head, once | 2HV: the last token alone, as a server does | wHV |

Bytes are the least traffic of separate kernels: weights and index keys are read once per pass, latents once per
pair. Other activations are not counted. The three indexer rows are paid by F layers alone: an S layer computes
nothing of its indexer and keeps no index keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from icsearch.cost.shape import ModelShape
from icsearch.errors import ModelError, PatternError
from icsearch.pattern import Pattern


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
    return _work(shape, pattern, _prefill(shape, length), widths or Widths())


def layer_work(shape: ModelShape, index: int, full: bool, length: int, widths: Widths | None = None) -> Breakdown:
    """Work of one DSA layer on `length` tokens of one sequence, with its own indexer or without; no LM head.

    Dense layers are taken to be the first ones, as they are in DeepSeek-V3.2 and GLM-5.
    """
    one, widths = _prefill(shape, length), widths or Widths()
    return Breakdown(
        index_projections=_index_projections(shape, one, widths).times(full),
        index_scores=_index_scores(shape, one, widths).times(full),
        index_topk=_index_topk(one, widths).times(full),
        attention=_attention(shape, one, widths),
        projections=_projections(shape, one, widths),
        mlp=_dense_mlp(shape, one, widths) if index < shape.dense_layers else _expert_mlp(shape, one, widths),
        lm_head=Work(),
    )


def decode_work(shape: ModelShape, pattern: Pattern, context: int, widths: Widths | None = None) -> Breakdown:
    """Work of one new token that sees `context` tokens, itself included; one sequence."""
    _check_context(context)
    selected = min(shape.index_topk, context)
    return _work(shape, pattern, _Pass(1, context, context, selected), widths or Widths())


def _prefill(shape: ModelShape, length: int) -> _Pass:
    _check_context(length)
    short = min(length, shape.index_topk)
    return _Pass(length, length, _triangle(length), _triangle(short) + (length - short) * shape.index_topk)


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def _check_context(length: int) -> None:
    if length < 1:
        raise ModelError(f"context length {length} is out of range: give a number of tokens of at least 1")


def _work(shape: ModelShape, pattern: Pattern, one: _Pass, widths: Widths) -> Breakdown:
    if len(pattern) != shape.dsa_layers:
        raise PatternError(
            f"pattern has {len(pattern)} letters, the model has {shape.dsa_layers} DSA layers: give one per layer"
        )
    full = len(pattern.full_layers)
    return Breakdown(
        index_projections=_index_projections(shape, one, widths).times(full),
        index_scores=_index_scores(shape, one, widths).times(full),
        index_topk=_index_topk(one, widths).times(full),
        attention=_attention(shape, one, widths).times(shape.dsa_layers),
        projections=_projections(shape, one, widths).times(shape.layers),
        mlp=_mlp(shape, one, widths),
        lm_head=Work(2 * shape.hidden_size * shape.vocab_size, widths.weights * shape.hidden_size * shape.vocab_size),
    )


def _index_projections(shape: ModelShape, one: _Pass, widths: Widths) -> Work:
    written = one.tokens * shape.index_head_dim * widths.index_keys
    return Work(2 * one.tokens * shape.index_weights, widths.weights * shape.index_weights + written)


def _index_scores(shape: ModelShape, one: _Pass, widths: Widths) -> Work:
    per_pair = 2 * shape.index_heads * (shape.index_head_dim + 1)
    keys = one.keys * shape.index_head_dim * widths.index_keys
    return Work(one.visible * per_pair, keys + one.visible * widths.scores)


def _index_topk(one: _Pass, widths: Widths) -> Work:
    return Work(0, one.visible * widths.scores + one.selected * widths.indices)


def _attention(shape: ModelShape, one: _Pass, widths: Widths) -> Work:
    per_pair = 2 * shape.heads * (shape.latent + shape.kv_lora_rank)
    return Work(one.selected * per_pair, one.selected * (shape.latent * widths.latents + widths.indices))


def _projections(shape: ModelShape, one: _Pass, widths: Widths) -> Work:
    written = one.tokens * shape.latent * widths.latents
    return Work(2 * one.tokens * shape.projection_weights, widths.weights * shape.projection_weights + written)


def _mlp(shape: ModelShape, one: _Pass, widths: Widths) -> Work:
    experts = _expert_mlp(shape, one, widths).times(shape.layers - shape.dense_layers)
    return _dense_mlp(shape, one, widths).times(shape.dense_layers) + experts


def _dense_mlp(shape: ModelShape, one: _Pass, widths: Widths) -> Work:
    dense = 3 * shape.hidden_size * shape.intermediate_size
    return Work(2 * one.tokens * dense, widths.weights * dense)


def _expert_mlp(shape: ModelShape, one: _Pass, widths: Widths) -> Work:
    active = shape.expert_weights * (shape.experts_per_token + shape.shared_experts) + shape.router_weights
    touched = min(shape.routed_experts, one.tokens * shape.experts_per_token)
    read = shape.expert_weights * (touched + shape.shared_experts) + shape.router_weights
    return Work(2 * one.tokens * active, widths.weights * read)
