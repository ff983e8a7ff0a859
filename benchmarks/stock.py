"""The stock naive search: transformers' own modules, sdpa, one whole forward for every candidate.

The judge of everything else, so it knows nothing of icsearch: a role switch around each indexer, a plain cross
entropy, and Algorithm 1 of the IndexCache paper. Where index scores are equal, `torch.topk` takes whichever it
likes; with `earliest` the earliest of equal ones is taken, by a stable sort, which is our rule. Times are taken
without it, patterns and losses compared with it.

Usage: python benchmarks/stock.py MODEL TOKENS --flips K [--earliest] [--sequences M]
MODEL is a checkpoint's directory, TOKENS one with calibration.safetensors.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

HEAD_CHUNK = 512  # tokens whose logits exist at once


class EarliestOfEqual(TorchFunctionMode):
    """Within it `scores.topk(k)` takes the earliest of equal scores: the first k of a stable descending sort."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function is not torch.Tensor.topk:
            return function(*args, **(kwargs or {}))
        scores, topk = args
        order = scores.sort(dim=-1, descending=True, stable=True)
        return torch.return_types.topk((order.values[..., :topk], order.indices[..., :topk]))


class Role(nn.Module):
    """An indexer that runs where `full`, and else hands back what the last one that ran has selected."""

    def __init__(self, indexer: nn.Module, last: dict[str, torch.Tensor], earliest: bool) -> None:
        super().__init__()
        self.indexer, self.last, self.earliest, self.full = indexer, last, earliest, True

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.full and self.earliest:
            with EarliestOfEqual():
                self.last["selection"] = self.indexer(*args, **kwargs)
        elif self.full:
            self.last["selection"] = self.indexer(*args, **kwargs)
        return self.last["selection"]


class StockModel:
    """A causal LM of transformers whose layers can be F or S."""

    def __init__(self, directory: Path, earliest: bool = False) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa", local_files_only=True)
        self.model = model.eval().requires_grad_(False)
        self.last: dict[str, torch.Tensor] = {}
        self.roles = []
        for layer in self.model.model.layers:
            layer.self_attn.indexer = Role(layer.self_attn.indexer, self.last, earliest)
            self.roles.append(layer.self_attn.indexer)

    @torch.inference_mode()
    def nll(self, letters: str, input_ids: torch.Tensor, counted: torch.Tensor) -> list[float]:
        """One whole forward of [B, T] tokens: summed NLL in nats of each sequence, as float64."""
        for role, letter in zip(self.roles, letters, strict=True):
            role.full = letter == "F"
        states = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        self.last.clear()
        return [self._sum(*row) for row in zip(states, input_ids, counted, strict=True)]

    def _sum(self, states: torch.Tensor, input_ids: torch.Tensor, counted: torch.Tensor) -> float:
        losses = [
            functional.cross_entropy(self.model.lm_head(part).float(), targets, reduction="none")
            for part, targets in zip(states[:-1].split(HEAD_CHUNK), input_ids[1:].split(HEAD_CHUNK), strict=True)
        ]
        return float(torch.cat(losses).double()[counted[1:]].sum())


@dataclass(frozen=True)
class Tokens:
    """Calibration sequences, int64 [S, T], which of their tokens count, and how many go into one forward."""

    input_ids: torch.Tensor
    counted: torch.Tensor
    batch_size: int

    @property
    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pairs = (self.input_ids.split(self.batch_size), self.counted.split(self.batch_size))
        return list(zip(*pairs, strict=True))

    @property
    def count(self) -> int:
        return int(self.counted[:, 1:].sum())


def read_tokens(directory: Path, batch_size: int, sequences: int | None = None) -> Tokens:
    """The first sequences of a directory with calibration.safetensors; by default all."""
    tensors = load_file(directory / "calibration.safetensors")
    input_ids = tensors["input_ids"][:sequences]
    mask = tensors.get("loss_mask")
    counted = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask[:sequences]
    return Tokens(input_ids, counted, batch_size)


@dataclass
class Found:
    """A search: the committed layers, patterns and losses (nats per token), the sums per sequence of all scored."""

    layers: list[int] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sums: dict[str, list[float]] = field(default_factory=dict)


def score(model: StockModel, letters: str, tokens: Tokens) -> list[float]:
    """Summed NLL of every sequence under a pattern: one forward per batch."""
    return [value for batch in tokens.batches for value in model.nll(letters, *batch)]


def greedy(sums_of: Callable[[str], list[float]], num_layers: int, flips: int, count: int) -> Found:
    """Algorithm 1: in each step score every F layer but the first as S, and commit the one with the lowest loss.

    `sums_of` gives a pattern's NLL sums of each sequence, `count` is the number of tokens in all of them.
    """
    found, letters = Found(), "F" * num_layers
    for _ in range(flips):
        candidates = {layer: flip(letters, layer) for layer in range(1, num_layers) if letters[layer] == "F"}
        found.sums |= {candidate: sums_of(candidate) for candidate in candidates.values()}
        losses = {layer: sum(found.sums[candidate]) / count for layer, candidate in candidates.items()}
        best = min(losses, key=lambda layer: losses[layer])
        letters = candidates[best]
        found.layers.append(best)
        found.patterns.append(letters)
        found.losses.append(losses[best])
    return found


def flip(letters: str, layer: int) -> str:
    return letters[:layer] + "S" + letters[layer + 1 :]


def candidates_of(num_layers: int, step: int) -> int:
    """Candidates of a step, counted from 1: every F layer but the first."""
    return num_layers - step


def forwards(num_layers: int, flips: int) -> int:
    """Whole forwards of the naive search, per batch."""
    return sum(candidates_of(num_layers, step) for step in range(1, flips + 1))


def estimate_seconds(num_layers: int, flips: int, batches: int, full: float, shared: float, shared_full: int) -> float:
    """What the naive search would take, from the seconds of two forwards of one batch.

    `full` with all N layers F, `shared` with `shared_full` of them. A forward with f layers F is taken to cost
    shared + (full - shared) (f - shared_full) / (N - shared_full); a candidate of step j has N - j layers F, and
    there are N - j of them. So: batches x sum over j of (N - j) x seconds(N - j).
    """
    per_layer = (full - shared) / (num_layers - shared_full)
    kept = [num_layers - step for step in range(1, flips + 1)]
    return batches * sum(f * (shared + per_layer * (f - shared_full)) for f in kept)


def time_forwards(model: StockModel, tokens: Tokens, patterns: list[str], times: int) -> dict[str, list[float]]:
    """Seconds of `times` forwards of the first batch under each pattern, taken in turns."""
    input_ids, counted = tokens.batches[0]
    seconds: dict[str, list[float]] = {letters: [] for letters in patterns}
    for _ in range(times):
        for letters in patterns:
            started = time.perf_counter()
            model.nll(letters, input_ids, counted)
            seconds[letters].append(time.perf_counter() - started)
    return seconds


def warm_up(model: StockModel, tokens: Tokens) -> None:
    """Start the thread pool and whatever else the first forward starts, on a short one."""
    model.nll("F" * len(model.roles), tokens.input_ids[:1, :128], tokens.counted[:1, :128])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--flips", type=int, required=True)
    parser.add_argument("--earliest", action="store_true", help="of equal index scores take the earliest token")
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens = read_tokens(arguments.tokens, arguments.batch_size, arguments.sequences)
    model = StockModel(arguments.model, arguments.earliest)
    layers = len(model.roles)
    print(f"{forwards(layers, arguments.flips) * len(tokens.batches)} forwards", flush=True)
    started = time.perf_counter()
    found = greedy(lambda letters: score(model, letters, tokens), layers, arguments.flips, tokens.count)
    seconds = time.perf_counter() - started
    print(
        json.dumps({"seconds": seconds, "layers": found.layers, "pattern": found.patterns[-1], "losses": found.losses})
    )


if __name__ == "__main__":
    main()
