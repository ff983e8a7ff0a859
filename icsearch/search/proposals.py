"""What a run's second-order table, corrected by all that the run has measured so far, has to propose. Numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from icsearch.core.pattern import Pattern
from icsearch.runs.fisher_file import arrays_of
from icsearch.runs.journal import Event
from icsearch.runs.record import RunRecord
from icsearch.search.protocol import KL, LOSS
from icsearch.search.second_order import SMALLEST, PatternSearch, SecondOrderTable, correction


class Proposals:
    """What the table of a run, corrected by all that was measured so far, has to propose."""

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._table = table_of(record)
        self._objective = KL if record.by_kl else LOSS
        self._flips = record.start["options"]["num_shared"]
        self._kept = len(record.start_pattern.full_layers) - self._flips

    def path(self) -> list[Pattern]:
        """The nested path."""
        return self._search().path(self._flips)

    def finalists(self, count: int) -> list[Pattern]:
        """Patterns to measure, by the objective: local optima first."""
        ranked = (pattern for _, pattern in self._search().best(self._kept, [self.best]))
        return list(islice((each for each in ranked if each.letters not in self._record.nll), count))

    def gain(self, rounds: int) -> float:
        """The part of its cost by which the last rounds have made the best pattern cheaper."""
        latest = {letters for some in self._record.proposals[-rounds:] for letters in some}
        before = next(pattern for pattern in self.measured() if pattern.letters not in latest)
        cheaper = self._record.objective.difference(before.letters, self.best.letters).delta
        cost = self._record.objective.difference(before.letters, self._record.start_pattern.letters).delta
        return cheaper / max(abs(cost), SMALLEST)

    def event(self, patterns: Sequence[Pattern]) -> Event:
        """The event that proposes these patterns."""
        letters = [pattern.letters for pattern in patterns]
        return {"event": "proposed", "round": len(self._record.proposals), "patterns": letters}

    @property
    def best(self) -> Pattern:
        """The best that was measured of the budget asked for."""
        return self.measured()[0]

    def measured(self) -> list[Pattern]:
        """All of the budget asked for that were measured and may be run, the best first."""
        return self._record.ranked(each for each in self._record.measured() if len(each.full_layers) == self._kept)

    def _search(self) -> PatternSearch:
        record = self._record
        numbers = correction(self._table, record.start_pattern, measured_prices(record))
        return PatternSearch(self._table, record.start_pattern, record.stay_full, self._objective, numbers)


def table_of(record: RunRecord) -> SecondOrderTable:
    """The second-order table of a journal that holds all of it."""
    return SecondOrderTable(**arrays_of(record), tokens=record.tokens)


def measured_prices(record: RunRecord) -> dict[Pattern, tuple[float, float]]:
    """Loss above the start pattern's and KL, in nats per token, of every pattern that was scored on all sequences."""
    start = record.start_pattern.letters
    return {
        Pattern(letters): (record.difference(letters).delta, record.kl.loss(letters))
        for letters in record.nll
        if letters != start and record.nll.is_complete(letters)
    }
