"""A loss that guessing would beat: the note that a run or an evaluation keeps of it, and how a report knows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from icsearch.core.pattern_file import CALIBRATION_FIELDS, PatternFile
from icsearch.runs.record import REFINING, RunRecord
from icsearch.runs.refinement import Trial

MEANS_NOTHING = "no pattern found on them means anything"


def guessing_notes(loss: float, vocab_size: int) -> list[str]:
    """Where the unmodified model's loss, in nats per token, is above that of guessing among all tokens."""
    guessing = math.log(vocab_size)
    if not loss > guessing:
        return []
    return [
        f"the unmodified model's loss of {loss:.4f} nats per token is above {guessing:.4f}, that of guessing among its "
        f"{vocab_size} tokens: these are probably not its text, its tokens or its tokenizer, and {MEANS_NOTHING}"
    ]


def split_notes(notes: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(cautions, other notes): those of `guessing_notes`, which belong beside the result, and the rest.

    A journal holds no vocabulary size, so that the note itself is what tells.
    """
    cautions = tuple(note for note in notes if note.endswith(MEANS_NOTHING))
    return cautions, tuple(note for note in notes if note not in cautions)


def cost(record: RunRecord) -> dict[str, Any]:
    """What the search took. A layer evaluation is one decoder layer run once over all calibration sequences.

    `layer_sequences` counts each run of a layer on each sequence. Over the number of sequences that need not be whole:
    a run that was interrupted begins some of them anew. A naive search scores every candidate of every step anew.
    """
    searched = sum(len(commit.candidates) for commit in record.commits)  # those too that are references
    refined = _refinement_evaluations(record)
    return {
        "candidate_evaluations": _number(searched + refined),
        "layer_evaluations": round(_layer_evaluations(record)),
        "layer_sequences": record.layer_sequences,
        "naive_layer_evaluations": _naive_patterns(record) * record.start["decoder_layers"],
        "seconds": round(record.seconds, 3),
        **({"refinement_evaluations": _number(refined)} if record.refinement else {}),
        **weights_read(record),
    }


def weights_read(record: RunRecord) -> dict[str, Any]:
    """Bytes of streamed weights that were read, in all and in a committed step on average; nothing where none were."""
    total = sum(record.weight_bytes.values())
    if not total:
        return {}
    steps = [record.weight_bytes.get(commit.step, 0) for commit in record.commits]
    return {
        "weight_bytes": total,
        "weight_bytes_per_step": round(sum(steps) / len(steps)) if steps else None,
        "checkpoint_bytes": record.start.get("checkpoint_bytes"),
    }


def _refinement_evaluations(record: RunRecord) -> Fraction:
    """Patterns that the refinement had scored, on either set; what the search had scored already is not in it."""
    on_calibration = Fraction(record.scored.get(REFINING, 0), len(record.tokens))
    heldout = record.heldout
    return on_calibration + (Fraction(heldout.scored.get(0, 0), len(heldout.tokens)) if heldout else 0)


def _number(evaluations: Fraction) -> int | float:
    """A whole number where all were scored on all sequences."""
    return int(evaluations) if evaluations.denominator == 1 else round(float(evaluations), 3)


def _naive_patterns(record: RunRecord) -> int:
    """What a naive run scores: references, every flip of every step, what the refinement adds, on either set."""
    flips = [record.before(commit.step).flip(layer).letters for commit in record.commits for layer in commit.candidates]
    moves = set(record.asked.get(REFINING, [])) - set(flips)
    heldout = record.heldout.asked.get(0, []) if record.heldout else []
    return len(record.asked.get(0, [])) + len(flips) + len(moves) + len(heldout)


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
