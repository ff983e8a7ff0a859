"""What happens before a run: model and batches are opened, options settled, the first event written."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from icsearch import __version__
from icsearch.calibration import cache as calibration_cache
from icsearch.calibration.batches import Calibration, Limits, check_heldout
from icsearch.calibration.sources import ReadyTokens, parse_source
from icsearch.commands.requests import KL, CalibrationRequest, GreedyRequest, PatternRequest, RunRequest
from icsearch.core.errors import ModelError
from icsearch.core.pattern import Pattern, references
from icsearch.model import checkpoint, loading
from icsearch.model.checkpoint import Checkpoint
from icsearch.model.layout import DTYPES, Layout, inspect
from icsearch.model.loading import resolve_device
from icsearch.model.machine import environment, free_bytes, resident_bytes
from icsearch.model.shape import BLOCK_ELEMENTS, default_batch_size
from icsearch.planning.footprint import KL_HEAD_COPIES, NLL_HEAD_COPIES, BatchShape, Call, blockwise_shape
from icsearch.planning.memory import MEMORY_SHARE, Job, Machine, WeightSizes
from icsearch.runs.directory import part_of
from icsearch.runs.journal import JOURNAL_FORMAT, Event
from icsearch.search.greedy import split_stages
from icsearch.sweep.distributed.launch import Launch

DEFAULT_NUM_SEQUENCES = 24


@dataclass(frozen=True)
class Inputs:
    """A checked checkpoint, its layout, and the batches to score on."""

    source: Checkpoint
    layout: Layout
    batches: Calibration
    heldout: Calibration | None = None


def open_model(request: CalibrationRequest) -> tuple[Checkpoint, Layout]:
    """The checkpoint's files and layout."""
    source = checkpoint.open_checkpoint(request.model, trust_remote_code=request.trust_remote_code)
    return source, inspect(source, request.trust_remote_code)


def calibrate(request: CalibrationRequest, out: Path, fresh: bool) -> tuple[Calibration, bool]:
    """Batches of a source for a model, cached in `out`, and whether they were there already."""
    source, layout = open_model(request)
    return obtain(request, source, layout, out, fresh, copy_ready=True)


def obtain_heldout(request: RunRequest, source: Checkpoint, layout: Layout, batches: Calibration) -> Calibration | None:
    """The held-out sequences of a refinement: as many and as long as the calibration's, where they are made."""
    if request.heldout_source is None:
        return None
    wanted = replace(request.calibration, source=request.heldout_source, seq_len=None, num_sequences=None)
    heldout, _ = obtain(wanted, source, layout, request.out / "refine-on", request.fresh, like=batches)
    check_heldout(heldout, batches, "--refine-on")
    return heldout


def obtain(
    request: CalibrationRequest,
    source: Checkpoint,
    layout: Layout,
    cache: Path,
    fresh: bool,
    copy_ready: bool = False,
    like: Calibration | None = None,
) -> tuple[Calibration, bool]:
    """Batches of a source, and whether they were in `cache` already; `like` others in size where none is asked for."""
    return calibration_cache.obtain(
        request.source,
        lambda: loading.load_tokenizer(source, request.trust_remote_code),
        cache,
        seq_len=request.seq_len,
        num_sequences=request.num_sequences,
        default_seq_len=like.seq_len if like else default_seq_len(layout),
        default_num_sequences=like.num_sequences if like else DEFAULT_NUM_SEQUENCES,
        seed=request.seed,
        limits=limits(layout),
        rebuild=fresh,
        copy_ready=copy_ready,
    )


def is_ready(source: str) -> bool:
    """Whether SOURCE names tokens that are used as they are."""
    return isinstance(parse_source(source), ReadyTokens)


def limits(layout: Layout) -> Limits:
    """What the model can take, and what is too short for its queries to choose."""
    selection = layout.selection
    return Limits(layout.vocab_size, selection.kept, layout.max_positions, selection.holds)


def default_seq_len(layout: Layout) -> int:
    """Four times as long as a selection, so that most queries have to choose; at least 256 tokens."""
    return min(max(256, 4 * layout.selection.kept), layout.max_positions)


def run_options(request: RunRequest, inputs: Inputs, existing: Sequence[Event]) -> dict[str, Any]:
    """The options that the bits of a loss follow. Threads of an existing run are taken over unless asked for."""
    length, sequences = inputs.batches.seq_len, inputs.batches.num_sequences
    recorded = part_of(existing, "options").get("threads") or torch.get_num_threads()
    return {
        "dtype": inputs.layout.dtype if request.dtype == "auto" else request.dtype,
        "device": str(resolve_device(request.device)),
        "batch_size": request.batch_size or default_batch_size(length, sequences),
        "attention": inputs.layout.attention,
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
        if request.block_elements is not None:
            raise ModelError("--block-elements belongs to the block-wise kernels, and this run has the reference's")
        return {"kernels": chosen}
    if not layout.has_arithmetic:
        raise ModelError(
            f"--kernels blockwise does not know the layers of a {layout.model_type} model: give auto or reference"
        )
    device = str(resolve_device(request.device))
    default = recorded.get("block_elements") or BLOCK_ELEMENTS["cuda" if device.startswith("cuda") else "cpu"]
    return {"kernels": chosen, "block_elements": request.block_elements or default}


def pattern_options(request: PatternRequest, start: Pattern) -> dict[str, Any]:
    """How many layers are shared, and which never; layers that stay F anyway are left out of `keep_full`."""
    num_shared = request.resolve_num_shared(start)  # first: it checks the stages too
    anyway = {block.start for block in split_stages(len(start), request.num_stages)}
    return {
        "num_shared": num_shared,
        "stages": request.num_stages,
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
            "revision": source.revision,
            "model_type": layout.model_type,
            "fingerprint": checkpoint.fingerprint(source),
            "native_shared": list(layout.native_shared),
            "wrapper_config": layout.wrapper_config,
            "num_hidden_layers": layout.num_layers,
        },
        "checkpoint_bytes": source.num_bytes,
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


def _identity(batches: Calibration, fallback: str) -> dict[str, Any]:
    """What a journal says of batches; `fallback` is named as their source where they do not say."""
    return {
        "fingerprint": batches.fingerprint,
        "num_sequences": batches.num_sequences,
        "seq_len": batches.seq_len,
        "source": batches.manifest.get("source", fallback),
        "source_revision": batches.manifest.get("source_revision"),
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
    blocks = [[block.start, block.stop] for block in split_stages(len(start), request.num_stages)]
    return start_event(inputs, options, references=references(start, options["num_shared"]), blocks=blocks)


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


def memory_job(request: RunRequest, inputs: Inputs, options: dict[str, Any]) -> Job:
    """What a run asks of memory, in numbers."""
    layout, width = inputs.layout, DTYPES[options["dtype"]].itemsize
    outside = layout.num_parameters - sum(layout.layer_parameters)
    layers = tuple(number * width for number in layout.layer_parameters)
    by_name = len(options.get("patterns", ())) or 1  # those that an evaluation names
    return Job(
        shape=batch_shape(layout, options, inputs.batches.seq_len),
        weights=WeightSizes(outside * width, layers, inputs.source.num_bytes),
        layer_indices=layout.layer_indices,
        sequences=inputs.batches.num_sequences,
        patterns=len(request.flippable(layout.start_pattern)) if isinstance(request, PatternRequest) else by_name,
        heldout=inputs.heldout.num_sequences if inputs.heldout else 0,
        offload=request.offload,
        by_kl=options.get("objective") == KL,
        may_offload_states=isinstance(request, GreedyRequest),
    )


def machine_here(request: RunRequest, device_name: str, launch: Launch | None = None) -> Machine:
    """What a process of a run may take: `--memory`, by default most of what its device has free."""
    device, cpu = torch.device(device_name), torch.device("cpu")
    launch = launch or Launch()
    neighbours = launch.neighbours(torch.cuda.device_count() if device.type == "cuda" else 1)
    return Machine(
        on_cpu=device.type == "cpu",
        budget=request.memory or int(MEMORY_SHARE * free_bytes(device) / neighbours),
        cpu_free=free_bytes(cpu),
        processes=launch.local_size,
        program=0 if device.type == "cuda" else resident_bytes(),
    )


def batch_shape(layout: Layout, options: dict[str, Any], seq_len: int) -> BatchShape:
    """One batch of a run under these options."""
    dtype_bytes = DTYPES[options["dtype"]].itemsize
    batch_size, elements = options["batch_size"], options.get("block_elements")
    copies = KL_HEAD_COPIES if options.get("objective") == KL else NLL_HEAD_COPIES
    if elements is not None and layout.sizes is not None:
        shape = blockwise_shape(Call(layout.sizes, batch_size, seq_len, dtype_bytes, elements), copies)
        return replace(shape, left_numbers=layout.left_numbers)
    return BatchShape(
        batch_size=batch_size,
        seq_len=seq_len,
        hidden_size=layout.hidden_size,
        dtype_bytes=dtype_bytes,
        index_topk=layout.selection.kept,
        index_heads=layout.index_heads,
        index_head_dim=layout.index_head_dim,
        attention_heads=layout.attention_heads,
        vocab_size=layout.vocab_size,
        head_copies=copies,
        streams=layout.streams,
        left_numbers=layout.left_numbers,
        selection_bytes=None if layout.selection.plain else layout.selection.bytes_per_query(seq_len),
        known=layout.reference_known,
    )
