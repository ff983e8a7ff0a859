"""`icsearch calibrate` as a function: batches of a text, made once; and which of their tokens need the far past."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from icsearch.calibration.batches import Calibration
from icsearch.calibration.cache import make_place
from icsearch.calibration.far import DEFAULT_GAIN, FAR, Counting, far_gains, short_pieces, short_sequences
from icsearch.commands.requests import CachedCalibrationRequest
from icsearch.commands.setup import (
    Inputs,
    kernel_options,
    machine_here,
    memory_job,
    obtain,
    open_model,
    run_options,
    start_event,
)
from icsearch.core.errors import CalibrationError, IcsearchError, NonFiniteLossError
from icsearch.model.checkpoint import Checkpoint, fingerprint
from icsearch.model.layout import Layout
from icsearch.model.loading import bring_up, resolve_device
from icsearch.planning.memory import plan_memory
from icsearch.planning.rows import model_rows, weight_rows
from icsearch.search.loop import Progress
from icsearch.sweep.branches import cut_waves, device_batches
from icsearch.sweep.distributed.launch import grids
from icsearch.sweep.measures import token_losses

if TYPE_CHECKING:
    from icsearch.sweep.distributed.world import World


def calibrate(
    request: CachedCalibrationRequest, listener: Progress | None = None, world: World | None = None
) -> tuple[Calibration, bool]:
    """A source's sequences for a model, cached in `request.out`, and whether they were there already."""
    source, layout = open_model(request.calibration)
    counting = None
    if request.count == FAR:
        if world is not None:
            raise IcsearchError("--count far runs in one process: start it without torchrun or accelerate launch")
        resolve_device(request.device)
        gain = DEFAULT_GAIN if request.far_gain is None else request.far_gain
        key = {
            "count": FAR,
            "far_gain": gain,
            "far_from": layout.selection.kept,
            "counted_by": fingerprint(source),
            "counted_dtype": layout.dtype if request.dtype == "auto" else request.dtype,
            "counted_kernels": kernel_options(request, layout, {})["kernels"],
        }
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
    short = Calibration(short_sequences(calibration.input_ids, near))
    make_place(request.out)
    inputs = Inputs(source, layout, calibration)
    options = run_options(request, inputs, [])
    job, machine = memory_job(request, inputs, options), machine_here(request, options["device"])
    memory = plan_memory(job, machine, grids(1, None, 1))
    listener.info(f"loading {request.model} ...")
    dsa = bring_up(source, options, request.calibration.trust_remote_code, offload=memory.offload.where)
    # As many tokens a layer call, and as many calls a wave: what the memory was planned for.
    as_many = calibration.seq_len // (2 * near)
    long_waves, short_waves = (
        cut_waves(device_batches(part, size, dsa.device), memory.batches_per_wave)
        for part, size in ((calibration, options["batch_size"]), (short, options["batch_size"] * as_many))
    )
    total = len(dsa.layers) * (calibration.num_sequences + short.num_sequences)
    both = calibration.num_sequences + -(-short.num_sequences // as_many)
    rows = [
        *model_rows(start_event(inputs, {"method": "calibrate", **options})),
        (
            "passes",
            f"{calibration.num_sequences} x {calibration.seq_len} tokens, and their {short.num_sequences} pieces of "
            f"{short.seq_len}",
        ),
        *weight_rows(memory, 1, both, None),
    ]
    listener.planned(rows, total, 0)
    listener.step_started("far tokens", 0, total)
    long_losses = token_losses(dsa, long_waves, listener.layer_done)
    try:
        short_losses = token_losses(dsa, short_waves, listener.layer_done)
    except NonFiniteLossError as error:
        at = f"a short context of it, {error.sequence % pieces + 1} of {pieces}"
        raise NonFiniteLossError(error.value, error.sequence // pieces, str(dsa.start_pattern), at) from None
    gains = np.where(calibration.counted(), far_gains(long_losses.numpy(), short_losses.numpy(), near), -np.inf)
    best = gains.max(axis=1)
    if not (best > gain).all():
        with contextlib.suppress(OSError):  # only where nothing is in it
            request.out.rmdir()
        raise CalibrationError(_too_little(best, gain))
    return gains > gain


def _too_little(best: NDArray[np.float64], gain: float) -> str:
    """Where a sequence has no far token; `best` is the largest gain of each."""
    lacking = np.flatnonzero(best <= gain)
    possible = math.floor(best.min() * 100 - 1) / 100 if best.min() > 0 else 0.0
    advice = f"--far-gain {possible:g} or less" if possible > 0 else "text whose later parts need its earlier ones"
    return (
        f"sequence {lacking[0]} has no token whose loss falls by more than {gain:g} nats by far context "
        f"({len(lacking)} of {len(best)} have none): give {advice}, or longer sequences"
    )
