"""The search loop: the only place where a strategy asks for losses; each is journaled, and nothing is scored twice."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from icsearch.core.errors import JournalError, OutOfMemoryError, PatternError
from icsearch.core.pattern import Pattern
from icsearch.core.text import shrunk_note
from icsearch.runs.journal import Event, Journal
from icsearch.runs.record import Choice, RunRecord
from icsearch.runs.refinement import CALIBRATION_SET, HELDOUT_SET, Refinement
from icsearch.search.protocol import Strategy
from icsearch.search.swaps import Judged, Move, Outcome, Question, Swaps


@dataclass(frozen=True)
class Scores:
    """Losses of one sweep: `nll[letters]` per sequence of the wave, in nats, and the layer runs x sequences.

    `notes` is what the reader of the report should know, such as a kernel without a deterministic form; `kl` is as
    `nll`, of the KL to the unmodified model, where the objective needs it; `weight_bytes` is what was read of weights.
    """

    nll: dict[str, list[float]]
    layer_sequences: int
    notes: tuple[str, ...] = ()
    kl: dict[str, list[float]] = field(default_factory=dict)
    weight_bytes: int = 0


class Scorer(Protocol):
    """Whatever can score patterns; in the product, the layer sweep over a model."""

    @property
    def waves(self) -> Sequence[tuple[int, int]]:
        """Ranges [first, last) of sequences that are scored together."""

    @property
    def patterns_per_sweep(self) -> int:
        """How many patterns may be scored together."""

    def retain(self, base: Pattern) -> None:
        """Hear the committed pattern: what was kept for flips of another one may go."""

    def expected(self, work: Sequence[tuple[Sequence[Pattern], tuple[int, int]]]) -> int:
        """Layer runs x sequences that scoring these patterns on these waves, in this order, will take."""

    def announce(self, work: Sequence[tuple[Sequence[Pattern], tuple[int, int]]]) -> None:
        """Hear what `score` will be asked for next, in this order: several processes get their work ahead."""

    def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Callable[[int], None]) -> Scores:
        """Score every pattern on the sequences of one wave. Raises OutOfMemoryError."""

    def shrink(self, patterns: int) -> bool:
        """Plan for less, after memory ran out over so many patterns; False where the plan cannot be smaller."""


class Progress(Protocol):
    """Hears what a run is about to do, and how far it is. It changes nothing."""

    def info(self, text: str) -> None: ...

    def planned(self, rows: Sequence[tuple[str, str]], layer_sequences: int, done: int) -> None: ...

    def step_started(self, step: int | str, patterns: int, layer_sequences: int) -> None: ...

    def layer_done(self, layer_sequences: int) -> None: ...

    def losses_known(self, record: RunRecord, step: int | str) -> None: ...

    def committed(self, record: RunRecord) -> None: ...

    def tried(self, record: RunRecord) -> None: ...


class Scoring:
    """Scores what a journal does not hold yet; every event is on disk before it counts.

    `part` marks the losses that a refinement asks for: on the calibration sequences, or on its held-out ones.
    """

    def __init__(
        self,
        journal: Journal,
        record: RunRecord,
        scorer: Scorer,
        progress: Progress,
        part: str | None = None,
    ) -> None:
        self.journal = journal
        self.record = record
        self.progress = progress
        self._scorer = scorer
        self._part = part

    def of(self, part: str, scorer: Scorer | None = None) -> Scoring:
        """The same run's scoring of one part of its refinement, by another scorer where its sequences are others."""
        return Scoring(self.journal, self.record, scorer or self._scorer, self.progress, part)

    @property
    def losses(self) -> RunRecord:
        """Where the losses of the sequences that are scored here are found."""
        heldout = self.record.heldout
        return heldout if heldout is not None and self._part == HELDOUT_SET else self.record

    def append(self, event: Event) -> None:
        """Write an event that fits, then let the record take it in; one that does not fit is never on disk."""
        try:
            self.record.check(event)
        except (ValueError, PatternError) as error:
            raise JournalError(
                f"{self.journal.path} cannot take its next event, a {event['event']} ({error}): the journal was "
                "changed or damaged; restore it, or start over with --fresh"
            ) from None
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
        self._scorer.retain(self.record.pattern)
        self.progress.step_started(self._part or step, len(patterns), self._scorer.expected(work))
        self._scorer.announce(work)
        for chunk, wave in work:
            started = time.monotonic()
            scores = self._scores(chunk, wave)
            if scores is None:
                self.score(step, patterns)  # by the smaller plan, what is still missing
                return
            event = _losses_event(step, chunk, wave, scores, time.monotonic() - started)
            self.append(event if self._part is None else {**event, "set": self._part})
            self.note(scores.notes)
            self.progress.losses_known(self.record, self._part or step)

    def _scores(self, chunk: list[Pattern], wave: tuple[int, int]) -> Scores | None:
        """One sweep; None where memory ran out and the plan is smaller now. Raises OutOfMemoryError where it cannot be.

        The bits do not follow from how many patterns run at once, nor from what is kept: the losses stay the same.
        """
        try:
            return self._scorer.score(chunk, wave, self.progress.layer_done)
        except OutOfMemoryError:
            if not self._scorer.shrink(len(chunk)):
                raise
        gc.collect()  # the failed sweep is let go of here, not while its error is still handled
        text = shrunk_note(len(chunk), self._scorer.patterns_per_sweep)
        self.progress.info(text)
        self.note([text])
        return None

    def note(self, texts: Sequence[str]) -> None:
        """Keep what the reader of the report should know, once."""
        for text in dict.fromkeys(texts):
            if text not in self.record.notes:
                self.append({"event": "note", "text": text})

    def _missing(self, patterns: list[Pattern], wave: tuple[int, int]) -> list[Pattern]:
        first, last = wave
        known = self.losses.nll
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

    def run(self, then: Callable[[], object] = lambda: None) -> RunRecord:
        """Search to the end; `then` is what the run does before it is finished, such as a refinement."""
        self._scoring.score_references()
        step = 1
        while layers := self._strategy.ask():
            flips = {layer: self._strategy.pattern.flip(layer) for layer in layers}
            self._scoring.score(step, list(flips.values()))
            sums = {layer: self._record.objective.sums(pattern.letters) for layer, pattern in flips.items()}
            self._commit(self._strategy.tell(sums))
            step += 1
        then()
        if not self._record.finished:
            self._scoring.append({"event": "finish", "pattern": self._record.pattern.letters})
        return self._record

    def _commit(self, choice: Choice) -> None:
        """Journal a flip, or check that it is what the journal says: what follows from the losses, so without ties."""
        if choice.step > len(self._record.commits):
            self._scoring.append(choice.to_event())
            self._scoring.progress.committed(self._record)
            return
        recorded = self._record.commits[choice.step - 1]
        for name in ("layer", "pattern", "candidates"):
            said, found = getattr(recorded, name), getattr(choice, name)
            if said != found:
                raise JournalError(
                    f"{self._scoring.journal.path} committed {name} {_shown(said)} in step {recorded.step}, but its "
                    f"losses say {_shown(found)}: the journal was changed or damaged; restore it, or start over with "
                    "--fresh"
                )


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _losses_event(
    step: int, patterns: Sequence[Pattern], wave: tuple[int, int], scores: Scores, seconds: float
) -> Event:
    return {
        "event": "losses",
        "step": step,
        "sequences": list(wave),
        "patterns": [pattern.letters for pattern in patterns],
        "nll": [scores.nll[pattern.letters] for pattern in patterns],
        **({"kl": [scores.kl[pattern.letters] for pattern in patterns]} if scores.kl else {}),
        "layer_sequences": scores.layer_sequences,
        "seconds": round(seconds, 3),
        **({"weight_bytes": scores.weight_bytes} if scores.weight_bytes else {}),
    }


class SwapRefinement:
    """The refinement of one run, from the journal's state to the end; `heldout` scores the held-out sequences."""

    def __init__(self, scoring: Scoring, heldout: Scorer) -> None:
        self._scoring = scoring
        self._record = scoring.record
        self._sets = {False: scoring.of(CALIBRATION_SET), True: scoring.of(HELDOUT_SET, heldout)}

    def run(self) -> None:
        """Make swaps until none is left to make. The search must be at its end."""
        refinement = self._begin()
        self._score(True, [refinement.start])  # for the report, also where no move comes so far
        swaps = make_swaps(self._record, refinement)
        number = 0
        while question := swaps.ask():
            self._score(question.heldout, sorted(question.patterns, key=str))  # neighbours share their first layers
            outcome = swaps.tell(self._sums(question))
            self._take_in(number, outcome, refinement)
            number += 1

    def _begin(self) -> Refinement:
        record = self._record
        if record.refinement is None:
            costs = sharing_costs(record)
            event = {"event": "refine", "pattern": record.searched.letters}
            self._scoring.append({**event, "costs": [costs.get(layer) for layer in range(len(record.start_pattern))]})
        if record.refinement is None or record.heldout is None:
            raise JournalError(f"{self._scoring.journal.path} has no held-out sequences: start over with --fresh")
        return record.refinement

    def _score(self, heldout: bool, patterns: list[Pattern]) -> None:
        self._sets[heldout].score(len(self._record.commits), patterns)

    def _sums(self, question: Question) -> dict[str, list[float]]:
        losses = self._sets[question.heldout].losses
        return {p.letters: losses.objective.sums(p.letters) for p in question.patterns}

    def _take_in(self, number: int, outcome: Outcome, refinement: Refinement) -> None:
        """Journal what follows from the losses, or check that it is what the journal says."""
        event = event_of(outcome)
        if number < len(refinement.outcomes):
            if refinement.outcomes[number] != event:
                raise JournalError(
                    f"{self._scoring.journal.path} says {_short(refinement.outcomes[number])} in its refinement, but "
                    f"its losses say {_short(event)}: the journal was changed or damaged; restore it, or start over "
                    "with --fresh"
                )
            return
        self._scoring.append(event)
        if event["event"] != "judged":
            self._scoring.progress.tried(self._record)


def make_swaps(record: RunRecord, refinement: Refinement) -> Swaps:
    """The swaps of a run, at their beginning: what stays F and what has no indexer are the search's."""
    start = record.start
    blocks = start.get("blocks") or []
    return Swaps(
        refinement.start,
        fixed=frozenset(start["options"]["keep_full"]) | {first for first, _ in blocks},
        native=frozenset(record.start_pattern.shared_layers),
        tokens=record.tokens,
        heldout_tokens=record.heldout.tokens if record.heldout else (),
        costs={layer: cost for layer, cost in enumerate(refinement.costs) if cost is not None},
    )


def sharing_costs(record: RunRecord) -> dict[int, float]:
    """What sharing each layer cost when the search last looked at it, in nats per token, as far as it is known."""
    costs = {}
    for commit in record.commits:
        before = record.before(commit.step).letters
        for candidate in record.candidates(commit.step):
            costs[candidate.layer] = record.objective.difference(candidate.pattern, before).delta
    return costs


def event_of(outcome: Outcome) -> Event:
    """An outcome as the journal has it."""
    if isinstance(outcome, Judged):
        moves = {"moves": _pairs(outcome.moves), "qualified": _pairs(outcome.qualified)}
        return {"event": "judged", "pattern": outcome.before, **moves}
    return {
        "event": "swap" if outcome.made else "refused",
        "before": outcome.before,
        "from_layer": outcome.move.from_layer,
        "to_layer": outcome.move.to_layer,
        "pattern": outcome.move.letters,
        "delta": outcome.difference.delta,
        "std_err": outcome.difference.std_err,
        "heldout_delta": outcome.heldout.delta,
        "heldout_std_err": outcome.heldout.std_err,
    }


def _pairs(moves: tuple[Move, ...]) -> list[list[int]]:
    return [[move.from_layer, move.to_layer] for move in moves]


def _short(event: Event) -> str:
    qualified = f" with {len(event['qualified'])} qualified" if event["event"] == "judged" else ""
    return f"{event['event']} {event['pattern']}{qualified}"
