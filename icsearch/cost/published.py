"""Speeds that others published, quoted: the constants of the estimate are fitted on two of them, and all judge it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from icsearch.cost.estimate import Rates, cost_rows
from icsearch.cost.shape import ModelShape
from icsearch.cost.work import Widths, decode_work, prefill_work
from icsearch.pattern import Pattern

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
