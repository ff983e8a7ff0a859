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
}


@dataclass(frozen=True)
class Step:
    """One committed flip. Losses in nats per token; `delta` is to the all-F baseline, with its paired std_err.

    `kl` is the mean KL to the unmodified model in nats per token, where the search went by it.
    """

    step: int
    layer: int
    loss: float
    delta: float
    std_err: float
    pattern: str
    kl: float | None = None
    kl_std_err: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields of the contract; those of the KL only where there is one."""
        values = asdict(self)
        return {name: value for name, value in values.items() if self.kl is not None or not name.startswith("kl")}


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
    model: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    icsearch_version: str | None = None
    refinement: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The document of the contract, format icsearch.pattern/1. `refinement` is there where there was one."""
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
        """The pattern of this run with ceil(retention * N) F layers; greedy patterns are nested.

        Where a refinement changed the last one, that retention gives the refined pattern.
        Raises PatternError where the run did not go that far.
        """
        kept = num_full(retention, len(self.pattern))
        on_the_way = [Pattern(step.pattern) for step in self.steps]
        if self.steps:
            first = self.steps[0]
            before = first.pattern[: first.layer] + FULL + first.pattern[first.layer + 1 :]
            on_the_way.insert(0, Pattern(before))
        for pattern in (self.pattern, *on_the_way):
            if len(pattern.full_layers) == kept:
                return pattern
        counts = sorted({len(p.full_layers) for p in (self.pattern, *on_the_way)})
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
        if document.get("refinement") is not None:
            _check_refinement(document["refinement"], pattern)
    except (PatternError, FieldError) as error:
        raise PatternError(f"{path} is damaged ({error}): write it again") from None
    fields: dict[str, Any] = {**{name: document.get(name) for name in FILE_FIELDS}, "steps": steps}
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
    by_kl = {"kl": optional(NUMBER), "kl_std_err": optional(NUMBER)}  # absent where the search went by the loss
    check_fields(document, {**fields, **by_kl})
    values: dict[str, Any] = {name: document.get(name) for name in (*fields, *by_kl)}
    if values["pattern"][values["layer"]] != SHARED:
        raise FieldError(f"step {values['step']} flips layer {values['layer']}, but its pattern has F there")
    unknown = ["std_err", *(["kl_std_err"] if values["kl"] is not None else [])]
    return Step(**{**values, **{name: math.nan for name in unknown if values[name] is None}})


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
