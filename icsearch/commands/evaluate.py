"""`icsearch eval` as a function: from a request to eval.json. The command line parses and calls this."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from icsearch.commands import tasks
from icsearch.commands.requests import EvalRequest
from icsearch.commands.scoring import Loaded, count_in_sweeps, load, opened
from icsearch.commands.setup import Inputs, run_options, start_event
from icsearch.commands.specs import Target, resolve_specs
from icsearch.core.errors import IcsearchError, ModelError
from icsearch.core.jsonfile import write_object
from icsearch.core.pattern import Pattern
from icsearch.engines.export import is_uniform
from icsearch.model.layout import Layout, config_dtype
from icsearch.model.loading import load_tokenizer
from icsearch.model.model import DsaModel
from icsearch.model.quantisation import other_bytes, quantisation
from icsearch.model.shape import ModelShape
from icsearch.planning.rows import model_rows, process_rows, weight_rows
from icsearch.planning.serving import CONTEXTS, Saved, footprint
from icsearch.planning.work import cost_rows
from icsearch.runs.evaluation import EvalRecord
from icsearch.runs.journal import Event
from icsearch.runs.results import guessing_notes
from icsearch.search.loop import Progress, Run
from icsearch.sweep.branches import cut_waves
from icsearch.sweep.distributed.launch import MEASURE, check_device, grids
from icsearch.sweep.measures import Share, Work, bucket_edges, bucket_tokens, measure_missing, shared_settings
from icsearch.sweep.timing import Timing, measure

if TYPE_CHECKING:
    from icsearch.sweep.distributed.world import World

# The tasks with an answer, by kind.
Questions = dict[str, list[tasks.Task]]
# Writes the results of an evaluation into its directory, given the content of eval.json.
Publish = Callable[[Path, dict[str, Any]], object]

TASK_SEED = 0
ROOM_TO_WRITE = 16  # tokens decoded behind a prompt
EXTRAS = {  # what is done for each of them, in words
    "cost_rows": "counting the work of each pattern, and what that makes its speed-up",
    "measured": "timing prefill and decoding on this machine",
    "lm_eval": "running lm-evaluation-harness",
}


def evaluate(
    request: EvalRequest,
    listener: Progress,
    publish: Publish = lambda out, document: None,
    world: World | None = None,
) -> dict[str, Any]:
    """Measure, or continue, or return the finished evaluation in `request.out`; the content of eval.json.

    With `world`, this is rank 0 of a run of several processes, which share the sequences; all else it does alone.
    """
    wanted = grids(world.size if world else 1, None, 1)
    check_device(request.device, wanted[0].size)
    with opened(request, lambda inputs, existing: _start(request, inputs, existing), listener) as here:
        record = EvalRecord.replay(here.existing)
        if not record.finished:
            _check_extras(request, here.inputs)  # all that can be refused is, before anything heavy
            questions = _questions(request, here.inputs)
            loaded = load(request, here, world, wanted, listener)
            _check_whole_forwards(request, loaded)
            record = EvalRecord.replay(here.run.open(here.start, here.existing))
            _measure(request, here.inputs, loaded, questions, Run(here.run.journal, record, listener))
        document = record.to_json()
        write_object(request.out / "eval.json", document)
        publish(request.out, document)
        return document


def _start(request: EvalRequest, inputs: Inputs, existing: list[Event]) -> Event:
    layout, calibration = inputs.layout, inputs.calibration
    edges = bucket_edges(calibration.seq_len, layout.selection.kept)
    start = start_event(
        inputs,
        {"method": "eval", **run_options(request, inputs, existing)},
        index_topk=layout.selection.kept,
        bucket_edges=edges,
        bucket_tokens=bucket_tokens(torch.from_numpy(calibration.counted()), edges),
        choosing_queries=calibration.seq_len - layout.selection.kept,
        masked=calibration.loss_mask is not None,
    )
    target = Target(
        layout.model_type,
        start["model"]["fingerprint"],
        layout.start_pattern,
        start["calibration"]["fingerprint"],
        frozenset(start["calibration"]["sequences"]),
        layout.backbone,
    )
    named = resolve_specs(request.patterns, target, request.retentions, request.force)
    start["patterns"] = [{**asdict(pattern), "pattern": pattern.pattern.letters} for pattern in named]
    for described in start["patterns"]:
        del described["notes"]  # they become the evaluation's
    start["options"] |= {
        "patterns": [list(described.values()) for described in start["patterns"]],
        "tasks": request.tasks,
        "task_length": task_length(request, inputs) if request.tasks else None,
        "contexts": list(request.contexts),
        "measure": list(request.measure),
        "lm_eval": list(request.lm_eval),
    }
    return start


def task_length(request: EvalRequest, inputs: Inputs) -> int:
    """Tokens of a task's prompt: as asked, or as long as the batches."""
    return request.task_length or inputs.calibration.seq_len


def _measure(request: EvalRequest, inputs: Inputs, loaded: Loaded, questions: Questions, run: Run[EvalRecord]) -> None:
    """Whatever the record does not hold yet: the batches, the tasks, the cost."""
    record, listener = run.record, run.progress
    layout, per_sweep = inputs.layout, loaded.memory.patterns_per_sweep
    patterns = list(dict.fromkeys(Pattern(row["pattern"]) for row in record.start["patterns"]))
    sequences = len(record.tokens)
    total = count_in_sweeps(layout, patterns, per_sweep) * sequences
    of_weights = weight_rows(loaded.memory, len(patterns), sequences, loaded.bytes_per_second)
    rows = [*model_rows(record.start), *process_rows(loaded.memory, sequences), *of_weights]
    listener.planned(rows, total, record.layer_sequences)
    listener.step_started(0, len(patterns), max(total - record.layer_sequences, 1))
    target = Target("", "", layout.start_pattern, "", layers=layout.backbone)
    named = resolve_specs(request.patterns, target, request.retentions, force=True)
    read = [f"{pattern.name}: {note}" for pattern in named for note in pattern.notes]
    run.note([*loaded.notes, *_uncounted(inputs), *read, *_uniform_alone(patterns, layout)], tell=True)
    waves = cut_waves(loaded.batches, loaded.memory.batches_per_wave)
    measure_missing(run, loaded.dsa, waves, patterns, per_sweep, _shared_by(loaded, record, listener))
    run.note(guessing_notes(record.loss(layout.start_pattern.letters), layout.vocab_size), tell=True)
    _run_tasks(questions, loaded.dsa, patterns, run)
    for name, compute in _extras(request, inputs, loaded, record).items():
        if name not in record.extras:
            listener.info(f"{EXTRAS[name]} ...")
            run.append({"event": "extra", "name": name, "value": compute()})
    run.append({"event": "finish"})


def _shared_by(loaded: Loaded, record: EvalRecord, listener: Progress) -> Share | None:
    """Has all processes of the run measure; None where there is one."""
    coordinator = loaded.coordinator
    if coordinator is None:
        return None
    shared = shared_settings(record.start)

    def measure_all(work: Sequence[Work]) -> Iterator[Event]:
        items = [
            {"batches": [batch.first for batch in wave], "patterns": [pattern.letters for pattern in patterns]}
            for patterns, wave in work
        ]
        for events in coordinator.do_jobs(MEASURE, shared, items, listener.layer_done):
            yield from events

    return measure_all


def _check_extras(request: EvalRequest, inputs: Inputs) -> None:
    """Refuse what would fail only behind hours of measuring; raises IcsearchError."""
    if request.contexts:
        _shape(inputs)  # where nothing was asked for, an evaluation of a family that is not counted does without
    limit = inputs.layout.max_positions
    longest = max([0, *request.measure, task_length(request, inputs) if request.tasks else 0]) + ROOM_TO_WRITE
    if (request.measure or request.tasks) and longest > limit:
        raise IcsearchError(
            f"--measure and tasks need up to {longest} positions with what is written behind a prompt, the model has "
            f"{limit}: give a smaller --measure or --task-length"
        )
    if request.lm_eval and importlib.util.find_spec("lm_eval") is None:
        raise IcsearchError("--lm-eval needs lm-evaluation-harness: pip install 'icsearch[lm-eval]'")


def _check_whole_forwards(request: EvalRequest, loaded: Loaded) -> None:
    """Refuse what runs token by token where each token would read all weights; raises IcsearchError."""
    asked = {"--tasks": request.tasks, "--measure": request.measure, "--lm-eval": request.lm_eval}
    if loaded.dsa.weights.streamed and any(asked.values()):
        option = next(name for name, value in asked.items() if value)
        raise IcsearchError(
            f"{option} runs the model token by token, and each token would read all weights, which are streamed from "
            f"{loaded.memory.offload.where}: leave it out, or give --offload none"
        )


def _questions(request: EvalRequest, inputs: Inputs) -> Questions:
    """The tasks of each kind; none where none were asked for. Raises TaskError."""
    if not request.tasks:
        return {}
    tokenizer = load_tokenizer(inputs.source, request.calibration.trust_remote_code)
    length = task_length(request, inputs)
    return {
        kind: tasks.make_tasks(tokenizer, kind, length_tokens=length, count=request.tasks, seed=TASK_SEED)
        for kind in tasks.KINDS
    }


def _run_tasks(questions: Questions, dsa: DsaModel, patterns: Sequence[Pattern], run: Run[EvalRecord]) -> None:
    """Tasks with an answer, for each pattern and kind that is missing."""
    for kind, asked in questions.items():
        for pattern in patterns:
            if (pattern.letters, kind) in run.record.tasks:
                continue
            run.progress.info(f"task {kind}, {len(asked)} questions of {len(asked[0].prompt)} tokens: {pattern}")
            with dsa.running(pattern):
                forced = tasks.teacher_forced_hits(dsa.model, asked)
                generated = tasks.generated_hits(dsa.model, asked)
            hits = {"forced": forced, "generated": generated}
            run.append({"event": "task", "pattern": pattern.letters, "kind": kind, **hits})


def _extras(request: EvalRequest, inputs: Inputs, loaded: Loaded, record: EvalRecord) -> dict[str, Callable[[], Any]]:
    """What is asked for beside the losses, by the name it has in eval.json."""
    start = inputs.layout.start_pattern
    names: dict[Pattern, str] = {}
    for row in record.start["patterns"]:
        names.setdefault(Pattern(row["pattern"]), row["name"])
    extras: dict[str, Callable[[], Any]] = {}
    if not _uncounted(inputs):
        contexts, counted = request.contexts or CONTEXTS, _shape(inputs)
        found = quantisation(inputs.source.config, inputs.source.name)
        each = other_bytes(found, config_dtype(inputs.source).itemsize)
        before = footprint(counted, start, each)
        extras["cost_rows"] = lambda: [
            {
                "name": name,
                "rows": [asdict(row) for row in cost_rows(counted, pattern, contexts, baseline=start)],
                "saved": asdict(Saved.between(before, footprint(counted, pattern, each))),
            }
            for pattern, name in names.items()
            if pattern != start
        ]
    if request.measure:
        extras["measured"] = lambda: _timings(measure(loaded.dsa, list(names), request.measure), names)
    if request.lm_eval:
        tokenizer = load_tokenizer(inputs.source, request.calibration.trust_remote_code)
        extras["lm_eval"] = lambda: tasks.lm_eval_results(loaded.dsa, tokenizer, list(names), request.lm_eval)
    return extras


def _shape(inputs: Inputs) -> ModelShape:
    """What the cost is counted from; raises ModelError for a family that is not counted."""
    return ModelShape.from_config(inputs.source.config, dsa_layers=len(inputs.layout.layer_indices))


def _uniform_alone(patterns: Sequence[Pattern], layout: Layout) -> list[str]:
    """A note where nothing is measured that was found for a model: what uniform patterns cost shows on long texts."""
    others = [pattern for pattern in patterns if pattern != layout.start_pattern]
    if not others or not all(map(is_uniform, others)):
        return []
    return [
        "only uniform patterns are measured here: short texts hide what they cost on long contexts (give longer "
        "sequences, or --tasks N); icsearch fisher finds a pattern for this model"
    ]


def _uncounted(inputs: Inputs) -> list[str]:
    """A note where the cost of this family is not counted."""
    try:
        _shape(inputs)
    except ModelError as error:
        return [f"no counted work and no estimated speed-up for {inputs.layout.model_type}: {error}"]
    return []


def _timings(timings: Sequence[Timing], names: dict[Pattern, str]) -> list[dict[str, Any]]:
    """Measured ratios, time of the unmodified model / time of the pattern, in paired rounds on this machine."""
    return [
        {
            "name": names[Pattern(timing.pattern)],
            "length": timing.length,
            "phase": phase,
            "min": speedup.minimum,
            "median": speedup.median,
            "max": speedup.maximum,
            "median_seconds": seconds.median,
            "repeats": timing.repeats,
            "threads": timing.threads,
        }
        for timing in timings
        for phase, speedup, seconds in (
            ("prefill", timing.prefill_speedup, timing.prefill_seconds),
            ("decode", timing.decode_speedup, timing.decode_seconds),
        )
    ]
