"""The first event of a journal: options, fingerprints, and what else a run must not change."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from icsearch import __version__, calibration
from icsearch.journal import JOURNAL_FORMAT, Event
from icsearch.requests import PatternRequest
from icsearch.runs.rundir import part_of
from icsearch.setup.inputs import Inputs
from icsearch.setup.run_options import pattern_options, run_options
from icsearch.specs import references
from icsearch.strategies import split_stages
from icsearch.weights import checkpoint


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


def _identity(batches: calibration.Calibration, fallback: str) -> dict[str, Any]:
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
