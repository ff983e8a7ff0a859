"""What to give a serving engine so that it runs a pattern: launch flags or config.json keys, with warnings."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from icsearch.engines.cautions import find_warnings
from icsearch.engines.engine import Engine, family
from icsearch.engines.letters import ExportError, decoder_letters
from icsearch.engines.serving import Serving, fit_stages
from icsearch.engines.table import find_engine
from icsearch.jsonfile import FieldError, check_fields
from icsearch.pattern import MODEL_FIELDS, Pattern, PatternFile


@dataclass(frozen=True)
class Export:
    """One engine's form of a pattern. `text` is what to paste, `how` says where, `warnings` what to look out for.

    `letters` are those that the engine counts, most often one a decoder layer; `settings` the keys in `text`.
    """

    engine: str
    title: str
    text: str
    how: str
    pattern: Pattern
    letters: str
    settings: dict[str, Any]
    warnings: tuple[str, ...]


def export(
    pattern_file: PatternFile, engine: str, retention: Fraction | None = None, serving: Serving | None = None
) -> Export:
    """The pattern of a pattern.json for one engine; with `retention`, an earlier pattern of the same run.

    With `serving`, the pattern is made fit for a pipeline layout: it may then come out as another one, and a warning
    says so. Raises ExportError for an unknown engine or a pattern that the checkpoint cannot run, PatternError where
    the run holds no pattern of that retention.
    """
    target = find_engine(engine)
    pattern = pattern_file.pattern if retention is None else pattern_file.at_retention(retention)
    check_model(pattern_file.model)
    check_native(pattern, pattern_file.model)
    stage_warnings: list[str] = []
    if serving is not None:
        pattern, stage_warnings = _fit_stages(pattern, pattern_file, target, serving)
    letters = engine_letters(target, pattern, pattern_file)
    if target.all_layers_alike and len(letters) != len(pattern):
        raise ExportError(
            f"{len(letters) - len(pattern)} of the {len(letters)} decoder layers have no indexer, and how "
            f"{target.title} numbers layers of such a model is not known here: no flags can be given"
        )
    model_type = pattern_file.model.get("model_type")
    settings = target.settings(letters, family(model_type))
    if pattern_file.model.get("wrapper_config") and target.nests_for(model_type):
        settings = {"text_config": settings}
    return Export(
        engine=target.name,
        title=target.title,
        text=target.render(settings),
        how=target.how,
        pattern=pattern,
        letters=letters,
        settings=settings,
        warnings=(*stage_warnings, *find_warnings(target, pattern, pattern_file, letters, serving is not None)),
    )


def _fit_stages(pattern: Pattern, file: PatternFile, engine: Engine, serving: Serving) -> tuple[Pattern, list[str]]:
    num_layers = len(decoder_letters(pattern, file.layer_indices, file.model.get("num_hidden_layers")))
    return fit_stages(pattern, file, engine, num_layers, serving)


def engine_letters(engine: Engine, pattern: Pattern, file: PatternFile) -> str:
    """The letters as the engine counts them: over all decoder layers, or over those with an indexer."""
    if engine.counts_indexed(file.model.get("model_type")):
        return pattern.letters
    return decoder_letters(pattern, file.layer_indices, file.model.get("num_hidden_layers"))


def check_model(model: dict[str, Any]) -> None:
    """Raise ExportError where a file's model holds what no file of ours does."""
    try:
        check_fields(model, MODEL_FIELDS)
    except FieldError as error:
        raise ExportError(f"the file's model is damaged ({error}): write the file again") from None


def check_native(pattern: Pattern, model: dict[str, Any]) -> None:
    """Raise ExportError where the pattern has F on a layer that the checkpoint itself shares."""
    native = model.get("native_shared") or []
    wrong = [layer for layer in native if layer >= len(pattern) or pattern.is_full(layer)]
    if wrong:
        raise ExportError(
            f"the checkpoint has no indexer weights at positions {wrong} (it shares these layers itself), but the "
            "pattern does not have S there: only F to S edits are possible on this checkpoint"
        )
