"""Several patterns measured on the same batches, in one sweep for all of them together.

Beside the loss: KL to the all-F model, agreement of the most likely token, loss by position, and how much of an S
layer's borrowed selection its own indexer would have chosen.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from icsearch.core.errors import OutOfMemoryError
from icsearch.core.pattern import Pattern
from icsearch.core.text import shrunk_note
from icsearch.model.model import DsaModel
from icsearch.runs.evaluation import EvalRecord
from icsearch.runs.journal import Event
from icsearch.sweep.branches import Batch
from icsearch.sweep.sweep import Sweeper, per_sequence, selection_overlap, token_measures


def bucket_edges(seq_len: int, index_topk: int) -> list[int]:
    """Position buckets that double from index_topk on: 0, k, 2k, 4k, ... T."""
    edges, edge = [0], index_topk
    while edge < seq_len:
        edges.append(edge)
        edge *= 2
    return [*edges, seq_len]


def bucket_tokens(counted: torch.Tensor, edges: Sequence[int]) -> list[list[int]]:
    """Counted tokens of each sequence in each bucket; counted: bool [S, T]."""
    return [[int(row[a:b].sum()) for a, b in pairwise(edges)] for row in counted]


# Patterns to measure, the all-F model first, and the wave to measure them on.
Work = tuple[list[Pattern], Sequence[Batch]]
# Has several processes do such work; one event for each, in this order.
Share = Callable[[Sequence[Work]], Iterator[Event]]


class Evaluation:
    """Measures what is missing of a record, wave by wave; each event is on disk before it counts.

    `several` has other processes share the work.
    """

    def __init__(
        self,
        dsa: DsaModel,
        waves: Sequence[Sequence[Batch]],
        record: EvalRecord,
        append: Callable[[Event], None],
        on_layer: Callable[[int], None],
        several: Share | None = None,
    ) -> None:
        self._dsa = dsa
        self._waves = waves
        self._record = record
        self._append = append
        self._on_layer = on_layer
        self._several = several

    def run(self, patterns: Sequence[Pattern], patterns_per_sweep: int) -> None:
        """Measure every pattern on every wave. The all-F model runs in each sweep: KL needs its states.

        Where memory runs out, it goes on once with half as many patterns at a time, and notes it in the journal.
        """
        others = [pattern for pattern in patterns if pattern != self._dsa.start_pattern]
        together = min(patterns_per_sweep, len(others))
        try:
            self._measure_all(others, max(1, together))
            return
        except OutOfMemoryError:
            if together < 2 or self._several is not None:
                raise
        gc.collect()  # the failed sweep is let go of here, not while its error is still handled
        self._append({"event": "note", "text": shrunk_note(together, together // 2)})
        self._measure_all(others, together // 2)

    def _measure_all(self, others: list[Pattern], together: int) -> None:
        """What is missing, with so many patterns in one sweep beside the all-F model."""
        for event in (self._several or self._alone)(list(self._missing(others, together))):
            self._append(event)

    def _missing(self, others: list[Pattern], together: int) -> Iterator[Work]:
        """Waves, and what the record lacks of them: the all-F model, which is known once it was measured, first."""
        full = self._dsa.start_pattern
        chunks = [others[i : i + together] for i in range(0, len(others), together)] or [[]]
        for wave in self._waves:
            known = self._known(full, wave)
            for chunk in chunks:
                missing = [pattern for pattern in chunk if not self._known(pattern, wave)]
                if missing or not known:
                    known = True
                    yield [full, *missing], wave

    def _alone(self, work: Sequence[Work]) -> Iterator[Event]:
        """By this process."""
        measures = WaveMeasures(self._dsa, self._record.start["bucket_edges"], self._record.start["index_topk"])
        for patterns, wave in work:
            yield measures.event(patterns, wave, self._on_layer)

    def _known(self, pattern: Pattern, wave: Sequence[Batch]) -> bool:
        known = self._record.measures.get(pattern.letters, {})
        return all(sequence in known for sequence in range(wave[0].first, wave[-1].last))


class WaveMeasures:
    """Measures patterns against the all-F model, a wave at a time; buckets are cut at the positions `edges`."""

    def __init__(self, dsa: DsaModel, edges: Sequence[int], index_topk: int) -> None:
        self._dsa = dsa
        self._sweeper = Sweeper(dsa)
        self._edges = edges
        self._topk = index_topk

    def event(self, patterns: Sequence[Pattern], wave: Sequence[Batch], on_layer: Callable[[int], None]) -> Event:
        """What the journal keeps of a wave. The all-F model must be among the patterns: KL needs its states."""
        started, before = time.monotonic(), self._dsa.weights.bytes_read
        overlap: dict[str, dict[str, list[float]]] = {pattern.letters: {} for pattern in patterns}
        tables: dict[str, dict[str, list[Any]]] = {}

        def probe(_: Batch, running: Sequence[Pattern], position: int, borrowed: Any, own: Any) -> None:
            choosing = selection_overlap(borrowed, own)[:, self._topk :]  # of the queries that had to choose
            sums = choosing.sum(dim=1).tolist()  # per sequence
            for pattern in running:
                overlap[pattern.letters].setdefault(str(position), []).extend(sums)

        def reduce(batch: Batch, states: dict[str, torch.Tensor]) -> None:
            reference = self._dsa.final_norm(states[self._dsa.start_pattern.letters])
            for letters, hidden_states in states.items():
                for name, values in self._table(batch, Pattern(letters), hidden_states, reference).items():
                    tables.setdefault(letters, {}).setdefault(name, []).extend(values)

        layer_sequences = self._sweeper.run(patterns, wave, reduce, on_layer, probe)
        read = self._dsa.weights.bytes_read - before
        return {
            "event": "measures",
            "sequences": [wave[0].first, wave[-1].last],
            "patterns": {letters: {**table, "overlap": overlap[letters]} for letters, table in tables.items()},
            "layer_sequences": layer_sequences,
            "seconds": round(time.monotonic() - started, 3),
            **({"weight_bytes": read} if read else {}),
        }

    def _table(
        self, batch: Batch, pattern: Pattern, hidden_states: torch.Tensor, reference: torch.Tensor
    ) -> dict[str, Any]:
        normed = self._dsa.final_norm(hidden_states)
        nll, kl, agree = token_measures(normed, reference, self._dsa.lm_head, batch.input_ids)
        sums = per_sequence(nll, batch.counted)
        self._sweeper.check_finite(sums, batch, pattern)
        buckets = []
        for first, last in pairwise(self._edges):
            within = torch.zeros_like(batch.counted)
            within[:, first:last] = batch.counted[:, first:last]
            buckets.append(per_sequence(nll, within))
        return {
            "nll": sums.tolist(),
            "kl": per_sequence(kl, batch.counted).tolist(),
            "agree": per_sequence(agree, batch.counted).tolist(),
            "bucket_nll": torch.stack(buckets, dim=1).tolist(),
        }


def naive_measures(dsa: DsaModel, pattern: Pattern, batch: Batch) -> list[tuple[float, float, float]]:
    """The slow, obvious twin: whole forwards and whole logits. (nll, kl, agree) sums of each sequence."""
    with torch.inference_mode():
        logits = dsa.lm_head(dsa.final_hidden_states(batch.input_ids, pattern)).float()[:, :-1]
        reference = dsa.lm_head(dsa.final_hidden_states(batch.input_ids, dsa.start_pattern)).float()[:, :-1]
        log_q, log_p = logits.log_softmax(-1), reference.log_softmax(-1)
        nll = -log_q.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)  # [B, T-1]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        agree = (logits.argmax(-1) == reference.argmax(-1)).float()
        counted = batch.counted[:, 1:]
        sums = [torch.where(counted, values.double(), 0.0).sum(1).tolist() for values in (nll, kl, agree)]
    return list(zip(*sums, strict=True))
