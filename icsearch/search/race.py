"""Racing: candidates are scored batch by batch, and given up once they are confidently worse than the leader.

The test. The sequence is the independent unit: losses of tokens within one are not independent. What is to be known
of two candidates is their difference on these S sequences, not on all texts of the world. `statistics.project`
foretells it from the first n, with an error that ends at zero for n = S and allows for sequences of different length.
The difference is held against that error by Student's t, one-sided. A step looks several times, and at every look the
leader may be any candidate: so a test's level is (1 - confidence) / (looks x (candidates - 1)), and the chance that a
step gives up its best candidate is at most 1 - confidence, as far as the differences are near enough to normal and
the order of the sequences to random. The idea is that of Hoeffding races (Maron and Moore, 1994).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from icsearch.core.statistics import Projection, mean_loss, project, student_tail
from icsearch.search.greedy import cheapest
from icsearch.search.protocol import Ask, Task

MIN_SEQUENCES = 5  # an error estimated from fewer is no estimate
ROUNDING = 1e-9  # an error this much smaller than its difference is one of arithmetic


def testing_looks(task: Task) -> tuple[int, ...]:
    """After how many sequences candidates can be dropped: with few sequences, or in one batch, never."""
    return tuple(look for look in task.looks if MIN_SEQUENCES <= look < len(task.tokens))


class Race:
    """Contest: a pool runs from batch to batch until one is left, or the sequences end; the lowest loss wins.

    Who has been scored on all sequences, in this pool or an earlier one of the step, competes on and is never given
    up. With a `tie_margin`, in nats per token, a leader that nobody is confidently known to beat by more than
    that is settled on: it alone is scored to the end.
    """

    def __init__(self, task: Task, confidence: float, tie_margin: float | None = None) -> None:
        self._tokens = task.tokens
        self._looks = testing_looks(task)
        self._risk = 1 - confidence
        self._tie_margin = tie_margin
        self.open(0)

    def open(self, candidates: int) -> None:
        self._level = self._risk / max(1, len(self._looks) * (candidates - 1))
        self.sums: dict[int, list[float]] = {}
        self._running: tuple[int, ...] = ()  # they have all been scored on the same number of sequences
        self._dropped: list[int] = []
        self._within_margin: list[int] = []
        self.settled: int | None = None

    def enter(self, pool: tuple[int, ...]) -> None:
        self._running = pool
        self.sums |= {layer: [] for layer in pool}

    def ask(self) -> Ask | None:
        if not self._running:
            return None
        done = len(self.sums[self._running[0]])
        alone = len(self._field()) == 1
        following = [look for look in self._looks if look > done and not alone]
        return Ask(self._running, done, following[0] if following else len(self._tokens))

    def tell(self, sums: Mapping[int, Sequence[float]]) -> None:
        for layer in self._running:
            self.sums[layer] += sums[layer]
        done = len(self.sums[self._running[0]])
        if done == len(self._tokens):
            self._running = ()
        elif len(self._field()) > 1:
            self._look(done)

    @property
    def winner(self) -> int:
        return cheapest({layer: mean_loss(self.sums[layer], self._tokens) for layer in self._complete()})

    @property
    def dropped(self) -> tuple[int, ...]:
        return tuple(self._dropped)

    @property
    def within_margin(self) -> tuple[int, ...]:
        return tuple(self._within_margin)

    def _complete(self) -> list[int]:
        return [layer for layer, sums in self.sums.items() if len(sums) == len(self._tokens)]

    def _field(self) -> list[int]:
        """Who is still in the race."""
        return sorted({*self._complete(), *self._running})

    def _look(self, done: int) -> None:
        leader = cheapest({layer: self._mean(layer, done) for layer in self._field()})
        behind = {layer: self._difference(layer, leader, done) for layer in self._running if layer != leader}
        lost = [layer for layer, difference in behind.items() if self._is_above(difference, 0.0)]
        self._dropped += lost
        left = [layer for layer in behind if layer not in lost]
        if left and self._tie_margin is not None:
            margin = self._tie_margin
            if all(self._is_above(behind[layer], -margin) for layer in left):
                self.settled = done
                self._within_margin += left
                left = []
        self._running = tuple(layer for layer in self._running if layer == leader or layer in left)

    def _mean(self, layer: int, done: int) -> float:
        return mean_loss(self.sums[layer][:done], self._tokens[:done])

    def _difference(self, layer: int, leader: int, done: int) -> Projection:
        """The layer's loss minus the leader's, in nats per token."""
        differences = [a - b for a, b in zip(self.sums[layer], self.sums[leader][:done], strict=True)]
        return project(differences, self._tokens)

    def _is_above(self, difference: Projection, bound: float) -> bool:
        """Whether the difference is above the bound, at this step's level.

        Never where a few long sequences make up the most of it, and never where all sequences agree to the last
        bits: an error of zero is no sign of certainty.
        """
        excess, error = difference.delta - bound, difference.std_err
        if excess <= 0 or not error > excess * ROUNDING or difference.degrees < MIN_SEQUENCES - 1:
            return False
        return student_tail(excess / error, difference.degrees) <= self._level
