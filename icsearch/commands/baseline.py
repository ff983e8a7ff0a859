"""`icsearch dp-baseline` as a function: similarity by one sweep, the dynamic program, the pattern's real loss.

The baseline of the IndexCache paper (Appendix C). It maximises a local similarity and so cannot see how missed
tokens add up downstream; the report sets its prediction beside what the pattern really costs. So it does with another
local measure, Kascade's score, and with a second-order table, which is not local: each chooses a pattern of as many F
layers, and all are scored together.
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
from icsearch.commands.setup import Inputs, pattern_start
from icsearch.core.pattern import Pattern
from icsearch.model.layout import Layout
from icsearch.planning.rows import model_rows, process_rows, stage_rows, weight_rows
from icsearch.runs.arrays import square_of
from icsearch.runs.fisher_file import drawing_of, read_table
from icsearch.runs.journal import Event
from icsearch.runs.record import RunRecord
from icsearch.runs.similarity_file import other_numerics, read_similarity, save_similarity
from icsearch.search.dynamic_program import solve
from icsearch.search.loop import Progress, Scoring
from icsearch.search.proposals import table_of
from icsearch.search.protocol import LOSS
from icsearch.search.second_order import PatternSearch, correction
from icsearch.sweep.branches import Batch, cut_waves
from icsearch.sweep.distributed.launch import COMPARE, check_device, grids
from icsearch.sweep.similarity import SimilaritySweep

if TYPE_CHECKING:
    from icsearch.sweep.distributed.world import World

METHOD = {"method": "dp-baseline", "strategy": "dynamic-program", "objective": "cosine-similarity"}
NO_KASCADE = (
    "Kascade's score is left out: the attention weights that it needs are those of --kernels blockwise, and the "
    "similarity was measured without"
)


def dp_baseline(
    request: BaselineRequest, listener: Progress, publish: Publish = publish_nothing, world: World | None = None
) -> RunRecord:
    """Find the pattern of highest similarity, and its loss. Raises IcsearchError for bad input.

    With `world`, this is rank 0 of a run of several processes, which share the sequences.
    """
    wanted = grids(world.size if world else 1, None, 1)
    check_device(request.device, wanted[0].size)
    with opened(request, lambda inputs, existing: _start(request, inputs, existing), listener) as here:
        reused = [read_similarity(request.similarity, here.start)] if request.similarity else []
        tables = [read_table(request.table, here.start)] if request.table else []
        record = RunRecord.replay(here.existing)
        if not record.finished:
            loaded = load(request, here, world, wanted, listener)
            record = RunRecord.replay(here.run.open(here.start, here.existing))
            scoring = make_scoring(here, record, loaded, listener)
            if not record.fisher.true:
                scoring.fill(lambda: iter(tables))
            _compare(here.inputs.layout, loaded, scoring, reused)
        save_similarity(request.out, record)
        publish(request.out, record)
        return record


def _start(request: BaselineRequest, inputs: Inputs, existing: list[Event]) -> Event:
    """The first event; with what tells a table's drawing, where one is compared with."""
    return pattern_start(request, inputs, existing, {**METHOD, **(drawing_of(request.table) if request.table else {})})


def _compare(layout: Layout, loaded: Loaded, scoring: Scoring, reused: list[Event]) -> None:
    """Similarity, wave by wave what the journal lacks; then the patterns; then what they cost beside the references."""
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
    if not record.similarity_sums.importance:
        scoring.note([NO_KASCADE])
    _choose(scoring)
    score_baseline(scoring, layout, record.pattern, *(Pattern(e["pattern"]) for e in record.compared.values()))
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


def _choose(scoring: Scoring) -> None:
    """The pattern of each measure, journaled as far as it is not."""
    record = scoring.record
    start, means = record.start_pattern, record.similarity_sums.means()
    native = frozenset(record.start["model"]["native_shared"])
    kept = len(start.full_layers) - record.start["options"]["num_shared"]

    def best(measure: Any) -> Event:
        solutions = solve(measure.tolist(), must_be_full=record.stay_full - {0}, must_be_shared=native)
        return {"pattern": solutions.pattern(kept).letters, "objective": solutions.objective(kept)}

    if record.chosen is None:
        scoring.append({"event": "chosen", **best(square_of(means["cosine"]))})
    if "kascade" in means and "kascade" not in record.compared:
        kascade = square_of(means["kascade"])  # of its sum over all layers, an F layer's part is on the diagonal
        scoring.append({"event": "compared", "by": "kascade", **best(kascade - kascade.diagonal()[:, None])})
    if record.fisher.true and "fisher" not in record.compared:
        table = table_of(record)
        search = PatternSearch(table, start, record.stay_full, LOSS, correction(table, start, {}))
        price, pattern = search.best(kept)[0]
        scoring.append({"event": "compared", "by": "fisher", "pattern": pattern.letters, "objective": price})
