"""`icsearch greedy` as a function: from a request to a finished run. The command line parses and calls this."""

from __future__ import annotations

from icsearch import plan
from icsearch.model import Layout
from icsearch.pattern import Pattern
from icsearch.prepare import (
    Inputs,
    Listener,
    Memory,
    SweepScorer,
    count_in_sweeps,
    device_batches,
    load_model,
    memory_of,
    obtain_batches,
    open_model,
    pattern_options,
    pattern_start,
    run_options,
    tell_what_happens,
)
from icsearch.record import RunRecord
from icsearch.requests import GreedyRequest
from icsearch.rundir import RunDirectory
from icsearch.search import Scoring, Search
from icsearch.strategies import Strategy, make_strategy


def greedy(request: GreedyRequest, listener: Listener) -> RunRecord:
    """Search, or continue, or return the finished run in `request.out`. Raises IcsearchError for bad input."""
    source, layout = open_model(request.calibration)
    num_shared = request.resolve_num_shared(layout.start_pattern)
    run = RunDirectory(request.out)
    with run.locked():
        inputs = Inputs(source, layout, obtain_batches(request, source, layout, listener))
        existing = [] if request.fresh else run.existing()
        options = {
            "method": "greedy",
            "strategy": request.strategy,
            "objective": request.objective,
            **pattern_options(request, num_shared),
            **run_options(request, inputs, existing),
        }
        record = RunRecord.replay(run.open(pattern_start(request, inputs, options), existing))
        tell_what_happens(existing, record.finished, request.out, listener)
        return record if record.finished else _search(request, inputs, run, record, listener)


def _search(
    request: GreedyRequest, inputs: Inputs, run: RunDirectory, record: RunRecord, listener: Listener
) -> RunRecord:
    options, layout = record.start["options"], inputs.layout
    memory = memory_of(request, inputs, options)
    per_sweep = memory.patterns_per_sweep
    dsa = load_model(request, inputs, options, listener)
    search_plan = _plan(request, layout, memory, record)
    total = search_plan.layer_evaluations * len(record.tokens)
    listener.planned(plan.rows(search_plan, record.start), total, record.layer_sequences)
    scorer = SweepScorer(dsa, device_batches(dsa, inputs.batches, options["batch_size"]), per_sweep)
    scoring = Scoring(run.journal, record, scorer, listener, layout.count_layer_runs)
    return Search(scoring, strategy_of(record)).run()


def strategy_of(record: RunRecord) -> Strategy:
    """The strategy of a run, at its beginning."""
    options = record.start["options"]
    return make_strategy(
        record.start_pattern, frozenset(options["keep_full"]), options["num_shared"], options["stages"]
    )


def _plan(request: GreedyRequest, layout: Layout, memory: Memory, record: RunRecord) -> plan.SearchPlan:
    size = memory.patterns_per_sweep

    def count(patterns: list[Pattern]) -> int:
        return count_in_sweeps(layout, patterns, size)

    references = [Pattern(letters) for letters in record.references.values()]
    evaluations, layer_runs = plan.preview(strategy_of(record), count)
    return plan.SearchPlan(
        num_layers=len(layout.layer_indices),
        candidates=len(request.flippable(layout.start_pattern)),
        num_shared=record.start["options"]["num_shared"],
        candidate_evaluations=evaluations,
        layer_evaluations=layer_runs + count([layout.start_pattern, *references]),
        naive_layer_evaluations=(evaluations + 1 + len(references)) * layout.num_layers,
        branches_per_sweep=size,
        branch_bytes=memory.shape.branch_bytes,
        layer_bytes=memory.shape.layer_bytes,
        weight_bytes=memory.weights,
        memory_bytes=memory.budget,
    )
