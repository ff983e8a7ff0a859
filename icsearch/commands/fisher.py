"""`icsearch fisher` as a function: the second-order table by one sweep, then what it proposes, measured."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from icsearch.commands.requests import FisherRequest
from icsearch.commands.scoring import (
    Loaded,
    Opened,
    Publish,
    load,
    make_scorer,
    make_scoring,
    opened,
    publish_nothing,
    score_baseline,
)
from icsearch.commands.setup import Inputs, pattern_start
from icsearch.core.pattern import Pattern
from icsearch.planning import rehearsal
from icsearch.planning.rows import model_rows, process_rows, stage_rows, table_rows, weight_rows
from icsearch.planning.work import pair_cost
from icsearch.runs.directory import part_of
from icsearch.runs.fisher_file import drawing_of, measured_beside, read_table, save_table
from icsearch.runs.journal import Event
from icsearch.runs.record import RunRecord
from icsearch.search.loop import Progress, Scoring, run_proposals, run_refinement
from icsearch.search.protocol import SearchTask
from icsearch.search.registry import DRAWS, LIKELY_ROUNDS, make_strategy
from icsearch.sweep.branches import Batch, cut_waves, make_place
from icsearch.sweep.distributed.launch import HELDOUT, TABLE, check_device, grids
from icsearch.sweep.fisher import FisherSweep, table_runs
from icsearch.sweep.states import Keeping

if TYPE_CHECKING:
    from icsearch.sweep.distributed.world import World

ENTRIES = "entries"  # of a run's directory: what the table's way back starts from, where that is on disk
METHOD = {"method": "fisher", "strategy": "second-order"}


def fisher(
    request: FisherRequest, listener: Progress, publish: Publish = publish_nothing, world: World | None = None
) -> RunRecord:
    """Search on the second-order table, or continue, or return the finished run. Raises IcsearchError for bad input.

    With `world`, this is rank 0 of a run of several processes, which share the sequences.
    """
    size = world.size if world else 1
    wanted = grids(size, request.dp, request.pp)
    check_device(request.device, size)
    with opened(request, lambda inputs, existing: _start(request, inputs, existing), listener) as here:
        record = RunRecord.replay(here.existing)
        if 0 < len(record.fisher.true) < len(here.start["tokens"]):  # one of its own is begun
            request = replace(request, table=None)
        reused: list[Event] = []
        if request.table and not record.fisher.true:
            reused = [read_table(request.table, here.start), *measured_beside(request.table, here.start)]
        if not record.finished:
            loaded = load(request, here, world, wanted, listener)
            record = RunRecord.replay(here.run.open(here.start, here.existing))
            scoring = make_scoring(here, record, loaded, listener)
            _announce(request, here, loaded, scoring)
            _fill_table(here, loaded, scoring, reused)
            score_baseline(scoring, here.inputs.layout)
            heldout = make_scorer(here, record, loaded, HELDOUT) if here.inputs.heldout else None
            if heldout is not None and request.refine is not None:
                run_proposals(scoring, then=lambda: run_refinement(scoring, heldout))
            else:
                run_proposals(scoring, heldout)
        save_table(request.out, record)
        publish(request.out, record)
        return record


def _start(request: FisherRequest, inputs: Inputs, existing: list[Event]) -> Event:
    """The first event; with what an exact greedy search as far as this one would take, by counting."""
    request = request.settled(part_of(existing, "options"))
    draws = request.draws or part_of(existing, "options").get("draws")
    if draws is None:
        draws = drawing_of(request.table)["draws"] if request.table else DRAWS
    method = {
        **METHOD,
        "objective": request.objective,
        "draws": draws,
        "seed": request.calibration.seed,
        "finalists": request.finalists,
        "rounds": request.rounds,
    }
    if request.refine is not None:
        method["refine"] = request.refine
    if request.confirm_on is not None:
        method["confirm"] = True
    start = pattern_start(request, inputs, existing, method)
    return {**start, "exact": _exact(SearchTask.of(start), request, inputs, start["references"].values())}


def _exact(task: SearchTask, request: FisherRequest, inputs: Inputs, references: Iterable[str]) -> dict[str, int]:
    """What an exact greedy search of as many flips would take, counted, with all states kept between its steps."""
    layout, uniform = inputs.layout, [Pattern(letters) for letters in references]
    keeping = Keeping(layout.num_layers, layout.layer_indices, frozenset(request.flippable(task.start)), stride=1)
    sweeps = rehearsal.rehearsed(lambda: make_strategy(task), task.tokens, uniform, keeping, len(task.start))
    evaluations, _ = rehearsal.preview(make_strategy(task), task.tokens, len)
    return {"candidate_evaluations": evaluations, "layer_evaluations": rehearsal.layer_evaluations(sweeps)}


def _announce(request: FisherRequest, here: Opened, loaded: Loaded, scoring: Scoring) -> None:
    """The plan, before anything runs. What is measured is taken to take half a forward each."""
    record, memory, layout = scoring.record, loaded.memory, here.inputs.layout
    sequences, options = len(record.tokens), record.start["options"]
    flips, path, finalists = len(request.flippable(layout.start_pattern)), options["num_shared"], options["finalists"]
    table = 0 if request.table else round(_table_runs(here))
    rounds = min(LIKELY_ROUNDS, options["rounds"])
    measuring = (flips + path + rounds * finalists) * layout.num_layers // 2
    made = f"{options['draws']} draws a sequence: about {table} layer evaluations, each pair's attention by its FLOPs"
    rows = [
        *model_rows(record.start),
        *process_rows(memory, sequences),
        *weight_rows(memory, flips, sequences, loaded.bytes_per_second),
        ("table", made if table else f"{request.table}"),
        *(table_rows(memory) if table else ()),
        (
            "then measured",
            f"{flips} single flips, a nested path of {path}, rounds of {finalists} patterns (at most "
            f"{options['rounds']}): about {measuring} layer evaluations with {rounds} rounds",
        ),
        ("exact greedy", f"{record.start['exact']['layer_evaluations']} layer evaluations (counted, not run)"),
        *stage_rows(record.start),
    ]
    scoring.progress.planned(rows, (table + measuring) * sequences, record.layer_sequences)


def _fill_table(here: Opened, loaded: Loaded, scoring: Scoring, reused: list[Event]) -> None:
    """The table, wave by wave, as far as the journal lacks it; where memory runs out, by waves of half as many batches.

    Of several processes one that runs out of memory ends the run.
    """
    record, plan = scoring.record, loaded.memory.table
    if not record.fisher.true:
        scoring.fill(lambda: iter(reused))
    together = plan.batches_per_wave if plan else 1

    def tables() -> Iterator[Event]:
        left = [batch for batch in loaded.batches if batch.first >= len(record.fisher.true)]
        if not left:
            return
        total = sum(len(batch.input_ids) for batch in left) * _table_runs(here)
        scoring.progress.step_started(TABLE, 0, round(total))
        for event in _tables(here, loaded, cut_waves(left, together), scoring.progress.layer_done):
            notes = event.pop("notes")
            yield event
            scoring.note(notes)

    def shrink() -> str:
        nonlocal together
        if together == 1 or loaded.coordinator is not None:
            return ""
        failed, together = together, together // 2
        return f"memory ran out in a wave of {failed} batches; the table goes on with {together} at a time"

    try:
        scoring.fill(tables, shrink)
    finally:
        shutil.rmtree(here.run.path / ENTRIES, ignore_errors=True)


def _pair_cost(here: Opened) -> float:
    """Of a family whose work is not counted, as much as a whole layer: the reference modules run all of attention."""
    sizes = here.inputs.layout.sizes
    return 1.0 if sizes is None else pair_cost(sizes, here.inputs.calibration.seq_len)


def _table_runs(here: Opened) -> float:
    """Runs of a layer that the table takes for each sequence."""
    layout = here.inputs.layout
    return table_runs(layout.start_pattern, layout.num_layers, here.start["options"]["draws"], _pair_cost(here))


def _tables(
    here: Opened, loaded: Loaded, waves: Sequence[Sequence[Batch]], on_layer: Callable[[int], None]
) -> Iterator[Event]:
    """The events of all batches, by one process or by all."""
    memory, options, entries = loaded.memory, here.start["options"], here.run.path / ENTRIES
    if memory.table is None:
        raise RuntimeError("a table was not planned for")
    job = {"draws": options["draws"], "seed": options["seed"], "pair_cost": _pair_cost(here)}
    if loaded.coordinator is not None:
        firsts = [[batch.first for batch in wave] for wave in waves]
        together = memory.grid.waves_per_job(len(waves))
        items = [{"waves": firsts[first : first + together]} for first in range(0, len(firsts), together)]
        shared = {**job, "place": memory.table.place, "directory": str(entries)}
        for events in loaded.coordinator.do_jobs(TABLE, shared, items, on_layer):
            yield from events
        return
    sweep = FisherSweep(loaded.dsa, place=make_place(memory.table.place, loaded.dsa.device, entries), **job)
    for wave in waves:
        yield from sweep.events(wave, on_layer)
