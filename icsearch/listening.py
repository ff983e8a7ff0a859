"""A listener of a run that passes everything on to another one: what hears more begins with this."""

from __future__ import annotations

from collections.abc import Sequence

from icsearch.runs.record import RunRecord
from icsearch.search import Progress


class Passing:
    """Hears a run for somebody else."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner

    def info(self, text: str) -> None:
        self._inner.info(text)

    def planned(self, rows: Sequence[tuple[str, str]], layer_sequences: int, done: int) -> None:
        self._inner.planned(rows, layer_sequences, done)

    def step_started(self, step: int | str, patterns: int, layer_sequences: int) -> None:
        self._inner.step_started(step, patterns, layer_sequences)

    def layer_done(self, layer_sequences: int) -> None:
        self._inner.layer_done(layer_sequences)

    def losses_known(self, record: RunRecord, step: int | str) -> None:
        self._inner.losses_known(record, step)

    def committed(self, record: RunRecord) -> None:
        self._inner.committed(record)

    def tried(self, record: RunRecord) -> None:
        self._inner.tried(record)
