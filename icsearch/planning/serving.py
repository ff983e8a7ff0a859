"""What sharing saves where a model is served: bytes of the cache and of weights, and the tokens that then fit.

It holds for engines that build no indexer for an S layer, and keep no index keys of it. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from icsearch.core.pattern import Pattern, num_full
from icsearch.core.text import format_bytes
from icsearch.engines.native import LOAD_WITHOUT_INDEXERS
from icsearch.model.shape import ModelShape
from icsearch.planning.devices import Devices
from icsearch.planning.modelfile import ModelFile
from icsearch.planning.work import CostRow, Widths, cost_rows

if TYPE_CHECKING:
    from rich.console import RenderableType

SERVING_FORMAT = "icsearch.serving/1"
CONTEXTS = (10_000, 60_000, 120_000, 200_000)  # tokens: the lengths of the paper's table
RETENTIONS = tuple(Fraction(1, part) for part in (2, 3, 4, 8))
FOR_SERVING = 0.9  # of a device's memory that engines take by default for weights and cache

INDEX_SCALE = 4  # bytes: the float32 scale of a token's index key in FP8, as engines store it


@dataclass(frozen=True)
class Footprint:
    """Counted bytes of a pattern: of one token in the cache, and of the indexers' weights.

    `latents` are all layers' keys and values of core attention, `index_keys` those of F layers' indexers, of which S
    layers keep none.
    """

    latents: float
    index_keys: float
    index_weights: float

    @property
    def per_token(self) -> float:
        return self.latents + self.index_keys


def footprint(shape: ModelShape, pattern: Pattern, weight_bytes: float, widths: Widths | None = None) -> Footprint:
    """Of a model whose indexers' weights take `weight_bytes` each; a cache in 16 bits, index keys in FP8 by default."""
    widths, full = widths or Widths(), len(pattern.full_layers)
    scale = INDEX_SCALE if widths.index_keys == 1 else 0
    return Footprint(
        latents=shape.layers * shape.latent * widths.latents,
        index_keys=full * (shape.index_head_dim * widths.index_keys + scale),
        index_weights=full * shape.indexer_parameters * weight_bytes,
    )


@dataclass(frozen=True)
class Saved:
    """What one pattern saves of another one's footprint; counted."""

    index_keys: float  # bytes a token
    per_token: float  # bytes that a token takes before, in all
    index_weights: float

    @classmethod
    def between(cls, before: Footprint, after: Footprint) -> Saved:
        return cls(before.index_keys - after.index_keys, before.per_token, before.index_weights - after.index_weights)


@dataclass(frozen=True)
class Row:
    """A number of F layers: what it saves at each context, in memory, and the tokens whose cache fits."""

    full: int
    costs: tuple[CostRow, ...]
    saved: Saved
    tokens: int  # 0: the weights alone do not fit


@dataclass(frozen=True)
class Serving:
    """What sharing buys in one model on so many devices, the model as it is first."""

    model: ModelFile
    devices: Devices
    rows: tuple[Row, ...]


def plan_serving(model: ModelFile, devices: Devices, contexts: Sequence[int] = CONTEXTS) -> Serving:
    """A row for the model as it is and for each retention below it.

    Where F layers stand changes losses and no cost. Every device of a tensor-parallel group holds all latents, index
    keys and indexers, and its part of the other weights, as they are on disk.
    """
    start = model.start
    kept = [num_full(retention, len(start)) for retention in RETENTIONS]
    counts = [len(start.full_layers), *(full for full in kept if full < len(start.full_layers))]
    each = model.other_bytes
    before = footprint(model.shape, start, each)
    room = devices.device.memory * FOR_SERVING
    others = (model.stored_model_bytes - before.index_weights) / devices.count
    rows = []
    for full in dict.fromkeys(counts):
        pattern = start if full == counts[0] else Pattern.from_full_layers(set(range(full)), len(start))
        cached = footprint(model.shape, pattern, each)
        left = room - others - cached.index_weights
        costs = tuple(cost_rows(model.shape, pattern, contexts, baseline=start))
        rows.append(Row(full, costs, Saved.between(before, cached), max(0, int(left // cached.per_token))))
    return Serving(model, devices, tuple(rows))


def document(serving: Serving) -> dict[str, Any]:
    """As JSON."""
    return {
        "format": SERVING_FORMAT,
        "model": serving.model.name,
        "model_type": serving.model.model_type,
        "devices": serving.devices.words,
        "engines": LOAD_WITHOUT_INDEXERS.get(serving.model.model_type, []),
        "rows": [
            {
                "full": row.full,
                "tokens": row.tokens,
                "saved": asdict(row.saved),
                "costs": [asdict(cost) for cost in row.costs],
            }
            for row in serving.rows
        ],
    }


def table(serving: Serving) -> RenderableType:
    """What `icsearch plan --serve` prints; fits 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    model, first = serving.model, serving.rows[0]
    words = f"{serving.devices.words}, {format_bytes(serving.devices.device.memory)} each"
    rows = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("F", *(f"at {cost.context // 1000}K" for cost in first.costs), "a token", "weights", "tokens", "more"):
        rows.add_column(name, justify="right")
    for row in serving.rows:
        gains = [f"{cost.prefill_speedup_estimate:.2f} {cost.decode_speedup_estimate:.2f}" for cost in row.costs]
        freed = [format_bytes(round(size)) for size in (row.saved.index_keys, row.saved.index_weights)]
        more = f"{row.tokens / first.tokens - 1:+.0%}" if first.tokens else ""
        fits = f"{row.tokens / 1000:,.0f}K" if row.tokens else "none fit"
        if row is first:  # it saves nothing of itself
            gains, more = [""] * len(gains), ""
        rows.add_row(str(row.full), *gains, *freed, fits, more)
    known = ", ".join(LOAD_WITHOUT_INDEXERS.get(model.model_type, [])) or f"none known for {model.model_type}"
    notes = (
        "at: times as fast in prefill and in decode, estimated by a formula fitted on the paper's 30B model; an order "
        "of magnitude. F: how many layers keep their indexer; which ones changes the loss and none of this.",
        f"a token, weights: freed, counted, of {format_bytes(round(first.saved.per_token))} that a token takes in the "
        "cache (latents in 16 bits, index keys in FP8 with a scale).",
        f"tokens: cached at once in {FOR_SERVING:.0%} of a device's memory beside its part of the weights; each device "
        "holds all latents and indexers, as tensor parallelism has it. Activations are not counted.",
        f"Memory is freed in engines that build no indexer for an S layer: {known}.",
    )
    head = f"What sharing buys in {model.name} ({model.model_type}, {len(model.start)} layers) on {words}"
    return Group(Text(head), Text(), rows, Text(), *(Text(note, style="dim") for note in notes))
