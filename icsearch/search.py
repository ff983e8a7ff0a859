"""The loop that joins sweep, strategy and journal: the only place where a strategy asks for more losses.

Live and resumed runs share one path. The strategy is always played from the start; what the journal already
holds is not scored again, and what it committed must be what the strategy commits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from icsearch.errors import JournalError
from icsearch.journal import Event, Journal
from icsearch.pattern import Pattern
from icsearch.record import RunRecord
from icsearch.strategies import Strategy


@dataclass(frozen=True)
class Scores:
    """Losses of one sweep: `nll[letters]` per sequence of the wave, in nats, and the layer runs x sequences.

    `notes` is what the reader of the report should know, such as a kernel without a deterministic form.
    """

    nll: dict[str, list[float]]
    layer_sequences: int
    notes: tuple[str, ...] = ()


class Scorer(Protocol):
    """Whatever can score patterns; in the product, the layer sweep over a model."""

    @property
    def waves(self) -> Sequence[tuple[int, int]]:
        """Ranges [first, last) of sequences that are scored together."""

    @property
    def patterns_per_sweep(self) -> int:
        """How many patterns may be scored together."""

    def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Callable[[int], None]) -> Scores:
        """Score every pattern on the sequences of one wave."""


class Progress(Protocol):
    """Hears what a run is about to do, and how far it is. It changes nothing."""

    def info(self, text: str) -> None: ...

    def planned(self, rows: Sequence[tuple[str, str]], layer_sequences: int, done: int) -> None: ...

    def step_started(self, step: int, patterns: int, layer_sequences: int) -> None: ...

    def layer_done(self, layer_sequences: int) -> None: ...

    def losses_known(self, record: RunRecord, step: int) -> None: ...

    def committed(self, record: RunRecord) -> None: ...


class Scoring:
    """Scores what a journal does not hold yet; every event is on disk before it counts."""

    def __init__(
        self,
        journal: Journal,
        record: RunRecord,
        scorer: Scorer,
        progress: Progress,
        count_layer_runs: Callable[[Sequence[Pattern]], int],
    ) -> None:
        self.journal = journal
        self.record = record
        self.progress = progress
        self._scorer = scorer
        self._count_layer_runs = count_layer_runs

    def append(self, event: Event) -> None:
        """Write an event, then let the record take it in."""
        self.journal.append(event)
        self.record.apply(event)

    def score_references(self, *more: Pattern) -> None:
        """Step 0: the start pattern, the references, and whatever else is to be compared."""
        references = [Pattern(letters) for letters in self.record.references.values()]
        self.score(0, list(dict.fromkeys([self.record.start_pattern, *references, *more])))

    def score(self, step: int, patterns: list[Pattern]) -> None:
        """Score what is missing of these patterns, wave by wave, and journal each sweep as it ends."""
        missing = {wave: self._missing(patterns, wave) for wave in self._scorer.waves}
        work = [(chunk, wave) for wave, left in missing.items() for chunk in self._chunks(left)]
        if not work:
            return
        expected = sum(self._count_layer_runs(chunk) * (wave[1] - wave[0]) for chunk, wave in work)
        self.progress.step_started(step, len(patterns), expected)
        for chunk, wave in work:
            started = time.monotonic()
            scores = self._scorer.score(chunk, wave, self.progress.layer_done)
            self.append(_losses_event(step, chunk, wave, scores, time.monotonic() - started))
            self.note(scores.notes)
            self.progress.losses_known(self.record, step)

    def note(self, texts: Sequence[str]) -> None:
        """Keep what the reader of the report should know, once."""
        for text in dict.fromkeys(texts):
            if text not in self.record.notes:
                self.append({"event": "note", "text": text})

    def _missing(self, patterns: list[Pattern], wave: tuple[int, int]) -> list[Pattern]:
        first, last = wave
        known = self.record.nll
        return [p for p in patterns if any(s not in known.get(p.letters, {}) for s in range(first, last))]

    def _chunks(self, patterns: list[Pattern]) -> list[list[Pattern]]:
        size = self._scorer.patterns_per_sweep
        return [patterns[start : start + size] for start in range(0, len(patterns), size)]


class Search:
    """One run of a strategy, from the journal's state to the end."""

    def __init__(self, scoring: Scoring, strategy: Strategy) -> None:
        self._scoring = scoring
        self._record = scoring.record
        self._strategy = strategy

    def run(self) -> RunRecord:
        """Search to the end."""
        self._scoring.score_references()
        step = 0
        while layers := self._strategy.ask():
            step += 1
            self._step(step, layers)
        if not self._record.finished:
            self._scoring.append({"event": "finish", "pattern": self._record.pattern.letters})
        return self._record

    def _step(self, step: int, layers: Sequence[int]) -> None:
        flips = {layer: self._strategy.pattern.flip(layer) for layer in layers}
        self._scoring.score(step, list(flips.values()))
        losses = {layer: self._record.loss(pattern.letters) for layer, pattern in flips.items()}
        winner = self._strategy.tell(losses)
        if step <= len(self._record.commits):
            self._check_replay(step, winner)
            return
        self._scoring.append(
            {
                "event": "commit",
                "step": step,
                "layer": winner,
                "pattern": flips[winner].letters,
                "candidates": sorted(flips),
                "ties": self._ties(winner, flips),
            }
        )
        self._scoring.progress.committed(self._record)

    def _ties(self, winner: int, flips: dict[int, Pattern]) -> list[int]:
        """The layers whose loss differs from the winner's by no more than one paired standard error."""
        best = flips[winner].letters
        others = {layer: pattern.letters for layer, pattern in flips.items() if layer != winner}
        return [layer for layer, letters in others.items() if self._record.difference(letters, best).is_tie]

    def _check_replay(self, step: int, winner: int) -> None:
        recorded = self._record.commits[step - 1]
        if recorded.layer != winner:
            raise JournalError(
                f"{self._scoring.journal.path} committed layer {recorded.layer} in step {step}, but its losses say "
                f"{winner}: the journal was changed or damaged; restore it, or start over with --fresh"
            )


def _losses_event(
    step: int, patterns: Sequence[Pattern], wave: tuple[int, int], scores: Scores, seconds: float
) -> Event:
    return {
        "event": "losses",
        "step": step,
        "sequences": list(wave),
        "patterns": [pattern.letters for pattern in patterns],
        "nll": [scores.nll[pattern.letters] for pattern in patterns],
        "layer_sequences": scores.layer_sequences,
        "seconds": round(seconds, 3),
    }
