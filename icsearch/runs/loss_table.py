"""A table of summed losses by pattern and sequence, and the means and paired differences that follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from icsearch.errors import JournalError
from icsearch.statistics import Difference, mean_loss, paired_difference


class LossTable(Mapping[str, Mapping[int, float]]):
    """`table[letters][sequence]` is the NLL or the KL of one sequence, summed over its counted tokens, in nats.

    `tokens` are the counted tokens of each sequence. What is asked of a pattern that was not scored on the sequences
    in question raises JournalError.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens = tuple(tokens)
        self._sums: dict[str, dict[int, float]] = {}

    def __getitem__(self, letters: str) -> Mapping[int, float]:
        return self._sums[letters]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def __repr__(self) -> str:
        return f"LossTable({self._sums!r})"

    def add(self, letters: str, first: int, sums: Sequence[float]) -> None:
        """Take in the sums of the sequences from `first` on."""
        self._sums.setdefault(letters, {}).update(enumerate(sums, start=first))

    def known_sequences(self, letters: str) -> int:
        """How many sequences a pattern was scored on, from the first one on without a gap."""
        known = self._sums.get(letters, {})
        return next(n for n in range(len(known) + 1) if n not in known)

    def is_complete(self, letters: str) -> bool:
        """Whether the pattern was scored on every sequence."""
        return len(self._sums.get(letters, ())) == len(self._tokens)

    def sums(self, letters: str, first: int = 0, last: int | None = None) -> list[float]:
        """The sums of the sequences [first, last), by default all, in order."""
        known = self._sums.get(letters, {})
        wanted = range(first, len(self._tokens) if last is None else last)
        if not all(sequence in known for sequence in wanted):
            raise JournalError(f"the journal has no complete loss of {letters}: continue the run first")
        return [known[sequence] for sequence in wanted]

    def loss(self, letters: str) -> float:
        """Nats per token over all sequences."""
        return mean_loss(self.sums(letters), self._tokens)

    def mean(self, letters: str) -> Difference:
        """As `loss`, with its standard error over sequences."""
        sums = self.sums(letters)
        return paired_difference(sums, [0.0] * len(sums), self._tokens)

    def difference(self, letters: str, reference: str) -> Difference:
        """The pattern's loss minus that of `reference`, paired over all sequences."""
        return paired_difference(self.sums(letters), self.sums(reference), self._tokens)

    def known_loss(self, letters: str, most: int | None = None) -> float:
        """Nats per token over the first sequences, as many as the pattern was scored on (at least one) or `most`."""
        known = self._known_up_to(most, letters)
        return mean_loss(self.sums(letters, 0, known), self._tokens[:known])

    def known_difference(self, letters: str, reference: str, most: int | None = None) -> Difference:
        """As `difference`, over the first sequences, as many as both patterns were scored on, and at most `most`."""
        common = self._known_up_to(most, letters, reference)
        if not common:
            raise JournalError(f"the journal lacks losses of {letters} or {reference}: continue the run first")
        own, others = (self.sums(name, 0, common) for name in (letters, reference))
        return paired_difference(own, others, self._tokens[:common])

    def _known_up_to(self, most: int | None, *patterns: str) -> int:
        """How many of the first sequences all of these patterns were scored on, and at most `most`."""
        known = [self.known_sequences(letters) for letters in patterns]
        return min(known if most is None else [*known, most])
