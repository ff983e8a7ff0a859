"""What a search will run, counted: sweeps, the layers that each one runs, by strategy. No torch, no model.

Exact: `rehearsal.rehearsed`, the likely course. The others: `rehearsal.preview`, the most that they can take; what they
are likely to take is that of exact times a share that was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from icsearch.core.pattern import Pattern, references
from icsearch.planning.rehearsal import Sweep, preview, rehearsed, swept
from icsearch.search.protocol import Strategy, Task
from icsearch.search.registry import Options, make_strategy
from icsearch.sweep.states import Keeping, Rehearsal

# Layer evaluations, of those of an exact search with states kept: medians of searches of two 24-layer checkpoints,
# measured by benchmarks/search.py (see benchmarks/README.md). They follow from the losses, so another model has others.
MEASURED_SHARES = {"exact": 1.0, "race": 0.69, "lazy": 0.72, "race+lazy": 0.56}


def share_of_exact(name: str, waves: int) -> float:
    """Layer evaluations of a strategy, of exact's, where sequences are scored in so many waves one behind the other.

    A race drops candidates between waves, so all of them run in the first one: where they are dropped at an even pace,
    it saves 1 - 1 / waves of what it saves with many, and nothing in one wave.
    """
    without_race = MEASURED_SHARES["lazy" if Options(name).is_lazy else "exact"]
    return without_race + (MEASURED_SHARES[name] - without_race) * (1 - 1 / waves)


def likely_passes(name: str, likely: Sequence[Sweep], most: Sequence[Sweep]) -> float:
    """How often all sequences go through the layers: exact's sweeps, and a sweep for each portion of a lazy search.

    It asks for as many portions as there are at most, times the measured share of the layer evaluations.
    """
    if not Options(name).is_lazy:
        return len(likely)
    return max(len(likely), MEASURED_SHARES["lazy"] * len(most))


@dataclass(frozen=True)
class Workload:
    """A search to be planned: K = `num_shared` flips of `start`, in `stages`, on so many `sequences`."""

    start: Pattern
    flippable: frozenset[int]
    num_shared: int
    stages: int
    sequences: int
    keep_full: tuple[int, ...] = ()  # as asked for: `flippable` has it already

    @property
    def references(self) -> list[Pattern]:
        """The uniform patterns that a search scores for its report."""
        return [Pattern(letters) for letters in references(self.start, self.num_shared).values()]

    @property
    def most_patterns(self) -> int:
        """How many patterns one sweep scores at most."""
        return max(len(self.flippable), 1 + len(self.references))

    def keeping(self, stride: int = 0) -> Keeping:
        layers = len(self.start)
        return Keeping(layers, tuple(range(layers)), self.flippable, stride)

    def likely(self, per_sweep: int, keeping: Keeping) -> list[Sweep]:
        """The sweeps of an exact search, each over all sequences."""
        return rehearsed(lambda: self._strategy("exact"), self._tokens, self.references, keeping, per_sweep)

    def most(self, name: str, per_sweep: int) -> list[Sweep]:
        """The sweeps that a strategy takes at most, without states kept between steps."""
        rehearsal = Rehearsal(self.keeping(), self.start)
        sweeps = swept(rehearsal, [self.start, *self.references], per_sweep)

        def count(patterns: list[Pattern]) -> int:
            added = swept(rehearsal, patterns, per_sweep)
            sweeps.extend(added)
            return layer_evaluations(added)

        preview(self._strategy(name), self._tokens, count, Options(name).is_lazy)
        return sweeps

    @property
    def _tokens(self) -> tuple[int, ...]:
        return (1,) * self.sequences  # sequences of one length weigh alike

    def _strategy(self, name: str) -> Strategy:
        """Scored on all sequences at once: a race that drops nobody takes as much as one that looks more often."""
        kept = frozenset(range(len(self.start))) - self.flippable
        task = Task(self.start, kept, self.num_shared, self.stages, self._tokens, (self.sequences,))
        return make_strategy(task, Options(name))


class Plays:
    """The sweeps of a workload by strategy and by how many patterns one sweep scores, each worked out once."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._likely: dict[tuple[int, int], list[Sweep]] = {}
        self._most: dict[tuple[bool, int], list[Sweep]] = {}

    def likely(self, per_sweep: int, stride: int) -> list[Sweep]:
        """As `Workload.likely`, with states kept at every so many layers."""
        key = per_sweep, stride
        if key not in self._likely:
            self._likely[key] = self._workload.likely(per_sweep, self._workload.keeping(stride))
        return self._likely[key]

    def most(self, name: str, per_sweep: int) -> list[Sweep]:
        """As `Workload.most`; what a race takes at most does not depend on it being one."""
        key = Options(name).is_lazy, per_sweep
        if key not in self._most:
            self._most[key] = self._workload.most("lazy" if key[0] else "exact", per_sweep)
        return self._most[key]


def layer_evaluations(sweeps: Sequence[Sweep]) -> int:
    """Layer runs, each of one layer over all sequences."""
    return sum(sweep.runs.total for sweep in sweeps)
