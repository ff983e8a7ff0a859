"""Plans of the large models from their configs alone, for several test modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from icsearch.commands.requests import PlanRequest

CONFIGS = Path(__file__).parent / "data" / "configs"
GLM, DEEPSEEK = str(CONFIGS / "glm-5.json"), str(CONFIGS / "deepseek-v3.2.json")


def plan_request(
    model: str = GLM, devices: str = "8xH200", sequences: int = 64, seq_len: int | None = 65536, **more: Any
) -> PlanRequest:
    """The request of a plan; `more` are fields of it."""
    return PlanRequest(model=model, devices=devices, num_sequences=sequences, seq_len=seq_len, **more)
