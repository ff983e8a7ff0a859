"""Patterns as named on the command line by a SPEC: `full`, `uniform:1/4`, `published:NAME`, a file, letters, or what
an engine is given today."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from icsearch.core.errors import IcsearchError, PatternError
from icsearch.core.files import published_patterns, typed_path
from icsearch.core.jsonfile import shown
from icsearch.core.pattern import Pattern, parse_retention
from icsearch.core.pattern_file import PatternFile, load_pattern_file
from icsearch.core.text import did_you_mean
from icsearch.engines.read import import_pattern, is_engine_source
from icsearch.model.config import Backbone
from icsearch.runs.record import why_no_pattern

EXPECTED = (
    "full, uniform:1/4, published:NAME, a pattern.json or RUN (RUN@1/2: at that retention), letters, or what an engine "
    "is given, behind its name (vllm:config.json, megatron:freq:4,offset:2)"
)
FORMS = ("uniform", "published", "freq")
NAME_LENGTH = 32  # of a name in a table


@dataclass(frozen=True)
class Target:
    """The model that patterns are for. `layers` are its decoder layers, by default one for each letter."""

    model_type: str
    fingerprint: str
    start: Pattern  # all F but for native S layers
    calibration_fingerprint: str
    sequences: frozenset[str] = frozenset()  # digests of the calibration sequences
    layers: Backbone | None = None

    @property
    def backbone(self) -> Backbone:
        """The decoder layers, and the config that an engine would read with a pattern."""
        return self.layers or replace(Backbone.alike(len(self.start)), model_type=self.model_type or None)


@dataclass(frozen=True)
class NamedPattern:
    """A pattern with what is known of its origin.

    `method` groups patterns in a picture. `in_sample`: it was searched on some of the sequences it is evaluated on.
    `foreign`: it belongs to another model, and was let through by --force. `notes`: how it was read.
    """

    name: str
    pattern: Pattern
    method: str
    in_sample: bool = False
    foreign: bool = False
    notes: tuple[str, ...] = ()


def resolve_specs(
    specs: Sequence[str], target: Target, retentions: Sequence[Fraction] = (), force: bool = False
) -> list[NamedPattern]:
    """All patterns that the SPECs name, checked against the target, `full` first; raises PatternError.

    `retentions` asks every run's file for its nested patterns at these retentions instead of its last one. A name that
    stands for several patterns gets its letters added.
    """
    named = {NamedPattern("full", target.start, "full"): None}  # each pair of name and letters once
    for spec in specs:
        for pattern in _resolve(spec.strip(), target, retentions, force):
            missing = [layer for layer in pattern.pattern.full_layers if not target.start.is_full(layer)]
            if missing:
                advice = "give letters with S there" if pattern.method == "uniform" else "write S there"
                raise PatternError(
                    f"pattern {pattern.name!r} asks F of layer {missing[0]}, which this checkpoint shares natively and "
                    f"which has no indexer: {advice}"
                )
            named[pattern] = None
    names = [pattern.name for pattern in named]
    return [
        pattern if names.count(pattern.name) == 1 else replace(pattern, name=f"{pattern.name} {pattern.pattern}")
        for pattern in named
    ]


def pattern_of(spec: str, start: Pattern, layers: Backbone | None = None) -> Pattern:
    """The pattern that a SPEC names, for a model of this start pattern; whose pattern it is does not matter here."""
    return resolve_specs([spec], Target("", "", start, "", layers=layers), force=True)[-1].pattern


def _resolve(spec: str, target: Target, retentions: Sequence[Fraction], force: bool) -> list[NamedPattern]:
    num_layers = len(target.start)
    if spec == "full":
        return [NamedPattern("full", target.start, "full")]
    if spec.startswith("uniform:"):
        retention = parse_retention(spec.removeprefix("uniform:"))
        return [NamedPattern(f"uniform {retention}", Pattern.uniform(num_layers, retention), "uniform")]
    if spec.startswith("published:"):
        file = load_pattern_file(published_path(spec))
        return [_from_file(spec, file, file.pattern, target, force)]
    if re.fullmatch(r"[A-Z]+|[fs]+", spec) and not os.path.exists(spec):  # other letters: their position gets named
        return [NamedPattern(spec.upper(), Pattern.parse(spec, num_layers), "letters")]
    if is_engine_source(spec):
        found = import_pattern(spec, None, target.backbone)
        name = spec
        if len(spec) > NAME_LENGTH:  # the end of a path, or whose settings these are
            is_file = Path(spec).suffix in (".json", ".gguf")
            name = f"as {found.engine.title}" if found.engine and not is_file else Path(spec).name
        file = found.pattern_file(name)
        return [replace(_from_file(name, file, file.pattern, target, force), notes=found.notes)]
    return _from_path(spec, target, retentions, force)


def published_path(spec: str) -> Path:
    """The file of `published:NAME`; raises PatternError with the names that there are."""
    known = sorted(file.stem for file in published_patterns().glob("*.json"))
    name = spec.removeprefix("published:")
    if name not in known:
        raise PatternError(
            f"no published pattern {shown(name)}: {did_you_mean(name, known)}known are {', '.join(known)}"
        )
    return published_patterns() / f"{name}.json"


def split_retention(text: str) -> tuple[str, str]:
    """RUN@1/2 as the RUN and its retention; the latter is empty where none is given, or the whole is a file's name."""
    run, _, at = (text, "", "") if os.path.exists(text) else text.partition("@")
    return run, at


def pattern_file_of(text: str, error: type[IcsearchError]) -> Path:
    """The path as typed, of a RUN its pattern.json; it need not exist. Raises `error` for an unfinished run."""
    path = typed_path(text, error)
    if not path.is_dir():
        return path
    file = path / "pattern.json"
    if not file.exists() and (why := why_no_pattern(path)):
        raise error(why)
    return file


def _from_path(spec: str, target: Target, retentions: Sequence[Fraction], force: bool) -> list[NamedPattern]:
    text, at = split_retention(spec)
    path = pattern_file_of(text, PatternError)
    if not path.exists():
        meant = did_you_mean(spec.partition(":")[0], FORMS) if ":" in spec else did_you_mean(spec, ["full"])
        raise PatternError(f"unknown pattern {shown(spec)}: {meant}expected {EXPECTED}")
    file = load_pattern_file(path)
    label = path.stem  # a run is called by its method and its folder, other files by their name
    if path.name == "pattern.json":
        folder = path.resolve().parent.name
        label = folder if folder.startswith(file.method) else f"{file.method} {folder}"
    wanted = [parse_retention(at)] if at else list(retentions)
    if not wanted or not (at or file.steps):
        return [_from_file(label, file, file.pattern, target, force)]
    try:
        nested = [(r, file.at_retention(r)) for r in wanted]
    except PatternError as error:
        raise PatternError(f"{spec}: {error}") from None
    return [_from_file(f"{label} @{r}", file, pattern, target, force) for r, pattern in nested]


def _from_file(name: str, file: PatternFile, pattern: Pattern, target: Target, force: bool) -> NamedPattern:
    """A pattern of a file, refused where it was made for another kind of model (unless forced)."""
    model_type = file.model.get("model_type")
    foreign = [
        f"{what} {found}, this model has {here}"
        for what, found, here in (
            ("model type", model_type, target.model_type or model_type),
            ("layers", len(pattern), len(target.start)),
        )
        if found is not None and found != here
    ]
    fits = len(pattern) == len(target.start)
    if foreign and not (force and fits):
        remedy = "use --force to evaluate it all the same" if fits else "it cannot be run here"
        raise PatternError(f"pattern {name!r} belongs to another model ({'; '.join(foreign)}): {remedy}")
    other_weights = file.model.get("fingerprint") not in (None, target.fingerprint)
    chosen_on = [file.calibration]
    if file.refinement is not None and pattern == file.pattern:  # refined on its held-out sequences
        chosen_on.append(file.refinement["heldout"])
    in_sample = any(
        batches.get("fingerprint") == target.calibration_fingerprint
        or not target.sequences.isdisjoint(batches.get("sequences") or ())
        for batches in chosen_on
    )
    return NamedPattern(name, pattern, file.method, in_sample, bool(foreign) or other_weights)
