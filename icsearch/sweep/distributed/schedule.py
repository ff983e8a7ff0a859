"""What all processes of a run keep between sweeps, played through by one of them: so all agree where a branch begins.

Numbers alone, no torch: what is kept follows from the orders and the plan, never from what memory happens to be free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from icsearch.core.pattern import Pattern
from icsearch.sweep.states import Keeping, Rehearsal

CALIBRATION, HELDOUT = "calibration", "heldout"  # the sets of sequences that a run scores


@dataclass(frozen=True)
class Start:
    """The decoder layer where each pattern's branch begins, by its letters, and the layer runs that follow."""

    entries: dict[str, int]
    layer_runs: int


class Ledger:
    """Follows every sweep of one set of sequences. `full`: the unmodified model, in runs that measure the KL to it.

    That one runs along in the first sweep of each batch, and in all of them unless `keep_full_states`.
    """

    def __init__(
        self, keeping: Keeping, base: Pattern, full: Pattern | None = None, keep_full_states: bool = False
    ) -> None:
        self.keeping = keeping
        self.base = base
        self.full = full
        self.keep_full_states = keep_full_states
        self._kept = Rehearsal(keeping, base)
        self._known: set[int] = set()

    def retain(self, base: Pattern) -> None:
        """What cannot be on the way to `base`, or to a flip of it, is let go of everywhere."""
        self.base = base
        self._kept.retain(base)

    def sweep(self, asked: Sequence[Pattern], batches: Sequence[int]) -> Start:
        """A sweep of these patterns over the batches that begin with these sequences; it counts as done."""
        running = dict.fromkeys(asked)
        if self.full is not None and not self._known >= set(batches):
            running[self.full] = None
            if self.keep_full_states:
                self._known |= set(batches)
        entries = {pattern.letters: self._kept.start(pattern, batches) for pattern in running}
        return Start(entries, self._kept.sweep(running, batches))

    def copy(self) -> Ledger:
        """For looking ahead: what happens to the copy leaves this one as it is."""
        other = Ledger(self.keeping, self.base, self.full, self.keep_full_states)
        other._kept, other._known = self._kept.rehearsal(), set(self._known)
        return other
