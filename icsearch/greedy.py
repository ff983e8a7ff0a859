"""`icsearch greedy` as a function: from a request to a finished run. The command line parses and calls this."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from icsearch import __version__, calibration, checkpoint, model, plan
from icsearch.checkpoint import Checkpoint
from icsearch.journal import JOURNAL_FORMAT, Event
from icsearch.model import DsaModel, Layout
from icsearch.pattern import Pattern
from icsearch.record import RunRecord
from icsearch.requests import CalibrationRequest, GreedyRequest
from icsearch.rundir import RunDirectory
from icsearch.search import Progress, Scores, Search
from icsearch.strategies import Strategy, make_strategy, split_stages
from icsearch.sweep import Batch, Sweeper, cut_batches, is_out_of_memory, out_of_memory

REFERENCE_RETENTIONS = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
BATCH_TOKENS = 1024  # default tokens per layer call: small calls keep the reference indexer's tensors in cache
DEFAULT_NUM_SEQUENCES = 48
MEMORY_SHARE = 0.8  # of what is free when the run starts


class Listener(Progress, Protocol):
    """Hears what a search is about to do, beside its progress."""

    def info(self, text: str) -> None: ...

    def planned(self, plan: plan.SearchPlan, request: GreedyRequest, layout: Layout, record: RunRecord) -> None: ...


def greedy(request: GreedyRequest, listener: Listener) -> RunRecord:
    """Search, or continue, or return the finished run in `request.out`. Raises IcsearchError for bad input."""
    source = checkpoint.open_checkpoint(request.model)
    layout = model.inspect(source, request.calibration.trust_remote_code)
    num_shared = request.resolve_num_shared(layout.start_pattern)
    run = RunDirectory(request.out)
    with run.locked():
        batches, hit = _obtain(request.calibration, source, layout, request.out / "calibration", request.fresh)
        how = "from the cache" if hit else "made now"
        listener.info(f"calibration: {batches.num_sequences} x {batches.seq_len} tokens ({how})")
        if request.fresh:
            run.clear()
        existing = run.existing()
        start = _start_event(request, source, layout, batches, num_shared, existing)
        if existing is not None:
            run.check_same(existing, start)
            if existing.finished:
                listener.info(f"{request.out} holds this run, finished: nothing to search")
                return existing
            listener.info(f"continuing {request.out} behind step {len(existing.commits)}")
        return _search(request, source, layout, batches, run, existing or run.begin(start), listener)


def _search(
    request: GreedyRequest,
    source: Checkpoint,
    layout: Layout,
    batches: calibration.Calibration,
    run: RunDirectory,
    record: RunRecord,
    listener: Listener,
) -> RunRecord:
    options = record.start["options"]
    torch.set_num_threads(options["threads"])
    deterministic_notes = make_deterministic(options["device"])
    memory = request.memory or int(MEMORY_SHARE * free_bytes(options["device"]))
    try:
        dsa = model.load(
            source,
            dtype=options["dtype"],
            device=request.device,
            trust_remote_code=request.calibration.trust_remote_code,
        )
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        raise
    shape = batch_shape(layout, options, batches.seq_len)
    scorer = SweepScorer(dsa, batches, options["batch_size"], plan.patterns_per_sweep(shape, memory - source.num_bytes))
    listener.planned(_plan(request, source, layout, scorer, shape, memory, record), request, layout, record)
    for note in deterministic_notes:
        listener.info(note)
    strategy = strategy_of(record)
    search = Search(run.journal, record, strategy, scorer, listener, layout.count_layer_runs)
    return search.run()


class SweepScorer:
    """The layer sweep as the search sees it. Resident weights: one batch is one wave."""

    def __init__(self, dsa: DsaModel, batches: calibration.Calibration, batch_size: int, patterns: int) -> None:
        self.patterns_per_sweep = patterns
        self._sweeper = Sweeper(dsa)
        input_ids = torch.from_numpy(batches.input_ids).to(dsa.device)
        counted = torch.from_numpy(batches.counted()).to(dsa.device)
        self._batches: dict[tuple[int, int], Batch] = {
            (batch.first, batch.last): batch for batch in cut_batches(input_ids, counted, batch_size)
        }

    @property
    def waves(self) -> Sequence[tuple[int, int]]:
        return list(self._batches)

    def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Callable[[int], None]) -> Scores:
        result = self._sweeper.sweep(patterns, [self._batches[wave]], on_layer)
        return Scores(result.nll, result.layer_sequences)


def strategy_of(record: RunRecord) -> Strategy:
    """The strategy of a run, at its beginning."""
    options = record.start["options"]
    return make_strategy(
        record.start_pattern, frozenset(options["keep_full"]), options["num_shared"], options["stages"]
    )


def calibrate(request: CalibrationRequest, out: Path, fresh: bool) -> tuple[calibration.Calibration, bool]:
    """Batches of a source for a model, cached in `out`, and whether they were there already."""
    source = checkpoint.open_checkpoint(request.model)
    return _obtain(request, source, model.inspect(source, request.trust_remote_code), out, fresh)


def _obtain(
    request: CalibrationRequest, source: Checkpoint, layout: Layout, cache: Path, fresh: bool
) -> tuple[calibration.Calibration, bool]:
    return calibration.obtain(
        request.source,
        lambda: model.load_tokenizer(source, request.trust_remote_code),
        cache,
        seq_len=request.seq_len or default_seq_len(layout),
        num_sequences=request.num_sequences or DEFAULT_NUM_SEQUENCES,
        seed=request.seed,
        limits=calibration.Limits(layout.vocab_size, layout.index_topk, layout.max_positions),
        rebuild=fresh,
    )


def default_seq_len(layout: Layout) -> int:
    """Four times as long as a selection, so that most queries have to choose; at least 256 tokens."""
    return min(max(256, 4 * layout.index_topk), layout.max_positions)


def _start_event(
    request: GreedyRequest,
    source: Checkpoint,
    layout: Layout,
    batches: calibration.Calibration,
    num_shared: int,
    existing: RunRecord | None,
) -> Event:
    start = layout.start_pattern
    recorded = existing.start["options"]["threads"] if existing else torch.get_num_threads()
    manifest = batches.manifest
    return {
        "event": "start",
        "format": JOURNAL_FORMAT,
        "icsearch_version": __version__,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "options": {
            "method": "greedy",
            "strategy": request.strategy,
            "objective": request.objective,
            "num_shared": num_shared,
            "stages": request.stages,
            "keep_full": sorted(request.keep_full),
            "dtype": layout.dtype if request.dtype == "auto" else request.dtype,
            "device": model.resolve_device(request.device).type,
            "batch_size": request.batch_size or max(1, min(BATCH_TOKENS // batches.seq_len, batches.num_sequences)),
            "attention": model.ATTENTION,
            "threads": request.threads or recorded,
            "seed": request.calibration.seed,
        },
        "model": {
            "name_or_path": source.name,
            "model_type": layout.model_type,
            "fingerprint": checkpoint.fingerprint(source),
            "native_shared": list(layout.native_shared),
            "wrapper_config": layout.wrapper_config,
            "num_hidden_layers": layout.num_layers,
        },
        "calibration": {
            "fingerprint": batches.fingerprint,
            "num_sequences": batches.num_sequences,
            "seq_len": batches.seq_len,
            "source": manifest.get("source", request.calibration.source),
        },
        "environment": environment(),
        "num_layers": len(start),
        "decoder_layers": layout.num_layers,
        "layer_indices": list(layout.layer_indices),
        "start_pattern": start.letters,
        "references": references(start, num_shared),
        "blocks": [[block.start, block.stop] for block in split_stages(len(start), request.stages)],
        "tokens": batches.counted_tokens(),
    }


def references(start: Pattern, num_shared: int) -> dict[str, str]:
    """Uniform patterns to compare with: at 1/2, 1/4, 1/8, and with as many F layers as the search will keep.

    Those that ask F of a native S layer cannot be run and are left out.
    """
    kept = Fraction(len(start.full_layers) - num_shared, len(start))
    found: dict[str, str] = {}
    for retention in (*REFERENCE_RETENTIONS, kept):
        pattern = Pattern.uniform(len(start), retention)
        possible = all(start.is_full(layer) for layer in pattern.full_layers)
        if possible and pattern.letters not in found.values():
            found[f"uniform:{retention}"] = pattern.letters
    return found


def environment() -> dict[str, Any]:
    """What the bits of a loss depend on, beside the options."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device_name": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def batch_shape(layout: Layout, options: dict[str, Any], seq_len: int) -> plan.BatchShape:
    return plan.BatchShape(
        batch_size=options["batch_size"],
        seq_len=seq_len,
        hidden_size=layout.hidden_size,
        dtype_bytes=model.DTYPES[options["dtype"]].itemsize,
        index_topk=layout.index_topk,
        index_heads=layout.index_heads,
        index_head_dim=layout.index_head_dim,
        attention_heads=layout.attention_heads,
    )


def _plan(
    request: GreedyRequest,
    source: Checkpoint,
    layout: Layout,
    scorer: SweepScorer,
    shape: plan.BatchShape,
    memory: int,
    record: RunRecord,
) -> plan.SearchPlan:
    size = scorer.patterns_per_sweep

    def count(patterns: list[Pattern]) -> int:
        return sum(layout.count_layer_runs(patterns[i : i + size]) for i in range(0, len(patterns), size))

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
        branch_bytes=shape.branch_bytes,
        layer_bytes=shape.layer_bytes,
        weight_bytes=source.num_bytes,
        memory_bytes=memory,
    )


def free_bytes(device: str) -> int:
    """Memory that is free now on the device."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def make_deterministic(device: str) -> list[str]:
    """On CUDA, switch deterministic algorithms on: expert routing adds with atomics otherwise."""
    if device != "cuda":
        return []
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    return ["deterministic algorithms are on; torch warns of a kernel that has none"]
