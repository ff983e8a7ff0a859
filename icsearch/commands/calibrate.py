"""`icsearch calibrate` as a function: batches of a text, made once; and which of their tokens need the far past."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from icsearch.calibration.batches import Calibration
from icsearch.calibration.cache import place
from icsearch.calibration.far import DEFAULT_GAIN, FAR, Counting, far_gains, short_pieces, short_sequences
from icsearch.commands.requests import CachedCalibrationRequest
from icsearch.commands.scoring import Opened, load
from icsearch.commands.setup import Inputs, kernel_options, obtain, open_model, run_options, start_event
from icsearch.core.errors import CalibrationError, IcsearchError, NonFiniteLossError
from icsearch.model.checkpoint import Checkpoint, fingerprint
from icsearch.model.layout import Layout
from icsearch.model.loading import resolve_device
from icsearch.planning.rows import model_rows, weight_rows
from icsearch.runs.directory import RunDirectory
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
    inputs = Inputs(source, layout, calibration)
    options = run_options(request, inputs, [])
    start = start_event(inputs, {"method": "calibrate", **options})
    with place(request.out):
        here = Opened(inputs, RunDirectory(request.out), [], start)
        loaded = load(request, here, None, grids(1, None, 1), listener)
        # As many tokens a layer call, and as many calls a wave: what the memory was planned for.
        as_many = calibration.seq_len // (2 * near)
        short_batches = device_batches(short, options["batch_size"] * as_many, loaded.dsa.device)
        both = calibration.num_sequences + -(-short.num_sequences // as_many)
        told = f"{calibration.num_sequences} x {calibration.seq_len} tokens, and their {short.num_sequences} pieces of "
        rows = [
            *model_rows(start),
            ("passes", f"{told}{short.seq_len}"),
            *weight_rows(loaded.memory, 1, both, loaded.bytes_per_second),
        ]
        total = len(loaded.dsa.layers) * (calibration.num_sequences + short.num_sequences)
        listener.planned(rows, total, 0)
        for note in loaded.notes:
            listener.info(note)
        listener.step_started("far tokens", 0, total)
        per_wave = loaded.memory.batches_per_wave
        long_losses = token_losses(loaded.dsa, cut_waves(loaded.batches, per_wave), listener.layer_done)
        try:
            short_losses = token_losses(loaded.dsa, cut_waves(short_batches, per_wave), listener.layer_done)
        except NonFiniteLossError as error:
            at = f"a short context of it, {error.sequence % pieces + 1} of {pieces}"
            pattern = str(layout.start_pattern)
            raise NonFiniteLossError(error.value, error.sequence // pieces, pattern, at) from None
        gains = np.where(calibration.counted(), far_gains(long_losses.numpy(), short_losses.numpy(), near), -np.inf)
        best = gains.max(axis=1)
        if not (best > gain).all():
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
