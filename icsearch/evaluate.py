"""`icsearch eval` as a function: from a request to eval.json. The command line parses and calls this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from icsearch import cost, plan
from icsearch.errors import IcsearchError
from icsearch.evaluation import EvalRecord, save_eval
from icsearch.journal import Event
from icsearch.measures import Evaluation, bucket_edges, bucket_tokens
from icsearch.model import DsaModel
from icsearch.pattern import Pattern
from icsearch.prepare import (
    Inputs,
    Listener,
    count_in_sweeps,
    device_batches,
    load_model,
    memory_of,
    obtain_batches,
    open_model,
    run_options,
    start_event,
    tell_what_happens,
)
from icsearch.requests import EvalRequest
from icsearch.rundir import RunDirectory
from icsearch.specs import NamedPattern, Target, resolve_specs


def evaluate(request: EvalRequest, listener: Listener) -> dict[str, Any]:
    """Measure, or continue, or return the finished evaluation in `request.out`; the content of eval.json."""
    source, layout = open_model(request.calibration)
    run = RunDirectory(request.out)
    with run.locked():
        inputs = Inputs(source, layout, obtain_batches(request, source, layout, listener))
        existing = [] if request.fresh else run.existing()
        start = _start(request, inputs, existing)
        record = EvalRecord.replay(run.open(start, existing))
        tell_what_happens(existing, record.finished, request.out, listener)
        if not record.finished:
            _run(request, inputs, run, record, listener)
        return save_eval(request.out / "eval.json", record)


def _start(request: EvalRequest, inputs: Inputs, existing: Sequence[Event]) -> Event:
    layout, batches = inputs.layout, inputs.batches
    edges = bucket_edges(batches.seq_len, layout.index_topk)
    start = start_event(
        inputs,
        {"method": "eval", **run_options(request, inputs, existing)},
        index_topk=layout.index_topk,
        bucket_edges=edges,
        bucket_tokens=bucket_tokens(torch.from_numpy(batches.counted()), edges),
        choosing_queries=batches.seq_len - layout.index_topk,
    )
    target = Target(
        layout.model_type, start["model"]["fingerprint"], layout.start_pattern, start["calibration"]["fingerprint"]
    )
    named = resolve_specs(request.patterns, target, request.retentions, request.force)
    start["patterns"] = [_describe(one) for one in named]
    start["options"] |= {
        "patterns": [[one.name, one.pattern.letters] for one in named],
        "tasks": request.tasks,
        "task_length": task_length(request, inputs) if request.tasks else None,
        "measure": list(request.measure),
        "lm_eval": list(request.lm_eval),
    }
    return start


def _describe(named: NamedPattern) -> dict[str, Any]:
    return {**asdict(named), "pattern": named.pattern.letters}


def task_length(request: EvalRequest, inputs: Inputs) -> int:
    """Tokens of a task's prompt: as asked, or as long as the batches."""
    return request.task_length or inputs.batches.seq_len


def _run(request: EvalRequest, inputs: Inputs, run: RunDirectory, record: EvalRecord, listener: Listener) -> None:
    options, layout = record.start["options"], inputs.layout
    memory = memory_of(request, inputs, options)
    per_sweep = memory.patterns_per_sweep
    dsa = load_model(request, inputs, options, listener)
    patterns = [Pattern(one["pattern"]) for one in record.start["patterns"]]
    total = count_in_sweeps(layout, patterns, per_sweep) * len(record.tokens)
    listener.planned(plan.model_rows(record.start), total, record.layer_sequences)

    def append(event: Event) -> None:
        run.journal.append(event)
        record.apply(event)

    batches = device_batches(dsa, inputs.batches, options["batch_size"])
    listener.step_started(0, len(patterns), max(total - record.layer_sequences, 1))
    Evaluation(dsa, batches, record, append, listener.layer_done).run(patterns, per_sweep)
    for name, compute in _extras(request, inputs, dsa, patterns).items():
        if name not in record.extras:
            listener.info(f"{name.replace('_', ' ')} ...")
            append({"event": "extra", "name": name, "value": compute()})
    append({"event": "finish"})
