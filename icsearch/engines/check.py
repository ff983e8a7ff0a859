"""What each engine will run with a config.json as it is, where they differ, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from icsearch.core.jsonfile import shown
from icsearch.core.pattern import FULL, SHARED
from icsearch.engines.engine import LETTER_KEYS, Engine
from icsearch.engines.read import PATTERN_KEYS, NotKnownError, import_config
from icsearch.engines.table import ENGINES, TRANSFORMERS
from icsearch.model.config import (
    FREQ,
    LETTERS,
    PATTERN,
    SWITCH,
    TEXT_CONFIG,
    TYPES,
    Backbone,
    EngineConfigError,
    read_backbone,
    refuse_modes,
)

CHECK_FORMAT = "icsearch.check/1"
OWN_KEYS = {TYPES, PATTERN, FREQ}  # of a checkpoint's config.json; engines without them are told elsewhere


@dataclass(frozen=True)
class Verdict:
    """What one engine makes of a config: the letters of the layers with an indexer, or why it makes nothing of it.

    In `notes` and `error` the engine is `it`. `known`: whether that is known here.
    """

    engine: Engine
    letters: str | None
    notes: tuple[str, ...] = ()
    error: str = ""
    known: bool = True

    @property
    def says(self) -> str:
        """In words, for whoever runs it; "" where it fails, which is a problem of the config."""
        if self.letters is None:
            return "" if self.known else self.error
        full = self.letters.count(FULL)
        kept = "every layer F" if full == len(self.letters) else f"{full} of {len(self.letters)} layers F"
        return "; ".join((kept, *self.notes))


@dataclass(frozen=True)
class Check:
    """`problems`: what is wrong or differs, one line each; none where the config is clean."""

    name: str
    backbone: Backbone
    verdicts: tuple[Verdict, ...]
    problems: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """The model, what each engine runs, each pattern, and the problems, one line each."""
        count, of = len(self.backbone.layer_indices), self.backbone.num_layers
        indexers = "all with an indexer" if count == of else f"{count} with an indexer"
        predicting = f", and {self.backbone.mtp_layers} of multi-token prediction" if self.backbone.mtp_layers else ""
        yield f"{self.name}: {self.backbone.model_type or 'no model_type'}, {of} layers, {indexers}{predicting}"
        for says, engines in _together(self.verdicts, lambda verdict: verdict.says).items():
            if says:
                yield f"{engines}: {says}"
        for letters, engines in _together(self.verdicts, lambda verdict: verdict.letters or "").items():
            if SHARED in letters:
                yield f"{letters}: {engines}"
        yield from (f"wrong: {problem}" for problem in self.problems)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "format": CHECK_FORMAT,
            "config": self.name,
            "model_type": self.backbone.model_type,
            "num_hidden_layers": self.backbone.num_layers,
            "layer_indices": list(self.backbone.layer_indices),
            "engines": {
                verdict.engine.name: {"pattern": verdict.letters, "notes": list(verdict.notes), "error": verdict.error}
                for verdict in self.verdicts
            },
            "problems": list(self.problems),
        }


def check_config(
    config: Mapping[str, Any], name: str, with_indexer: Collection[int] | None = None, engine: Engine | None = None
) -> Check:
    """Read a config as engines do; `with_indexer`: the layers that the weights hold an indexer for, where known.

    By `engine` alone, or by all that read a config.json and share in models of its type. Raises EngineConfigError
    where it is not that of a model with indexers.
    """
    refuse_modes(config, name, EngineConfigError)
    backbone = read_backbone(config, name)
    reading = [each for each in ENGINES.values() if OWN_KEYS & {*each.reader_of(backbone.model_type).order}]
    serving = [each for each in reading if each is TRANSFORMERS or each.serves(backbone.model_type)]
    verdicts = tuple(_verdict(each, config, backbone, name) for each in ([engine] if engine else serving))
    problems = [*_malformed(config, backbone), *_failing(verdicts), *_differing(verdicts)]
    if with_indexer is not None:
        problems += _without_weights(verdicts, backbone, with_indexer)
    return Check(name, backbone, verdicts, tuple(dict.fromkeys(problems)))


def _verdict(engine: Engine, config: Mapping[str, Any], backbone: Backbone, name: str) -> Verdict:
    def of_it(text: str) -> str:
        return text.replace(engine.title, "it")

    try:
        found = import_config(config, name, engine, backbone)
    except EngineConfigError as error:
        return Verdict(engine, None, error=of_it(str(error)), known=not isinstance(error, NotKnownError))
    said = any(keys.get(key) is not None for keys in (config, backbone.keys) for key in PATTERN_KEYS)
    notes = [of_it(note).removesuffix("every layer is F").removesuffix(": as given, ") for note in found.notes]
    return Verdict(engine, found.pattern.letters, tuple(note.rstrip(": ") for note in notes) if said else ())


def _malformed(config: Mapping[str, Any], backbone: Backbone) -> Iterator[str]:
    """What no engine is meant to be given, whether or not one of them copes with it."""
    keys = backbone.keys
    layers, mtp = backbone.num_layers, backbone.mtp_layers
    if outside := [key for key in PATTERN_KEYS if backbone.wrapper and config.get(key) is not None]:
        yield f"{', '.join(outside)} stands beside {TEXT_CONFIG}, where the language model does not see it: move it in"
    if FREQ in keys and keys[FREQ] is None:
        yield f"{FREQ} is null, on which transformers and vLLM fail: remove it, or write 1"
    if keys.get(SWITCH) is False and any(keys.get(key) for key in OWN_KEYS):
        yield f"{SWITCH} is false, which some engines do not read: write true, or remove the pattern"
    for key in (TYPES, *LETTER_KEYS):
        value = keys.get(key)
        if value is None:
            continue
        if not isinstance(value, (str, list)) or not all(each in (FULL, SHARED, *LETTERS) for each in value):
            yield f"{key} is {shown(value)}: expected full and shared, or F and S in capitals, one for each layer"
            continue
        letters = "".join(LETTERS.get(each, each) for each in value)
        if len(letters) not in (layers, layers + mtp, len(backbone.layer_indices)):
            yield f"{key} has {len(letters)} for {layers} layers: write one for each"
        if SHARED in letters[layers:]:
            yield f"{key} marks layers of multi-token prediction S, where nothing comes before them: leave them out"
        if letters.startswith(SHARED):
            yield f"{key} begins with S, and no selection comes before it: begin with F"


def _failing(verdicts: Collection[Verdict]) -> Iterator[str]:
    failing = [verdict for verdict in verdicts if verdict.letters is None and verdict.known]
    for error, engines in _together(failing, lambda verdict: verdict.error).items():
        yield f"{engines}: {error}"


def _differing(verdicts: Collection[Verdict]) -> Iterator[str]:
    """One line for each pattern that is not the one most engines run."""
    read = [verdict for verdict in verdicts if verdict.letters]
    count = Counter(verdict.letters for verdict in read)
    most = max(count, key=lambda letters: count[letters], default="") or ""
    for letters, engines in _together(read, lambda verdict: verdict.letters or "").items():
        if letters != most:
            differs = sum(one != other for one, other in zip(letters, most, strict=True))
            yield f"{engines} ({letters.count(FULL)} F) and most ({most.count(FULL)} F) differ in {differs} layers"


def _together(verdicts: Collection[Verdict], key: Callable[[Verdict], str]) -> dict[str, str]:
    """The engines of each kind of verdict, in words."""
    found: dict[str, list[str]] = {}
    for verdict in verdicts:
        found.setdefault(key(verdict), []).append(verdict.engine.title)
    return {kind: ", ".join(titles) for kind, titles in found.items()}


def _without_weights(verdicts: Collection[Verdict], backbone: Backbone, there: Collection[int]) -> Iterator[str]:
    """Layers that run an indexer of which the checkpoint holds no weights."""

    def lacking(verdict: Verdict) -> str:
        letters = zip(backbone.layer_indices, verdict.letters or "", strict=False)
        return ", ".join(str(index) for index, letter in letters if letter == FULL and index not in there)

    for layers, engines in _together(verdicts, lacking).items():
        if layers:
            yield f"the weights hold no indexer for layers that are F with {engines}: {layers}"
