"""What layers lose under each other's selections, judged locally, by one sweep of the unmodified model.

Similarity and overlap are those of the IndexCache paper (Appendices C and A).

S[i][j], j < i: mean cosine similarity between layer i's core-attention output under its own selection and under
layer j's, everything before layer i being the unmodified model. The tensor is the attention-weighted sum of the
values, per token over the concatenated heads, before the output projection.
O[i][j] = |T_i & T_j| / k, the share of a selection that two layers have in common.
Both are means over the queries that see more than index_topk tokens: below that every selection is the same.
Kascade's score (arXiv 2512.16391) is that of a method that shares top-k indices of dense attention; taken over to DSA:
K[i][j] = W[i] x the attention weights, mean over the heads, that layer i under its own selection puts on tokens which
layer j's has too: the minimum over these queries of a sequence, averaged over sequences. W[i], the importance, is
1 - the cosine similarity of hidden states in front of decoder layer i and behind it: the mean over these queries of a
sequence, averaged over sequences. It needs attention weights, which the block-wise arithmetic alone gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from icsearch.core.errors import IcsearchError
from icsearch.model.families.attention import Core
from icsearch.model.families.calls import LayerCall
from icsearch.model.kernels import LatentAttention
from icsearch.model.model import DsaModel
from icsearch.model.slot import SelectionStore
from icsearch.runs.journal import Event
from icsearch.sweep.branches import Batch, LayerBlock
from icsearch.sweep.sweep import selection_overlap

# Rows of a lower triangle: row i has i sums, one for each earlier layer.
Triangle = list[list[float]]
# A selection made small, and the type that it had.
SmallSelection = tuple[torch.Tensor, torch.dtype]


@dataclass
class BatchSimilarity:
    """Sums of one batch, over all choosing queries where nothing else is said."""

    cosine: Triangle = field(default_factory=list)
    overlap: Triangle = field(default_factory=list)
    kept: Triangle = field(default_factory=list)  # over sequences; both empty without block-wise arithmetic
    importance: list[float] = field(default_factory=list)
    queries: int = 0
    layer_sequences: int = 0


@dataclass
class _Pass:
    """One batch on its way through the layers: its states, the selections so far, and the sums of each layer."""

    batch: Batch
    calls: list[LayerCall]
    states: torch.Tensor
    store: SelectionStore
    earlier: list[SmallSelection] = field(default_factory=list)
    sums: BatchSimilarity = field(default_factory=BatchSimilarity)


class SimilaritySweep:
    """Runs the unmodified model layer by layer, and each DSA layer's core attention under all earlier selections."""

    def __init__(self, dsa: DsaModel, index_topk: int, keep_on_cpu: bool = False) -> None:
        self._dsa = dsa
        self._block = LayerBlock(dsa)
        self._topk = index_topk
        self._keep_on_cpu = keep_on_cpu

    @torch.inference_mode()
    def run(
        self, wave: Sequence[Batch], on_layer: Callable[[int], None] = lambda layer_sequences: None
    ) -> list[BatchSimilarity]:
        """Both triangles' sums for each batch, in one pass over the layers.

        Raises IcsearchError where a similarity is not finite.
        """
        passes = []
        for batch in wave:  # calls are captured before observing: the reference's mask is made under its own name only
            calls, states = self._block.calls_for(batch), self._dsa.embed(batch.input_ids)
            passes.append(_Pass(batch, calls, states, SelectionStore(self._dsa.start_pattern)))
        for index in range(len(self._dsa.layers)):
            with self._dsa.holding(index):
                for through in passes:
                    before = through.states
                    with self._dsa.observed(partial(self._observe, through)):
                        call = through.calls[index].on(through.batch.input_ids)
                        through.states = self._dsa.run_layer(index, before, call, through.store)
                    if self._dsa.blockwise is not None and index in self._dsa.layer_indices:
                        through.sums.importance.append(self._importance(before, through.states))
                    on_layer(len(through.batch.input_ids))
        for through in passes:
            batch, (sequences, length) = through.batch, through.batch.input_ids.shape
            for layer, row in enumerate(through.sums.cosine):
                if not all(abs(value) < float("inf") for value in row):
                    raise IcsearchError(
                        f"the similarity of DSA layer {layer} is not finite in sequences {batch.first} to "
                        f"{batch.last - 1}: expected numbers; try --dtype float32, or look at those sequences"
                    )
            through.sums.queries = sequences * (length - self._topk)
            through.sums.layer_sequences = sequences * len(self._dsa.layers)
        return [through.sums for through in passes]

    def events(self, wave: Sequence[Batch], on_layer: Callable[[int], None]) -> list[Event]:
        """The batches of a wave as the journal has them: each by itself, so that waves change no sum."""
        started, before = time.monotonic(), self._dsa.weights.bytes_read
        measured = self.run(wave, on_layer)
        seconds, read = time.monotonic() - started, self._dsa.weights.bytes_read - before
        events: list[Event] = [
            {
                "event": "similarity",
                "sequences": [batch.first, batch.last],
                "cosine": sums.cosine,
                "overlap": sums.overlap,
                **({"kept": sums.kept, "importance": sums.importance} if sums.importance else {}),
                "queries": sums.queries,
                "layer_sequences": sums.layer_sequences,
                "seconds": round(seconds / len(wave), 3),
            }
            for batch, sums in zip(wave, measured, strict=True)
        ]
        if read:
            events[0]["weight_bytes"] = read
        return events

    def _observe(self, through: _Pass, output: torch.Tensor, selection: torch.Tensor, core: Core) -> None:
        """A DSA layer's own core attention [B, T, H, D], and what it would be under each earlier selection."""
        cosine: list[float] = []
        overlap: list[float] = []
        kept: list[float] = []
        kept_mass = core.kept_mass(selection, self._topk) if isinstance(core, LatentAttention) else None
        for small, dtype in through.earlier:
            earlier = small.to(self._dsa.device, dtype)
            own, borrowing = output.flatten(2).float(), core(earlier).flatten(2).float()  # heads concatenated
            similarity = functional.cosine_similarity(own, borrowing, dim=-1)  # [B, T]
            cosine.append(float(similarity[:, self._topk :].double().sum()))  # over the queries that choose
            overlap.append(float(selection_overlap(selection, earlier)[:, self._topk :].sum()))
            if kept_mass is not None:
                kept.append(float(kept_mass(earlier).amin(1).clamp_max(1.0).double().sum()))
        through.sums.cosine.append(cosine)
        through.sums.overlap.append(overlap)
        if kept_mass is not None:
            through.sums.kept.append(kept)
        small = made_small(selection, through.batch.input_ids.shape[1])
        through.earlier.append((small.cpu() if self._keep_on_cpu else small, selection.dtype))

    def _importance(self, before: torch.Tensor, behind: torch.Tensor) -> float:
        """1 - cosine of a layer's input and output [B, T, ...], mean over choosing queries, summed over sequences."""
        similarity = functional.cosine_similarity(before.flatten(2).float(), behind.flatten(2).float(), dim=-1)
        return float((1 - similarity[:, self._topk :].double()).clamp_min(0.0).mean(1).sum())


def made_small(selection: torch.Tensor, length: int) -> torch.Tensor:
    """A selection of tokens of a sequence that long in the smallest type that holds it; a mask is small as it is."""
    if selection.dtype == torch.bool:
        return selection
    return selection.to(smallest_index_type(length, signed=bool((selection < 0).any())))


def smallest_index_type(length: int, signed: bool = False) -> torch.dtype:
    """The smallest integer type that holds every position of a sequence, and where it is signed -1 too."""
    types = (torch.int8 if signed else torch.uint8, torch.int16, torch.int32)
    return next(t for t in types if torch.iinfo(t).max >= length - 1)


@torch.inference_mode()
def direct_similarity(dsa: DsaModel, batch: Batch, index_topk: int, layer: int, source: int) -> float:
    """The slow, obvious twin of one entry: whole layers, core-attention outputs read off in front of `o_proj`."""
    calls = [call.on(batch.input_ids) for call in dsa.capture_calls(batch.input_ids)]
    states, store = dsa.embed(batch.input_ids), SelectionStore(dsa.start_pattern)
    borrowed: Any = None
    for index in range(dsa.layer_indices[layer]):
        states = dsa.run_layer(index, states, calls[index], store)
        borrowed = store.selection if index == dsa.layer_indices[source] else borrowed
    index = dsa.layer_indices[layer]
    outputs: list[torch.Tensor] = []
    attention: Any = dsa.layers[index].self_attn
    hook = attention.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    try:
        dsa.run_layer(index, states, calls[index], store)
        shared = dsa.start_pattern.flip(layer)
        dsa.run_layer(index, states, calls[index], SelectionStore(shared, borrowed, more=store.more))
    finally:
        hook.remove()
    similarity = functional.cosine_similarity(outputs[0].float(), outputs[1].float(), dim=-1)
    return float(similarity[:, index_topk:].double().sum())
