"""What a refinement did, for page and terminal: before and after on both sets of sequences, every swap, and what was
tried without one.
"""

from __future__ import annotations

from dataclasses import dataclass

from icsearch.report import numbers
from icsearch.runs.record import RunRecord
from icsearch.runs.refinement import Refinement, Trial


@dataclass(frozen=True)
class SetRow:
    """The pattern before and after the refinement on one set of sequences, as text."""

    name: str
    sequences: int
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class SwapRow:
    """One move that held-out sequences were asked about, as text."""

    number: str
    from_layer: int
    to_layer: int
    pattern: str
    change: str
    heldout: str


@dataclass(frozen=True)
class RefinementSection:
    """Everything that a report says of a refinement."""

    sentence: str
    before: str
    after: str
    sets: tuple[SetRow, ...]
    swaps: tuple[SwapRow, ...]
    refused: tuple[SwapRow, ...]


def refinement_section(record: RunRecord) -> RefinementSection | None:
    """The section of a run; None where it has no refinement, or this has not come so far."""
    refinement, heldout = record.refinement, record.heldout
    if refinement is None or heldout is None or not heldout.nll.is_complete(refinement.start.letters):
        return None
    refused = [trial for trial in refinement.trials if not trial.made]
    return RefinementSection(
        sentence=refinement_sentence(record, refinement),
        before=refinement.start.letters,
        after=refinement.pattern.letters,
        sets=(*_set_rows("searched on", record, refinement), *_set_rows("held out", heldout, refinement)),
        swaps=tuple(_swap_row(record, heldout, trial, str(i)) for i, trial in enumerate(refinement.swaps, start=1)),
        refused=tuple(_swap_row(record, heldout, trial, "") for trial in refused),
    )


def refinement_sentence(record: RunRecord, refinement: Refinement) -> str:
    """How many moves were scored, qualified, and made."""
    rounds = len({event["pattern"] for event in refinement.outcomes if event["event"] == "judged"})
    scored = f"{numbers.plural(refinement.moves_scored, 'move')} scored in {numbers.plural(rounds, 'round')}"
    state = "" if record.finished else "so far "
    if not refinement.moves_scored:
        return "Swaps: no move scored yet." if not record.finished else "Swaps: this pattern has no move to score."
    if not refinement.moves_qualified:
        return (
            f"Swaps: {state}{scored}; none gained more than two paired standard errors, so the pattern is the search's."
        )
    refused = len(refinement.trials) - len(refinement.swaps)
    return (
        f"Swaps: {state}{scored}; {refinement.moves_qualified} gained more than two paired standard errors. The "
        f"held-out sequences were asked about {len(refinement.trials)} of these, best first: "
        f"{len(refinement.swaps)} made, {refused} refused."
    )


def _set_rows(name: str, record: RunRecord, refinement: Refinement) -> list[SetRow]:
    """The loss, and below it the KL where the run goes by that."""
    before, after = refinement.start.letters, refinement.pattern.letters
    values = [(name, record.loss(before), record.loss(after), record.difference(after, before))]
    old, new = record.mean_kl(before), record.mean_kl(after)
    if old is not None and new is not None:
        values.append((f"{name}, KL", old.delta, new.delta, record.objective.difference(after, before)))
    return [
        SetRow(
            label,
            len(record.tokens),
            numbers.loss(at_first),
            numbers.loss(now),
            "–" if before == after else numbers.difference(change),
        )
        for label, at_first, now, change in values
    ]


def _swap_row(record: RunRecord, heldout: RunRecord, trial: Trial, number: str) -> SwapRow:
    """Its differences are of what the run goes by."""
    change, confirmed = (
        numbers.difference(one.objective.difference(trial.pattern, trial.before)) for one in (record, heldout)
    )
    return SwapRow(number, trial.from_layer, trial.to_layer, trial.pattern, change, confirmed)
