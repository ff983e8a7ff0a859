"""What a checkpoint shows: single flips, uniform patterns, a quick greedy path, on two sets of sequences.

Usage: python checkpoint/evaluate.py icsearch/demo [--sequences 64] [--seq-len 256]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import Packer


class Slot(nn.Module):
    """Runs the layer's indexer, or hands back the selection of the last one that ran."""

    def __init__(self, indexer: nn.Module, store: dict) -> None:
        super().__init__()
        self.indexer, self.store, self.full = indexer, store, True

    def forward(self, *args, **kwargs) -> torch.Tensor:
        if self.full:
            self.store["selection"] = self.indexer(*args, **kwargs)
        return self.store["selection"]


class Scorer:
    """Per-sequence losses of patterns; only the layers after the first changed one are run again."""

    def __init__(self, model: nn.Module, input_ids: torch.Tensor) -> None:
        self.model, self.input_ids = model, input_ids
        self.store: dict = {}
        for layer in model.model.layers:
            if not isinstance(layer.self_attn.indexer, Slot):
                layer.self_attn.indexer = Slot(layer.self_attn.indexer, self.store)
            layer.self_attn.indexer.store = self.store
        length = input_ids.shape[1]
        position = torch.arange(length)[None]
        self.mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        self.mask = self.mask.expand(len(input_ids), -1, -1, -1)
        self.shared = {
            "attention_mask": self.mask,
            "position_ids": position,
            "position_embeddings": model.model.rotary_emb(model.model.embed_tokens.weight, position),
        }
        self.start = (model.model.embed_tokens(input_ids), None)

    @torch.no_grad()
    def run(self, pattern: str, first: int = 0, states: list | None = None) -> tuple[torch.Tensor, list]:
        """Mean loss per sequence, and the states before every layer, to fork from."""
        states = [self.start] if states is None else states[: first + 1]
        hidden, self.store["selection"] = states[-1]
        for index in range(first, len(pattern)):
            layer = self.model.model.layers[index]
            layer.self_attn.indexer.full = pattern[index] == "F"
            hidden, _ = layer(hidden, **self.shared)
            states = [*states, (hidden, self.store["selection"])]
        logits = self.model.lm_head(self.model.model.norm(hidden))[:, :-1]
        nll = F.cross_entropy(logits.flatten(0, 1), self.input_ids[:, 1:].flatten(), reduction="none")
        return nll.view(len(self.input_ids), -1).mean(1).double(), states

    def flips(self, pattern: str) -> dict[int, torch.Tensor]:
        """Losses of the pattern with each of its F layers (but the first) shared."""
        _, states = self.run(pattern)
        candidates = [i for i in range(1, len(pattern)) if pattern[i] == "F"]
        return {i: self.run(share(pattern, i), i, states)[0] for i in candidates}


def share(pattern: str, layer: int) -> str:
    return pattern[:layer] + "S" + pattern[layer + 1 :]


def delta(losses: torch.Tensor, base: torch.Tensor) -> str:
    """Difference to the base and its standard error, paired over sequences."""
    difference = losses - base
    return f"{difference.mean():+.4f} ± {difference.std() / math.sqrt(len(difference)):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--search-sequences", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, attn_implementation="sdpa").eval()
    layers = model.config.num_hidden_layers
    held_out_ids = Packer(tokenizer, "heldout", 0).batch(arguments.sequences, arguments.seq_len).input_ids
    held_out = Scorer(model, held_out_ids)
    full = "F" * layers
    base, _ = held_out.run(full)
    print(f"all F {base.mean():.4f}")
    for layer, losses in held_out.flips(full).items():
        print(f"flip {layer:2d}  {delta(losses, base)}")
    for name, pattern in (
        ("all S", "F" + "S" * (layers - 1)),
        ("1/2", "FS" * (layers // 2)),
        ("1/4", "FSSS" * (layers // 4)),
    ):
        print(f"{name:6s} {pattern}  {delta(held_out.run(pattern)[0], base)}")
    search(model, tokenizer, held_out, arguments)


def search(model: nn.Module, tokenizer, held_out: Scorer, arguments: argparse.Namespace) -> None:
    """Greedy on calibration sequences, every pattern of the path also on the held-out ones."""
    calibration = Packer(tokenizer, "calibration", 0).batch(arguments.search_sequences, arguments.seq_len).input_ids
    store = held_out.store
    searched = Scorer(model, calibration)
    pattern = "F" * model.config.num_hidden_layers
    base, _ = searched.run(pattern)
    path = []
    while pattern.count("F") > 1:
        losses = searched.flips(pattern)
        layer = min(losses, key=lambda i: losses[i].mean().item())
        costs = " ".join(f"{i}:{(losses[i] - base).mean():+.3f}" for i in losses)
        pattern = share(pattern, layer)
        path.append((pattern, layer, delta(losses[layer], base), costs))
    for layer_module in model.model.layers:
        layer_module.self_attn.indexer.store = store
    base, _ = held_out.run("F" * len(pattern))
    for pattern, layer, cost, costs in path:
        out = delta(held_out.run(pattern)[0], base)
        print(f"{pattern} {pattern.count('F'):2d} F, shared {layer:2d}  in {cost}  out {out}")
        print(f"    {costs}")


if __name__ == "__main__":
    main()
