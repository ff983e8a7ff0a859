"""Trains the demo checkpoint the DSA way: dense, then the indexers alone, then sparse. See README.md beside it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GlmMoeDsaForCausalLM

import twin
from data import NO_TARGET, NUM_TAPS, Batch, Packer, train_tokenizer
from optim import Rates, build_optimizers
from seeding import build_model


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    seed: int = 3
    seq_len: int = 256
    batch_size: int = 16
    far_layers: tuple[int, ...] = (1, 6, 11)
    windows: tuple[int, ...] = (8, 0, 4, 8, 4, 4, 0, 4, 8, 4, 4, 0, 4, 8, 4, 4)
    far_head_windows: tuple[int, ...] = (0, 0, 0, 0)
    index_topk: int = 8
    rope_theta: float = 100.0
    dense_steps: int = 500
    indexer_steps: int = 200
    sparse_steps: int = 350
    muon_lr: float = 0.01
    adam_lr: float = 2e-3
    indexer_lr: float = 0.02
    sparse_muon_lr: float = 0.005
    sparse_adam_lr: float = 1e-3
    sparse_indexer_lr: float = 0.005
    answer_weight: float = 5.0
    tap_weight: float = 0.5


class Trainer:
    """One model, its taps (auxiliary read-outs, thrown away in the end), and a log of what happened."""

    def __init__(self, recipe: Recipe, layer_fn) -> None:
        self.recipe, self.layer_fn = recipe, layer_fn
        self.tokenizer = train_tokenizer()
        rope = {"rope_type": "default", "rope_theta": recipe.rope_theta}
        self.model, readers = build_model(
            recipe.far_layers, recipe.seed, index_topk=recipe.index_topk, rope_parameters=rope
        )
        self.taps = nn.ModuleList(nn.Linear(96, 96, bias=False) for _ in recipe.far_layers)
        for tap, reader in zip(self.taps, readers, strict=False):
            tap.weight.data.copy_(reader)
        self.cos, self.sin = twin.rotary(self.model, recipe.seq_len)
        self.data = Packer(self.tokenizer, "train", seed=1000 + recipe.seed)
        self.probe_batch = Packer(self.tokenizer, "train", seed=2).batch(32, recipe.seq_len)
        self.history: list[dict] = []

    def forward(self, batch: Batch, mode: str) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Final hidden states, the states after each far layer, and the indexers' KL summed over layers."""
        hidden = self.model.model.embed_tokens(batch.input_ids)
        tapped, total_kl = [], torch.zeros(())
        for index, layer in enumerate(self.model.model.layers):
            hidden, kl = self.layer_fn(layer, hidden, self.cos, self.sin, mode, self.windows(index))
            total_kl = total_kl + kl
            if index in self.recipe.far_layers:
                tapped.append(hidden)
        return hidden, tapped, total_kl

    def windows(self, layer: int) -> tuple[int, ...]:
        """What the heads of a layer may see before the indexers choose; 0 means everything."""
        if layer in self.recipe.far_layers:
            return self.recipe.far_head_windows
        return (self.recipe.windows[layer],) * len(self.recipe.far_head_windows)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(twin.rms_norm(hidden, self.model.model.norm)).float()

    def tap_logits(self, batch: Batch, tapped: list[torch.Tensor]):
        """Per far layer: logits at the positions before an answer, and what the look-up should have found."""
        for tap, hidden, hop in zip(self.taps, tapped, batch.hops, strict=False):
            target = hop[:, 1:]
            known = target != NO_TARGET
            yield self.logits(tap(hidden[:, :-1][known])), target[known]

    def loss(self, batch: Batch, mode: str) -> tuple[torch.Tensor, dict]:
        """What to minimise in this mode, and its parts as numbers."""
        with torch.autocast("cpu", torch.bfloat16):
            hidden, tapped, kl = self.forward(batch, mode)
            logits = self.logits(hidden[:, :-1])
            taps = [F.cross_entropy(*pair) for pair in self.tap_logits(batch, tapped)]
        nll = F.cross_entropy(logits.flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none")
        weight = torch.where(batch.num_hops[:, 1:].flatten() > 0, self.recipe.answer_weight, 1.0)
        lm = (nll * weight).sum() / weight.sum()
        parts = {"lm": nll.mean().item(), "kl": float(kl) / len(self.model.model.layers)}
        if mode == "distill":
            return kl, parts
        return lm + self.recipe.tap_weight * torch.stack(taps).mean() + kl, parts

    def train(self, name: str, mode: str, steps: int, rates: Rates, end: float = 0.05) -> None:
        """One stage: linear warm-up, then linear decay to `end` of the rate."""
        named = [*self.model.named_parameters(), *((f"taps.{n}", p) for n, p in self.taps.named_parameters())]
        for parameter_name, parameter in named:
            is_indexer = ".indexer." in parameter_name
            parameter.requires_grad_({"dense": not is_indexer, "distill": is_indexer, "sparse": True}[mode])
        optimizers = build_optimizers([(n, p) for n, p in named if p.requires_grad], rates)
        started = time.time()
        for step in range(steps):
            rate = min((step + 1) / max(1, min(40, steps // 4)), 1 - (1 - end) * step / steps)
            loss, parts = self.loss(self.data.batch(self.recipe.batch_size, self.recipe.seq_len), mode)
            loss.backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if step % 50 == 49 or step == 0 or step == steps - 1:
                probe = self.probe("sparse" if mode == "distill" else mode)
                self.note(stage=name, step=step + 1, seconds=round(time.time() - started, 1), **parts, **probe)

    @torch.no_grad()
    def probe(self, mode: str) -> dict:
        """Accuracy of the answers by number of look-ups, and of what each far layer has found."""
        batch = self.probe_batch
        with torch.autocast("cpu", torch.bfloat16):
            hidden, tapped, _ = self.forward(batch, mode)
            predicted = self.logits(hidden[:, :-1]).argmax(-1)
            found = [
                (logits.argmax(-1) == target).float().mean().item() for logits, target in self.tap_logits(batch, tapped)
            ]
        right, hops = predicted == batch.input_ids[:, 1:], batch.num_hops[:, 1:]
        copied = batch.answers[:, 1:] & (hops == 0)
        recall = [right[hops == count].float().mean().item() for count in range(1, NUM_TAPS + 1)]
        rounded = lambda values: [round(v, 3) for v in values]  # noqa: E731
        return {
            "recall": rounded(recall),
            "copy": round(right[copied].float().mean().item(), 3),
            "taps": rounded(found),
        }

    def note(self, **facts) -> None:
        facts = {k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()}
        self.history.append(facts)
        print(json.dumps(facts), flush=True)

    def save(self, folder: Path, seconds: float) -> None:
        """The checkpoint, its tokenizer, and training.json."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        record = {
            "recipe": asdict(self.recipe),
            "seconds": round(seconds, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "history": self.history,
        }
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def train_checkpoint(recipe: Recipe, out: Path, compiled: bool) -> GlmMoeDsaForCausalLM:
    """The three stages; the model is stored after each, so that a run can be looked at while it goes on."""
    started = time.time()
    torch.manual_seed(recipe.seed)
    layer_fn = torch.compile(twin.run_layer, dynamic=False) if compiled else twin.run_layer
    trainer = Trainer(recipe, layer_fn)
    dense = Rates(recipe.muon_lr, recipe.adam_lr, recipe.indexer_lr)
    sparse = Rates(recipe.sparse_muon_lr, recipe.sparse_adam_lr, recipe.sparse_indexer_lr)
    trainer.train("dense", "dense", recipe.dense_steps, dense)
    trainer.train("indexers", "distill", recipe.indexer_steps, dense)
    trainer.save(out.with_name(out.name + "-stage2"), time.time() - started)
    trainer.train("sparse", "sparse", recipe.sparse_steps, sparse)
    trainer.save(out, time.time() - started)
    return trainer.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="change single values of the recipe")
    arguments = parser.parse_args()
    changes = {name: json.loads(value) for name, value in (item.split("=", 1) for item in arguments.set)}
    changes = {name: tuple(v) if isinstance(v, list) else v for name, v in changes.items()}
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch._dynamo.config.recompile_limit = 128
    train_checkpoint(Recipe(**changes), arguments.out, arguments.compile)


if __name__ == "__main__":
    main()
