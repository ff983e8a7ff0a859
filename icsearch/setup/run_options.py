"""The options of a run as its journal has them: what was asked for, and what was chosen where nothing was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from icsearch.block_sizes import BLOCK_ELEMENTS, default_batch_size
from icsearch.errors import ModelError
from icsearch.journal import Event
from icsearch.pattern import Pattern
from icsearch.requests import PatternRequest, RunRequest
from icsearch.runs.rundir import part_of
from icsearch.setup.inputs import Inputs
from icsearch.strategies import split_stages
from icsearch.weights.layout import Layout
from icsearch.weights.loading import resolve_device


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
