"""A deeper model made from the demo checkpoint: copies of some layers put in, then the sharing stage once more.

A copy adds to the residual what its original adds, scaled down, so the deeper model starts near the one that it
comes from. The layers that always keep their own selection are the same ones, at their new places.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GlmMoeDsaForCausalLM

import twin
from optim import Rates
from share import RELUCTANT, SharingTrainer, read_record

INSERT_AFTER = (2, 4, 5, 8, 9, 12, 13, 14)  # layers that get a copy right behind them
SCALE = 0.3
NOISE = 0.02  # of the spread of each matrix, so that a copy does not stay one
STEPS = 160
RATES = Rates(0.001, 3e-4, 0.003)
MAX_POSITIONS = 8192
OUTPUTS = ("o_proj", "down_proj")  # what writes to the residual


def origins(num_layers: int, insert_after: tuple[int, ...]) -> list[int]:
    """For every layer of the deeper model the layer that it comes from; of two equal ones the second is the copy."""
    return sorted([*range(num_layers), *insert_after])


def deepen(model: GlmMoeDsaForCausalLM, origin: list[int], seed: int) -> GlmMoeDsaForCausalLM:
    """The model with its layers in the order of `origin`, the copies quiet and slightly off their originals."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(origin)
    config.max_position_embeddings = MAX_POSITIONS
    for name in ("mlp_layer_types", "layer_types", "indexer_types"):
        setattr(config, name, [getattr(model.config, name)[old] for old in origin])
    config.first_k_dense_replace = config.mlp_layer_types.count("dense")
    deeper = GlmMoeDsaForCausalLM(config).float()
    whole = {name: weight for name, weight in model.state_dict().items() if not name.startswith("model.layers.")}
    deeper.load_state_dict(whole, strict=False)
    generator = torch.Generator().manual_seed(seed)
    for new, old in enumerate(origin):
        layer = deeper.model.layers[new]
        layer.load_state_dict(model.model.layers[old].state_dict())
        if new and origin[new - 1] == old:
            quieten(layer, generator)
    return deeper


@torch.no_grad()
def quieten(layer: torch.nn.Module, generator: torch.Generator) -> None:
    """Scales down what a copied layer adds to the residual, and puts a little noise on its matrices."""
    for name, parameter in layer.named_parameters():
        if any(part in name for part in OUTPUTS):
            parameter.mul_(SCALE)
        if parameter.ndim >= 2:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * NOISE)


class DeepTrainer(SharingTrainer):
    """The sharing stage on the deeper model, which is stored whenever a line of the log is written."""

    def __init__(self, folder: Path, out: Path, insert_after: tuple[int, ...], reluctant_share: float) -> None:
        recipe, seconds = read_record(folder)
        origin = origins(len(recipe.windows), insert_after)
        super().__init__(recipe, folder, reluctant_share, reluctant=tuple(map(origin.index, RELUCTANT)))
        self.model = deepen(self.model, origin, recipe.seed)
        self.cos, self.sin = twin.rotary(self.model, recipe.seq_len)
        self.recipe = replace(
            recipe,
            far_layers=tuple(map(origin.index, recipe.far_layers)),
            windows=tuple(recipe.windows[old] for old in origin),
        )
        self.tokenizer.model_max_length = MAX_POSITIONS
        self.out, self.began = out, time.time() - seconds

    def note(self, **facts) -> None:
        super().note(**facts)
        self.save(self.out, time.time() - self.began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="the checkpoint of share.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--insert-after", type=int, nargs="+", default=INSERT_AFTER)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--reluctant-share", type=float, default=0.45, help="as in share.py")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    trainer = DeepTrainer(arguments.source, arguments.out, tuple(arguments.insert_after), arguments.reluctant_share)
    torch.manual_seed(trainer.recipe.seed)
    trainer.note(stage="deepen", insert_after=list(arguments.insert_after), **trainer.probe("sparse"))
    trainer.train("sharing", "sparse", arguments.steps, RATES)


if __name__ == "__main__":
    main()
