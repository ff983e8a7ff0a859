"""The search loop: the only place where a strategy asks for losses; each is journaled, and nothing is scored twice.

What a run finds, of whatever kind, is journaled by `Run`; `Scoring` has it score the patterns that it lacks.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic, Protocol

from icsearch.core.errors import JournalError, OutOfMemoryError, PatternError
from icsearch.core.pattern import Pattern
from icsearch.core.text import shrunk_note
from icsearch.runs.journal import Event, Journal, RecordT
from icsearch.runs.record import Choice, RunRecord
from icsearch.runs.refinement import CALIBRATION_SET, HELDOUT_SET, Refinement
from icsearch.search.proposals import Proposals
from icsearch.search.protocol import Strategy
from icsearch.search.swaps import Judged, Outcome, Swaps

CONFIRMED = 4  # patterns that held-out sequences choose among
PATIENCE = 2  # rounds of finalists that find nothing much better end a search: a first one that fails teaches the table
MUCH = 0.05  # of what the best pattern costs: less is within the errors of any calibration


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

    waves: Sequence[tuple[int, int]]  # ranges [first, last) of sequences that are scored together
    patterns_per_sweep: int  # how many patterns may be scored together

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


class Progress:
    """Hears what a run is about to do, and how far it is, and changes nothing. This one keeps silent."""

    def info(self, text: str) -> None: ...

    def planned(self, rows: Sequence[tuple[str, str]], layer_sequences: int, done: int) -> None: ...

    def step_started(self, step: int | str, patterns: int, layer_sequences: int) -> None: ...

    def layer_done(self, layer_sequences: int) -> None: ...

    def losses_known(self, record: RunRecord, step: int | str) -> None: ...

    def committed(self, record: RunRecord) -> None: ...

    def tried(self, record: RunRecord) -> None: ...


class Run(Generic[RecordT]):
    """A run at work: its journal, the record of what is in it, and whoever watches."""

    def __init__(self, journal: Journal, record: RecordT, progress: Progress) -> None:
        self.journal = journal
        self.record = record
        self.progress = progress

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

    def note(self, texts: Sequence[str], tell: bool = False) -> None:
        """Keep what the reader of the report should know, once; `tell` whoever watches as well."""
        for text in dict.fromkeys(texts):
            if text not in self.record.notes:
                self.append({"event": "note", "text": text})
                if tell:
                    self.progress.info(text)

    def fill(self, missing: Callable[[], Iterator[Event]], shrink: Callable[[], str] = lambda: "") -> None:
        """Journal each event as it comes from `missing`, which finds what the record lacks.

        Where memory runs out, `shrink` plans for less and says so, and `missing` begins anew behind what is journaled;
        OutOfMemoryError where it says nothing. Bits do not follow from how much runs at once: losses stay the same.
        """
        while True:
            try:
                for event in missing():
                    self.append(event)
                return
            except OutOfMemoryError:
                if not (text := shrink()):
                    raise
            gc.collect()  # the failed sweep is let go of here, not while its error is still handled
            self.note([text], tell=True)

    def follow(self, what: str, event: Event, said: Event | None) -> bool:
        """Journal what follows from the losses; where the journal has `said` what did, check that it is the same.

        Ties are left out: they are for the reader, and nothing follows from them. True where it is new.
        """
        if said is None:
            self.append(event)
            return True
        for name, found in event.items():
            if said[name] != found and name != "ties":
                raise JournalError(
                    f"{self.journal.path} says {name} {said[name]} in {what}, but its losses say {found}: the journal "
                    "was changed or damaged; restore it, or start over with --fresh"
                )
        return False


class Scoring(Run[RunRecord]):
    """Scores what a search's journal does not hold yet.

    `part` marks the losses that a refinement asks for: on the calibration sequences, or on its held-out ones.
    """

    def __init__(
        self, journal: Journal, record: RunRecord, scorer: Scorer, progress: Progress, part: str | None = None
    ) -> None:
        super().__init__(journal, record, progress)
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

    def score_references(self, *more: Pattern) -> None:
        """Step 0: the start pattern, the references, and whatever else is to be compared."""
        references = [Pattern(letters) for letters in self.record.references.values()]
        self.score(0, list(dict.fromkeys([self.record.start_pattern, *references, *more])))

    def score(self, step: int, patterns: list[Pattern], name: str | None = None) -> None:
        """Score what is missing of these patterns, wave by wave, and journal each sweep as it ends.

        `name`: what whoever watches calls it, by default the step.
        """
        together = 0  # patterns in the sweep at work

        def missing() -> Iterator[Event]:
            nonlocal together
            work = self._missing(patterns)
            if not work:
                return
            self._scorer.retain(self.record.pattern)
            self.progress.step_started(self._part or name or step, len(patterns), self._scorer.expected(work))
            self._scorer.announce(work)
            for chunk, wave in work:
                started, together = time.monotonic(), len(chunk)
                scores = self._scorer.score(chunk, wave, self.progress.layer_done)
                yield {
                    "event": "losses",
                    "step": step,
                    "sequences": list(wave),
                    "patterns": [pattern.letters for pattern in chunk],
                    "nll": [scores.nll[pattern.letters] for pattern in chunk],
                    **({"kl": [scores.kl[pattern.letters] for pattern in chunk]} if scores.kl else {}),
                    "layer_sequences": scores.layer_sequences,
                    "seconds": round(time.monotonic() - started, 3),
                    **({"weight_bytes": scores.weight_bytes} if scores.weight_bytes else {}),
                    **({"set": self._part} if self._part else {}),
                }
                self.note(scores.notes)
                self.progress.losses_known(self.record, self._part or name or step)

        def shrink() -> str:
            return shrunk_note(together, self._scorer.patterns_per_sweep) if self._scorer.shrink(together) else ""

        self.fill(missing, shrink)

    def _missing(self, patterns: list[Pattern]) -> list[tuple[list[Pattern], tuple[int, int]]]:
        """The sweeps that score what is missing: at most so many patterns, and the wave to score them on."""
        known, size, work = self.losses.nll, self._scorer.patterns_per_sweep, []
        for first, last in self._scorer.waves:
            left = [p for p in patterns if any(s not in known.get(p.letters, {}) for s in range(first, last))]
            work += [(left[start : start + size], (first, last)) for start in range(0, len(left), size)]
        return work


def run_search(scoring: Scoring, strategy: Strategy, then: Callable[[], object] = lambda: None) -> RunRecord:
    """One run of a strategy, from the journal's state to the end.

    `then` is what the run does before it is finished, such as a refinement.
    """
    record, step = scoring.record, 1
    scoring.score_references()
    while layers := strategy.ask():
        flips = {layer: strategy.pattern.flip(layer) for layer in layers}
        scoring.score(step, list(flips.values()))
        choice = strategy.tell({layer: record.objective.sums(pattern.letters) for layer, pattern in flips.items()})
        said = record.commits[step - 1].to_event() if step <= len(record.commits) else None
        if scoring.follow(f"step {step}", choice.to_event(), said):
            scoring.progress.committed(record)
        step += 1
    then()
    if not record.finished:
        scoring.append({"event": "finish", "pattern": record.pattern.letters})
    return record


def run_proposals(scoring: Scoring, heldout: Scorer | None = None, then: Callable[[], object] = lambda: None) -> None:
    """A search on the second-order table, which the journal must hold, from the journal's state to the end.

    Single flips are measured, then the nested path that follows from table and flips, then round after round what the
    table, mended by all that was measured, holds for best; until PATIENCE rounds in a row have found nothing much
    better, or there were enough. Where there is a scorer of `heldout` sequences, these choose among the best. What was
    proposed is journaled before it is measured, and a run that goes on takes it from there.
    """
    record = scoring.record
    start = record.start_pattern
    scoring.score_references()
    movable = [layer for layer in start.full_layers if layer and layer not in record.stay_full]
    scoring.score(1, [start.flip(layer) for layer in movable], "single flips")
    proposals = Proposals(record)
    if not record.proposals:
        scoring.append(proposals.event(proposals.path()))
    path = [Pattern(letters) for letters in record.proposals[0]]
    scoring.score(1, path, "nested path")
    for before, after in list(pairwise([start, *path]))[len(record.commits) :]:
        (layer,) = set(before.full_layers) - set(after.full_layers)
        candidates = tuple(movable) if before == start else (layer,)
        scoring.append(Choice(len(record.commits) + 1, layer, after.letters, candidates, ()).to_event())
        scoring.progress.committed(record)
    _run_rounds(scoring, proposals)
    if record.chosen is None:
        if heldout is None:
            pattern = record.steadiest(proposals.measured())
        else:
            pattern = _confirmed(scoring.of(HELDOUT_SET, heldout), proposals)
        price = record.objective.difference(pattern.letters, start.letters).delta
        scoring.append({"event": "chosen", "pattern": pattern.letters, "objective": price})
    then()
    if not record.finished:
        scoring.append({"event": "finish", "pattern": record.pattern.letters})


def _run_rounds(scoring: Scoring, proposals: Proposals) -> None:
    """Rounds of finalists, from the last one that was proposed on."""
    record, options = scoring.record, scoring.record.start["options"]
    while True:
        number = len(record.proposals) - 1
        if number:
            finalists = [Pattern(letters) for letters in record.proposals[number]]
            scoring.score(len(record.commits), finalists, f"round {number}")
        in_vain = number >= PATIENCE and proposals.gain(PATIENCE) < MUCH
        if record.chosen or in_vain or number == options["rounds"]:
            return
        if not (finalists := proposals.finalists(options["finalists"])):
            return  # all that can be looked at has been measured
        scoring.append(proposals.event(finalists))


def _confirmed(heldout: Scoring, proposals: Proposals) -> Pattern:
    """Of the best measured patterns, the one of lowest objective on held-out sequences."""
    best = proposals.measured()[:CONFIRMED]
    heldout.score(len(heldout.record.commits), sorted([heldout.record.start_pattern, *best], key=str))
    return min(best, key=lambda each: (heldout.losses.objective.loss(each.letters), each.letters))


def run_refinement(scoring: Scoring, heldout: Scorer) -> None:
    """Make swaps until none is left to make, from the journal's state on; `heldout` scores the held-out sequences.

    The search must be at its end.
    """
    record = scoring.record
    sets = {False: scoring.of(CALIBRATION_SET), True: scoring.of(HELDOUT_SET, heldout)}
    if record.refinement is None:
        costs = {  # of sharing each layer when the search last looked at it, in nats per token
            candidate.layer: record.objective.difference(candidate.pattern, record.before(commit.step).letters).delta
            for commit in record.commits
            for candidate in record.candidates(commit.step)
        }
        event = {"event": "refine", "pattern": record.searched.letters}
        scoring.append({**event, "costs": [costs.get(layer) for layer in range(len(record.start_pattern))]})
    if record.refinement is None or record.heldout is None:
        raise JournalError(f"{scoring.journal.path} has no held-out sequences: start over with --fresh")
    step, outcomes = len(record.commits), record.refinement.outcomes
    sets[True].score(step, [record.refinement.start])  # for the report, also where no move comes so far
    swaps, number = make_swaps(record, record.refinement), 0
    while question := swaps.ask():
        asked = sets[question.heldout]
        asked.score(step, sorted(question.patterns, key=str))  # neighbours share their first layers
        outcome = swaps.tell({p.letters: asked.losses.objective.sums(p.letters) for p in question.patterns})
        said = outcomes[number] if number < len(outcomes) else None
        if scoring.follow("its refinement", event_of(outcome), said) and not isinstance(outcome, Judged):
            scoring.progress.tried(record)
        number += 1


def make_swaps(record: RunRecord, refinement: Refinement) -> Swaps:
    """The swaps of a run, at their beginning: what stays F and what has no indexer are the search's."""
    return Swaps(
        refinement.start,
        fixed=record.stay_full,
        native=frozenset(record.start_pattern.shared_layers),
        tokens=record.tokens,
        heldout_tokens=record.heldout.tokens if record.heldout else (),
        costs={layer: cost for layer, cost in enumerate(refinement.costs) if cost is not None},
    )


def event_of(outcome: Outcome) -> Event:
    """An outcome as the journal has it."""
    if isinstance(outcome, Judged):
        moves, qualified = (
            [[move.from_layer, move.to_layer] for move in some] for some in (outcome.moves, outcome.qualified)
        )
        return {"event": "judged", "pattern": outcome.before, "moves": moves, "qualified": qualified}
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
