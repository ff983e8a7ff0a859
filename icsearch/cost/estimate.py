"""What a pattern saves at a context length: counted shares, and an estimate of the speed-up.

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
from dataclasses import dataclass

from icsearch.cost.shape import ModelShape
from icsearch.cost.work import Breakdown, Widths, decode_work, prefill_work
from icsearch.pattern import Pattern


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
    at every length. Estimated: the two speed-ups over the baseline, by the formulas at the top of this module.
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
