"""What a process can be asked of one wave beside a sweep: measures of patterns, similarity of layers. Events come back.

Each job is a function of the model, its arguments and the wave alone, so it does not matter which process does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from icsearch.block import Batch
from icsearch.journal import Event
from icsearch.measures import WaveMeasures
from icsearch.model import DsaModel
from icsearch.pattern import Pattern
from icsearch.similarity import SimilaritySweep, similarity_events

MEASURE, COMPARE = "measure", "compare"

# (model, arguments that all waves share, arguments of this wave, wave, what hears of layers) to events.
Job = Callable[[DsaModel, dict[str, Any], dict[str, Any], Sequence[Batch], Callable[[int], None]], list[Event]]


def measure(
    dsa: DsaModel,
    shared: dict[str, Any],
    own: dict[str, Any],
    wave: Sequence[Batch],
    on_layer: Callable[[int], None],
) -> list[Event]:
    """Patterns measured against the unmodified model: see `WaveMeasures`."""
    measures = WaveMeasures(dsa, shared["bucket_edges"], shared["index_topk"])
    return [measures.event([Pattern(letters) for letters in own["patterns"]], wave, on_layer)]


def compare(
    dsa: DsaModel,
    shared: dict[str, Any],
    own: dict[str, Any],
    wave: Sequence[Batch],
    on_layer: Callable[[int], None],
) -> list[Event]:
    """Layers compared with one another: see `SimilaritySweep`."""
    sweep = SimilaritySweep(dsa, shared["index_topk"], shared["keep_on_cpu"])
    return similarity_events(sweep, wave, on_layer)


JOBS: dict[str, Job] = {MEASURE: measure, COMPARE: compare}
