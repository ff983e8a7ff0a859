"""Swaps: a local search behind any strategy. It moves one F layer at a time; the number of F layers stays as it is.

A move takes the indexer from one layer and gives it to another. Greedy cannot make one: what it has shared stays
shared, however the layers around it change. Shifts by one or two positions are scored first, since they are few;
only where none of them is made, all other exchanges of an F with an S layer, a fixed number at a time.

The best of many noisy numbers looks better than it is, so a move has to pass twice:

- it *qualifies* where its loss on the calibration sequences is below the present pattern's by more than two paired
  standard errors. Of moves that change nothing, one in about forty passes by luck (more with few sequences), and a
  round scores dozens: this test alone would make moves that are worth nothing, or worse;
- it is *confirmed* where its loss on held-out sequences, on which nothing was chosen before, is lower too, by more
  than one paired standard error. Qualified moves are taken there one by one, best first, until one is confirmed, so
  that few are looked at; a refused one is not tried again before the pattern changes.

Every move that is made lowers the loss on both sets, so the result is never worse than the start on either, no
pattern comes up twice, and the search ends by itself (and after MAX_SWAPS moves in any case). What it does not say:
the held-out loss of the result is itself a little chosen by, so a last word needs sequences that neither set holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import Difference, paired_difference

QUALIFY_ERRORS = 2.0  # how many paired standard errors a move must gain on the calibration sequences
CONFIRM_ERRORS = 1.0  # and how many on the held-out ones
SHIFT_REACH = 2  # positions that a shift moves an F layer by, at most
MAX_SWAPS = 32

# NLL sums (or those of another objective) by the pattern's letters, one for each sequence of a set.
Sums = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Move:
    """The indexer goes from one layer, F until now, to another, S until now; `letters` is the pattern behind it."""

    from_layer: int
    to_layer: int
    letters: str

    @property
    def distance(self) -> int:
        return abs(self.from_layer - self.to_layer)


@dataclass(frozen=True)
class Question:
    """Patterns to be scored on all calibration sequences, or on all held-out ones: the present one, then moves."""

    patterns: tuple[Pattern, ...]
    heldout: bool


@dataclass(frozen=True)
class Judged:
    """What the calibration sequences said: all moves of a question, and those that qualified, best first."""

    before: str
    moves: tuple[Move, ...]
    qualified: tuple[Move, ...]


@dataclass(frozen=True)
class Decided:
    """What the held-out sequences said of one move, beside its difference on the calibration sequences."""

    before: str
    move: Move
    difference: Difference
    heldout: Difference

    @property
    def made(self) -> bool:
        return confirms(self.heldout)


Outcome = Judged | Decided


def qualifies(difference: Difference) -> bool:
    """True where a move gains enough on the calibration sequences; never for a single one, which has no error."""
    return difference.delta < -QUALIFY_ERRORS * difference.std_err


def confirms(heldout: Difference) -> bool:
    """True where a move gains enough on the held-out sequences; never for a single one, which has no error."""
    return heldout.delta < -CONFIRM_ERRORS * heldout.std_err


def moves_of(pattern: Pattern, fixed: frozenset[int], native: frozenset[int]) -> list[Move]:
    """Every exchange of an F layer outside `fixed` and 0 with an S layer outside `native`, which have no indexer."""
    givers = [layer for layer in pattern.full_layers if layer not in fixed | {0}]
    takers = [layer for layer in pattern.shared_layers if layer not in native]
    return [_move(pattern, giver, taker) for giver in givers for taker in takers]


def _move(pattern: Pattern, from_layer: int, to_layer: int) -> Move:
    full = set(pattern.full_layers) - {from_layer} | {to_layer}
    return Move(from_layer, to_layer, Pattern.from_full_layers(full, len(pattern)).letters)


def in_order(moves: Sequence[Move], costs: Mapping[int, float], size: int) -> list[tuple[Move, ...]]:
    """The moves in the order of being scored: all shifts together, then the exchanges, `size` at a time.

    Exchanges are in order of promise: sharing the one layer and freeing the other would gain
    costs[to_layer] - costs[from_layer], did layers not interact. They do, so this orders and leaves nothing out.
    """
    shifts = sorted((m for m in moves if m.distance <= SHIFT_REACH), key=lambda m: (m.distance, _place(m)))
    exchanges = sorted(
        (m for m in moves if m.distance > SHIFT_REACH),
        key=lambda m: (costs.get(m.from_layer, 0.0) - costs.get(m.to_layer, 0.0), _place(m)),
    )
    chunks = [tuple(exchanges[first : first + size]) for first in range(0, len(exchanges), size)]
    return [tuple(shifts), *chunks] if shifts else chunks


def _place(move: Move) -> tuple[int, int]:
    return move.from_layer, move.to_layer


class Swaps:
    """The refinement as ask and tell. It sees sums per sequence, never a model.

    `fixed` are the F layers that stay F, `native` the S layers without an indexer, `costs` what sharing each layer
    cost in the search (nats per token, where it is known). `tokens` and `heldout_tokens` are the counted tokens of
    each sequence. As many exchanges are scored together as there are layers: as in a step of greedy, whatever
    memory there is, so that the outcome does not hang on it.
    """

    def __init__(
        self,
        start: Pattern,
        fixed: frozenset[int],
        native: frozenset[int],
        tokens: Sequence[int],
        heldout_tokens: Sequence[int],
        costs: Mapping[int, float],
    ) -> None:
        self.pattern = start
        self.swaps = 0
        self._fixed, self._native, self._costs = fixed, native, dict(costs)
        self._tokens, self._heldout_tokens = tokens, heldout_tokens
        self._groups: list[tuple[Move, ...]] = []
        self._qualified: list[tuple[Difference, Move]] = []
        self._begin_round()

    def ask(self) -> Question | None:
        """What to score next; None once no move is left that could qualify."""
        if self._qualified:
            _, best = self._qualified[0]
            return Question((self.pattern, Pattern(best.letters)), heldout=True)
        if not self._groups:
            return None
        return Question((self.pattern, *(Pattern(move.letters) for move in self._groups[0])), heldout=False)

    def tell(self, sums: Sums) -> Outcome:
        """Take the sums of all patterns asked for, and say what follows from them."""
        return self._decide(sums) if self._qualified else self._judge(sums)

    def _judge(self, sums: Sums) -> Judged:
        moves = self._groups.pop(0)
        present = sums[self.pattern.letters]
        differences = [(paired_difference(sums[m.letters], present, self._tokens), m) for m in moves]
        self._qualified = sorted(
            (pair for pair in differences if qualifies(pair[0])), key=lambda pair: (pair[0].delta, _place(pair[1]))
        )
        return Judged(self.pattern.letters, moves, tuple(move for _, move in self._qualified))

    def _decide(self, sums: Sums) -> Decided:
        difference, move = self._qualified.pop(0)
        before = self.pattern.letters
        heldout = paired_difference(sums[move.letters], sums[before], self._heldout_tokens)
        decided = Decided(before, move, difference, heldout)
        if decided.made:
            self.pattern, self.swaps = Pattern(move.letters), self.swaps + 1
            self._begin_round()
        return decided

    def _begin_round(self) -> None:
        done = self.swaps == MAX_SWAPS
        moves = [] if done else moves_of(self.pattern, self._fixed, self._native)
        self._groups = in_order(moves, self._costs, len(self.pattern))
        self._qualified = []
