"""What the fields of a run's journal must be: the schemas of its events, and what has to agree among them. No state."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from icsearch.journal import Event
from icsearch.jsonfile import (
    DURATION,
    FLAG,
    MAX_NUMBER,
    NUMBER,
    OBJECT,
    TEXT,
    FieldError,
    Kind,
    between,
    check_fields,
    layers,
    letters,
    list_of,
    one_of,
    optional,
    shown,
    whole,
)
from icsearch.pattern import CALIBRATION_FIELDS, MODEL_FIELDS
from icsearch.runs.refinement import CALIBRATION_SET

# What the fields of the first event must be; `check_start` adds what has to agree among them.
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
OPTION_FIELDS = {
    "method": one_of("greedy", "dp-baseline"),
    "strategy": one_of("exact", "race", "lazy", "race+lazy", "dynamic-program"),
    "objective": one_of("lm-loss", "kl", "cosine-similarity"),
    "refine": optional(one_of("swaps")),
    "num_shared": optional(whole(0)),
    "stages": optional(whole(1)),
    "keep_full": optional(layers()),
    "confidence": optional(between(0.5, 1)),
    "tie_margin": optional(between(0, MAX_NUMBER)),
    **RUN_OPTION_FIELDS,
}


def check_options(event: Event) -> None:
    """Raise FieldError where the options of a first event, of a search or an evaluation, are no options.

    What a command takes over from an existing run it takes from there, before anything else of the journal is read.
    """
    check_fields(event, {"options": OBJECT})
    options = event["options"]
    check_fields(options, RUN_OPTION_FIELDS if options.get("method") == "eval" else OPTION_FIELDS)


def check_start(event: Event) -> None:
    """Raise FieldError where the first event is no start event, lacks a field, or its fields disagree."""
    if event.get("event") != "start":
        raise FieldError(f"event is {shown(event.get('event'))}: expected start, which every journal begins with")
    check_fields(event, START_FIELDS)
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
    if event.get("refine_on") is not None:
        tokens = event["refine_on"].get("tokens")
        check_fields(event["refine_on"], {**CALIBRATION_FIELDS, "tokens": list_of(whole(1))})
        check_fields({"refine_on": tokens}, {"refine_on": Kind("at least one sequence", bool)})
    check_fields(event["references"], dict.fromkeys(event["references"], letters(num_layers)))


def _covers(blocks: Any, num_layers: int) -> bool:
    """True for [first, last) ranges that follow one another from 0 to the last layer."""
    pairs = list_of(list_of(whole(0), 2)).fits(blocks)
    edges = [0, *(last for _, last in blocks)] if pairs else []
    return pairs and edges[-1] == num_layers and [[a, b] for a, b in pairwise(edges)] == blocks


def event_fields(start: Event) -> dict[str, dict[str, Kind]]:
    """What the fields of every later event must be, in a run that began so."""
    num_layers, sequences = len(start["start_pattern"]), len(start["tokens"])
    pattern = letters(num_layers)
    flipped = list_of(whole(1, num_layers - 1))
    waves = Kind(f"a range within 0 to {sequences}", lambda value: _is_range(value, sequences))
    triangle = Kind("a lower triangle of numbers", lambda value: _is_triangle(value, num_layers))
    cost = {"layer_sequences": whole(0), "seconds": DURATION, "weight_bytes": optional(whole(0))}
    return {
        "losses": {
            "step": whole(0),
            "sequences": waves,
            "patterns": list_of(pattern),
            "nll": list_of(list_of(NUMBER)),
            **({"kl": list_of(list_of(NUMBER))} if start["options"]["objective"] == "kl" else {}),
            "set": optional(Kind(repr(CALIBRATION_SET), lambda value: value == CALIBRATION_SET)),
            **cost,
        },
        "commit": {
            "step": whole(1),
            "layer": whole(1, num_layers - 1),
            "pattern": pattern,
            "candidates": flipped,
            "ties": flipped,
            **dict.fromkeys(("dropped", "within_margin", "stale", "violations", "spared"), optional(flipped)),
            "settled": optional(whole(1, sequences)),
            "missed": optional(FLAG),
        },
        "similarity": {
            "sequences": waves,
            "queries": whole(1),
            "cosine": triangle,
            "overlap": triangle,
            "numerics": optional(OBJECT),
            **cost,
        },
        "chosen": {"pattern": pattern, "objective": NUMBER},
        **_refinement_fields(num_layers),
        "note": {"text": TEXT},
        "finish": {},
    }


def _refinement_fields(num_layers: int) -> dict[str, dict[str, Kind]]:
    """What the fields of a refinement's events must be."""
    pattern, layer = letters(num_layers), whole(0, num_layers - 1)
    moves = list_of(list_of(layer, 2))
    trial: dict[str, Any] = {
        "before": pattern,
        "from_layer": layer,
        "to_layer": layer,
        "pattern": pattern,
        **dict.fromkeys(("delta", "std_err", "heldout_delta", "heldout_std_err"), NUMBER),
    }
    return {
        "refine": {"pattern": pattern, "costs": list_of(optional(NUMBER), num_layers)},
        "judged": {"pattern": pattern, "moves": moves, "qualified": moves},
        "swap": trial,
        "refused": trial,
    }


def _is_range(value: Any, sequences: int) -> bool:
    return list_of(whole(0, sequences), 2).fits(value) and value[0] < value[1]


def _is_triangle(value: Any, num_layers: int) -> bool:
    rows = list_of(list_of(NUMBER), num_layers).fits(value)
    return rows and [len(row) for row in value] == list(range(num_layers))
