"""Sweeps that measure, beside the loss, the KL of each pattern to the unmodified model.

The KL needs the unmodified model's final states. They are taken from the first sweep of a batch, in which that model
runs along, and kept; where there is no room for them, it runs along in every sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from icsearch.losses import per_sequence, token_measures
from icsearch.model import DsaModel
from icsearch.pattern import Pattern
from icsearch.states import StateStore
from icsearch.sweep import Batch, BranchState, Sweeper, SweepResult


class KlSweeper(Sweeper):
    """A sweeper whose results have the KL too. `keep_full_states`: all batches' final states have room in memory."""

    def __init__(self, model: DsaModel, kept: StateStore[BranchState] | None, keep_full_states: bool) -> None:
        super().__init__(model, kept)
        self._keep_full_states = keep_full_states
        self._full_states: dict[int, torch.Tensor] = {}  # by first sequence: [B, T, D] after the final norm

    def sweep(
        self,
        patterns: Iterable[Pattern],
        wave: Sequence[Batch],
        on_layer: Callable[[int], None] = lambda layer_sequences: None,
    ) -> SweepResult:
        """NLL and KL(unmodified || pattern) of every pattern on every sequence of the wave, summed, in nats.

        The NLL has the bits of a sweep without KL. Raises NonFiniteLossError, OutOfMemoryError.
        """
        asked = list(dict.fromkeys(patterns))
        nll: dict[str, list[float]] = {pattern.letters: [] for pattern in asked}
        kl: dict[str, list[float]] = {pattern.letters: [] for pattern in asked}

        def reduce(batch: Batch, states: dict[str, torch.Tensor]) -> None:
            reference = self._reference(batch, states)
            for pattern in asked:
                sums = self._sums(states[pattern.letters], reference, batch, pattern)
                nll[pattern.letters] += sums[0].tolist()
                kl[pattern.letters] += sums[1].tolist()

        layer_sequences = self.run(self._with_full(asked, wave, self._full_states), wave, reduce, on_layer)
        return SweepResult(nll, layer_sequences, kl)

    def expected(self, work: Iterable[tuple[Sequence[Pattern], Sequence[Batch]]]) -> int:
        """As of any sweeper, with the runs of the unmodified model where its states are not known."""
        known, swept = set(self._full_states), []
        for patterns, wave in work:
            swept.append((self._with_full(patterns, wave, known), wave))
            known |= {batch.first for batch in wave if self._keep_full_states}
        return super().expected(swept)

    def _with_full(self, patterns: Sequence[Pattern], wave: Sequence[Batch], known: Iterable[int]) -> Sequence[Pattern]:
        """The patterns, and the unmodified model's unless its states on the whole wave are known."""
        if {batch.first for batch in wave} <= set(known):
            return patterns
        return list(dict.fromkeys([*patterns, self.model.start_pattern]))

    def _reference(self, batch: Batch, states: dict[str, torch.Tensor]) -> torch.Tensor:
        if batch.first in self._full_states:
            return self._full_states[batch.first]
        reference = self.model.final_norm(states[self.model.start_pattern.letters])
        if self._keep_full_states:
            self._full_states[batch.first] = reference
        return reference

    def _sums(
        self, hidden_states: torch.Tensor, reference: torch.Tensor, batch: Batch, pattern: Pattern
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, D] states of the last layer to NLL and KL sums, float64 [B] each; raises NonFiniteLossError."""
        normed = self.model.final_norm(hidden_states)
        nll, kl, _ = token_measures(normed, reference, self.model.lm_head, batch.input_ids)
        sums = per_sequence(nll, batch.counted), per_sequence(kl, batch.counted)
        for values in sums:
            self.check_finite(values, batch, pattern)
        return sums
