"""What a search will take, worked out before it runs: evaluations, layer runs, memory. Numbers only, no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from icsearch.errors import IcsearchError
from icsearch.pattern import Pattern
from icsearch.strategies import Strategy

FLOAT_BYTES = 4
INDEX_BYTES = 4
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class BatchShape:
    """The numbers that memory follows from: one batch of one model."""

    batch_size: int
    seq_len: int
    hidden_size: int
    dtype_bytes: int
    index_topk: int
    index_heads: int
    index_head_dim: int
    attention_heads: int
    vocab_size: int
    head_chunk_tokens: int

    @property
    def branch_bytes(self) -> int:
        """One branch's state: hidden states and selection."""
        tokens = self.batch_size * self.seq_len
        selection = min(self.index_topk, self.seq_len) * INDEX_BYTES
        return tokens * (self.hidden_size * self.dtype_bytes + selection)

    def selections_bytes(self, layers: int) -> int:
        """All layers' selections of one batch, in the smallest integer type that holds a position."""
        width = 1 if self.seq_len <= 2**8 else 2 if self.seq_len <= 2**15 else 4
        return layers * self.batch_size * self.seq_len * min(self.index_topk, self.seq_len) * width

    @property
    def layer_bytes(self) -> int:
        """Estimate of what one call takes while it runs: of a reference layer, or of the LM head if that is more.

        The reference indexer holds scores per head twice and a copy of the keys per query, attention its scores
        per head: (2 H_index + D_index + 3 + H_attention) float32 values per pair of tokens. The LM head holds a
        chunk's logits in the model's type, in float32, and their softmax.
        """
        pairs = self.batch_size * self.seq_len**2
        per_pair = 2 * self.index_heads + self.index_head_dim + 3 + self.attention_heads
        chunk = min(self.head_chunk_tokens, self.batch_size * self.seq_len)
        head = chunk * self.vocab_size * (self.dtype_bytes + 2 * FLOAT_BYTES)
        return max(pairs * per_pair * FLOAT_BYTES, head)


@dataclass(frozen=True)
class SearchPlan:
    """The plan that is printed before a run. `layer_evaluations` is one layer over all sequences; see `preview`."""

    num_layers: int
    candidates: int
    num_shared: int
    candidate_evaluations: int
    layer_evaluations: int
    naive_layer_evaluations: int
    branches_per_sweep: int
    branch_bytes: int
    layer_bytes: int
    weight_bytes: int
    memory_bytes: int


def patterns_per_sweep(shape: BatchShape, weight_bytes: int, memory_bytes: int) -> int:
    """How many candidates may live at once beside the trunk; raises IcsearchError where not even one fits."""
    branches = (memory_bytes - weight_bytes - shape.layer_bytes) // shape.branch_bytes
    if branches < 3:  # the trunk, a candidate, and the layer output that is just being made
        needed = shape.layer_bytes + 3 * shape.branch_bytes
        raise IcsearchError(
            f"memory budget {format_bytes(memory_bytes)} is too small: {format_bytes(weight_bytes)} of weights and "
            f"about {format_bytes(needed)} for one candidate; raise --memory, or lower --batch-size or --seq-len"
        )
    return int(branches) - 2


def preview(strategy: Strategy, tokens: Sequence[int], count: Callable[[list[Pattern]], int]) -> tuple[int, int]:
    """(candidate evaluations, layer evaluations) of a whole search, by playing it through with made-up losses.

    The number of evaluations is exact. The layer evaluations are those of a search that always commits the last
    candidate, which is the most that a search can take: the candidates left then fork off earliest.
    """
    evaluations = layer_runs = 0
    strategy.begin([0.0] * len(tokens))
    while ask := strategy.ask():
        evaluations += len(ask.layers)
        layer_runs += count([strategy.pattern.flip(layer) for layer in ask.layers])
        strategy.tell({layer: [-float(layer) * t for t in tokens[ask.first : ask.last]] for layer in ask.layers})
    return evaluations, layer_runs


def rows(plan: SearchPlan, start: dict[str, Any]) -> list[tuple[str, str]]:
    """The plan in words; `start` is the journal's first event."""
    ratio = plan.naive_layer_evaluations / plan.layer_evaluations
    branches = min(plan.branches_per_sweep, plan.candidates) + 1
    return [
        *model_rows(start),
        ("DSA layers", f"{plan.num_layers}, of which {plan.candidates} can be flipped; {plan.num_shared} will be"),
        ("evaluations", f"{plan.candidate_evaluations} candidates in {plan.num_shared} steps"),
        (
            "layer evaluations",
            f"at most {plan.layer_evaluations}; one whole forward each would take {plan.naive_layer_evaluations} "
            f"({ratio:.1f} times as many)",
        ),
        (
            "memory",
            f"{format_bytes(plan.weight_bytes)} weights + {branches} branches x {format_bytes(plan.branch_bytes)} + "
            f"{format_bytes(plan.layer_bytes)} in a layer, of {format_bytes(plan.memory_bytes)} (estimate)",
        ),
    ]


def model_rows(start: dict[str, Any]) -> list[tuple[str, str]]:
    """Model and numerics in words."""
    model, options = start["model"], start["options"]
    found = [
        ("model", f"{model['name_or_path']} ({model['model_type']}, {start['decoder_layers']} layers)"),
        (
            "numerics",
            f"{options['dtype']} on {options['device']}, {options['threads']} threads, "
            f"{options['batch_size']} sequences a call",
        ),
    ]
    if shared := model["native_shared"]:
        found.append(("native S layers", f"{', '.join(map(str, shared))}: shared by the checkpoint, and they stay so"))
    return found


def parse_bytes(text: str) -> int:
    """A size as typed, such as 8GB, 500MB or 2GiB, in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise IcsearchError(f"memory {text!r} is not a size: give a number with a unit, such as 8GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(size: int) -> str:
    """A size for people, in decimal units."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
