"""The devices that a search can be planned for: sizes and peak rates, quoted from data sheets. No torch.

Peak rates are dense ones, without sparsity, at the boost clock: what a part of the work reaches of them is the
efficiency in `layer_time`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import psutil

from icsearch.core.errors import IcsearchError
from icsearch.core.jsonfile import shown

MAX_RATE = 1e24  # far above all devices of the world together
MB, GB, TB = 10**6, 10**9, 10**12
CUDA, CPU = "cuda", "cpu"


@dataclass(frozen=True)
class Device:
    """One device: bytes, FLOP/s, bytes/s. `node_memory` is the CPU memory beside all devices of a node."""

    name: str
    kind: str
    memory: int
    flops: float  # 16-bit products, dense
    float32_flops: float  # products in float32 proper, not TF32: what our scores are computed in
    bandwidth: float  # of the device's own memory
    cache: int  # bytes that stay on the chip
    link: float  # to and from CPU memory, each way
    peer: float  # to another device of the node, each way
    node_memory: int
    node_read_rate: float  # from the node's disks, shared by all devices
    node_cached_rate: float  # from the page cache, where the node's memory holds the checkpoint; shared too
    convert_rate: float  # of FP8 weights to the type that computes, on the CPU, in one process
    source: str


# H100, H200: NVIDIA's data sheets (SXM; their tensor figures are with sparsity, halved here); NVLink 4 has 450 GB/s
# each way; 2 TB of CPU memory as in a DGX. A100: its data sheet (80 GB SXM). B200: an eighth of NVIDIA's DGX B200, and
# the HGX figures for one GPU. Links are PCIe's rate x 0.8. Disk, page cache and conversion are assumed.
_GPU = Device(
    name="H200", kind=CUDA, memory=141 * GB, flops=989 * TB, float32_flops=67 * TB, bandwidth=4.8 * TB, cache=50 * MB,
    link=50 * GB, peer=450 * GB, node_memory=2 * TB, node_read_rate=4 * GB, node_cached_rate=80 * GB,
    convert_rate=1 * GB, source="data sheet; disk, page cache and conversion assumed",
)  # fmt: skip
_TABLE = (
    replace(
        _GPU, name="A100", memory=80 * GB, flops=312 * TB, float32_flops=19.5 * TB, bandwidth=2.04 * TB, cache=40 * MB,
        link=25 * GB, peer=300 * GB,
    ),
    replace(_GPU, name="H100", memory=80 * GB, bandwidth=3.35 * TB),
    _GPU,
    replace(
        _GPU, name="B200", memory=180 * GB, flops=2250 * TB, float32_flops=80 * TB, bandwidth=8 * TB, cache=126 * MB,
        peer=900 * GB,
    ),
    # One thread of the machine that benchmarks/forecast.py was fitted on; memory is that of the machine at hand.
    Device(
        name="cpu", kind=CPU, memory=0, flops=0.1 * TB, float32_flops=0.1 * TB, bandwidth=10 * GB, cache=16 * MB,
        link=10 * GB, peer=5 * GB, node_memory=0, node_read_rate=1 * GB, node_cached_rate=4 * GB,
        convert_rate=0.05 * GB, source="one thread, measured by benchmarks/forecast.py",
    ),
)  # fmt: skip
DEVICES = {device.name.lower(): device for device in _TABLE}


@dataclass(frozen=True)
class Devices:
    """So many devices of one kind, in one node."""

    count: int
    device: Device
    memory_given: bool = False  # by the user, in place of the table's

    @property
    def words(self) -> str:
        """As typed, such as 8xH200."""
        return f"{self.count}x{self.device.name}"


def parse_devices(
    text: str,
    *,
    memory: int | None = None,
    flops: float | None = None,
    bandwidth: float | None = None,
    read_rate: float | None = None,
    node_memory: int | None = None,
) -> Devices:
    """Devices as typed (8xH200, 1xH100, 2xcpu, H200), with numbers of one's own in place of the table's.

    Memory and bandwidth are of one device, the read rate and CPU memory of the node. Raises IcsearchError.
    """
    match = re.fullmatch(r"(?:(\d{1,4})\s*x\s*)?([a-z][a-z0-9-]*)", text.strip().lower())
    if match is None or match[2] not in DEVICES or int(match[1] or 1) < 1:
        known = ", ".join(device.name for device in _TABLE)
        raise IcsearchError(
            f"--devices {text!r} is unknown: give a number and one of {known}, such as 8xH200 or 2xcpu; for another "
            "device take the nearest one, with --device-memory, --device-flops and --bandwidth of its own"
        )
    count, device = int(match[1] or 1), DEVICES[match[2]]
    if device.kind == CPU:  # all processes share the machine's memory
        total = psutil.virtual_memory().total
        device = replace(device, memory=total // count, node_memory=total)
    own = {"memory": memory, "flops": flops, "bandwidth": bandwidth, "node_read_rate": read_rate}
    given: dict[str, Any] = {n: value for n, value in {**own, "node_memory": node_memory}.items() if value is not None}
    if flops is not None:  # the one in float32 moves along
        given["float32_flops"] = device.float32_flops * flops / device.flops
    if given:
        given["source"] = f"{device.source}; {', '.join(sorted(given))} as given"
    return Devices(count, replace(device, **given), memory is not None)


def parse_rate(text: str, option: str) -> float:
    """A rate as typed: 989T, 4.8TB, 50GB/s, in units per second; raises IcsearchError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:B|FLOPS|FLOP)?(?:/S)?", text.strip().upper())
    rate = float(match[1]) * 1000.0 ** " KMGTP".index(match[2] or " ") if match else 0.0
    if not 0 < rate <= MAX_RATE:
        raise IcsearchError(f"{option} {shown(text)} is not a rate: give a number with a unit, such as 4.8TB/s or 989T")
    return rate
