"""What follows from a finished run: its cost, its pattern.json, and the note of a loss that guessing would beat."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from icsearch.core.pattern_file import CALIBRATION_FIELDS, Best, PatternFile
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
    Of a search on a second-order table, candidates are all that it measured but the references.
    """
    heldout, sequences = record.heldout, len(record.tokens)
    flips = [record.before(commit.step).flip(layer).letters for commit in record.commits for layer in commit.candidates]
    if record.by_table:
        measured = {letters for step, patterns in record.asked.items() if step > 0 for letters in patterns}
        flips = sorted(measured - set(record.asked.get(0, [])))
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
        **(_table_cost(record) if record.by_table else {}),
        **weights_read(record),
    }


def _table_cost(record: RunRecord) -> dict[str, Any]:
    """The table's part of the cost, and what an exact greedy search as far as this one takes, by counting."""
    exact = record.start.get("exact")
    return {
        "table_layer_evaluations": round(record.fisher.layer_sequences / len(record.tokens)),
        "table_seconds": round(record.fisher.seconds, 3),
        "exact_layer_evaluations": exact["layer_evaluations"] if exact else None,
    }


def table_parts(record: RunRecord) -> dict[str, int]:
    """The layer evaluations of a search on a second-order table, by its parts."""
    heldout, sequences = record.heldout, len(record.tokens)
    spent = {"table": record.fisher.layer_sequences, **record.fisher.measuring}
    parts = {part: round(each / sequences) for part, each in spent.items() if each}  # no table: an earlier run's
    if heldout is not None and heldout.layer_sequences:
        parts["held out"] = round(heldout.layer_sequences / len(heldout.tokens))
    return parts


def weights_read(record: RunRecord) -> dict[str, Any]:
    """Bytes of streamed weights that were read, in all and in a committed step on average; nothing where none were.

    A search on a second-order table measures many steps at once: there is no average.
    """
    total = sum(record.weight_bytes.values())
    if not total:
        return {}
    steps = [] if record.by_table else [record.weight_bytes.get(commit.step, 0) for commit in record.commits]
    return {
        "weight_bytes": total,
        "weight_bytes_per_step": round(sum(steps) / len(steps)) if steps else None,
        "checkpoint_bytes": record.start.get("checkpoint_bytes"),
    }


def _number(evaluations: Fraction) -> int | float:
    """A whole number where all were scored on all sequences."""
    return int(evaluations) if evaluations.denominator == 1 else round(float(evaluations), 3)


def pattern_file(record: RunRecord, predicted: Mapping[str, tuple[float, float]] | None = None) -> PatternFile:
    """The pattern.json of this run, as far as it has come.

    `predicted`: by letters, what a second-order table says of a pattern's loss above the start pattern's and of its KL.
    """
    options, baseline, said = record.start["options"], record.loss(record.start_pattern.letters), predicted or {}
    steps = tuple(
        replace(step, predicted_loss=baseline + said[step.pattern][0], predicted_kl=said[step.pattern][1])
        if step.pattern in said
        else step
        for step in record.steps()
    )
    return PatternFile(
        pattern=record.pattern,
        layer_indices=tuple(record.start["layer_indices"]),
        method=options["method"],
        strategy=options["strategy"],
        objective=options["objective"],
        baseline_loss=baseline,
        loss=record.loss(record.pattern.letters),
        steps=steps,
        frontier=_frontier(record) if record.by_table else (),
        model=record.start["model"],
        calibration=record.start["calibration"],
        cost=cost(record),
        icsearch_version=record.start["icsearch_version"],
        refinement=_refinement_document(record),
    )


def _frontier(record: RunRecord) -> tuple[Best, ...]:
    found = []
    for count, pattern in record.frontier().items():
        letters = pattern.letters
        loss, kl = record.difference(letters), record.kl.mean(letters)
        found.append(Best(letters, count, record.loss(letters), loss.delta, loss.std_err, kl.delta, kl.std_err))
    return tuple(found)


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
    """Differences of the loss, and of the KL where it is measured, in nats per token with paired errors."""
    changes = {"": record.difference(after, before)}
    if record.has_kl:
        changes["kl_"] = record.kl.difference(after, before)
    return {
        f"{prefix}{name}{of}": getattr(change, of) for name, change in changes.items() for of in ("delta", "std_err")
    }
