"""Sweeps that measure, beside the loss, the KL of each pattern to the unmodified model.

The KL needs the unmodified model's final states. They are taken from the first sweep of a batch, in which that model
runs along, and kept; where there is no room for them, it runs along in every sweep.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from icsearch.block import Batch, BranchState
from icsearch.losses import per_sequence, token_measures
from icsearch.model import DsaModel
from icsearch.pattern import Pattern
from icsearch.resting import InCpuMemory, OnDevice
from icsearch.states import StateStore
from icsearch.sweep import Sweeper


class KlSweeper(Sweeper):
    """A sweeper whose results have KL(unmodified || pattern) too, summed, in nats.

    The NLL has the bits of a sweep without KL. `keep_full_states`: all batches' final states have room in memory.
    """

    def __init__(
        self,
        model: DsaModel,
        kept: StateStore[BranchState] | None,
        keep_full_states: bool,
        resting: OnDevice | None = None,
    ) -> None:
        super().__init__(model, kept, resting)
        self._keep_full_states = keep_full_states
        self._full_states: dict[int, torch.Tensor] = {}  # by first sequence: [B, T, D] after the final norm

    def expected(self, work: Iterable[tuple[Sequence[Pattern], Sequence[Batch]]]) -> int:
        """As of any sweeper, with the runs of the unmodified model where its states are not known."""
        known, swept = set(self._full_states), []
        for patterns, wave in work:
            swept.append((self._with_full(patterns, wave, known), wave))
            known |= {batch.first for batch in wave if self._keep_full_states}
        return super().expected(swept)

    def with_others(self, asked: Sequence[Pattern], wave: Sequence[Batch]) -> Sequence[Pattern]:
        """The patterns asked for, and the unmodified model's unless its states on the whole wave are known."""
        return self._with_full(asked, wave, self._full_states)

    def _with_full(self, patterns: Sequence[Pattern], wave: Sequence[Batch], known: Iterable[int]) -> Sequence[Pattern]:
        if {batch.first for batch in wave} <= set(known):
            return patterns
        return list(dict.fromkeys([*patterns, self.model.start_pattern]))

    def losses(
        self, asked: Sequence[Pattern], batch: Batch, states: Mapping[str, torch.Tensor]
    ) -> dict[str, dict[str, list[float]]]:
        """NLL and KL sums; `states` holds the unmodified model's too, where they are not known."""
        reference = self._reference(batch, states)
        sums = {p.letters: self._sums(states[p.letters], reference, batch, p) for p in asked}
        return {
            "nll": {letters: nll.tolist() for letters, (nll, _) in sums.items()},
            "kl": {letters: kl.tolist() for letters, (_, kl) in sums.items()},
        }

    def _reference(self, batch: Batch, states: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if batch.first in self._full_states:
            return self._full_states[batch.first]
        reference = self.normed(states[self.model.start_pattern.letters])
        if self._keep_full_states:
            self._full_states[batch.first] = reference
        return reference

    def _sums(
        self, hidden_states: torch.Tensor, reference: torch.Tensor, batch: Batch, pattern: Pattern
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, D] states of the last layer to NLL and KL sums, float64 [B] each; raises NonFiniteLossError."""
        normed = self.normed(hidden_states)
        nll, kl, _ = token_measures(normed, reference, self.model.lm_head, batch.input_ids)
        sums = per_sequence(nll, batch.counted), per_sequence(kl, batch.counted)
        for values in sums:
            self.check_finite(values, batch, pattern)
        return sums


def make_sweeper(
    model: DsaModel, kept: StateStore[BranchState], by_kl: bool, keep_full_states: bool, rest_in_cpu: bool
) -> Sweeper:
    """A sweeper that measures the KL too where that is wanted, with states where the plan has them rest."""
    resting = InCpuMemory(model.device) if rest_in_cpu else OnDevice()
    return KlSweeper(model, kept, keep_full_states, resting) if by_kl else Sweeper(model, kept, resting)
