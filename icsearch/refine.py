"""`--refine swaps`: the loop that joins the swaps of a finished search with sweep and journal.

As in the search, the refinement is always played from its start: what the journal holds is not scored again, and
what it says of a move must be what the losses say.
"""

from __future__ import annotations

from icsearch.errors import JournalError
from icsearch.journal import Event
from icsearch.pattern import Pattern
from icsearch.runs.record import RunRecord
from icsearch.runs.refinement import CALIBRATION_SET, HELDOUT_SET, Refinement
from icsearch.search import Scorer, Scoring
from icsearch.strategies.swaps import Judged, Move, Outcome, Question, Swaps


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
