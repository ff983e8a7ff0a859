"""Devices as typed: the table, one's own numbers, what is refused."""

from __future__ import annotations

from dataclasses import fields

import psutil
import pytest

from icsearch.core.errors import IcsearchError
from icsearch.planning.devices import device_table, parse_devices, parse_rate


def test_devices_as_typed() -> None:
    eight = parse_devices("8xH200")
    assert (eight.count, eight.device, eight.words) == (8, device_table()["h200"], "8xH200")
    assert parse_devices("h100").words == "1xH100"
    assert parse_devices(" 2 x cpu ").count == 2


def test_every_constant_has_a_source() -> None:
    for device in device_table().values():
        constants = {field.name for field in fields(device)} - {"name", "kind", "sources"}
        assert device.sources.keys() == constants and all(device.sources.values())
        assert all(getattr(device, name) > 0 for name in constants)


def test_the_roofline_is_the_larger_of_two() -> None:
    device = parse_devices("H200", flops=1000.0, bandwidth=10.0).device
    assert device.efficiency == 0.5
    assert device.seconds(3000, 20, in_float32=False) == pytest.approx(6)
    assert device.seconds(3000, 200, in_float32=False) == pytest.approx(20)
    assert device.seconds(3000, 20, in_float32=True) == pytest.approx(6 * 989 / 67)


def test_processes_on_the_cpu_share_its_memory() -> None:
    total = psutil.virtual_memory().total
    assert parse_devices("2xcpu").device.memory == total // 2
    assert parse_devices("2xcpu", memory=10**9).device.memory == 10**9


def test_own_numbers_beat_the_table() -> None:
    device = parse_devices("8xH200", memory=5, flops=494.5e12, bandwidth=7.0, read_rate=9.0).device
    assert (device.memory, device.bandwidth, device.read_rate) == (5, 7, 9)
    assert device.float32_flops == pytest.approx(33.5e12)  # moves along
    given = [name for name, source in device.sources.items() if source == "as given"]
    assert sorted(given) == ["bandwidth", "float32_flops", "flops", "memory", "read_rate"]


@pytest.mark.parametrize("text", ["", "8", "8xK20", "0xH200", "-1xH200", "8 H200 now", "8xH200x2"])
def test_unknown_devices_are_refused(text: str) -> None:
    with pytest.raises(IcsearchError, match=r"A100, H100, H200, B200, cpu, such as 8xH200"):
        parse_devices(text)


@pytest.mark.parametrize(("text", "rate"), [("989T", 989e12), ("4.8 TB/s", 4.8e12), ("50gb/s", 5e10), ("7", 7)])
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text, "--bandwidth") == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "fast", "0T", "-1T", "1e9", "5 apples"])
def test_bad_rates(text: str) -> None:
    with pytest.raises(IcsearchError, match="--bandwidth .* is not a rate"):
        parse_rate(text, "--bandwidth")
