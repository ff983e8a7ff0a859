"""`icsearch greedy` as a function: from a request to a finished run. The command line parses and calls this."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from icsearch.commands.requests import GreedyRequest
from icsearch.commands.scoring import (
    Loaded,
    Publish,
    count_in_sweeps,
    load,
    make_scorer,
    make_scoring,
    opened,
    publish_nothing,
    score_baseline,
)
from icsearch.commands.setup import Inputs, pattern_start
from icsearch.core.pattern import Pattern
from icsearch.model.layout import Layout
from icsearch.planning import rehearsal
from icsearch.planning.rows import SearchPlan, model_rows, process_rows, search_rows, stage_rows, weight_rows
from icsearch.runs.directory import part_of
from icsearch.runs.journal import Event
from icsearch.runs.record import RunRecord
from icsearch.search.loop import Progress, run_refinement, run_search
from icsearch.search.protocol import SearchTask, Strategy
from icsearch.search.registry import make_strategy
from icsearch.sweep.distributed.launch import HELDOUT, check_device, grids
from icsearch.sweep.states import Keeping

if TYPE_CHECKING:
    from icsearch.sweep.distributed.world import World


def greedy(
    request: GreedyRequest, listener: Progress, publish: Publish = publish_nothing, world: World | None = None
) -> RunRecord:
    """Search, or continue, or return the finished run in `request.out`. Raises IcsearchError for bad input.

    `publish` writes the results, while the directory is still ours. With `world`, this is rank 0 of a run of several
    processes, and has the others do their part.
    """
    size = world.size if world else 1
    wanted = grids(size, request.dp, request.pp)  # refused before anything is read
    check_device(request.device, size)
    with opened(request, lambda inputs, existing: _start(request, inputs, existing), listener) as here:
        record = RunRecord.replay(here.existing)
        if not record.finished:
            request = request.settled(here.start["options"])
            loaded = load(request, here, world, wanted, listener)
            record = RunRecord.replay(here.run.open(here.start, here.existing))
            search_plan = _plan(request, here.inputs.layout, loaded, record)
            scoring = make_scoring(here, record, loaded, listener, search_plan.kept)
            total = search_plan.expected_layer_evaluations * len(record.tokens)
            listener.planned(_rows(request, search_plan, loaded, here.start), total, record.layer_sequences)
            score_baseline(scoring, here.inputs.layout)
            if request.refine is None:
                run_search(scoring, strategy_of(record))
            else:
                heldout = make_scorer(here, record, loaded, HELDOUT)
                run_search(scoring, strategy_of(record), lambda: run_refinement(scoring, heldout))
        publish(request.out, record)
        return record


def _start(request: GreedyRequest, inputs: Inputs, existing: list[Event]) -> Event:
    request = request.settled(part_of(existing, "options"))
    method = {"method": "greedy", "strategy": request.strategy, "objective": request.objective}
    if request.refine is not None:  # only then: runs of earlier versions have no such option, and go on
        method["refine"] = request.refine
    return pattern_start(request, inputs, existing, method)


def strategy_of(record: RunRecord) -> Strategy:
    """The strategy of a run, at its beginning."""
    return make_strategy(SearchTask.of(record.start), record.start["options"]["strategy"])


def _plan(request: GreedyRequest, layout: Layout, loaded: Loaded, record: RunRecord) -> SearchPlan:
    memory, size = loaded.memory, loaded.memory.patterns_per_sweep
    along = [layout.start_pattern] * memory.along

    count = partial(count_in_sweeps, layout, per_sweep=size, along=along)
    references = [Pattern(letters) for letters in record.references.values()]
    flippable = request.flippable(layout.start_pattern)
    keeping = Keeping(layout.num_layers, layout.layer_indices, frozenset(flippable))
    kept = memory.keep(keeping, max(len(flippable), 1 + len(references)), len(record.tokens))
    evaluations, layer_runs = rehearsal.preview(strategy_of(record), record.tokens, count)
    sweeps = rehearsal.rehearsed(lambda: strategy_of(record), record.tokens, references, kept.keeping, size, along)
    return SearchPlan(
        num_layers=len(layout.layer_indices),
        candidates=len(flippable),
        num_shared=record.start["options"]["num_shared"],
        candidate_evaluations=evaluations,
        layer_evaluations=layer_runs + count([layout.start_pattern, *references]),
        expected_layer_evaluations=rehearsal.layer_evaluations(sweeps),
        naive_layer_evaluations=(evaluations + 1 + len(references)) * layout.num_layers,
        memory=memory,
        kept=kept,
        heldout_sequences=len(record.heldout.tokens) if record.heldout else 0,
    )


def _rows(request: GreedyRequest, search_plan: SearchPlan, loaded: Loaded, start: Event) -> list[tuple[str, str]]:
    """The plan in words."""
    stages = start["options"]["stages"]
    blocks = f"; searched in {stages} stages, their blocks of layers (--stages 1: all layers together)"
    more = blocks if stages == request.pp and stages > 1 else ""
    return [
        *model_rows(start),
        *process_rows(loaded.memory, len(start["tokens"]), more),
        *weight_rows(loaded.memory, search_plan.candidates, len(start["tokens"]), loaded.bytes_per_second),
        *search_rows(search_plan, start),
        *stage_rows(start),
    ]
