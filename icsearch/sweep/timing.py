"""Times prefill and decode of the patched transformers model on this machine, as ratios paired with the all-F model.

What it measures is transformers' reference code here and now: its eager and sdpa attention are dense, so the
indexers' share differs from an engine's, and nothing follows for other machines, engines or batch sizes. For a
projection see `planning.work`, which is an estimate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from icsearch.core.errors import ModelError, OutOfMemoryError
from icsearch.core.pattern import Pattern
from icsearch.model.machine import is_out_of_memory
from icsearch.model.model import DsaModel


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of the repeats."""

    minimum: float
    median: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(min(values), statistics.median(values), max(values))


@dataclass(frozen=True)
class Timing:
    """Measured times of one pattern at one length, one sequence at a time.

    `prefill_seconds` is per prefill of `length` tokens; `decode_seconds` per token, over `decode_tokens` tokens
    after that prefill. The speed-ups are time of the unmodified model / time of the pattern within the same round,
    above 1 where the pattern is faster; exactly 1 for the unmodified model itself.
    """

    pattern: str
    length: int
    repeats: int
    decode_tokens: int
    device: str
    dtype: str
    threads: int  # of torch on the CPU
    prefill_seconds: Spread
    decode_seconds: Spread
    prefill_speedup: Spread
    decode_speedup: Spread


@dataclass(frozen=True)
class _Sample:
    """Seconds of one prefill, and of one decoded token after it."""

    prefill: float
    decode: float


def measure(
    model: DsaModel,
    patterns: Sequence[Pattern],
    lengths: Sequence[int],
    *,
    repeats: int = 5,
    decode_tokens: int = 16,
    seed: int = 0,
) -> list[Timing]:
    """Timings by length, then in the order of `patterns`; the unmodified model comes first, asked for or not.

    In each round all patterns take their turn on the same random tokens, so that a drift of the machine meets all
    of them; the first round is warm-up and not counted. Raises ModelError for numbers that make no sense, and
    OutOfMemoryError with the length that did not fit.
    """
    for what, value in (("repeats", repeats), ("decode_tokens", decode_tokens), ("length", min(lengths, default=1))):
        if value < 1:
            raise ModelError(f"cannot time with {what} {value}: give a number of at least 1")
    longest, limit = max(lengths, default=0) + decode_tokens, model.config.max_position_embeddings
    if longest > limit:
        raise ModelError(
            f"length {longest - decode_tokens} and {decode_tokens} decoded tokens make {longest}, but the model has "
            f"{limit} positions: measure shorter lengths"
        )
    turns = list(dict.fromkeys([model.start_pattern, *patterns]))
    timings = []
    for length in lengths:
        ids = _random_ids(model, length + decode_tokens, seed)
        try:  # interleaved A B C, A B C, ...
            rounds = [{pattern: _sample(model, pattern, ids, length) for pattern in turns} for _ in range(1 + repeats)]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"out of memory at {length} tokens: measure shorter lengths; the reference indexer holds float32 "
                "scores of all heads, queries and keys at once"
            ) from error
        timings += [_timing(model, pattern, length, decode_tokens, rounds[1:]) for pattern in turns]
    return timings


def _random_ids(model: DsaModel, count: int, seed: int) -> torch.Tensor:
    """[1, count] token ids, the same for every pattern; what the tokens are does not matter to the time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (1, count), generator=generator).to(model.device)


@torch.inference_mode()
def _sample(model: DsaModel, pattern: Pattern, input_ids: torch.Tensor, length: int) -> _Sample:
    """One prefill of the first `length` ids, then the rest one by one over the KV cache."""
    with model.running(pattern):
        start = _now(model.device)
        output = model.model(input_ids=input_ids[:, :length], use_cache=True, logits_to_keep=1)
        filled = _now(model.device)
        for position in range(length, input_ids.shape[1]):
            token = input_ids[:, position : position + 1]
            cache = "cache" if "cache" in output else "past_key_values"  # its name until transformers 5.23
            output = model.model(input_ids=token, use_cache=True, **{cache: output[cache]})
        end = _now(model.device)
    return _Sample(filled - start, (end - filled) / (input_ids.shape[1] - length))


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _timing(
    model: DsaModel, pattern: Pattern, length: int, decode_tokens: int, rounds: list[dict[Pattern, _Sample]]
) -> Timing:
    own = [samples[pattern] for samples in rounds]
    pairs = list(zip([samples[model.start_pattern] for samples in rounds], own, strict=True))
    return Timing(
        pattern=str(pattern),
        length=length,
        repeats=len(rounds),
        decode_tokens=decode_tokens,
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
        dtype=str(model.model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        prefill_seconds=Spread.of([sample.prefill for sample in own]),
        decode_seconds=Spread.of([sample.decode for sample in own]),
        prefill_speedup=Spread.of([full.prefill / sample.prefill for full, sample in pairs]),
        decode_speedup=Spread.of([full.decode / sample.decode for full, sample in pairs]),
    )
