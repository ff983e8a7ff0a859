"""`icsearch calibrate` as a function: batches of a text, made once; and which of their tokens need the far context."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from icsearch.calibration.batches import Calibration, described
from icsearch.calibration.far import DEFAULT_GAIN, FAR, Counting, far_tokens, short_pieces, short_sequences
from icsearch.commands.requests import CachedCalibrationRequest
from icsearch.commands.setup import Inputs, machine_here, memory_job, obtain, open_model, run_options
from icsearch.core.errors import CalibrationError
from icsearch.core.files import make_directory
from icsearch.model.checkpoint import Checkpoint, fingerprint
from icsearch.model.layout import Layout
from icsearch.model.loading import bring_up, resolve_device
from icsearch.planning.memory import plan_memory
from icsearch.planning.rows import weight_rows
from icsearch.search.loop import Progress
from icsearch.sweep.branches import cut_waves, device_batches
from icsearch.sweep.distributed.launch import grids
from icsearch.sweep.measures import token_losses


def calibrate(request: CachedCalibrationRequest, listener: Progress | None = None) -> tuple[Calibration, bool]:
    """A source's sequences for a model, cached in `request.out`, and whether they were there already."""
    resolve_device(request.device)
    source, layout = open_model(request.calibration)
    counting = None
    if request.count == FAR:
        gain = DEFAULT_GAIN if request.far_gain is None else request.far_gain
        near = layout.selection.kept
        key = {"count": FAR, "far_gain": gain, "far_from": near, "counted_by": fingerprint(source)}
        counting = Counting(key, partial(_far_mask, request, source, layout, gain, listener or Progress()))
    return obtain(request.calibration, source, layout, request.out, request.fresh, copy_ready=True, counting=counting)


def _far_mask(
    request: CachedCalibrationRequest,
    source: Checkpoint,
    layout: Layout,
    gain: float,
    listener: Progress,
    calibration: Calibration,
) -> NDArray[np.bool_]:
    """Two passes of the unmodified model, over the sequences and over their pieces: bool [S, T]."""
    near = layout.selection.kept
    pieces = len(short_pieces(calibration.seq_len, near))  # refused before any weights are read
    make_directory(request.out)
    inputs = Inputs(source, layout, calibration)
    options = run_options(request, inputs, [])
    job, machine = memory_job(request, inputs, options), machine_here(request, options["device"])
    memory = plan_memory(job, machine, grids(1, None, 1))
    listener.info(f"loading {request.model} ...")
    dsa = bring_up(source, options, request.calibration.trust_remote_code, offload=memory.offload.where)
    short = described(short_sequences(calibration.input_ids, near), None, {})
    # As many tokens a layer call, and as many calls a wave: what the memory was planned for.
    sizes = {calibration: options["batch_size"], short: options["batch_size"] * (calibration.seq_len // (2 * near))}
    work = [cut_waves(device_batches(part, size, dsa.device), memory.batches_per_wave) for part, size in sizes.items()]
    total = len(dsa.layers) * calibration.num_sequences * (1 + pieces)
    listener.planned(weight_rows(memory, 1, calibration.num_sequences, None), total, 0)
    listener.step_started("far tokens", 1, total)
    long_losses, short_losses = (token_losses(dsa, waves, listener.layer_done).numpy() for waves in work)
    far = far_tokens(long_losses, short_losses, near, gain)
    lacking = np.flatnonzero(~(far & calibration.counted()).any(axis=1))
    if len(lacking):
        raise CalibrationError(
            f"sequence {lacking[0]} has no token whose loss falls by more than {gain:g} nats by far context "
            f"({len(lacking)} of {calibration.num_sequences} have none): give a smaller --far-gain, longer sequences, "
            "or text whose later parts need its earlier ones"
        )
    return far
