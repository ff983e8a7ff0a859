"""A similarity baseline's prediction beside the loss that its pattern really has, and its two heatmaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import Difference
from icsearch.report import numbers
from icsearch.report.triangle import TrianglePicture, triangle_picture
from icsearch.report.view import Reference, RunView

Triangle = Sequence[Sequence[float]]


@dataclass(frozen=True)
class PredictionRow:
    """What similarity says of a pattern, and what its loss says, as text."""

    name: str
    full: int
    objective: str
    mean: str
    loss: str
    delta: str


@dataclass(frozen=True)
class SimilaritySection:
    """All that the page says about the similarities of a run."""

    rows: tuple[PredictionRow, ...]
    reading: tuple[str, ...]
    pictures: tuple[TrianglePicture, ...]
    queries: str


def similarity_section(view: RunView) -> SimilaritySection | None:
    """The section of a similarity baseline; None for other runs, or before the similarities are measured."""
    similarity = view.record.similarity
    if similarity is None:
        return None
    pattern, cosine = view.record.pattern, similarity["cosine"]
    return SimilaritySection(
        rows=tuple(_rows(view, cosine, similarity["objective"])),
        reading=tuple(_reading(view, cosine, similarity["objective"])),
        pictures=(
            triangle_picture("Similarity of attention outputs", "mean cosine similarity", cosine, pattern),
            triangle_picture("Overlap of selections", "mean overlap", similarity["overlap"], pattern),
        ),
        queries=numbers.count(similarity["queries"]),
    )


def similarity_sum(cosine: Triangle, pattern: Pattern) -> float:
    """The objective: the sum over S layers of the similarity to their source's selection."""
    pairs = enumerate(pattern.sources())
    return math.fsum(cosine[layer][source] for layer, source in pairs if layer != source)


def _rows(view: RunView, cosine: Triangle, objective: float) -> list[PredictionRow]:
    if not view.points:
        return []
    baseline, chosen = view.points[0], view.record.pattern
    rows = [PredictionRow(view.baseline_name, baseline.full, "–", "–", numbers.loss(baseline.loss), "–")]
    if len(view.points) > 1:
        rows.append(_row("chosen by similarity", chosen, objective, view.final.loss, view.final.difference))
    for reference in view.references:
        predicted = similarity_sum(cosine, reference.pattern)
        rows.append(_row(reference.label, reference.pattern, predicted, reference.loss, reference.difference))
    return rows


def _row(name: str, pattern: Pattern, objective: float, loss: float, difference: Difference) -> PredictionRow:
    return PredictionRow(
        name=name,
        full=len(pattern.full_layers),
        objective=f"{objective:.4f}",
        mean=_mean(objective, pattern),
        loss=numbers.loss(loss),
        delta=numbers.difference(difference),
    )


def _mean(objective: float, pattern: Pattern) -> str:
    shared = len(pattern.shared_layers)
    return f"{objective / shared:.4f}" if shared else "–"


# --- in words -----------------------------------------------------------------------------------------------------


def _reading(view: RunView, cosine: Triangle, objective: float) -> list[str]:
    found = [_prediction(view.record.pattern, cosine, objective)]
    reference = view.same_retention
    if reference is not None and len(view.points) > 1:
        found.append(_prediction_of_uniform(reference, cosine))
        found.append(_outcome(reference))
    return [sentence for sentence in found if sentence]


def _prediction(pattern: Pattern, cosine: Triangle, objective: float) -> str:
    pairs = [(layer, source) for layer, source in enumerate(pattern.sources()) if layer != source]
    if not pairs:
        return ""
    worst, source = min(pairs, key=lambda pair: cosine[pair[0]][pair[1]])
    return (
        f"Of all patterns with {len(pattern.full_layers)} F layers that this run allows, this one keeps the attention "
        f"outputs of its {numbers.plural(len(pairs), 'S layer')} most alike: their similarities add up to "
        f"{objective:.4f}, {_mean(objective, pattern)} on average. The least alike is layer {worst} under layer "
        f"{source}'s selection, {cosine[worst][source]:.4f}."
    )


def _prediction_of_uniform(reference: Reference, cosine: Triangle) -> str:
    total = similarity_sum(cosine, reference.pattern)
    return f"The uniform pattern of that size adds up to {total:.4f}, {_mean(total, reference.pattern)} on average."


def _outcome(reference: Reference) -> str:
    """What the losses say of the choice; no more than two standard errors carry."""
    difference = reference.searched_minus_uniform
    if reference.searched is None or difference is None:
        return ""
    if reference.searched.pattern == reference.pattern:
        return "It is this very pattern: similarity chose the uniform one."
    measured = f"Measured, its loss minus that of uniform is {numbers.difference(difference)} nats per token"
    if math.isnan(difference.std_err):
        return f"{measured} (one sequence: no standard error)."
    if abs(difference.delta) <= 2 * difference.std_err:
        return f"{measured}, within two standard errors of nothing: more similarity did not buy a lower loss."
    if difference.delta > 0:
        return f"{measured}: more similarity, and a higher loss."
    return f"{measured}: here the choice by similarity is the better one."
