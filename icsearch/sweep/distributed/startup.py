"""The processes of a run made ready together: each loads its layers, and all get the same batches from rank 0."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from icsearch.calibration import batches as packing
from icsearch.calibration.batches import Calibration
from icsearch.core.errors import ModelError
from icsearch.model import checkpoint, loading
from icsearch.model.checkpoint import Checkpoint, open_checkpoint
from icsearch.model.machine import environment
from icsearch.model.model import DsaModel
from icsearch.model.shape import RESIDENT
from icsearch.sweep.branches import Batch, cut_batches
from icsearch.sweep.distributed.launch import Grid
from icsearch.sweep.distributed.worker import Member, Order
from icsearch.sweep.distributed.world import World


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


def device_batches(dsa: DsaModel, batches: packing.Calibration, batch_size: int) -> list[Batch]:
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


SAME = ("torch", "transformers", "device_name")  # what the bits of a loss depend on, beside the options


def load_order(
    grid: Grid,
    blocks: list[range],
    source: Checkpoint,
    trust_remote_code: bool,
    options: dict[str, Any],
    sets: Mapping[str, Calibration],
    offload: str,
) -> Order:
    """What every process must know to load its part."""
    return {
        "do": "load",
        "grid": [grid.data, grid.pipeline],
        "blocks": [[block.start, block.stop] for block in blocks],
        "model": source.name,
        "trust_remote_code": trust_remote_code,
        "options": options,
        "offload": offload,
        "sets": {name: list(batches.input_ids.shape) for name, batches in sets.items()},
    }


def lead_in(world: World, order: Order, source: Checkpoint, sets: Mapping[str, Calibration]) -> tuple[Member, DsaModel]:
    """Rank 0: have all processes load, and load its own part."""
    world.tell(order)
    return _make_member(world, order, source, sets)


def check_ready(world: World, start: Mapping[str, Any]) -> list[str]:
    """Rank 0: wait until all have loaded, the same checkpoint too; raises ModelError.

    `start` is the run's first event. Returns notes on what differs between processes and may change bits.
    """
    notes = []
    for rank in world.others:
        found = world.take(f"ready/{rank}", f"rank {rank} to load the model")
        if found["fingerprint"] != start["model"]["fingerprint"]:
            raise ModelError(
                f"rank {rank} has another checkpoint under the name {start['model']['name_or_path']} than rank 0: "
                "give all machines the same files"
            )
        notes += [
            f"rank {rank} has {name} {found['environment'][name]}, rank 0 {start['environment'][name]}: losses may "
            "differ from those of one process in their last bits"
            for name in SAME
            if found["environment"][name] != start["environment"][name]
        ]
    return notes


def follow_in(world: World, order: Order) -> Member:
    """Another process: load what is ordered, and say which checkpoint it is of."""
    source = open_checkpoint(order["model"], trust_remote_code=order["trust_remote_code"])
    member, _ = _make_member(world, order, source, None)
    found = {"fingerprint": checkpoint.fingerprint(source), "environment": environment(order["options"]["device"])}
    world.post(f"ready/{world.rank}", found)
    return member


def _make_member(
    world: World, order: Order, source: Checkpoint, sets: Mapping[str, Calibration] | None
) -> tuple[Member, DsaModel]:
    """The batches of all sets, which rank 0 has, and this process's layers."""
    tensors = {}
    for name, shape in order["sets"].items():
        if sets is None:
            ids, counted = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.bool)
        else:
            ids, counted = torch.from_numpy(sets[name].input_ids), torch.from_numpy(sets[name].counted())
        tensors[name] = world.broadcast(ids), world.broadcast(counted)
    grid = Grid(*order["grid"])
    layers = range(*order["blocks"][grid.place(world.rank)])
    dsa = bring_up(source, order["options"], order["trust_remote_code"], layers, order["offload"])
    size = order["options"]["batch_size"]
    batches = {
        name: cut_batches(ids.to(dsa.device), counted.to(dsa.device), size) for name, (ids, counted) in tensors.items()
    }
    return Member(world, grid, dsa, batches), dsa
