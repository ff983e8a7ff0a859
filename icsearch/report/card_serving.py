"""How a model card says a pattern is served: by engines known to share in models of its type, and by no others."""

from __future__ import annotations

from icsearch.core.pattern_file import PatternFile
from icsearch.engines.engine import ExportError
from icsearch.engines.export import Export, export
from icsearch.engines.table import ENGINES

SHOWN = 2  # engines whose settings are written out; the others are named


def serving(file: PatternFile) -> list[str]:
    """Paragraphs of Markdown: what the first engines are given, with their warnings, and which others there are.

    Where no engine is known, one sentence that says so and names the way in Python. Raises ExportError for a run whose
    pattern does not fit its own model.
    """
    found = _exports(file)
    if not found:
        return [_in_python(file.model.get("model_type"))]
    others = ", ".join(f"{one.title} (`{one.engine}`)" for one in found[SHOWN:])
    also = f"Also known to take it: {others}; `icsearch export pattern.json --engine NAME` says how."
    return [*map(_settings, found[:SHOWN]), *([also] if others else [])]


def _exports(file: PatternFile) -> list[Export]:
    """What each engine that serves models of this type is given, those first that take a flag.

    One that cannot express this pattern is left out, as Megatron's two numbers give few. Raises ExportError where none
    of them can: then something is wrong with the run.
    """
    known = [engine for engine in ENGINES.values() if engine.serves(file.model.get("model_type"))]
    found, refusal = [], None
    for engine in sorted(known, key=lambda one: one.writes is not None):
        try:
            found.append(export(file, engine.name))
        except ExportError as error:
            refusal = error
    if refusal is not None and not found:
        raise refusal
    return found


def _settings(found: Export) -> str:
    text = f"With {found.title}, {found.how}:\n\n```\n{found.text}\n```"
    if not found.warnings:
        return text
    warnings = "\n".join(f"- {warning}" for warning in found.warnings)
    return f"{text}\n\nWarnings of `icsearch export pattern.json --engine {found.engine}`:\n\n{warnings}"


def _in_python(model_type: str | None) -> str:
    models = f"`{model_type}` models" if model_type else "a model of a type that the run does not say"
    return (
        f"No engine is known to take a pattern for {models}; in Python, `icsearch.load(MODEL, PATTERN)` gives the "
        "transformers model that runs it."
    )
