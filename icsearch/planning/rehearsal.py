"""A search played through before it runs, with made-up losses: evaluations and layer runs. Numbers only, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, product

from icsearch.core.pattern import Pattern, references
from icsearch.search.protocol import SearchTask, Strategy
from icsearch.search.registry import FINALISTS, make_strategy
from icsearch.sweep.states import Keeping, LayerRuns, Rehearsal


@dataclass(frozen=True)
class Sweep:
    """One sweep of a search that was played through: the patterns that it scores, and the layers that it runs."""

    patterns: int
    runs: LayerRuns


def preview(strategy: Strategy, tokens: Sequence[int], count: Callable[[list[Pattern]], int]) -> tuple[int, int]:
    """(candidate evaluations, layer evaluations) that a search takes at most, played through with made-up losses.

    The last candidate is committed always, which is the most that a search can take: the candidates left then fork off
    earliest.
    """
    evaluations = layer_runs = 0
    while layers := strategy.ask():
        evaluations += len(layers)
        layer_runs += count([strategy.pattern.flip(layer) for layer in layers])
        strategy.tell({layer: [-layer * t for t in tokens] for layer in layers})
    return evaluations, layer_runs


def rehearsed(
    begin: Callable[[], Strategy],
    tokens: Sequence[int],
    references: Sequence[Pattern],
    keeping: Keeping,
    per_sweep: int,
    along: Sequence[Pattern] = (),
) -> list[Sweep]:
    """The sweeps that a search with states kept between steps is likely to take, over all sequences.

    It is played through with made-up losses, once committing the first candidate in each step and once the last; the
    one that takes more is returned. With everything kept, every pair of candidates costs the layers above the later one
    once, whichever of them is committed first: an exact search to the end then takes the same in any order, and a
    shorter one the most where the first layers are committed. With nothing kept it takes the most where the last ones
    are. In each sweep, the patterns `along` run beside those that are scored.
    """
    courses = []
    for sign in (1.0, -1.0):  # of what a flip costs: its layer's number, or that much less
        strategy = begin()
        rehearsal = Rehearsal(keeping, strategy.pattern)
        sweeps = swept(rehearsal, [strategy.pattern, *references], per_sweep, along)
        while layers := strategy.ask():
            rehearsal.retain(strategy.pattern)
            sweeps += swept(rehearsal, [strategy.pattern.flip(layer) for layer in layers], per_sweep, along)
            strategy.tell({layer: [sign * layer * t for t in tokens] for layer in layers})
        courses.append(sweeps)
    return max(courses, key=layer_evaluations)


def swept(
    rehearsal: Rehearsal, patterns: Sequence[Pattern], per_sweep: int, along: Sequence[Pattern] = ()
) -> list[Sweep]:
    """The sweeps that score these patterns, at most so many in one."""
    chunks = [patterns[start : start + per_sweep] for start in range(0, len(patterns), per_sweep)]
    return [Sweep(len(chunk), rehearsal.runs([*chunk, *along], [0])) for chunk in chunks]


def layer_evaluations(sweeps: Sequence[Sweep]) -> int:
    """Layer runs, each of one layer over all sequences."""
    return sum(sweep.runs.total for sweep in sweeps)


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

    def keeping(self, stride: int = 0) -> Keeping:
        layers = len(self.start)
        return Keeping(layers, tuple(range(layers)), self.flippable, stride)

    def likely(self, name: str, per_sweep: int, keeping: Keeping) -> list[Sweep]:
        """The sweeps that a strategy is likely to take, each over all sequences."""
        return rehearsed(lambda: self._strategy(name), self._tokens, self.references, keeping, per_sweep)

    def most(self, name: str, per_sweep: int) -> list[Sweep]:
        """The sweeps that a strategy takes at most, without states kept between steps."""
        rehearsal = Rehearsal(self.keeping(), self.start)
        sweeps = swept(rehearsal, [self.start, *self.references], per_sweep)

        def count(patterns: list[Pattern]) -> int:
            added = swept(rehearsal, patterns, per_sweep)
            sweeps.extend(added)
            return layer_evaluations(added)

        preview(self._strategy(name), self._tokens, count)
        return sweeps

    def proposed(self, per_sweep: int, keeping: Keeping, rounds: int) -> list[Sweep]:
        """The sweeps of a search on the second-order table behind the table.

        The path shares the first layers first, which leaves most to run; finalists differ from its end in one exchange.
        """
        rehearsal, flippable = Rehearsal(keeping, self.start), sorted(self.flippable)
        sweeps = swept(rehearsal, [self.start, *self.references], per_sweep)
        sweeps += swept(rehearsal, [self.start.flip(layer) for layer in flippable], per_sweep)
        path = list(accumulate(flippable[: self.num_shared], Pattern.flip, initial=self.start))[1:]
        sweeps += swept(rehearsal, path, per_sweep)
        shared, full = flippable[: self.num_shared], flippable[self.num_shared :]
        exchanged = [
            Pattern.from_full_layers({*path[-1].full_layers} - {taken} | {given}, len(self.start))
            for given, taken in islice(product(shared, reversed(full)), rounds * FINALISTS)
        ]
        for first in range(0, len(exchanged), FINALISTS):
            sweeps += swept(rehearsal, exchanged[first : first + FINALISTS], per_sweep)
        return sweeps

    @property
    def _tokens(self) -> tuple[int, ...]:
        return (1,) * self.sequences  # sequences of one length weigh alike

    def _strategy(self, name: str) -> Strategy:
        kept = frozenset(range(len(self.start))) - self.flippable
        task = SearchTask(self.start, kept, self.num_shared, self.stages, self._tokens)
        return make_strategy(task, name)
