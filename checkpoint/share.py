"""The fourth stage: the demo model learns to live with shared selections (training-aware IndexCache).

In every step a random set of layers borrows its selection from the layer before. Each indexer that runs is trained
against the averaged attention of all the layers it serves, which has the gradient of the paper's multi-layer loss.
Layer 0 and the far-looking layers always keep their own selection, a few local layers nearly always: what they find
is not taught to the others, so dropping their indexers goes on costing something.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
from transformers import GlmMoeDsaForCausalLM

import twin
from optim import Rates
from train import Recipe, Trainer

INDEX_TOPK = 12
STEPS = 150
RELUCTANT = (8, 12, 13)  # local layers that share less often than the others
RATES = Rates(0.004, 8e-4, 0.005)


class SharingTrainer(Trainer):
    """A trainer whose forward follows a pattern drawn anew for every step."""

    def __init__(
        self, recipe: Recipe, folder: Path, reluctant_share: float, reluctant: tuple[int, ...] = RELUCTANT
    ) -> None:
        super().__init__(recipe, twin.run_layer)
        trained = GlmMoeDsaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.load_state_dict(trained.state_dict())
        for layer in self.model.model.layers:
            layer.self_attn.indexer.index_topk = INDEX_TOPK
        self.model.config.index_topk = INDEX_TOPK
        self.history = json.loads((folder / "training.json").read_text())["history"]
        self.chance = random.Random(recipe.seed)
        self.reluctant_share, self.reluctant = reluctant_share, reluctant

    def draw(self) -> list[bool]:
        """Which layers share in this step; one step in four is the unmodified model."""
        often = self.chance.uniform(0.3, 1.0) if self.chance.random() < 0.75 else 0.0
        rarely = min(often, self.reluctant_share)
        keep = (0, *self.recipe.far_layers)
        return [
            index not in keep and self.chance.random() < (rarely if index in self.reluctant else often)
            for index in range(len(self.model.model.layers))
        ]

    def forward(self, batch, mode):
        """As in the other stages; the KL is that of every running indexer to the mean attention it serves."""
        shares = self.draw() if torch.is_grad_enabled() else [False] * len(self.model.model.layers)
        hidden = self.model.model.embed_tokens(batch.input_ids)
        tapped, chosen, groups = [], None, []
        for index, layer in enumerate(self.model.model.layers):
            given = chosen if shares[index] else None
            hidden, target, scores, chosen = twin.run_layer_shared(layer, hidden, self.cos, self.sin, given)
            if scores is not None:
                groups.append((scores, [target]))
            else:
                groups[-1][1].append(target)
            if index in self.recipe.far_layers:
                tapped.append(hidden)
        seen = twin.causal_mask(hidden.shape[1], 0)
        kl = sum(twin.divergence(torch.stack(targets).mean(0), scores, seen) for scores, targets in groups)
        return hidden, tapped, kl


def read_record(folder: Path) -> tuple[Recipe, float]:
    """The recipe of a checkpoint and the seconds that it took."""
    record = json.loads((folder / "training.json").read_text())
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in record["recipe"].items()}
    return Recipe(**values), record["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="the checkpoint of train.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--reluctant-share", type=float, default=0.15, help="how often layers 8, 12, 13 share at most")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    recipe, seconds = read_record(arguments.source)
    torch.manual_seed(recipe.seed)
    started = time.time()
    trainer = SharingTrainer(recipe, arguments.source, arguments.reluctant_share)
    trainer.train("sharing", "sparse", arguments.steps, RATES)
    trainer.save(arguments.out, seconds + time.time() - started)


if __name__ == "__main__":
    main()
