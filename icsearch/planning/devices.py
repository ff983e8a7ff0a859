"""The devices that a search can be planned for, from devices.toml: sizes and peak rates, each with its source."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from icsearch.core.errors import IcsearchError
from icsearch.core.jsonfile import shown
from icsearch.core.text import parse_toml

MAX_RATE = 1e24  # far above all devices of the world together


@dataclass(frozen=True)
class Device:
    """One device, and its part of a node: as devices.toml has it. `sources` says where each constant is from."""

    name: str
    kind: str  # cuda or cpu
    memory: int
    flops: float
    float32_flops: float
    bandwidth: float
    link: float
    node_memory: int
    read_rate: float
    cached_rate: float
    convert_rate: float
    efficiency: float
    sources: dict[str, str]

    def seconds(self, flops: float, moved: float, in_float32: bool) -> float:
        """The roofline: at least what computing takes, or moving so many bytes of its memory if that is more."""
        rate = self.float32_flops if in_float32 else self.flops
        return max(flops / (rate * self.efficiency), moved / self.bandwidth)


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


@cache
def device_table() -> dict[str, Device]:
    """All devices, by their name in small letters."""
    table = parse_toml(Path(__file__).with_name("devices.toml").read_text(encoding="utf-8"))
    node, total = table.pop("node"), psutil.virtual_memory().total
    machine = {name: [total, "the machine at hand"] for name in ("memory", "node_memory")}
    devices = {}
    for name, row in table.items():
        constants: dict[str, Any] = {**(machine if row["kind"] == "cpu" else node), **row}
        kind = constants.pop("kind")
        values = {key: int(value) if key.endswith("memory") else value for key, (value, _) in constants.items()}
        devices[name.lower()] = Device(name, kind, sources={key: why for key, (_, why) in constants.items()}, **values)
    return devices


def parse_devices(
    text: str,
    *,
    memory: int | None = None,
    flops: float | None = None,
    bandwidth: float | None = None,
    read_rate: float | None = None,
) -> Devices:
    """Devices as typed (8xH200, 1xH100, 2xcpu, H200), with numbers of one's own in place of the table's.

    Memory and bandwidth are of one device, the read rate of the node. Raises IcsearchError.
    """
    table = device_table()
    match = re.fullmatch(r"(?:(\d{1,4})\s*x\s*)?([a-z][a-z0-9-]*)", text.strip().lower())
    if match is None or match[2] not in table or int(match[1] or 1) < 1:
        known = ", ".join(device.name for device in table.values())
        raise IcsearchError(
            f"--devices {text!r} is unknown: give a number and one of {known}, such as 8xH200 or 2xcpu; for another "
            "device take the nearest one, with --device-memory, --device-flops and --bandwidth of its own"
        )
    count, device = int(match[1] or 1), table[match[2]]
    own = {"memory": memory, "flops": flops, "bandwidth": bandwidth, "read_rate": read_rate}
    given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    if flops is not None:  # the one in float32 moves along
        given["float32_flops"] = device.float32_flops * flops / device.flops
    if device.kind == "cpu" and memory is None:  # all processes share the machine's memory
        device = replace(device, memory=device.memory // count)
    sources = {**device.sources, **dict.fromkeys(given, "as given")}
    return Devices(count, replace(device, **given, sources=sources), memory is not None)


def parse_rate(text: str, option: str) -> float:
    """A rate as typed: 989T, 4.8TB, 50GB/s, in units per second; raises IcsearchError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:B|FLOPS|FLOP)?(?:/S)?", text.strip().upper())
    rate = float(match[1]) * 1000.0 ** " KMGTP".index(match[2] or " ") if match else 0.0
    if not 0 < rate <= MAX_RATE:
        raise IcsearchError(f"{option} {shown(text)} is not a rate: give a number with a unit, such as 4.8TB/s or 989T")
    return rate
