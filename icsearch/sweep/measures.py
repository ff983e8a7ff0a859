"""Several patterns measured on the same batches, in one sweep for all of them together.

Beside the loss: KL to the all-F model, agreement of the most likely token, loss by position, and how much of an S
layer's borrowed selection its own indexer would have chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from icsearch.core.pattern import Pattern
from icsearch.core.text import shrunk_note
from icsearch.model.model import DsaModel
from icsearch.runs.evaluation import EvalRecord
from icsearch.runs.journal import Event
from icsearch.search.loop import Run
from icsearch.sweep.branches import Batch
from icsearch.sweep.sweep import Sweeper, per_sequence, selection_overlap, token_measures, token_nll


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


def shared_settings(start: Event) -> dict[str, Any]:
    """What an evaluation's first event says of how waves are measured; one of an earlier version has no masks."""
    return {"masked": False} | {name: start[name] for name in ("bucket_edges", "index_topk", "masked") if name in start}


def measure_missing(
    run: Run[EvalRecord],
    dsa: DsaModel,
    waves: Sequence[Sequence[Batch]],
    patterns: Sequence[Pattern],
    per_sweep: int,
    several: Share | None = None,
) -> None:
    """Measure every pattern on every wave, as far as the run's record lacks it. The all-F model runs in each sweep.

    Where memory runs out, it goes on once with half as many patterns at a time. `several` has other processes share
    the work.
    """
    others = [pattern for pattern in patterns if pattern != dsa.start_pattern]
    together = max(1, min(per_sweep, len(others)))
    shrunk = several is not None

    def missing() -> Iterator[Event]:
        work = list(_missing(run.record, dsa.start_pattern, others, together, waves))
        if several is not None:
            yield from several(work)
            return
        measures = WaveMeasures(dsa, **shared_settings(run.record.start))
        for measured, wave in work:
            yield measures.event(measured, wave, run.progress.layer_done)

    def shrink() -> str:
        nonlocal together, shrunk
        if shrunk or together < 2:
            return ""
        shrunk, text, together = True, shrunk_note(together, together // 2), together // 2
        return text

    run.fill(missing, shrink)


def _missing(
    record: EvalRecord, full: Pattern, others: list[Pattern], together: int, waves: Sequence[Sequence[Batch]]
) -> Iterator[Work]:
    """Waves, and what the record lacks of them: the all-F model, which is known once it was measured, first."""
    chunks = [others[i : i + together] for i in range(0, len(others), together)] or [[]]
    for wave in waves:
        sequences = range(wave[0].first, wave[-1].last)
        lacking = {
            pattern
            for pattern in (full, *others)
            if any(sequence not in record.measures.get(pattern.letters, {}) for sequence in sequences)
        }
        known = full not in lacking
        for chunk in chunks:
            missing = [pattern for pattern in chunk if pattern in lacking]
            if missing or not known:
                known = True
                yield [full, *missing], wave


class WaveMeasures:
    """Measures patterns against the all-F model, a wave at a time; buckets are cut at the positions `bucket_edges`.

    `masked`: a loss_mask says which tokens count, so NLL and KL of all tokens are summed beside those.
    """

    def __init__(self, dsa: DsaModel, bucket_edges: Sequence[int], index_topk: int, masked: bool) -> None:
        self._dsa = dsa
        self._sweeper = Sweeper(dsa)
        self._edges = bucket_edges
        self._topk = index_topk
        self._masked = masked

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
        table = {
            "nll": sums.tolist(),
            "kl": per_sequence(kl, batch.counted).tolist(),
            "agree": per_sequence(agree, batch.counted).tolist(),
            "bucket_nll": torch.stack(buckets, dim=1).tolist(),
        }
        if self._masked:
            everything = torch.ones_like(batch.counted)
            beside = {"all_nll": nll, "all_kl": kl}
            table |= {name: per_sequence(values, everything).tolist() for name, values in beside.items()}
        return table


def token_losses(dsa: DsaModel, waves: Iterable[Sequence[Batch]], on_layer: Callable[[int], None]) -> torch.Tensor:
    """The unmodified model's NLL of each predicted token, in nats: float32 [S, T - 1], on the CPU."""
    sweeper, rows, pattern = Sweeper(dsa), [], dsa.start_pattern

    def reduce(batch: Batch, states: dict[str, torch.Tensor]) -> None:
        nll = token_nll(sweeper.normed(states[pattern.letters]), dsa.lm_head, batch.input_ids)
        sweeper.check_finite(per_sequence(nll, torch.ones_like(batch.counted)), batch, pattern)
        rows.append(nll.view(len(batch.input_ids), -1).cpu())

    for wave in waves:
        sweeper.run([pattern], wave, reduce, on_layer)
    return torch.cat(rows)


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
