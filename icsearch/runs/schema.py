"""What the fields of a journal and of an eval.json must be, and what has to agree among them. No state."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from icsearch.core.errors import JournalError
from icsearch.core.jsonfile import (
    DURATION,
    FLAG,
    NUMBER,
    OBJECT,
    TEXT,
    FieldError,
    Kind,
    check_fields,
    layers,
    letters,
    list_of,
    one_of,
    optional,
    shown,
    whole,
)
from icsearch.core.pattern_file import CALIBRATION_FIELDS, MODEL_FIELDS
from icsearch.runs.journal import Event
from icsearch.runs.refinement import CALIBRATION_SET

# What the fields of the first event must be; `check_run_start` adds what has to agree among them.
START_FIELDS = {
    "icsearch_version": TEXT,
    "options": OBJECT,
    "model": OBJECT,
    "calibration": OBJECT,
    "environment": optional(OBJECT),
    "start_pattern": letters(),
    "layer_indices": layers(),
    "decoder_layers": whole(1),
    "references": OBJECT,
    "tokens": list_of(whole(1)),
    "refine_on": optional(OBJECT),
    "exact": optional(OBJECT),
    "checkpoint_bytes": optional(whole(0)),
}
# Options of any run, evaluations too; earlier versions have fewer.
RUN_OPTION_FIELDS = {
    "dtype": optional(TEXT),
    "device": optional(TEXT),
    "batch_size": optional(whole(1)),
    "attention": optional(TEXT),
    "threads": optional(whole(1, 1024)),
    "kernels": optional(one_of("blockwise", "reference")),
    "block_elements": optional(whole(1024)),
}
COMPARED = ("kascade", "fisher")  # measures whose pattern a similarity baseline scores beside its own
REMOVED_STRATEGIES, LAST_WITH_THEM = ("race", "lazy", "race+lazy"), "0.1.0"
OPTION_FIELDS = {
    "method": one_of("greedy", "fisher", "dp-baseline"),
    "strategy": TEXT,  # which there are, `search.registry` knows
    "objective": one_of("lm-loss", "kl", "cosine-similarity"),
    "refine": optional(one_of("swaps")),
    "num_shared": optional(whole(0)),
    "stages": optional(whole(1)),
    "keep_full": optional(layers()),
    **dict.fromkeys(("draws", "finalists", "rounds"), optional(whole(1))),
    "seed": optional(whole(0)),
    "confirm": optional(FLAG),
    **RUN_OPTION_FIELDS,
}


def check_options(event: Event) -> None:
    """Raise FieldError where the options of a first event, of a search or an evaluation, are no options.

    JournalError where they are those of a strategy that was taken out.
    What a command takes over from an existing run it takes from there, before anything else of the journal is read.
    """
    check_fields(event, {"options": OBJECT})
    options = event["options"]
    if options.get("strategy") in list(REMOVED_STRATEGIES):  # a list: what is damaged may not be hashable
        raise JournalError(
            f"a search with --strategy {options['strategy']}, which only icsearch {LAST_WITH_THEM} can read: take "
            "that, give another --out, or start over with --fresh"
        )
    check_fields(options, RUN_OPTION_FIELDS if options.get("method") == "eval" else OPTION_FIELDS)


def check_run_start(event: Event) -> None:
    """Raise FieldError where the first event is not that of a search, lacks a field, or its fields disagree."""
    _check_start(event, START_FIELDS)
    num_layers = len(event["start_pattern"])
    agreeing = {
        "num_layers": optional(whole(num_layers, num_layers)),
        "layer_indices": list_of(whole(0, event["decoder_layers"] - 1), num_layers),
        "tokens": Kind("at least one sequence", bool),
        "blocks": optional(Kind(f"stages that cover layers 0 to {num_layers - 1}", lambda b: _covers(b, num_layers))),
    }
    check_fields(event, agreeing)
    check_options(event)
    check_fields(event["model"], {**MODEL_FIELDS, "native_shared": optional(layers(num_layers))})
    check_fields(event["calibration"], CALIBRATION_FIELDS)
    if event.get("exact") is not None:
        check_fields(event["exact"], dict.fromkeys(("candidate_evaluations", "layer_evaluations"), whole(0)))
    if event.get("refine_on") is not None:
        tokens = event["refine_on"].get("tokens")
        check_fields(event["refine_on"], {**CALIBRATION_FIELDS, "tokens": list_of(whole(1))})
        check_fields({"refine_on": tokens}, {"refine_on": Kind("at least one sequence", bool)})
    check_fields(event["references"], dict.fromkeys(event["references"], letters(num_layers)))


def _check_start(event: Event, fields: Mapping[str, Kind]) -> None:
    """What the first event of a search and of an evaluation have in common."""
    if event.get("event") != "start":
        raise FieldError(f"event is {shown(event.get('event'))}: expected start, which every journal begins with")
    check_fields(event, fields)


def check_event(event: Event, fields: Mapping[str, Mapping[str, Kind]]) -> None:
    """Raise FieldError where a later event is none of these, or one of its fields is other than its kind."""
    kind = event.get("event")
    if kind not in list(fields):  # a list: a damaged journal's kind may not be hashable
        raise FieldError(f"event is {shown(kind)}: expected one of {', '.join(fields)}")
    check_fields(event, fields[kind])


def _covers(blocks: Any, num_layers: int) -> bool:
    """True for [first, last) ranges that follow one another from 0 to the last layer."""
    pairs = list_of(list_of(whole(0), 2)).fits(blocks)
    edges = [0, *(last for _, last in blocks)] if pairs else []
    return pairs and edges[-1] == num_layers and [[a, b] for a, b in pairwise(edges)] == blocks


def measures_kl(options: Mapping[str, Any]) -> bool:
    """Whether a search's sweeps measure the KL to the start pattern beside the loss; an evaluation has no such ones."""
    return bool(options.get("objective") == "kl" or options.get("method") == "fisher")


def event_fields(start: Event) -> dict[str, dict[str, Kind]]:
    """What the fields of every later event must be, in a run that began so."""
    num_layers, wave = len(start["start_pattern"]), _wave(len(start["tokens"]))
    pattern, layer = letters(num_layers), whole(0, num_layers - 1)
    moves = list_of(list_of(layer, 2))
    trial: dict[str, Kind] = {
        "before": pattern,
        "from_layer": layer,
        "to_layer": layer,
        "pattern": pattern,
        **dict.fromkeys(("delta", "std_err", "heldout_delta", "heldout_std_err"), NUMBER),
    }
    flipped = list_of(whole(1, num_layers - 1))
    rows = list_of(list_of(NUMBER), num_layers)
    triangle = Kind(
        "a lower triangle of numbers",
        lambda value: rows.fits(value) and [len(row) for row in value] == list(range(num_layers)),
    )
    return {
        "losses": {
            "step": whole(0),
            "sequences": wave,
            "patterns": list_of(pattern),
            "nll": list_of(list_of(NUMBER)),
            **({"kl": list_of(list_of(NUMBER))} if measures_kl(start["options"]) else {}),
            "set": optional(Kind(repr(CALIBRATION_SET), lambda value: value == CALIBRATION_SET)),
            **_COST,
        },
        "commit": {
            "step": whole(1),
            "layer": whole(1, num_layers - 1),
            "pattern": pattern,
            "candidates": flipped,
            "ties": flipped,
        },
        "similarity": {
            "sequences": wave,
            "queries": whole(1),
            "cosine": triangle,
            "overlap": triangle,
            "kept": optional(triangle),
            "importance": optional(list_of(NUMBER, num_layers)),
            "numerics": optional(OBJECT),
            **_COST,
        },
        "fisher": {
            "sequences": wave,
            "drawn": list_of(list_of(triangle, start["options"].get("draws"))),
            "true": list_of(triangle),
            **_COST,
        },
        "proposed": {"round": whole(0), "patterns": list_of(pattern)},
        "chosen": {"pattern": pattern, "objective": NUMBER},
        "compared": {"by": one_of(*COMPARED), "pattern": pattern, "objective": NUMBER},
        "refine": {"pattern": pattern, "costs": list_of(optional(NUMBER), num_layers)},
        "judged": {"pattern": pattern, "moves": moves, "qualified": moves},
        "swap": trial,
        "refused": trial,
        "note": {"text": TEXT},
        "finish": {},
    }


_COST = {"layer_sequences": whole(0), "seconds": DURATION, "weight_bytes": optional(whole(0))}


def _wave(sequences: int) -> Kind:
    """[first, last) of some of so many sequences."""
    ends = list_of(whole(0, sequences), 2)
    return Kind(f"a range within 0 to {sequences}", lambda value: ends.fits(value) and value[0] < value[1])


PHASES = ("prefill", "decode")
ALL_TOKENS = ("all_nll", "all_kl")  # sums beside those of the counted tokens, where a mask counts some alone
WAYS = ("forced", "generated")
_FINITE = Kind(  # a perplexity can be far larger than any loss
    "a finite number", lambda value: NUMBER.fits(value) or (type(value) is float and abs(value) <= sys.float_info.max)
)
_error = optional(NUMBER)  # null: one sequence has none
_layer = Kind("layer numbers as names", lambda value: all(key.isdecimal() and len(key) < 6 for key in value))
_described = {"name": TEXT, "method": TEXT, "in_sample": FLAG, "foreign": FLAG}


def _each(fields: Mapping[str, Kind]) -> Kind:
    """A list of objects with these fields."""
    return Kind(
        f"a list of objects with {', '.join(fields)}",
        lambda value: list_of(OBJECT).fits(value) and all(_has(item, fields) for item in value),
    )


def _has(value: Mapping[str, Any], fields: Mapping[str, Kind]) -> bool:
    return all(kind.fits(value.get(name)) for name, kind in fields.items())


# --- eval.json --------------------------------------------------------------------------------------------------------


def check_document(document: dict[str, Any]) -> None:
    """Raise FieldError where a field of an eval.json is missing or other than its kind."""
    check_fields(document, DOCUMENT_FIELDS)
    check_fields(document["model"], MODEL_FIELDS)
    check_fields(document["calibration"], CALIBRATION_FIELDS)
    if not document["rows"]:
        raise FieldError("rows is an empty list: expected one for each pattern")
    for row in document["rows"]:
        check_fields(row, {"pattern": letters(), **_ROW})
        check_fields(row, {"pattern": letters(len(document["rows"][0]["pattern"]))})


_BOUNDS = dict.fromkeys(("accuracy", "low", "high"), NUMBER)
_ACCURACY = Kind("accuracy, low and high", lambda value: OBJECT.fits(value) and _has(value, _BOUNDS))
_LOSS = {"loss": NUMBER, "delta": NUMBER, "std_err": _error, "kl": NUMBER, "kl_std_err": _error}
_ROW = {
    **_described,
    **_LOSS,
    "perplexity": optional(_FINITE),
    "top1_agreement": NUMBER,
    "verdict": TEXT,
    "all_tokens": optional(Kind("loss and KL of all tokens", lambda value: OBJECT.fits(value) and _has(value, _LOSS))),
    "positions": optional(_each({"first": whole(0), "last": whole(1), "delta": NUMBER, "std_err": _error})),
    "borrowed_overlap": optional(
        Kind(
            "an object of a number for each layer",
            lambda value: OBJECT.fits(value) and _layer.fits(value) and all(map(NUMBER.fits, value.values())),
        )
    ),
    "tasks": optional(_each({"kind": TEXT, **dict.fromkeys(WAYS, optional(_ACCURACY))})),
}
_ESTIMATE = {
    "context": whole(1),
    **dict.fromkeys(
        (
            "indexer_share_full",
            "indexer_share_pattern",
            "removed_share",
            "prefill_speedup_estimate",
            "decode_speedup_estimate",
        ),
        NUMBER,
    ),
}
DOCUMENT_FIELDS = {
    "icsearch_version": optional(TEXT),
    "layer_indices": optional(layers()),
    "model": OBJECT,
    "calibration": OBJECT,
    "options": optional(OBJECT),
    "environment": optional(OBJECT),
    "rows": list_of(OBJECT),
    "notes": optional(list_of(TEXT)),
    "gaps": optional(_each({"name": TEXT, "uniform": TEXT, "gap_closed": _error, "std_err": _error})),
    "cost": optional(OBJECT),
    "cost_rows": optional(_each({"name": TEXT, "rows": _each(_ESTIMATE), "saved": optional(OBJECT)})),
    "measured": optional(
        _each(
            {"name": TEXT, "phase": one_of(*PHASES), "length": whole(1), "min": NUMBER, "median": NUMBER, "max": NUMBER}
        )
    ),
}


# --- the journal of an evaluation -------------------------------------------------------------------------------------

EVAL_START_FIELDS = {
    "icsearch_version": TEXT,
    "layer_indices": layers(),
    "model": OBJECT,
    "calibration": OBJECT,
    "options": OBJECT,
    "environment": OBJECT,
    "start_pattern": letters(),
    "tokens": list_of(whole(1)),
    "choosing_queries": whole(1),
    "bucket_edges": layers(sys.maxsize),
    "masked": optional(FLAG),
}


def check_eval_start(event: Event) -> None:
    """Raise FieldError where the first event is not that of an evaluation, or its fields disagree."""
    _check_start(event, EVAL_START_FIELDS)
    check_fields(event, {"tokens": Kind("at least one sequence", bool)})
    num_layers, buckets = len(event["start_pattern"]), len(event["bucket_edges"]) - 1
    check_fields(
        event,
        {
            "bucket_tokens": list_of(list_of(whole(0), buckets), len(event["tokens"])),
            "patterns": _each({**_described, "pattern": letters(num_layers)}),
        },
    )
    check_fields(event["model"], MODEL_FIELDS)
    check_fields(event["calibration"], CALIBRATION_FIELDS)


def check_later(event: Event, start: Event) -> None:
    """Raise FieldError where another event is none of an evaluation that began so.

    The sums of a pattern are one for each sequence, or for each bucket of each.
    """
    hits = Kind("true or false for each question", lambda value: list_of(FLAG).fits(value) and bool(value))
    fields = {
        "measures": {"sequences": _wave(len(start["tokens"])), "patterns": OBJECT, **_COST},
        "task": {"pattern": letters(len(start["start_pattern"])), "kind": TEXT, "forced": hits, "generated": hits},
        "extra": {"name": TEXT},
        "note": {"text": TEXT},
        "finish": {},
    }
    check_event(event, fields)
    if event["event"] != "measures":
        return
    first, last = event["sequences"]
    buckets = len(start["bucket_edges"]) - 1
    sums = list_of(NUMBER, last - first)
    by_layer = Kind(
        f"{last - first} sums for each layer",
        lambda value: OBJECT.fits(value) and _layer.fits(value) and all(map(sums.fits, value.values())),
    )
    pattern = letters(len(start["start_pattern"]))
    for name, table in event["patterns"].items():
        if not (pattern.fits(name) and OBJECT.fits(table)):
            raise FieldError(f"patterns has {shown(name)}: expected the sums of {pattern.name}")
        check_fields(
            table,
            {
                **dict.fromkeys(("nll", "kl", "agree"), sums),
                "bucket_nll": list_of(list_of(NUMBER, buckets), last - first),
                "overlap": by_layer,
                **(dict.fromkeys(ALL_TOKENS, sums) if start.get("masked") else {}),
            },
        )
