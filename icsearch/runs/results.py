"""What follows from a finished run: its cost, its pattern.json, and the note of a loss that guessing would beat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from icsearch.core.pattern_file import CALIBRATION_FIELDS, PatternFile
from icsearch.runs.record import REFINING, RunRecord

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
    heldout, sequences = record.heldout, len(record.tokens)
    flips = [record.before(commit.step).flip(layer).letters for commit in record.commits for layer in commit.candidates]
    moves = set(record.asked.get(REFINING, [])) - set(flips)
    naive_patterns = len(record.asked.get(0, [])) + len(flips) + len(moves)
    refined = Fraction(record.scored.get(REFINING, 0), sequences)  # what the search had scored already is not in it
    layer_evaluations = record.layer_sequences / sequences
    if heldout is not None:  # a layer run counts as one over all sequences of its set
        naive_patterns += len(heldout.asked.get(0, []))
        refined += Fraction(heldout.scored.get(0, 0), len(heldout.tokens))
        on_calibration = record.layer_sequences - heldout.layer_sequences
        layer_evaluations = on_calibration / sequences + heldout.layer_sequences / len(heldout.tokens)
    return {
        "candidate_evaluations": _number(len(flips) + refined),  # flips that are references too
        "layer_evaluations": round(layer_evaluations),
        "layer_sequences": record.layer_sequences,
        "naive_layer_evaluations": naive_patterns * record.start["decoder_layers"],
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


def _number(evaluations: Fraction) -> int | float:
    """A whole number where all were scored on all sequences."""
    return int(evaluations) if evaluations.denominator == 1 else round(float(evaluations), 3)


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
    """What pattern.json says of the refinement; None where there was none."""
    refinement, heldout = record.refinement, record.heldout
    if refinement is None or heldout is None:
        return None
    start, end = refinement.start.letters, refinement.pattern.letters
    scored = heldout.nll.is_complete(start)  # not, where no move came so far
    return {
        "start_pattern": start,
        "start_loss": record.loss(start),
        "pattern": end,
        "loss": record.loss(end),
        **_changes(record, end, start),
        "heldout": {
            "start_loss": heldout.loss(start) if scored else None,
            "loss": heldout.loss(end) if scored else None,
            **(_changes(heldout, end, start) if scored else {"delta": None, "std_err": None}),
            **{name: heldout.start["calibration"].get(name) for name in (*CALIBRATION_FIELDS, "sequences")},
        },
        "swaps": [
            {
                "from_layer": trial.from_layer,
                "to_layer": trial.to_layer,
                "pattern": trial.pattern,
                "loss": record.loss(trial.pattern),
                **_changes(record, trial.pattern, trial.before),
                **_changes(heldout, trial.pattern, trial.before, "heldout_"),
            }
            for trial in refinement.swaps
        ],
    }


def _changes(record: RunRecord, after: str, before: str, prefix: str = "") -> dict[str, float]:
    """Differences of the loss, and of the KL where a run goes by that, in nats per token with paired errors."""
    changes = {"": record.difference(after, before)}
    if record.by_kl:
        changes["kl_"] = record.objective.difference(after, before)
    return {
        f"{prefix}{name}{of}": getattr(change, of) for name, change in changes.items() for of in ("delta", "std_err")
    }
