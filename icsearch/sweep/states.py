"""States kept between the steps of a search, so that a branch goes on where it was left, not at the embedding.

A branch's state at the entry of a decoder layer follows from the batch and from the letters of the layers before it,
and from nothing else: the same shapes, the same operations, the same bits. After committing layer w, the new trunk's
states are those of the winner's branch. A candidate below w is unchanged up to w, and goes on from there; one above w
forks off the new trunk, which is known as a whole. With everything kept, the next step takes the layer runs

    sum over candidates c < w of (N - w)  +  sum over candidates c > w of (N - c).

Kept are the states at every `stride`-th layer entry, on the way to the committed pattern (the base) or to the base
with one more flip. What is kept changes the cost of a run, never its bits. No torch here: a state is any object.

Words, here and in `model` and `planning`: the weights of decoder layers are *held* by a process, on its device or
*offloaded* to CPU memory or disk. Branch states are *kept* between the steps of a search; within a sweep they have
their *place* between two layer calls, the device or CPU memory. What a layer gives to later ones is *handed on*.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from icsearch.core.pattern import FULL, SHARED, Pattern

T = TypeVar("T")


@dataclass(frozen=True)
class LayerRuns:
    """How often one sweep runs each decoder layer, by role: with its own indexer, and with a selection from before."""

    full: tuple[int, ...]
    shared: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.full) + sum(self.shared)


@dataclass(frozen=True)
class Keeping:
    """What to keep: the entries of the decoder layers `stride`, 2 `stride`, ... (0: none), for flips of `flippable`.

    `layer_indices[position]` is the decoder layer of each DSA layer, of `num_layers` decoder layers.
    """

    num_layers: int
    layer_indices: tuple[int, ...]
    flippable: frozenset[int] = frozenset()
    stride: int = 0

    @property
    def entries(self) -> range:
        """The decoder layers at whose entry states are kept. Layer 0 needs none: it starts at the embedding."""
        return range(self.stride, self.num_layers, self.stride) if self.stride else range(0)

    def states_in(self, layers: range) -> int:
        """How many states of one batch there can be at once at the entries of these decoder layers.

        The base's, and those of each flip behind its layer.
        """
        flips = [self.layer_indices[layer] for layer in self.flippable]
        entries = [entry for entry in self.entries if entry in layers]
        return sum(1 + sum(1 for layer in flips if layer < entry) for entry in entries)

    def letters_before(self, pattern: Pattern, entry: int) -> str:
        """The letters that the state at the entry of a decoder layer follows from."""
        return pattern.letters[: bisect_left(self.layer_indices, entry)]

    def useful(self, base: Pattern) -> frozenset[str]:
        """All beginnings of the base and of the base with one more flip."""
        letters = base.letters
        flips = [letters[:c] + SHARED + letters[c + 1 :] for c in self.flippable if base.is_full(c)]
        return frozenset(flipped[:length] for flipped in (letters, *flips) for length in range(len(letters) + 1))


class StateStore(Generic[T]):
    """States by batch (its first sequence), layer entry and the letters before it; never more than `budget` bytes."""

    def __init__(self, keeping: Keeping, base: Pattern, budget: int = 0) -> None:
        self.keeping = keeping
        self.budget = budget
        self.bytes = 0
        self._states: dict[tuple[int, int, str], tuple[T, int]] = {}
        self._base = base
        self._useful = keeping.useful(base)

    def __len__(self) -> int:
        return len(self._states)

    def retain(self, base: Pattern) -> None:
        """Let go of what cannot be on the way to `base`, or to `base` with one more flip, any longer."""
        if base == self._base:
            return
        self._base, self._useful = base, self.keeping.useful(base)
        self._states = {node: sized for node, sized in self._states.items() if node[2] in self._useful}
        self.bytes = sum(size for _, size in self._states.values())

    def shrink(self) -> int:
        """Let go of every state, and keep half as much from here on; returns the bytes that are free now."""
        freed = self.bytes
        self._states, self.bytes, self.budget = {}, 0, freed // 2
        return freed

    def wants(self, batch: int, entry: int, letters: str) -> bool:
        """True for a state that is worth keeping and is not there yet."""
        return entry in self.keeping.entries and letters in self._useful and (batch, entry, letters) not in self._states

    def put(self, batch: int, entry: int, letters: str, state: T, size: int) -> None:
        """Keep a state of so many bytes, if it is wanted and there is room."""
        if self.wants(batch, entry, letters) and self.bytes + size <= self.budget:
            self._states[batch, entry, letters] = state, size
            self.bytes += size

    def get(self, batch: int, entry: int, letters: str) -> T:
        """The state at an entry that `start` named."""
        return self._states[batch, entry, letters][0]

    def start(self, pattern: Pattern, batches: Sequence[int]) -> int:
        """The deepest entry on the pattern's way where the states of all these batches are kept; 0 if there is none."""
        for entry in reversed(self.keeping.entries):
            letters = self.keeping.letters_before(pattern, entry)
            if all((batch, entry, letters) in self._states for batch in batches):
                return entry
        return 0

    def rehearsal(self) -> Rehearsal:
        """What sweeps would take from here on; this store stays as it is."""
        rehearsal = Rehearsal(self.keeping, self._base)
        rehearsal._states = dict.fromkeys(self._states, (None, 0))
        return rehearsal


class Rehearsal(StateStore[None]):
    """A store of keys alone, that counts what sweeps take without running them."""

    def sweep(self, patterns: Iterable[Pattern], batches: Sequence[int]) -> int:
        """Layer runs of one sweep: the nodes of the patterns' tree of prefixes behind what is kept by now."""
        return self.runs(patterns, batches).total

    def runs(self, patterns: Iterable[Pattern], batches: Sequence[int]) -> LayerRuns:
        """The layer runs of one sweep, decoder layer by decoder layer."""
        nodes = {
            (index, self.keeping.letters_before(pattern, index + 1))
            for pattern in patterns
            for index in range(self.start(pattern, batches), self.keeping.num_layers)
        }
        full, shared = [0] * self.keeping.num_layers, [0] * self.keeping.num_layers
        indexed = set(self.keeping.layer_indices)
        for index, letters in nodes:
            runs = full if index in indexed and letters[-1] == FULL else shared
            runs[index] += 1
            for batch in batches:
                self.put(batch, index + 1, letters, None, 0)
        return LayerRuns(tuple(full), tuple(shared))
