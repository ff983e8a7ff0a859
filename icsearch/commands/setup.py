"""What happens before a run: model and batches are opened, options settled, the first event and the memory job made."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from icsearch.calibration import cache
from icsearch.calibration.batches import Calibration, Limits, check_heldout
from icsearch.calibration.far import Counting
from icsearch.commands.requests import (
    DEFAULT_NUM_SEQUENCES,
    CalibrationRequest,
    PatternRequest,
    RunRequest,
    SearchRequest,
)
from icsearch.core import __version__
from icsearch.core.errors import ModelError
from icsearch.core.pattern import references
from icsearch.model.checkpoint import Checkpoint, fingerprint, open_checkpoint
from icsearch.model.layout import DTYPES, Layout, inspect
from icsearch.model.loading import load_tokenizer, resolve_device
from icsearch.model.machine import environment, free_bytes, resident_bytes
from icsearch.model.shape import BLOCK_ELEMENTS, default_batch_size
from icsearch.planning.footprint import KL_HEAD_COPIES, NLL_HEAD_COPIES, BatchShape, Call, blockwise_shape
from icsearch.planning.memory import MEMORY_SHARE, Job, Machine, WeightSizes
from icsearch.runs.directory import part_of
from icsearch.runs.journal import JOURNAL_FORMAT, Event
from icsearch.runs.schema import measures_kl
from icsearch.search.greedy import split_stages
from icsearch.sweep.distributed.launch import Launch


@dataclass(frozen=True)
class Inputs:
    """A checked checkpoint, its layout, and the sequences to score on."""

    source: Checkpoint
    layout: Layout
    calibration: Calibration
    heldout: Calibration | None = None


def open_model(request: CalibrationRequest) -> tuple[Checkpoint, Layout]:
    """The checkpoint's files and layout."""
    source = open_checkpoint(request.model, trust_remote_code=request.trust_remote_code)
    return source, inspect(source, request.trust_remote_code)


def obtain_heldout(
    request: RunRequest, source: Checkpoint, layout: Layout, calibration: Calibration
) -> Calibration | None:
    """The held-out sequences of a refinement: as many and as long as the calibration's, where they are made."""
    if request.heldout_source is None:
        return None
    wanted = replace(request.calibration, source=request.heldout_source, seq_len=None, num_sequences=None)
    heldout, _ = obtain(wanted, source, layout, request.out / "refine-on", request.fresh, like=calibration)
    check_heldout(heldout, calibration, request.heldout_option)
    return heldout


def obtain(
    request: CalibrationRequest,
    source: Checkpoint,
    layout: Layout,
    directory: Path,
    fresh: bool,
    copy_ready: bool = False,
    like: Calibration | None = None,
    counting: Counting | None = None,
) -> tuple[Calibration, bool]:
    """A source's sequences, and whether the directory had them already; `like` others in size where none is asked for.

    By default they are four times as long as a selection, so that most queries have to choose; at least 256 tokens.
    """
    selection = layout.selection
    default_seq_len = min(max(256, 4 * selection.kept), layout.max_positions)
    return cache.obtain(
        request.source,
        lambda: load_tokenizer(source, request.trust_remote_code),
        directory,
        seq_len=request.seq_len,
        num_sequences=request.num_sequences,
        default_seq_len=like.seq_len if like else default_seq_len,
        default_num_sequences=like.num_sequences if like else DEFAULT_NUM_SEQUENCES,
        seed=request.seed,
        limits=Limits(layout.vocab_size, selection.kept, layout.max_positions, selection.holds),
        rebuild=fresh,
        copy_ready=copy_ready,
        counting=counting,
        field=request.field,
    )


def run_options(request: RunRequest, inputs: Inputs, existing: Sequence[Event]) -> dict[str, Any]:
    """The options that the bits of a loss follow. Threads of an existing run are taken over unless asked for."""
    length, sequences = inputs.calibration.seq_len, inputs.calibration.num_sequences
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


def start_event(inputs: Inputs, options: dict[str, Any], **more: Any) -> Event:
    """The first event of a journal: options, fingerprints and what else a run must not change."""
    source, layout, heldout = inputs.source, inputs.layout, inputs.heldout
    refine_on = {"refine_on": {**_identity(heldout, ""), "tokens": heldout.counted_tokens()}} if heldout else {}
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
            "fingerprint": fingerprint(source),
            "native_shared": list(layout.native_shared),
            "wrapper_config": layout.wrapper_config,
            "num_hidden_layers": layout.num_layers,
        },
        "checkpoint_bytes": source.num_bytes,
        "calibration": _identity(inputs.calibration, source.name),
        "environment": environment(options["device"]),
        "num_layers": len(layout.layer_indices),
        "decoder_layers": layout.num_layers,
        "layer_indices": list(layout.layer_indices),
        "start_pattern": layout.start_pattern.letters,
        "tokens": inputs.calibration.counted_tokens(),
        **refine_on,
        **more,
    }


def _identity(calibration: Calibration, fallback: str) -> dict[str, Any]:
    """What a journal says of sequences; `fallback` is named as their source where they do not say."""
    return {
        "fingerprint": calibration.fingerprint,
        "num_sequences": calibration.num_sequences,
        "seq_len": calibration.seq_len,
        "source": calibration.manifest.get("source", fallback),
        "source_revision": calibration.manifest.get("source_revision"),
        "sequences": calibration.sequence_digests(),
        **({"count": calibration.manifest["count"]} if "count" in calibration.manifest else {}),
    }


def pattern_start(request: PatternRequest, inputs: Inputs, existing: Sequence[Event], method: dict[str, Any]) -> Event:
    """The first event of a run that looks for a pattern; layers that stay F anyway are left out of `keep_full`."""
    start = inputs.layout.start_pattern
    num_shared = request.resolve_num_shared(start)  # first: it checks the stages too
    stages = split_stages(len(start), request.num_stages)
    options = {
        **method,
        "num_shared": num_shared,
        "stages": request.num_stages,
        "keep_full": sorted(request.keep_full - {stage.start for stage in stages}),
        **run_options(request, inputs, existing),
    }
    blocks = [[stage.start, stage.stop] for stage in stages]
    return start_event(inputs, options, references=references(start, num_shared), blocks=blocks)


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
        shape=batch_shape(layout, options, inputs.calibration.seq_len),
        weights=WeightSizes(outside * width, layers, inputs.source.num_bytes),
        layer_indices=layout.layer_indices,
        sequences=inputs.calibration.num_sequences,
        patterns=len(request.flippable(layout.start_pattern)) if isinstance(request, PatternRequest) else by_name,
        heldout=inputs.heldout.num_sequences if inputs.heldout else 0,
        offload=request.offload,
        by_kl=measures_kl(options),
        draws=0 if getattr(request, "table", None) else options.get("draws", 0),  # one from a file is there
        may_offload_states=isinstance(request, SearchRequest),
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
        disk_free=shutil.disk_usage(request.out).free,
    )


def batch_shape(layout: Layout, options: dict[str, Any], seq_len: int) -> BatchShape:
    """One batch of a run under these options."""
    dtype_bytes = DTYPES[options["dtype"]].itemsize
    batch_size, elements = options["batch_size"], options.get("block_elements")
    copies = KL_HEAD_COPIES if measures_kl(options) else NLL_HEAD_COPIES
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
