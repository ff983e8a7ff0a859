"""The cost side of a pattern, without a model: counted FLOPs and bytes, and an estimate of the speed-up.

Three kinds of numbers, never mixed: *counted* (exact by the formulas of `work.py`), *estimated* (`estimate.py`: from
counted work and one constant per phase) and *quoted* (`published.py`). Measured ones are `measure.py`'s.
"""

from icsearch.cost.estimate import PAPER_RATES, CostRow, Rates, cost_rows
from icsearch.cost.published import GLM_FLASH_DSA, check_estimate, fit_rates
from icsearch.cost.shape import DSA_LAYER_TYPES, ModelShape
from icsearch.cost.work import Breakdown, Widths, Work, decode_work, layer_work, prefill_work

__all__ = [
    "DSA_LAYER_TYPES",
    "GLM_FLASH_DSA",
    "PAPER_RATES",
    "Breakdown",
    "CostRow",
    "ModelShape",
    "Rates",
    "Widths",
    "Work",
    "check_estimate",
    "cost_rows",
    "decode_work",
    "fit_rates",
    "layer_work",
    "prefill_work",
]
