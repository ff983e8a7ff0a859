"""A model made ready to compute by the options of a run: threads, determinism, weights; and its batches beside it."""

from __future__ import annotations

import os
from typing import Any

import torch

from icsearch import calibration
from icsearch.block import Batch, cut_batches
from icsearch.model import DsaModel
from icsearch.weights import loading
from icsearch.weights.checkpoint import Checkpoint
from icsearch.weights.holding import RESIDENT


def bring_up(
    source: Checkpoint,
    options: dict[str, Any],
    trust_remote_code: bool,
    layers: range | None,
    offload: str = RESIDENT,
) -> DsaModel:
    """Load the weights under these options, in a pipeline those of `layers`; raises ModelError, OutOfMemoryError.

    `offload` says where they rest while the model runs.
    """
    torch.set_num_threads(options["threads"])
    make_deterministic(torch.device(options["device"]))
    # By its number: a thread of its own, such as one that reads weights ahead, would take `cuda` for the first one.
    device = f"cuda:{torch.cuda.current_device()}" if options["device"] == "cuda" else options["device"]
    return loading.load(
        source,
        dtype=options["dtype"],
        device=device,
        trust_remote_code=trust_remote_code,
        block_elements=options.get("block_elements"),
        layers=layers,
        offload=offload,
    )


def device_batches(dsa: DsaModel, batches: calibration.Calibration, batch_size: int) -> list[Batch]:
    """The batches as tensors on the model's device."""
    input_ids = torch.from_numpy(batches.input_ids).to(dsa.device)
    counted = torch.from_numpy(batches.counted()).to(dsa.device)
    return cut_batches(input_ids, counted, batch_size)


def make_deterministic(device: torch.device) -> None:
    """On CUDA, switch deterministic algorithms on: expert routing adds with atomics otherwise.

    torch warns of a kernel that has none; the scorer turns such warnings into notes of the run.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False
