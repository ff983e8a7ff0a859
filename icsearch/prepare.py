"""What every run has in common before it starts: inputs checked, options resolved, the model loaded.

Nothing of an earlier run is touched before all of that has gone well.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import transformers

from icsearch import __version__, calibration, checkpoint, kernels, model, plan
from icsearch.checkpoint import Checkpoint
from icsearch.divergence import KlSweeper
from icsearch.errors import ModelError
from icsearch.journal import JOURNAL_FORMAT, Event
from icsearch.losses import HEAD_CHUNK_TOKENS
from icsearch.memory import free_bytes
from icsearch.model import DsaModel, Layout
from icsearch.pattern import Pattern
from icsearch.record import RunRecord
from icsearch.requests import KL, CalibrationRequest, PatternRequest, RunRequest
from icsearch.rundir import RunDirectory, part_of
from icsearch.search import Progress, Scores, Scoring
from icsearch.states import Keeping, StateStore
from icsearch.strategies import split_stages
from icsearch.sweep import Batch, BranchState, Sweeper, cut_batches

REFERENCE_RETENTIONS = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
BATCH_TOKENS = 1024  # default tokens per layer call: small calls keep the reference indexer's tensors in cache
DEFAULT_NUM_SEQUENCES = 24
# Numbers in one buffer of the block-wise arithmetic: on CPU what stays in cache, on CUDA what keeps the device busy.
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
NLL_HEAD_COPIES, KL_HEAD_COPIES = 2, 6  # float32 numbers per logit that the LM head holds at once
MEMORY_SHARE = 0.8  # of what is free when the run starts


# Writes the results of a run into its directory.
Publish = Callable[[Path, RunRecord], object]


def publish_nothing(out: Path, record: RunRecord) -> None:
    """For callers who only want the record."""


@dataclass(frozen=True)
class Inputs:
    """A checked checkpoint, its layout, and the batches to score on."""

    source: Checkpoint
    layout: Layout
    batches: calibration.Calibration
    heldout: calibration.Calibration | None = None


@dataclass(frozen=True)
class Opened:
    """A directory that is ours: its inputs checked, its events so far, and the first event that it has or gets."""

    inputs: Inputs
    run: RunDirectory
    existing: list[Event]
    start: Event


@contextlib.contextmanager
def opened(
    request: RunRequest, describe: Callable[[Inputs, list[Event]], Event], listener: Progress
) -> Iterator[Opened]:
    """Check the inputs, hold the directory, and refuse to continue a run with other settings.

    `describe` makes the first event. Nothing of an earlier run is touched; no weights are read.
    """
    source, layout = open_model(request.calibration)
    request.check(layout.start_pattern)
    run = RunDirectory(request.out)
    with run.locked():
        batches, hit = _obtain(request.calibration, source, layout, request.out / "calibration", request.fresh)
        how = "from the cache" if hit else "made now"
        listener.info(f"calibration: {batches.num_sequences} x {batches.seq_len} tokens ({how})")
        inputs = Inputs(source, layout, batches, _heldout(request, source, layout, batches))
        existing = [] if request.fresh else run.existing()
        start = describe(inputs, existing)
        run.check_same(existing, start)
        if existing:
            done = existing[-1]["event"] == "finish"
            listener.info(f"{request.out} is finished" if done else f"continuing {request.out}")
        yield Opened(inputs, run, existing, start)


def _heldout(
    request: RunRequest, source: Checkpoint, layout: Layout, batches: calibration.Calibration
) -> calibration.Calibration | None:
    """The held-out sequences of a refinement: as many and as long as the calibration's, where they are made."""
    if request.heldout_source is None:
        return None
    wanted = replace(request.calibration, source=request.heldout_source, seq_len=None, num_sequences=None)
    heldout, _ = _obtain(wanted, source, layout, request.out / "refine-on", request.fresh, like=batches)
    calibration.check_heldout(heldout, batches, "--refine-on")
    return heldout


def open_model(request: CalibrationRequest) -> tuple[Checkpoint, Layout]:
    """The checkpoint's files and layout."""
    source = checkpoint.open_checkpoint(request.model, trust_remote_code=request.trust_remote_code)
    return source, model.inspect(source, request.trust_remote_code)


def calibrate(request: CalibrationRequest, out: Path, fresh: bool) -> tuple[calibration.Calibration, bool]:
    """Batches of a source for a model, cached in `out`, and whether they were there already."""
    source, layout = open_model(request)
    return _obtain(request, source, layout, out, fresh, copy_ready=True)


def _obtain(
    request: CalibrationRequest,
    source: Checkpoint,
    layout: Layout,
    cache: Path,
    fresh: bool,
    copy_ready: bool = False,
    like: calibration.Calibration | None = None,
) -> tuple[calibration.Calibration, bool]:
    return calibration.obtain(
        request.source,
        lambda: model.load_tokenizer(source, request.trust_remote_code),
        cache,
        seq_len=request.seq_len,
        num_sequences=request.num_sequences,
        default_seq_len=like.seq_len if like else default_seq_len(layout),
        default_num_sequences=like.num_sequences if like else DEFAULT_NUM_SEQUENCES,
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
    recorded = part_of(existing, "options").get("threads") or torch.get_num_threads()
    return {
        "dtype": inputs.layout.dtype if request.dtype == "auto" else request.dtype,
        "device": str(model.resolve_device(request.device)),
        "batch_size": request.batch_size or max(1, min(BATCH_TOKENS // length, sequences)),
        "attention": kernels.DENSE,
        "threads": request.threads or recorded,
        **kernel_options(request, inputs.layout, part_of(existing, "options")),
    }


def kernel_options(request: RunRequest, layout: Layout, recorded: dict[str, Any]) -> dict[str, Any]:
    """Which arithmetic layers compute with, and its block size; those of an existing run, unless asked for."""
    chosen = request.kernels
    if chosen == "auto":
        automatic = "blockwise" if layout.has_arithmetic else "reference"
        chosen = recorded.get("kernels", "reference") if recorded else automatic
    if chosen == "reference":
        return {"kernels": chosen}
    if not layout.has_arithmetic:
        raise ModelError(
            f"--kernels blockwise does not know the layers of a {layout.model_type} model: give auto or reference"
        )
    device = str(model.resolve_device(request.device))
    default = recorded.get("block_elements") or BLOCK_ELEMENTS["cuda" if device.startswith("cuda") else "cpu"]
    return {"kernels": chosen, "block_elements": request.block_elements or default}


def pattern_options(request: PatternRequest, start: Pattern) -> dict[str, Any]:
    """How many layers are shared, and which never; layers that stay F anyway are left out of `keep_full`."""
    num_shared = request.resolve_num_shared(start)  # first: it checks the stages too
    anyway = {block.start for block in split_stages(len(start), request.stages)}
    return {
        "num_shared": num_shared,
        "stages": request.stages,
        "keep_full": sorted(request.keep_full - anyway),
    }


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
        "calibration": _identity(batches, source.name),
        "environment": environment(options["device"]),
        "num_layers": len(layout.layer_indices),
        "decoder_layers": layout.num_layers,
        "layer_indices": list(layout.layer_indices),
        "start_pattern": layout.start_pattern.letters,
        "tokens": batches.counted_tokens(),
        **_refine_on(inputs),
        **more,
    }


def _identity(batches: calibration.Calibration, fallback: str) -> dict[str, Any]:
    """What a journal says of batches; `fallback` is named as their source where they do not say."""
    return {
        "fingerprint": batches.fingerprint,
        "num_sequences": batches.num_sequences,
        "seq_len": batches.seq_len,
        "source": batches.manifest.get("source", fallback),
        "sequences": batches.sequence_digests(),
    }


def _refine_on(inputs: Inputs) -> dict[str, Any]:
    """The held-out sequences of a refinement, in runs that have one."""
    if inputs.heldout is None:
        return {}
    return {"refine_on": {**_identity(inputs.heldout, ""), "tokens": inputs.heldout.counted_tokens()}}


def pattern_start(request: PatternRequest, inputs: Inputs, existing: Sequence[Event], method: dict[str, Any]) -> Event:
    """The first event of a run that looks for a pattern."""
    start = inputs.layout.start_pattern
    options = {**method, **pattern_options(request, start), **run_options(request, inputs, existing)}
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


def environment(device: str) -> dict[str, Any]:
    """What the bits of a loss depend on, beside the options."""
    on_cuda = device.startswith("cuda")
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device_name": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
    }


def _cpu_name() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def environment_notes(existing: Sequence[Event], start: Event) -> list[str]:
    """What has changed since a run began that may change the bits of its losses."""
    if not existing:
        return []
    before, now = part_of(existing, "environment"), start["environment"]
    return [
        f"{name} was {before.get(name)} when the run began and is {now[name]} now: losses from here on may differ "
        "from the earlier ones in their last bits"
        for name in ("torch", "transformers", "device_name")
        if before.get(name) != now[name]
    ]


@dataclass(frozen=True)
class Memory:
    """The memory of a run: its budget and what it goes into, in bytes.

    `full_states`: the unmodified model's final states, kept for the KL; 0 where they are not needed or do not fit.
    """

    budget: int
    weights: int
    shape: plan.BatchShape
    patterns_per_sweep: int  # how many patterns may live at once beside the trunk
    full_states: int = 0

    @property
    def spare(self) -> int:
        """What weights, kept final states, one layer call and two branches leave."""
        fixed = self.weights + self.full_states + self.shape.layer_bytes
        return self.budget - fixed - 2 * self.shape.branch_bytes

    def for_kl(self, full_states: int) -> Memory:
        """The final states of the unmodified model come first; where they do not fit, it runs along in each sweep."""
        left = (self.spare - full_states) // self.shape.branch_bytes
        if left >= 1:
            return replace(self, full_states=full_states, patterns_per_sweep=left)
        return replace(self, patterns_per_sweep=max(1, self.patterns_per_sweep - 1))


@dataclass(frozen=True)
class Loaded:
    """A model in memory, its batches beside it, and the memory that was planned for them."""

    dsa: DsaModel
    batches: list[Batch]
    memory: Memory
    heldout: list[Batch]


def load(request: RunRequest, inputs: Inputs, options: dict[str, Any]) -> Loaded:
    """Plan the memory, then load the weights under these options; raises ModelError, OutOfMemoryError."""
    memory = plan_memory(request, inputs, options)
    torch.set_num_threads(options["threads"])
    make_deterministic(torch.device(options["device"]))
    dsa = model.load(
        inputs.source,
        dtype=options["dtype"],
        device=options["device"],
        trust_remote_code=request.calibration.trust_remote_code,
        block_elements=options.get("block_elements"),
    )
    size = options["batch_size"]
    heldout = [] if inputs.heldout is None else device_batches(dsa, inputs.heldout, size)
    return Loaded(dsa, device_batches(dsa, inputs.batches, size), memory, heldout)


def plan_memory(request: RunRequest, inputs: Inputs, options: dict[str, Any]) -> Memory:
    """The budget, by default most of what is free, and what fits; raises IcsearchError where no pattern does."""
    budget = request.memory or int(MEMORY_SHARE * free_bytes(torch.device(options["device"])))
    weights = inputs.layout.num_parameters * model.DTYPES[options["dtype"]].itemsize
    shape = batch_shape(inputs.layout, options, inputs.batches.seq_len)
    memory = Memory(budget, weights, shape, plan.patterns_per_sweep(shape, weights, budget))
    if options.get("objective") != KL:
        return memory
    sequences = inputs.batches.num_sequences + (inputs.heldout.num_sequences if inputs.heldout else 0)
    return memory.for_kl(sequences * shape.final_bytes)


def device_batches(dsa: DsaModel, batches: calibration.Calibration, batch_size: int) -> list[Batch]:
    """The batches as tensors on the model's device."""
    input_ids = torch.from_numpy(batches.input_ids).to(dsa.device)
    counted = torch.from_numpy(batches.counted()).to(dsa.device)
    return cut_batches(input_ids, counted, batch_size)


class SweepScorer:
    """The layer sweep as the search sees it. Resident weights: one batch is one wave."""

    def __init__(self, sweeper: Sweeper, batches: Sequence[Batch], patterns: int) -> None:
        self.patterns_per_sweep = patterns
        self._sweeper = sweeper
        self._batches = {(batch.first, batch.last): batch for batch in batches}

    @property
    def waves(self) -> Sequence[tuple[int, int]]:
        return list(self._batches)

    def retain(self, base: Pattern) -> None:
        self._sweeper.retain(base)

    def expected(self, work: Sequence[tuple[Sequence[Pattern], tuple[int, int]]]) -> int:
        return self._sweeper.expected([(patterns, [self._batches[wave]]) for patterns, wave in work])

    def score(self, patterns: Sequence[Pattern], wave: tuple[int, int], on_layer: Callable[[int], None]) -> Scores:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = self._sweeper.sweep(patterns, [self._batches[wave]], on_layer)
        notes = {str(warning.message) for warning in caught if "deterministic" in str(warning.message)}
        return Scores(result.nll, result.layer_sequences, tuple(sorted(notes)), result.kl)


def make_scoring(
    here: Opened, record: RunRecord, loaded: Loaded, listener: Progress, kept: plan.Kept | None = None
) -> Scoring:
    """The scoring of a run by the layer sweep; notes what has changed around a run that goes on.

    `kept` says which states are kept between sweeps; by default none.
    """
    layout = here.inputs.layout
    kept = kept or _keep_nothing(layout)
    scorer = _scorer(loaded, loaded.batches, kept, record)
    scoring = Scoring(here.run.journal, record, scorer, listener)
    scoring.note(environment_notes(here.existing, here.start))
    return scoring


def heldout_scorer(here: Opened, record: RunRecord, loaded: Loaded) -> SweepScorer:
    """Scores the held-out sequences of a refinement; few patterns ever come there, and no states are kept."""
    return _scorer(loaded, loaded.heldout, _keep_nothing(here.inputs.layout), record)


def _scorer(loaded: Loaded, batches: Sequence[Batch], kept: plan.Kept, record: RunRecord) -> SweepScorer:
    """Measures what the run's objective needs."""
    store: StateStore[BranchState] = StateStore(kept.keeping, record.pattern, kept.budget)
    sweeper = Sweeper(loaded.dsa, store)
    if record.start["options"]["objective"] == KL:
        sweeper = KlSweeper(loaded.dsa, store, keep_full_states=loaded.memory.full_states > 0)
    return SweepScorer(sweeper, batches, loaded.memory.patterns_per_sweep)


def _keep_nothing(layout: Layout) -> plan.Kept:
    return plan.Kept(Keeping(layout.num_layers, layout.layer_indices), 0, 0)


def count_in_sweeps(layout: Layout, patterns: Sequence[Pattern], per_sweep: int, along: Sequence[Pattern] = ()) -> int:
    """Layer runs of scoring these patterns, with so many in one sweep, and others that run along in each."""
    starts = range(0, len(patterns), per_sweep)
    return sum(layout.count_layer_runs([*patterns[start : start + per_sweep], *along]) for start in starts)


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
        vocab_size=layout.vocab_size,
        head_chunk_tokens=HEAD_CHUNK_TOKENS,
        block_elements=options.get("block_elements"),
        layer_width=layout.layer_width,
        head_copies=KL_HEAD_COPIES if options.get("objective") == KL else NLL_HEAD_COPIES,
    )


def make_deterministic(device: torch.device) -> None:
    """On CUDA, switch deterministic algorithms on: expert routing adds with atomics otherwise.

    torch warns of a kernel that has none; the scorer turns such warnings into notes of the run.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False
