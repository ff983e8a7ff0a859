"""Which layers are candidates of a step: all, or one pipeline stage's (IndexCache paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

from icsearch.pattern import Pattern


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
