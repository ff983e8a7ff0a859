"""pattern.json: a pattern with its origin and its evidence, read, checked and written."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from icsearch.core.errors import PatternError
from icsearch.core.jsonfile import (
    FLAG,
    MAX_LAYERS,
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
    optional,
    read_object,
    whole,
    write_object,
)
from icsearch.core.pattern import FULL, SHARED, Pattern, num_full

PATTERN_FORMAT = "icsearch.pattern/1"

# What the fields of a pattern.json must be, beside the pattern itself and its steps.
FILE_FIELDS = {
    "method": TEXT,
    "strategy": optional(TEXT),
    "objective": optional(TEXT),
    "baseline_loss": optional(NUMBER),
    "loss": optional(NUMBER),
    "steps": list_of(OBJECT),
    "frontier": optional(list_of(OBJECT)),
    "model": OBJECT,
    "calibration": OBJECT,
    "cost": OBJECT,
    "icsearch_version": optional(TEXT),
    "refinement": optional(OBJECT),
}
MODEL_FIELDS = {
    "name_or_path": optional(TEXT),
    "revision": optional(TEXT),  # the commit that the hub delivered; null for a path, absent before it was recorded
    "model_type": optional(TEXT),
    "fingerprint": optional(TEXT),
    "native_shared": optional(layers()),
    "wrapper_config": optional(FLAG),
    "num_hidden_layers": optional(whole(1, MAX_LAYERS)),
}
CALIBRATION_FIELDS = {
    "fingerprint": optional(TEXT),
    "source": optional(TEXT),
    "source_revision": optional(TEXT),  # of a dataset of the hub; absent before it was recorded
    "num_sequences": optional(whole(0)),
    "seq_len": optional(whole(0)),
    "count": optional(TEXT),  # which tokens, where it is not all of them
}


@dataclass(frozen=True)
class Step:
    """One committed flip. Losses in nats per token; `delta` is to the all-F baseline, with its paired std_err.

    `kl` is the mean KL to the unmodified model in nats per token, where it was measured; `predicted_loss` and
    `predicted_kl` are what a second-order table had said of the pattern, where there was one.
    """

    step: int
    layer: int
    loss: float
    delta: float
    std_err: float
    pattern: str
    kl: float | None = None
    kl_std_err: float | None = None
    predicted_loss: float | None = None
    predicted_kl: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields of the contract; those of a KL and of a prediction only where there is one."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Best:
    """Of the patterns with so many F layers that were measured, the one of lowest objective. Numbers as in a `Step`."""

    pattern: str
    full_layers: int
    loss: float
    delta: float
    std_err: float
    kl: float
    kl_std_err: float


@dataclass(frozen=True)
class PatternFile:
    """The contents of a pattern.json: a pattern and where it comes from."""

    pattern: Pattern
    layer_indices: tuple[int, ...]
    method: str
    strategy: str | None = None
    objective: str | None = None
    baseline_loss: float | None = None
    loss: float | None = None
    steps: tuple[Step, ...] = ()
    frontier: tuple[Best, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    icsearch_version: str | None = None
    refinement: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The document of the contract, format icsearch.pattern/1; `frontier` and `refinement` where there is one."""
        return {
            "format": PATTERN_FORMAT,
            "pattern": self.pattern.letters,
            "num_layers": len(self.pattern),
            "layer_indices": list(self.layer_indices),
            "full_layers": list(self.pattern.full_layers),
            "retention": self.pattern.retention,
            "method": self.method,
            "strategy": self.strategy,
            "objective": self.objective,
            "baseline_loss": self.baseline_loss,
            "loss": self.loss,
            "steps": [step.to_json() for step in self.steps],
            **({"frontier": [asdict(best) for best in self.frontier]} if self.frontier else {}),
            "model": self.model,
            "calibration": self.calibration,
            "cost": self.cost,
            "icsearch_version": self.icsearch_version,
            **({} if self.refinement is None else {"refinement": self.refinement}),
        }

    def save(self, path: Path) -> None:
        """Write it as strict JSON, whole or not at all; a number that is nan (an unknown std_err) becomes null."""
        write_object(path, self.to_json())

    def at_retention(self, retention: Fraction) -> Pattern:
        """The pattern of this run with ceil(retention * N) F layers: its own, else the best measured, else a step's.

        Greedy patterns are nested. Where a refinement changed the last one, that retention gives the refined pattern.
        Raises PatternError where the run has none.
        """
        kept = num_full(retention, len(self.pattern))
        on_the_way = [Pattern(step.pattern) for step in self.steps]
        if self.steps:
            first = self.steps[0]
            before = first.pattern[: first.layer] + FULL + first.pattern[first.layer + 1 :]
            on_the_way.insert(0, Pattern(before))
        known = [self.pattern, *(Pattern(best.pattern) for best in self.frontier), *on_the_way]
        for pattern in known:
            if len(pattern.full_layers) == kept:
                return pattern
        counts = sorted({len(pattern.full_layers) for pattern in known})
        raise PatternError(
            f"the file holds no pattern with {kept} F layers (retention {retention}): "
            f"it holds {counts[0]} to {counts[-1]} of {len(self.pattern)}; search with a smaller --retention"
        )


NOMINAL = 0.05  # a retention may be off by less: the one that was asked for, as 1/4 for 22 of 78


def load_pattern_file(path: Path) -> PatternFile:
    """Read and check a pattern.json; an unknown format version is refused. Raises PatternError."""
    document = read_object(
        path,
        expected="a pattern.json that icsearch wrote",
        advice="write it with this version",
        error=PatternError,
        version=PATTERN_FORMAT,
        absent="give its path, a RUN directory, or published:NAME",
    )
    try:
        check_fields(document, {"pattern": TEXT, "num_layers": whole(1, MAX_LAYERS)})
        pattern = Pattern.parse(document["pattern"], document["num_layers"])
        own_layers = Kind("the F layers of the pattern", lambda value: value == list(pattern.full_layers))
        agreeing = {
            "layer_indices": layers(length=len(pattern)),
            "full_layers": optional(own_layers),
            "retention": optional(between(pattern.retention - NOMINAL, pattern.retention + NOMINAL)),
        }
        check_fields(document, {**agreeing, **FILE_FIELDS})
        check_fields(document["model"], MODEL_FIELDS)
        check_fields(document["calibration"], CALIBRATION_FIELDS)
        steps = tuple(_step(step, len(pattern)) for step in document["steps"])
        frontier = tuple(_best(best, len(pattern)) for best in document.get("frontier") or ())
        if document.get("refinement") is not None:
            _check_refinement(document["refinement"], pattern)
    except (PatternError, FieldError) as error:
        raise PatternError(f"{path} is damaged ({error}): write it again") from None
    fields: dict[str, Any] = {
        **{name: document.get(name) for name in FILE_FIELDS},
        "steps": steps,
        "frontier": frontier,
    }
    return PatternFile(pattern=pattern, layer_indices=tuple(document["layer_indices"]), **fields)


def _step(document: dict[str, Any], num_layers: int) -> Step:
    fields = {
        "step": whole(1),
        "layer": whole(1, num_layers - 1),
        "loss": NUMBER,
        "delta": NUMBER,
        "std_err": optional(NUMBER),  # null: one sequence has no error
        "pattern": letters(num_layers),
    }
    more = dict.fromkeys(
        ("kl", "kl_std_err", "predicted_loss", "predicted_kl"), optional(NUMBER)
    )  # absent in most runs
    check_fields(document, {**fields, **more})
    values: dict[str, Any] = {name: document.get(name) for name in (*fields, *more)}
    if values["pattern"][values["layer"]] != SHARED:
        raise FieldError(f"step {values['step']} flips layer {values['layer']}, but its pattern has F there")
    unknown = ["std_err", *(["kl_std_err"] if values["kl"] is not None else [])]
    return Step(**{**values, **{name: math.nan for name in unknown if values[name] is None}})


def _best(document: dict[str, Any], num_layers: int) -> Best:
    errors = dict.fromkeys(("std_err", "kl_std_err"), optional(NUMBER))  # null: one sequence has no error
    fields = {"pattern": letters(num_layers), **dict.fromkeys(("loss", "delta", "kl"), NUMBER), **errors}
    check_fields(document, fields)
    count = document["pattern"].count(FULL)
    check_fields(document, {"full_layers": whole(count, count)})
    values: dict[str, Any] = {name: document.get(name) for name in (*fields, "full_layers")}
    return Best(**{**values, **{name: math.nan for name in errors if values[name] is None}})


def _check_refinement(document: dict[str, Any], pattern: Pattern) -> None:
    """Raise FieldError where a refinement lacks a field, or its swaps do not lead from its start to the pattern."""
    n, number = len(pattern), optional(NUMBER)  # null: not scored, or one sequence, which has no error
    changes = dict.fromkeys(("delta", "std_err", "kl_delta", "kl_std_err"), number)
    fields = {"start_pattern": letters(n), "start_loss": number, "pattern": letters(n), "loss": number, **changes}
    check_fields(document, {**fields, "heldout": OBJECT, "swaps": list_of(OBJECT)})
    losses = {"start_loss": number, "loss": number, **changes}
    check_fields(document["heldout"], {**CALIBRATION_FIELDS, **losses, "sequences": optional(list_of(TEXT))})
    at = document["start_pattern"]
    for swap in document["swaps"]:
        layer = whole(0, n - 1)
        check_fields(swap, {"from_layer": layer, "to_layer": layer, "pattern": letters(n), "loss": NUMBER})
        check_fields(swap, {f"{on}{name}": number for on in ("", "heldout_") for name in changes})
        full = set(Pattern(at).full_layers) - {swap["from_layer"]} | {swap["to_layer"]}
        if swap["pattern"] != Pattern.from_full_layers(full, n).letters or at[swap["from_layer"]] != FULL:
            raise FieldError(f"a swap from layer {swap['from_layer']} to {swap['to_layer']} does not give its pattern")
        at = swap["pattern"]
    if not at == document["pattern"] == pattern.letters:
        raise FieldError("the swaps of the refinement do not lead to the pattern")
