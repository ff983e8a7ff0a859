"""The documents that follow from a run's record: what it cost, and its pattern.json with the refinement in it."""

from __future__ import annotations

from typing import Any

from icsearch.pattern import CALIBRATION_FIELDS, PatternFile
from icsearch.record import REFINING, RunRecord
from icsearch.refinement import Trial


def cost(record: RunRecord) -> dict[str, Any]:
    """What the search took. A layer evaluation is one decoder layer run once over all calibration sequences.

    A candidate that was scored on a part of the sequences counts as that part of an evaluation. A naive search
    scores every candidate of every step on all sequences, those that this one left stale or gave up too.
    """
    refined = _refinement_evaluations(record)
    candidates = _search_evaluations(record) + refined
    flips = sum(len(commit.candidates) + len(commit.stale) for commit in record.commits)
    scored = flips + refined + len(record.asked.get(0, []))
    return {
        "candidate_evaluations": candidates,
        "layer_evaluations": _layer_evaluations(record),
        "naive_layer_evaluations": scored * record.start["decoder_layers"],
        "seconds": round(record.seconds, 3),
        **({"refinement_evaluations": refined} if record.refinement else {}),
    }


def _search_evaluations(record: RunRecord) -> int | float:
    """Candidates scored by the committed steps; a whole number where all were scored on all sequences."""
    given_up = [len(commit.given_up) for commit in record.commits]
    whole_ones = sum(len(commit.candidates) for commit in record.commits) - sum(given_up)
    if not any(given_up):
        return whole_ones
    parts = sum(one.sequences for step, some in enumerate(given_up, start=1) if some for one in record.given_up(step))
    total = round(whole_ones + parts / len(record.tokens), 3)
    return int(total) if total.is_integer() else total


def _refinement_evaluations(record: RunRecord) -> int:
    """Patterns that the refinement had scored, on either set; what the search had scored already is not in it."""
    heldout = record.heldout.asked.get(0, []) if record.heldout else []
    return len(record.asked.get(REFINING, [])) + len(heldout)


def _layer_evaluations(record: RunRecord) -> float:
    """Layer runs over all sequences of a set; those of the held-out set count as one over all of that set."""
    heldout = record.heldout.layer_sequences if record.heldout else 0
    tokens = record.heldout.start["tokens"] if record.heldout else [1]
    return (record.layer_sequences - heldout) / len(record.start["tokens"]) + heldout / len(tokens)


def pattern_file(record: RunRecord) -> PatternFile:
    """The pattern.json of this run, as far as it has come."""
    options = record.start["options"]
    return PatternFile(
        pattern=record.pattern,
        layer_indices=tuple(record.start["layer_indices"]),
        method=options["method"],
        strategy=options["strategy"],
        objective=options["objective"],
        baseline_loss=record.loss(record.start_pattern.letters),
        loss=record.loss(record.pattern.letters),
        steps=record.steps(),
        model=record.start["model"],
        calibration=record.start["calibration"],
        cost=cost(record),
        icsearch_version=record.start["icsearch_version"],
        refinement=_refinement_document(record),
    )


def _refinement_document(record: RunRecord) -> dict[str, Any] | None:
    """What pattern.json says of the refinement; None where there was none, or its held-out start is not scored."""
    refinement, heldout = record.refinement, record.heldout
    if refinement is None or heldout is None:
        return None
    start, end = refinement.start.letters, refinement.pattern.letters
    return {
        "start_pattern": start,
        "start_loss": record.loss(start),
        "pattern": end,
        "loss": record.loss(end),
        **_changes(record, end, start),
        "heldout": _heldout_document(heldout, start, end),
        "swaps": [_swap_document(record, heldout, trial) for trial in refinement.swaps],
    }


def _heldout_document(heldout: RunRecord, start: str, end: str) -> dict[str, Any]:
    """The losses before and after on the held-out sequences, None where no move came so far, and whose they are."""
    scored = heldout.nll.is_complete(start)
    return {
        "start_loss": heldout.loss(start) if scored else None,
        "loss": heldout.loss(end) if scored else None,
        **(_changes(heldout, end, start) if scored else {"delta": None, "std_err": None}),
        **{name: heldout.start["calibration"].get(name) for name in (*CALIBRATION_FIELDS, "sequences")},
    }


def _swap_document(record: RunRecord, heldout: RunRecord, trial: Trial) -> dict[str, Any]:
    return {
        "from_layer": trial.from_layer,
        "to_layer": trial.to_layer,
        "pattern": trial.pattern,
        "loss": record.loss(trial.pattern),
        **_changes(record, trial.pattern, trial.before),
        **_changes(heldout, trial.pattern, trial.before, "heldout_"),
    }


def _changes(record: RunRecord, after: str, before: str, prefix: str = "") -> dict[str, float]:
    """Differences of the loss, and of the KL where a run goes by that, in nats per token with paired errors."""
    changes = {"": record.difference(after, before)}
    if record.by_kl:
        changes["kl_"] = record.objective.difference(after, before)
    return {
        f"{prefix}{name}{of}": getattr(change, of) for name, change in changes.items() for of in ("delta", "std_err")
    }
