"""What every run has in common before it starts: inputs checked, options resolved, the model loaded."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from icsearch.requests import CalibrationRequest, PatternRequest, RunRequest
from icsearch.search import Progress, Scores
from icsearch.strategies import split_stages
from icsearch.sweep import Batch, Sweeper, cut_batches, is_out_of_memory, out_of_memory

REFERENCE_RETENTIONS = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
BATCH_TOKENS = 1024  # default tokens per layer call: small calls keep the reference indexer's tensors in cache
DEFAULT_NUM_SEQUENCES = 48
MEMORY_SHARE = 0.8  # of what is free when the run starts


class Listener(Progress, Protocol):
    """Hears what a run is about to do, beside its progress."""

    def info(self, text: str) -> None: ...

    def planned(self, rows: Sequence[tuple[str, str]], layer_sequences: int, done: int) -> None: ...


@dataclass(frozen=True)
class Inputs:
    """A checked checkpoint, its layout, and the batches to score on."""

    source: Checkpoint
    layout: Layout
    batches: calibration.Calibration


def open_model(request: CalibrationRequest) -> tuple[Checkpoint, Layout]:
    """The checkpoint's files and layout."""
    source = checkpoint.open_checkpoint(request.model, trust_remote_code=request.trust_remote_code)
    return source, model.inspect(source, request.trust_remote_code)


def obtain_batches(
    request: RunRequest, source: Checkpoint, layout: Layout, listener: Listener
) -> calibration.Calibration:
    """The batches of a run, cached in its directory where they are made from text."""
    batches, hit = _obtain(request.calibration, source, layout, request.out / "calibration", request.fresh)
    how = "from the cache" if hit else "made now"
    listener.info(f"calibration: {batches.num_sequences} x {batches.seq_len} tokens ({how})")
    return batches


def calibrate(request: CalibrationRequest, out: Path, fresh: bool) -> tuple[calibration.Calibration, bool]:
    """Batches of a source for a model, cached in `out`, and whether they were there already."""
    source, layout = open_model(request)
    return _obtain(request, source, layout, out, fresh, copy_ready=True)


def _obtain(
    request: CalibrationRequest, source: Checkpoint, layout: Layout, cache: Path, fresh: bool, copy_ready: bool = False
) -> tuple[calibration.Calibration, bool]:
    return calibration.obtain(
        request.source,
        lambda: model.load_tokenizer(source, request.trust_remote_code),
        cache,
        seq_len=request.seq_len,
        num_sequences=request.num_sequences,
        default_seq_len=default_seq_len(layout),
        default_num_sequences=DEFAULT_NUM_SEQUENCES,
        seed=request.seed,
        limits=calibration.Limits(layout.vocab_size, layout.index_topk, layout.max_positions),
        rebuild=fresh,
        copy_ready=copy_ready,
    )


def default_seq_len(layout: Layout) -> int:
    """Four times as long as a selection, so that most queries have to choose; at least 256 tokens."""
    return min(max(256, 4 * layout.index_topk), layout.max_positions)


def run_options(request: RunRequest, inputs: Inputs, existing: Sequence[Event]) -> dict[str, Any]:
    """The options that the bits of a loss follow. Threads of an existing run are taken over unless asked for."""
    length, sequences = inputs.batches.seq_len, inputs.batches.num_sequences
    recorded = existing[0]["options"]["threads"] if existing else torch.get_num_threads()
    return {
        "dtype": inputs.layout.dtype if request.dtype == "auto" else request.dtype,
        "device": model.resolve_device(request.device).type,
        "batch_size": request.batch_size or max(1, min(BATCH_TOKENS // length, sequences)),
        "attention": model.ATTENTION,
        "threads": request.threads or recorded,
        "seed": request.calibration.seed,
    }


def pattern_options(request: PatternRequest, num_shared: int) -> dict[str, Any]:
    """How many layers are shared, and which never."""
    return {"num_shared": num_shared, "stages": request.stages, "keep_full": sorted(request.keep_full)}


def tell_what_happens(existing: Sequence[Event], finished: bool, out: Path, listener: Listener) -> None:
    """Say whether a run is new, continued, or done already."""
    if finished:
        listener.info(f"{out} holds this run, finished: nothing to compute")
    elif existing:
        listener.info(f"continuing {out} behind {len(existing)} events")


def start_event(inputs: Inputs, options: dict[str, Any], **more: Any) -> Event:
    """The first event of a journal: options, fingerprints and what else a run must not change."""
    source, layout, batches = inputs.source, inputs.layout, inputs.batches
    return {
        "event": "start",
        "format": JOURNAL_FORMAT,
        "icsearch_version": __version__,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "options": options,
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
            "source": batches.manifest.get("source", source.name),
        },
        "environment": environment(),
        "num_layers": len(layout.layer_indices),
        "decoder_layers": layout.num_layers,
        "layer_indices": list(layout.layer_indices),
        "start_pattern": layout.start_pattern.letters,
        "tokens": batches.counted_tokens(),
        **more,
    }


def pattern_start(request: PatternRequest, inputs: Inputs, options: dict[str, Any]) -> Event:
    """The first event of a run that looks for a pattern."""
    start = inputs.layout.start_pattern
    blocks = [[block.start, block.stop] for block in split_stages(len(start), request.stages)]
    return start_event(inputs, options, references=references(start, options["num_shared"]), blocks=blocks)


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


def load_model(request: RunRequest, inputs: Inputs, options: dict[str, Any], listener: Listener) -> DsaModel:
    """Load the weights under the recorded options; raises ModelError, OutOfMemoryError."""
    torch.set_num_threads(options["threads"])
    for note in make_deterministic(options["device"]):
        listener.info(note)
    try:
        return model.load(
            inputs.source,
            dtype=options["dtype"],
            device=request.device,
            trust_remote_code=request.calibration.trust_remote_code,
        )
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        raise


@dataclass(frozen=True)
class Memory:
    """The memory of a run: its budget and what it goes into, in bytes."""

    budget: int
    weights: int
    shape: plan.BatchShape

    @property
    def spare(self) -> int:
        """What weights, one layer call and two branches leave."""
        return self.budget - self.weights - self.shape.layer_bytes - 2 * self.shape.branch_bytes

    @property
    def patterns_per_sweep(self) -> int:
        """How many patterns may live at once beside the trunk; raises IcsearchError where none fits."""
        return plan.patterns_per_sweep(self.shape, self.budget - self.weights)


def memory_of(request: RunRequest, inputs: Inputs, options: dict[str, Any]) -> Memory:
    """The memory budget, by default most of what is free now (call it before the weights are loaded)."""
    budget = request.memory or int(MEMORY_SHARE * free_bytes(options["device"]))
    return Memory(budget, inputs.source.num_bytes, batch_shape(inputs.layout, options, inputs.batches.seq_len))


def device_batches(dsa: DsaModel, batches: calibration.Calibration, batch_size: int) -> list[Batch]:
    """The batches as tensors on the model's device."""
    input_ids = torch.from_numpy(batches.input_ids).to(dsa.device)
    counted = torch.from_numpy(batches.counted()).to(dsa.device)
    return cut_batches(input_ids, counted, batch_size)


class SweepScorer:
    """The layer sweep as the search sees it. Resident weights: one batch is one wave."""

    def __init__(self, dsa: DsaModel, batches: Sequence[Batch], patterns: int) -> None:
        self.patterns_per_sweep = patterns
        self._sweeper = Sweeper(dsa)
        self._batches = {(batch.first, batch.last): batch for batch in batches}

    @property
    def waves(self) -> Sequence[tuple[int, int]]:
        return list(self._batches)

    def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Callable[[int], None]) -> Scores:
        result = self._sweeper.sweep(patterns, [self._batches[wave]], on_layer)
        return Scores(result.nll, result.layer_sequences)


def count_in_sweeps(layout: Layout, patterns: Sequence[Pattern], per_sweep: int) -> int:
    """Layer runs of scoring these patterns, with so many in one sweep."""
    starts = range(0, len(patterns), per_sweep)
    return sum(layout.count_layer_runs(patterns[start : start + per_sweep]) for start in starts)


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
