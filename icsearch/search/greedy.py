"""Greedy search, one flip at a time (IndexCache paper, Algorithm 1), in one block of layers or several in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import mean_loss
from icsearch.search.protocol import Ask, Choice, Task


def split_stages(num_layers: int, stages: int) -> tuple[range, ...]:
    """Contiguous blocks of ceil(N / P) layers, the last one smaller where that does not divide.

    So the paper cut GLM-5: its published 1/4 pattern shares exactly 14 layers of each of [0,20), [20,40), [40,60),
    [60,78). There may be fewer blocks than asked for (9 layers in 4 stages make 3 blocks of 3).
    """
    size = -(-num_layers // stages)
    return tuple(range(first, min(first + size, num_layers)) for first in range(0, num_layers, size))


class StageTurns:
    """Rounds over the blocks in order: each block's best flip is committed before the next block is scored.

    The first layer of each block stays F, so that every pipeline stage can start on its own selection. A block
    without candidates is passed over. One block is the search without stages.
    """

    def __init__(self, blocks: Sequence[range], keep_full: frozenset[int]) -> None:
        self._blocks = blocks
        self._keep_full = keep_full | {block.start for block in blocks}
        self.turn = 0

    def candidates(self, pattern: Pattern) -> tuple[int, ...]:
        """The layers that may be flipped in this step; empty where no block has any left."""
        for _ in self._blocks:
            if found := self._candidates_of(self._blocks[self.turn], pattern):
                return found
            self.next_turn()
        return ()

    def next_turn(self) -> None:
        self.turn = (self.turn + 1) % len(self._blocks)

    def _candidates_of(self, block: range, pattern: Pattern) -> tuple[int, ...]:
        return tuple(layer for layer in block if pattern.is_full(layer) and layer not in self._keep_full)


class Pools(Protocol):
    """Which candidates of a step are scored, pool by pool."""

    @property
    def violations(self) -> tuple[int, ...]:
        """Layers of this step that were cheaper than was held possible."""

    @property
    def missed(self) -> bool:
        """Whether the winner would not have been scored, had this step not scored everyone."""

    @property
    def spared(self) -> tuple[int, ...]:
        """The layers of this step that only the tie margin kept from being scored."""

    def open(self, candidates: tuple[int, ...], turn: int) -> tuple[int, ...]:
        """Begin a step and return its first pool. `turn` is the stage whose turn it is."""

    def more(self, differences: Mapping[int, Sequence[float]], winner: int) -> tuple[int, ...]:
        """The next pool; empty where the winner so far stands.

        `differences` are the objective's sums minus those of the committed pattern, of all that was scored in this
        step, each in sequence order from the first sequence on.
        """

    def close(self, before: Pattern, layer: int) -> None:
        """End the step: this layer of that pattern was flipped."""


class Contest(Protocol):
    """How the candidates of a pool are scored until one has won. Those of earlier pools of the step compete on."""

    @property
    def sums(self) -> Mapping[int, Sequence[float]]:
        """What has been told in this step, by layer, from the first sequence on."""

    @property
    def winner(self) -> int:
        """The layer with the lowest loss of those scored on all sequences."""

    @property
    def dropped(self) -> tuple[int, ...]:
        """The layers that were given up before their last sequence because they were worse than the leader."""

    @property
    def within_margin(self) -> tuple[int, ...]:
        """The layers that were given up because the tie margin made the leader as good as them."""

    @property
    def settled(self) -> int | None:
        """The number of sequences behind which the winner was settled on, if it was."""

    def open(self, candidates: int) -> None:
        """Begin a step with so many candidates."""

    def enter(self, pool: tuple[int, ...]) -> None:
        """Let these layers in."""

    def ask(self) -> Ask | None:
        """What to score next; None once there is a winner."""

    def tell(self, sums: Mapping[int, Sequence[float]]) -> None:
        """Take the sums of what was asked for."""


class StepwiseGreedy:
    """At each step, commit the flip that wins its contest."""

    def __init__(self, task: Task, pools: Pools, contest: Contest) -> None:
        self.pattern = task.start
        self._stages = StageTurns(split_stages(len(task.start), task.stages), task.keep_full)
        self._pools = pools
        self._contest = contest
        self._remaining = task.num_shared
        self._sums: Sequence[float] = ()  # the committed pattern's
        self._candidates: tuple[int, ...] = ()  # of the open step; empty between two steps

    def begin(self, start_sums: Sequence[float]) -> None:
        self._sums = start_sums

    def ask(self) -> Ask | None:
        if self._remaining == 0:
            return None
        if not self._candidates:
            self._open()
        return self._contest.ask() if self._candidates else None

    def tell(self, sums: Mapping[int, Sequence[float]]) -> Choice | None:
        self._contest.tell(sums)
        if self._contest.ask() is not None:
            return None
        if pool := self._pools.more(self._differences(), self._contest.winner):
            self._contest.enter(pool)
            return None
        return self._commit()

    def _open(self) -> None:
        self._candidates = self._stages.candidates(self.pattern)
        if self._candidates:
            self._contest.open(len(self._candidates))
            self._contest.enter(self._pools.open(self._candidates, self._stages.turn))

    def _differences(self) -> dict[int, list[float]]:
        # a candidate may have been scored on a part of the sequences only
        return {
            layer: [a - b for a, b in zip(sums, self._sums, strict=False)] for layer, sums in self._contest.sums.items()
        }

    def _commit(self) -> Choice:
        contest, layer, spared = self._contest, self._contest.winner, self._pools.spared
        self._pools.close(self.pattern, layer)
        choice = Choice(
            layer=layer,
            scored=tuple(sorted(contest.sums)),
            dropped=tuple(sorted(contest.dropped)),
            within_margin=tuple(sorted(contest.within_margin)),
            stale=tuple(candidate for candidate in self._candidates if candidate not in contest.sums),
            settled=contest.settled,
            violations=tuple(sorted(self._pools.violations)),
            missed=self._pools.missed,
            spared=tuple(sorted(spared)),
        )
        self.pattern = self.pattern.flip(layer)
        self._sums = contest.sums[layer]
        self._remaining -= 1
        self._candidates = ()
        self._stages.next_turn()
        return choice


def cheapest(losses: Mapping[int, float]) -> int:
    """The layer with the lowest loss; of equal ones the smallest layer."""
    return min(losses, key=lambda layer: (losses[layer], layer))


class Everyone:
    """Pools: one, of all candidates."""

    violations: tuple[int, ...] = ()
    missed = False
    spared: tuple[int, ...] = ()

    def open(self, candidates: tuple[int, ...], turn: int) -> tuple[int, ...]:
        return candidates

    def more(self, differences: Mapping[int, Sequence[float]], winner: int) -> tuple[int, ...]:
        return ()

    def close(self, before: Pattern, layer: int) -> None: ...


class Complete:
    """Contest: all of a pool on all sequences; the lowest loss wins."""

    dropped: tuple[int, ...] = ()
    within_margin: tuple[int, ...] = ()
    settled: int | None = None

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._pool: tuple[int, ...] = ()
        self.sums: dict[int, list[float]] = {}

    def open(self, candidates: int) -> None:
        self.sums = {}

    def enter(self, pool: tuple[int, ...]) -> None:
        self._pool = pool

    def ask(self) -> Ask | None:
        return Ask(self._pool, 0, len(self._tokens)) if self._pool else None

    def tell(self, sums: Mapping[int, Sequence[float]]) -> None:
        self.sums |= {layer: list(sums[layer]) for layer in self._pool}
        self._pool = ()

    @property
    def winner(self) -> int:
        return cheapest({layer: mean_loss(sums, self._tokens) for layer, sums in self.sums.items()})
