"""Greedy search, one flip at a time (IndexCache paper, Algorithm 1), in one block of layers or several in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from icsearch.core.statistics import mean_loss, paired_difference
from icsearch.runs.record import Choice
from icsearch.search.protocol import SearchTask


def split_stages(num_layers: int, stages: int) -> tuple[range, ...]:
    """Contiguous blocks of ceil(N / P) layers, the last one smaller where that does not divide.

    So the paper cut GLM-5: its published 1/4 pattern shares exactly 14 layers of each of [0,20), [20,40), [40,60),
    [60,78). There may be fewer blocks than asked for (9 layers in 4 stages make 3 blocks of 3).
    """
    size = -(-num_layers // stages)
    return tuple(range(first, min(first + size, num_layers)) for first in range(0, num_layers, size))


class Greedy:
    """At each step, every layer that may still be flipped is scored, and the flip with the lowest loss committed.

    With stages, the blocks of layers take turns: each block's best flip is committed before the next block is scored,
    and one that has no candidates left is passed over. The first layer of each block stays F, so that every pipeline
    stage can start on its own selection.
    """

    def __init__(self, task: SearchTask) -> None:
        self.pattern = task.start
        self._blocks = split_stages(len(task.start), task.stages)
        self._stay_full = task.keep_full | {block.start for block in self._blocks}
        self._steps, self._tokens = task.num_shared, task.tokens
        self._step, self._turn = 1, 0

    def ask(self) -> tuple[int, ...]:
        for _ in self._blocks if self._step <= self._steps else ():
            block = self._blocks[self._turn % len(self._blocks)]
            layers = (layer for layer in block if self.pattern.is_full(layer) and layer not in self._stay_full)
            if candidates := tuple(layers):
                return candidates
            self._turn += 1
        return ()

    def tell(self, sums: Mapping[int, Sequence[float]]) -> Choice:
        layer = min(sums, key=lambda candidate: (mean_loss(sums[candidate], self._tokens), candidate))
        self.pattern = self.pattern.flip(layer)
        choice = Choice(
            step=self._step,
            layer=layer,
            pattern=self.pattern.letters,
            candidates=tuple(sorted(sums)),
            ties=tuple(
                other
                for other in sorted(sums)
                if other != layer and paired_difference(sums[other], sums[layer], self._tokens).is_tie
            ),
        )
        self._step += 1
        self._turn += 1
        return choice
