"""The keyword options of the API: those of the commands, under their names, checked by the same requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypedDict

from icsearch.commands.requests import CalibrationRequest
from icsearch.core.pattern import parse_retention
from icsearch.core.text import parse_bytes

Retention = str | float | Fraction
LARGEST_DENOMINATOR = 4096  # far more than a model has layers


class CalibrationOptions(TypedDict, total=False):
    """What batches are made of: tokens per sequence, sequences, seed of their choice and order."""

    seq_len: int
    num_sequences: int
    seed: int
    trust_remote_code: bool


class RunOptions(CalibrationOptions, total=False):
    """How a model is run. `memory` is a budget in bytes, or text such as ``8GB``; `fresh` starts over."""

    device: str
    dtype: str
    batch_size: int
    memory: str | int
    threads: int
    kernels: str
    block_elements: int
    offload: str
    fresh: bool


class SearchOptions(RunOptions, total=False):
    """How far to go, which layers must stay F, and by which strategy. `num_shared` is given instead of `retention`."""

    retention: Retention
    num_shared: int
    stages: int
    keep_full: Collection[int]
    objective: str
    strategy: str
    confidence: float
    tie_margin: float
    refine: str
    refine_on: str | Path


class EvalOptions(RunOptions, total=False):
    """What else to measure than the losses: see the options of `icsearch eval`."""

    retentions: Sequence[Retention]
    force: bool
    tasks: int
    task_length: int
    contexts: Sequence[int]
    measure: Sequence[int]
    lm_eval: Sequence[str]


def calibration_request(model: str | Path, source: str | Path, options: dict[str, Any]) -> CalibrationRequest:
    """The batches that options ask for; takes its own out of them."""
    names = CalibrationOptions.__annotations__
    own = {name: options.pop(name) for name in list(options) if name in names}
    return CalibrationRequest(str(model), str(source), **own)


def parsed(options: dict[str, Any]) -> dict[str, Any]:
    """The options with text in place of numbers read as the command line reads it."""
    readers: dict[str, Callable[[Any], Any]] = {
        "retention": fraction,
        "retentions": lambda values: tuple(map(fraction, values)),
        "memory": lambda value: parse_bytes(value) if isinstance(value, str) else value,
        "keep_full": frozenset,
        "refine_on": str,
        **dict.fromkeys(("contexts", "measure", "lm_eval"), tuple),
    }
    return {name: readers[name](value) if name in readers else value for name, value in options.items()}


def fraction(retention: Retention) -> Fraction:
    """A retention in (0, 1]; raises PatternError for another one.

    A float is the simplest fraction near it, so that 5/7 and "5/7" keep as many of 14 layers.
    """
    if isinstance(retention, float) and math.isfinite(retention):
        retention = Fraction(retention).limit_denominator(LARGEST_DENOMINATOR) or Fraction(retention)
    return parse_retention(str(retention))
