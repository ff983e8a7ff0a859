"""Counted work and bytes of one pass, by part, and what a pattern saves at a context length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

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
    _check_context(context)
    return _of_pattern(shape, pattern, _Pass(1, context, context, min(shape.index_topk, context)), widths)


def layer_work(shape: ModelShape, index: int, full: bool, length: int, widths: Widths | None = None) -> Breakdown:
    """Work of one DSA layer on `length` tokens of one sequence, with its own indexer or without; no LM head.

    Dense layers are taken to be the first ones, as they are in DeepSeek-V3.2 and GLM-5.
    """
    dense = int(index < shape.dense_layers)
    return _count(shape, _prefill(shape, length), widths or Widths(), int(full), 1, dense, 1 - dense, 0)


def _prefill(shape: ModelShape, length: int) -> _Pass:
    _check_context(length)
    short = min(length, shape.index_topk)
    selected = short * (short + 1) // 2 + (length - short) * shape.index_topk
    return _Pass(length, length, length * (length + 1) // 2, selected)


def _check_context(length: int) -> None:
    if length < 1:
        raise ModelError(f"context length {length} is out of range: give a number of tokens of at least 1")


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


# Fitted on the paper's figures of the 30B model at 200K, as `check_estimate` does; a test fits them again.
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
    full, pattern = Pattern.full(shape.dsa_layers), Pattern.uniform(shape.dsa_layers, Fraction(1, 4))
    prefill = next(p for p in PAPER if p.phase == "prefill" and p.context == prefill_at)
    decode = next(p for p in PAPER if p.phase == "decode")
    before, after = (prefill_work(shape, p, prefill.context) for p in (full, pattern))
    old, new = (decode_work(shape, p, decode.context) for p in (full, pattern))

    def solve(rest: float, full: float, pattern: float, speedup: float) -> float:
        return rest * (speedup - 1) / (full - speedup * pattern)

    return Rates(
        prefill=solve(before.rest.flops, before.indexer.flops, after.indexer.flops, prefill.speedup),
        decode=solve(old.rest.bytes, old.indexer.bytes, new.indexer.bytes, decode.speedup),
    )


def check_estimate(prefill_at: int = 200_000, shape: ModelShape = GLM_FLASH_DSA) -> list[Check]:
    """The estimate beside every published speed-up, with the constants fitted on two of them and marked so.

    Where a pattern's F layers lie does not change its cost. GLM-5's rows are another model, machine and engine, with
    weights counted at half a byte: nothing is fitted there.
    """
    rates, rows = fit_rates(shape, prefill_at), []
    quarter = Pattern.uniform(shape.dsa_layers, Fraction(1, 4))
    glm_5 = Pattern.from_full_layers(set(range(22)), GLM_5.dsa_layers)
    cases = [(one, shape, quarter, Widths()) for one in PAPER]
    cases += [(one, GLM_5, glm_5, Widths(weights=0.5)) for one in ELSEWHERE]
    for one, model, pattern, widths in cases:
        (row,) = cost_rows(model, pattern, [one.context], rates=rates, widths=widths)
        estimates = {"prefill": row.prefill_speedup_estimate, "decode": row.decode_speedup_estimate}
        fitted = one in PAPER and (one.phase == "decode" or one.context == prefill_at)
        rows.append(Check(one.model, one.phase, one.context, one.speedup, estimates[one.phase], fitted))
    return rows
