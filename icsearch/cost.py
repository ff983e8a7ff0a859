"""The cost side of a pattern, without a model: counted FLOPs and bytes, and an estimate of the speed-up.

Three kinds of numbers, never mixed: *counted* (exact by the formulas below), *estimated* (`CostRow`'s two
speed-ups, from counted work and one constant per phase) and *quoted* (`Published`). Measured ones are
`measure.py`'s.

Formulas
--------
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

Estimate
--------
prefill time ∝ (FLOPs outside the indexers) + ρ_prefill · (FLOPs of the indexers);
decode time ∝ (bytes outside the indexers) + ρ_decode · (bytes of the indexers).
ρ is the price of one unit of indexer work relative to one of the rest, assumed the same at every length and on
every machine. Each is fitted on one figure of the IndexCache paper (arXiv 2603.12201), the 30B model at 200K;
`check_estimate` shows what that predicts elsewhere, misses included:
- prefill at 60K and 120K comes out within 3%; at 10K it is 16% too low: an indexer costs more there than its
  FLOPs say (launches, the top-k), and no single ρ fits 10K and the rest;
- decode has no second figure for that model, so its dependence on the context is unchecked;
- GLM-5 in SGLang, on other GPUs with FP4 weights, comes out 13% too low in prefill and 17% in decode.
ρ_prefill also rests on an assumption: the 30B model's indexer sizes are not public. With 64 index heads instead of
32 it would be half as large; its own table would hardly change, but other models' estimates would. With one
sequence, latency counts more in decode than bytes. So: an order of magnitude, not a promise; `measure.py` times.

The paper also says that indexers take 81% of prefill time at 200K. With 35 of 47 removed that would be a
speed-up of 2.5, but 1.82 was measured, which implies 61%: the two figures do not describe the same thing, and the
fit follows the measured times. (The counted share of FLOPs is 79%.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from icsearch.errors import ModelError, PatternError
from icsearch.pattern import Pattern

# Keys of a config whose work the formulas leave out, and what that work is.
_UNCOUNTED = {
    "index_kpool": "pooled index keys",
    "hc_mult": "hyper-connections",
    "hc_count": "hyper-connections",
    "compress_rates": "compressed keys",
}
DSA_LAYER_TYPES = ("indexed_attention", "full_attention")  # both names occur for DSA layers beside others


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a DSA model with latent attention (MLA) that its cost depends on.

    Layers of another kind than DSA are counted with projections of the same size and without core attention, so
    shares and speed-ups of a model that mixes kinds are upper bounds. MTP layers are not counted. `gate_rank`: the
    query projection makes output gates too, from the query latent before and behind its norm, and each of a layer's
    two norms has a low-rank gate (A.X-K2; the norm before a dense MLP has none, and is counted as if it had).
    `q_lora_rank` 0: queries, the indexer's too, come straight from the hidden states (Mistral-Large-4, whose layers
    without RoPE are counted as if they had it).
    """

    hidden_size: int
    layers: int
    dsa_layers: int
    heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_heads: int
    index_head_dim: int
    index_topk: int
    intermediate_size: int
    dense_layers: int
    moe_intermediate_size: int
    routed_experts: int
    experts_per_token: int
    shared_experts: int
    vocab_size: int
    gate_rank: int = 0

    @classmethod
    def from_config(cls, config: dict[str, Any], dsa_layers: int | None = None) -> ModelShape:
        """The shape in a config.json, multimodal wrappers included; ModelError where this module cannot count it.

        `dsa_layers`, where the caller knows the model, beats what `layer_types` says.
        """
        config = config.get("text_config") or config
        for key, what in _UNCOUNTED.items():
            if config.get(key):
                raise ModelError(f"config.json has {key}, and the cost of {what} is not counted here")
        layers = _size(config, "num_hidden_layers")
        dense = _dense_layers(config, layers)
        moe = dense < layers
        return cls(
            hidden_size=_size(config, "hidden_size"),
            layers=layers,
            dsa_layers=_dsa_layers(config, layers) if dsa_layers is None else dsa_layers,
            heads=_size(config, "num_attention_heads"),
            q_lora_rank=_query_rank(config),
            kv_lora_rank=_size(config, "kv_lora_rank"),
            qk_nope_head_dim=_size(config, "qk_nope_head_dim"),
            qk_rope_head_dim=_size(config, "qk_rope_head_dim", least=0),
            v_head_dim=_size(config, "v_head_dim"),
            index_heads=_size(config, "index_n_heads"),
            index_head_dim=_size(config, "index_head_dim"),
            index_topk=_size(config, "index_topk"),
            intermediate_size=_size(config, "intermediate_size") if dense else 0,
            dense_layers=dense,
            moe_intermediate_size=_size(config, "moe_intermediate_size") if moe else 0,
            routed_experts=_size(config, "n_routed_experts", "num_experts", "num_local_experts") if moe else 0,
            experts_per_token=_size(config, "num_experts_per_tok") if moe else 0,
            shared_experts=_size(config, "n_shared_experts", least=0) if moe else 0,
            vocab_size=_size(config, "vocab_size"),
            gate_rank=config.get("gated_norm_rank") or 0,
        )

    @property
    def index_weights(self) -> int:
        """Weights of one indexer: queries from the query latent, keys and head weights from the hidden state."""
        queries = (self.q_lora_rank or self.hidden_size) * self.index_heads * self.index_head_dim
        return queries + self.hidden_size * (self.index_head_dim + self.index_heads)

    @property
    def projection_weights(self) -> int:
        """Weights of one layer's attention: query down and up, key-value down, key and value up, output."""
        heads = self.heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        query = self.q_lora_rank * (self.hidden_size + heads) if self.q_lora_rank else self.hidden_size * heads
        key_value = self.heads * self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        output = self.heads * self.v_head_dim * self.hidden_size
        return query + self.hidden_size * self.latent + key_value + output + self._gate_weights

    @property
    def _gate_weights(self) -> int:
        if not self.gate_rank:
            return 0
        fused = self.heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + 2 * self.v_head_dim)
        return self.q_lora_rank * fused + 4 * self.hidden_size * self.gate_rank

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: gate, up, down."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def router_weights(self) -> int:
        return self.hidden_size * self.routed_experts

    def layer_parameters(self, index: int, with_indexer: bool = True) -> int:
        """Parameters of a decoder layer, norms included; biases, which the large models have none of, are not."""
        norms = 2 * self.hidden_size + self.q_lora_rank + self.kv_lora_rank
        indexer = (self.index_weights + 2 * self.index_head_dim) if with_indexer else 0
        experts = self.expert_weights * (self.routed_experts + self.shared_experts) + self.router_weights
        mlp = 3 * self.hidden_size * self.intermediate_size if index < self.dense_layers else experts
        if index < self.dense_layers:
            mlp -= 2 * self.hidden_size * self.gate_rank  # that norm has no gate
        return self.projection_weights + norms + indexer + mlp

    @property
    def embedding_weights(self) -> int:
        """Weights of the embedding, and of the LM head where it has its own."""
        return self.vocab_size * self.hidden_size

    @property
    def latent(self) -> int:
        """Values cached per token and layer for core attention."""
        return self.kv_lora_rank + self.qk_rope_head_dim


def _size(config: dict[str, Any], *keys: str, least: int = 1) -> int:
    value = next((config[key] for key in keys if config.get(key) is not None), None)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ModelError(
            f"config.json has {keys[0]} {value!r}: expected a whole number of at least {least}; the cost is counted "
            "for models with latent attention (MLA) and a DSA indexer on the query latent, such as deepseek_v32 or "
            "glm_moe_dsa"
        )
    return value


def _query_rank(config: dict[str, Any]) -> int:
    """Rank of the query latent; 0 in the one make that has none, which lists its layers without RoPE."""
    if config.get("no_rope_layers") and config.get("q_lora_rank") is None:
        return 0
    return _size(config, "q_lora_rank")


def _dense_layers(config: dict[str, Any], layers: int) -> int:
    """Layers with a dense MLP: as listed, else the leading ones and those that `moe_layer_freq` skips."""
    types = config.get("mlp_layer_types")
    if types:
        return sum(kind == "dense" for kind in types)
    if not any(config.get(key) for key in ("n_routed_experts", "num_experts", "num_local_experts")):
        return layers
    first = config.get("first_k_dense_replace") or 0
    frequency = config.get("moe_layer_freq") or 1
    return sum(index < first or index % frequency != 0 for index in range(layers))


def _dsa_layers(config: dict[str, Any], layers: int) -> int:
    types = config.get("layer_types")
    return sum(kind in DSA_LAYER_TYPES for kind in types) if types else layers


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


@dataclass(frozen=True)
class Rates:
    """ρ of the estimate: the price of a unit of indexer work (prefill: FLOP, decode: byte) relative to the rest."""

    prefill: float
    decode: float


# Fitted on the paper's figures of the 30B model at 200K, as `check_estimate` does; a test fits them again.
PAPER_RATES = Rates(prefill=0.420, decode=3.52)


@dataclass(frozen=True)
class CostRow:
    """What a pattern saves at one context length (tokens).

    Counted: `indexer_share_full` and `indexer_share_pattern`, indexer FLOPs / all FLOPs of a prefill under the
    baseline and under the pattern; `removed_share`, the part of the baseline's indexer work that the pattern
    removes. All indexers are of one size, so that part is the same in FLOPs and in bytes, in prefill and in decode,
    at every length. Estimated: the two speed-ups over the baseline, by the formula at the top of this module.
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
    reference = baseline or Pattern.full(shape.dsa_layers)
    return [_cost_row(shape, pattern, reference, context, rates, widths) for context in contexts]


def _cost_row(
    shape: ModelShape, pattern: Pattern, reference: Pattern, context: int, rates: Rates, widths: Widths | None
) -> CostRow:
    before, after = (prefill_work(shape, p, context, widths) for p in (reference, pattern))
    old, new = (decode_work(shape, p, context, widths) for p in (reference, pattern))
    return CostRow(
        context=context,
        indexer_share_full=before.indexer_share,
        indexer_share_pattern=after.indexer_share,
        removed_share=1 - after.indexer.flops / before.indexer.flops,
        prefill_speedup_estimate=_prefill_units(before, rates.prefill) / _prefill_units(after, rates.prefill),
        decode_speedup_estimate=_decode_units(old, rates.decode) / _decode_units(new, rates.decode),
    )


def _prefill_units(work: Breakdown, rate: float) -> float:
    return work.rest.flops + rate * work.indexer.flops


def _decode_units(work: Breakdown, rate: float) -> float:
    return work.rest.bytes + rate * work.indexer.bytes


# GLM-4.7-Flash: config.json of zai-org/GLM-4.7-Flash (transformers `glm4_moe_lite` defaults). The DSA version is
# not public: its indexer is ASSUMED to be GLM-5's, 32 heads of 128, top 2048. The fit absorbs most of that.
GLM_FLASH_DSA = ModelShape(
    hidden_size=2048, layers=47, dsa_layers=47, heads=20, q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=192,
    qk_rope_head_dim=64, v_head_dim=256, index_heads=32, index_head_dim=128, index_topk=2048,
    intermediate_size=10240, dense_layers=1, moe_intermediate_size=1536, routed_experts=64, experts_per_token=4,
    shared_experts=1, vocab_size=154880,
)  # fmt: skip

# GLM-5: transformers 5.23 `glm_moe_dsa` defaults.
GLM_5 = ModelShape(
    hidden_size=6144, layers=78, dsa_layers=78, heads=64, q_lora_rank=2048, kv_lora_rank=512, qk_nope_head_dim=192,
    qk_rope_head_dim=64, v_head_dim=256, index_heads=32, index_head_dim=128, index_topk=2048,
    intermediate_size=12288, dense_layers=3, moe_intermediate_size=2048, routed_experts=256, experts_per_token=8,
    shared_experts=1, vocab_size=154880,
)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A quoted speed: seconds (per prefill, or per token) of the all-F model and of a pattern at one context."""

    model: str
    phase: str  # "prefill" or "decode"
    context: int
    full: float
    pattern: float

    @property
    def speedup(self) -> float:
        return self.full / self.pattern


# Quoted: IndexCache paper, 30B model, 1/4 kept (12 of 47 F), H100.
PAPER = (
    Published("30B", "prefill", 10_000, 0.57, 0.45),
    Published("30B", "prefill", 60_000, 3.38, 2.59),
    Published("30B", "prefill", 120_000, 8.57, 5.66),
    Published("30B", "prefill", 200_000, 19.5, 10.7),
    Published("30B", "decode", 200_000, 1 / 58, 1 / 86),
)
# Quoted: SGLang pull request 21925, GLM-5 with 22 of 78 F, FP4 weights, 8 GPUs; "128K" and "64K" input.
ELSEWHERE = (
    Published("GLM-5", "prefill", 128_000, 1 / 78_516, 1 / 101_398),
    Published("GLM-5", "decode", 64_000, 1 / 65.25, 1 / 87.91),
)


@dataclass(frozen=True)
class Check:
    """A published speed-up beside the estimated one; `fitted` where a constant was chosen to match it."""

    model: str
    phase: str
    context: int
    published: float
    predicted: float
    fitted: bool

    @property
    def error(self) -> float:
        """Predicted / published − 1."""
        return self.predicted / self.published - 1


def fit_rates(shape: ModelShape = GLM_FLASH_DSA, prefill_at: int = 200_000) -> Rates:
    """Both constants in closed form, each from one figure of the paper: prefill at that length, decode at 200K.

    (rest + ρ·full) / (rest + ρ·pattern) = speed-up, solved for ρ.
    """
    pattern = _quarter(shape)
    prefill = next(p for p in PAPER if p.phase == "prefill" and p.context == prefill_at)
    decode = next(p for p in PAPER if p.phase == "decode")
    before, after = (prefill_work(shape, p, prefill.context) for p in (Pattern.full(len(pattern)), pattern))
    old, new = (decode_work(shape, p, decode.context) for p in (Pattern.full(len(pattern)), pattern))
    return Rates(
        prefill=_solve(before.rest.flops, before.indexer.flops, after.indexer.flops, prefill.speedup),
        decode=_solve(old.rest.bytes, old.indexer.bytes, new.indexer.bytes, decode.speedup),
    )


def _solve(rest: float, full: float, pattern: float, speedup: float) -> float:
    return rest * (speedup - 1) / (full - speedup * pattern)


def _quarter(shape: ModelShape) -> Pattern:
    """A pattern with the paper's number of F layers; where they lie does not change the cost."""
    return Pattern.uniform(shape.dsa_layers, Fraction(1, 4))


def check_estimate(prefill_at: int = 200_000, shape: ModelShape = GLM_FLASH_DSA) -> list[Check]:
    """The estimate beside every published speed-up, with the constants fitted on two of them and marked so.

    GLM-5's rows are another model, machine and engine, with weights counted at half a byte: nothing is fitted there.
    """
    rates = fit_rates(shape, prefill_at)
    glm_5 = Pattern.from_full_layers(set(range(22)), GLM_5.dsa_layers)
    rows = [_check(p, shape, _quarter(shape), rates, Widths()) for p in PAPER]
    marked = [replace(row, fitted=row.phase == "decode" or row.context == prefill_at) for row in rows]
    return marked + [_check(p, GLM_5, glm_5, rates, Widths(weights=0.5)) for p in ELSEWHERE]


def _check(published: Published, shape: ModelShape, pattern: Pattern, rates: Rates, widths: Widths) -> Check:
    (row,) = cost_rows(shape, pattern, [published.context], rates=rates, widths=widths)
    estimates = {"prefill": row.prefill_speedup_estimate, "decode": row.decode_speedup_estimate}
    predicted = estimates[published.phase]
    return Check(published.model, published.phase, published.context, published.speedup, predicted, fitted=False)
