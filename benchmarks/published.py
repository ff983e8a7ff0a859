"""The estimated speed-ups of `eval` against published speeds: two constants fitted on two figures, checked on others.

Usage: python benchmarks/published.py [--prefill-at 200000]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from fractions import Fraction

from icsearch.core.pattern import Pattern
from icsearch.model.shape import ModelShape
from icsearch.planning.work import Rates, Widths, cost_rows, decode_work, prefill_work

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefill-at", type=int, default=200_000, help="the paper's length that prefill is fitted on")
    arguments = parser.parse_args()
    print("| model | phase | context | published | estimated | error |", "|---|---|---|---|---|---|", sep="\n")
    for row in check_estimate(arguments.prefill_at):
        error = "fitted" if row.fitted else f"{row.error:+.1%}"
        print(f"| {row.model} | {row.phase} | {row.context} | {row.published:.2f} | {row.predicted:.2f} | {error} |")
    print(f"\n{fit_rates(prefill_at=arguments.prefill_at)}")


if __name__ == "__main__":
    main()
