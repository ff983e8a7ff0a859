"""Plans of the large models from their configs alone, for several test modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from icsearch.commands.requests import CalibrationRequest
from icsearch.planning.devices import parse_devices
from icsearch.planning.forecast import PlanRequest

CONFIGS = Path(__file__).parent / "data" / "configs"
GLM, DEEPSEEK = str(CONFIGS / "glm-5.json"), str(CONFIGS / "deepseek-v3.2.json")


def plan_request(
    model: str = GLM, devices: str = "8xH200", sequences: int = 64, seq_len: int | None = 65536, **more: Any
) -> PlanRequest:
    """The request of a plan; `more` are fields of PlanRequest, or own numbers of the device (device_memory)."""
    own = {name.removeprefix("device_"): more.pop(name) for name in list(more) if name.startswith("device_")}
    calibration = CalibrationRequest(model, "", seq_len, sequences)
    return PlanRequest(calibration, out=Path(), devices=parse_devices(devices, **own), **more)
