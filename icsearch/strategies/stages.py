"""The pipeline split of the search (IndexCache paper, section 3.1 on pipeline-parallel search)."""

from __future__ import annotations

from collections.abc import Mapping

from icsearch.pattern import Pattern
from icsearch.strategies.exact import cheapest


def split_stages(num_layers: int, stages: int) -> tuple[range, ...]:
    """Contiguous blocks of ceil(N / P) layers, the last one smaller where that does not divide.

    So the paper cut GLM-5: its published 1/4 pattern shares exactly 14 layers of each of [0,20), [20,40), [40,60),
    [60,78). There may be fewer blocks than asked for (9 layers in 4 stages make 3 blocks of 3).
    """
    size = -(-num_layers // stages)
    return tuple(range(first, min(first + size, num_layers)) for first in range(0, num_layers, size))


class StagedGreedy:
    """Rounds over the blocks in order: each block's best flip is committed before the next block is scored.

    The first layer of each block stays F, so that every pipeline stage can start on its own selection. A round
    costs one evaluation per remaining candidate and commits up to one flip per block.
    """

    def __init__(self, start: Pattern, keep_full: frozenset[int], num_shared: int, stages: int) -> None:
        self.pattern = start
        self.blocks = split_stages(len(start), stages)
        self._keep_full = keep_full | {block.start for block in self.blocks}
        self._remaining = num_shared
        self._turn = 0

    def ask(self) -> tuple[int, ...]:
        if self._remaining == 0:
            return ()
        for _ in self.blocks:
            if candidates := self._candidates(self.blocks[self._turn]):
                return candidates
            self._next_turn()
        return ()

    def tell(self, losses: Mapping[int, float]) -> int:
        layer = cheapest(losses)
        self.pattern = self.pattern.flip(layer)
        self._remaining -= 1
        self._next_turn()
        return layer

    def _candidates(self, block: range) -> tuple[int, ...]:
        return tuple(layer for layer in block if self.pattern.is_full(layer) and layer not in self._keep_full)

    def _next_turn(self) -> None:
        self._turn = (self._turn + 1) % len(self.blocks)
