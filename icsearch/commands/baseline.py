"""`icsearch dp-baseline` as a function: similarity by one sweep, the dynamic program, the pattern's real loss.

The baseline of the IndexCache paper (Appendix C). It maximises a local similarity and so cannot see how missed
tokens add up downstream; the report sets its prediction beside what the pattern really costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from icsearch.commands.requests import BaselineRequest
from icsearch.commands.scoring import (
    Loaded,
    Publish,
    count_in_sweeps,
    load,
    make_scoring,
    opened,
    publish_nothing,
    score_baseline,
)
from icsearch.commands.setup import pattern_start
from icsearch.core.pattern import Pattern
from icsearch.model.layout import Layout
from icsearch.planning.rows import model_rows, process_rows, stage_rows, weight_rows
from icsearch.runs.journal import Event
from icsearch.runs.record import RunRecord
from icsearch.runs.similarity_file import other_numerics, read_similarity, save_similarity, square_of
from icsearch.search.dynamic_program import solve
from icsearch.search.loop import Progress, Scoring
from icsearch.sweep.branches import Batch, cut_waves
from icsearch.sweep.distributed.launch import COMPARE, check_device, grids
from icsearch.sweep.similarity import SimilaritySweep

if TYPE_CHECKING:
    from icsearch.sweep.distributed.world import World

METHOD = {"method": "dp-baseline", "strategy": "dynamic-program", "objective": "cosine-similarity"}


def dp_baseline(
    request: BaselineRequest, listener: Progress, publish: Publish = publish_nothing, world: World | None = None
) -> RunRecord:
    """Find the pattern of highest similarity, and its loss. Raises IcsearchError for bad input.

    With `world`, this is rank 0 of a run of several processes, which share the sequences.
    """
    wanted = grids(world.size if world else 1, None, 1)
    check_device(request.device, wanted[0].size)
    with opened(request, lambda inputs, existing: pattern_start(request, inputs, existing, METHOD), listener) as here:
        reused = [read_similarity(request.similarity, here.start)] if request.similarity else []
        record = RunRecord.replay(here.existing)
        if not record.finished:
            loaded = load(request, here, world, wanted, listener)
            record = RunRecord.replay(here.run.open(here.start, here.existing))
            _compare(request, here.inputs.layout, loaded, make_scoring(here, record, loaded, listener), reused)
        save_similarity(request.out, record)
        publish(request.out, record)
        return record


def _compare(request: BaselineRequest, layout: Layout, loaded: Loaded, scoring: Scoring, reused: list[Event]) -> None:
    """Similarity, wave by wave what the journal lacks; then the pattern; then what it costs beside the references."""
    record, memory = scoring.record, loaded.memory
    patterns = [record.start_pattern, *map(Pattern, record.references.values())]
    runs = layout.num_layers + count_in_sweeps(layout, patterns, memory.patterns_per_sweep)
    sequences = len(record.tokens)
    of_weights = weight_rows(memory, len(patterns), sequences, loaded.bytes_per_second)
    of_processes = process_rows(memory, sequences)
    rows = [*model_rows(record.start), *of_processes, *of_weights, *stage_rows(record.start)]
    scoring.progress.planned(rows, runs * sequences, record.layer_sequences)
    if not record.similarity_sums.sequences:
        scoring.fill(lambda: iter(reused))
    if (measured := record.similarity_sums.numerics) is not None:
        scoring.note(other_numerics(measured, record.start))
    of_batch = memory.shape.selections_bytes(len(layout.layer_indices))
    per_wave = min(memory.batches_per_wave, max(1, memory.spare // of_batch))
    shared = {"index_topk": layout.selection.kept, "keep_on_cpu": of_batch > memory.spare}
    left = [batch for batch in loaded.batches if batch.first >= record.similarity_sums.sequences]
    if left:
        scoring.progress.step_started(0, 1, layout.num_layers * sum(len(batch.input_ids) for batch in left))
    scoring.fill(lambda: _similarities(loaded, shared, cut_waves(left, per_wave), scoring.progress.layer_done))
    if record.chosen is None:
        _choose(request, scoring)
    score_baseline(scoring, layout, record.pattern)
    scoring.append({"event": "finish", "pattern": record.pattern.letters})


def _similarities(
    loaded: Loaded, shared: dict[str, Any], waves: Sequence[Sequence[Batch]], on_layer: Callable[[int], None]
) -> Iterator[Event]:
    """The events of each wave, by one process or by all."""
    if loaded.coordinator is not None:
        items = [{"batches": [batch.first for batch in wave]} for wave in waves]
        for events in loaded.coordinator.do_jobs(COMPARE, shared, items, on_layer):
            yield from events
        return
    sweep = SimilaritySweep(loaded.dsa, shared["index_topk"], shared["keep_on_cpu"])
    for wave in waves:
        yield from sweep.events(wave, on_layer)


def _choose(request: BaselineRequest, scoring: Scoring) -> None:
    """Solve the dynamic program and journal its pattern."""
    record = scoring.record
    start = record.start_pattern
    stages = frozenset(first for first, _ in record.start["blocks"])
    native = frozenset(record.start["model"]["native_shared"])
    solutions = solve(
        square_of(record.similarity_sums.means()["cosine"]).tolist(),
        must_be_full=(request.keep_full | stages) - native - {0},
        must_be_shared=native,
    )
    kept = len(start.full_layers) - record.start["options"]["num_shared"]
    pattern = solutions.pattern(kept)
    scoring.append({"event": "chosen", "pattern": pattern.letters, "objective": solutions.objective(kept)})
