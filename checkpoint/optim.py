"""Muon for the matrices, AdamW for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@torch.no_grad()
def orthogonalise(stack: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrices; stack is [N, rows, columns]."""
    x = stack / (stack.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    flipped = x.shape[-2] > x.shape[-1]
    x = x.mT if flipped else x
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if flipped else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Matrices of one shape are treated as one stack; 3-D weights as many matrices."""

    def __init__(self, parameters: list[nn.Parameter], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            stacks: dict[tuple[int, int], list[tuple[nn.Parameter, torch.Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"]).reshape(-1, *parameter.shape[-2:])
                stacks.setdefault((update.shape[-2], update.shape[-1]), []).append((parameter, update))
            for (rows, columns), members in stacks.items():
                updates = orthogonalise(torch.cat([update for _, update in members]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, piece in zip(
                    [p for p, _ in members], updates.split([len(update) for _, update in members]), strict=False
                ):
                    parameter.add_(piece.reshape(parameter.shape), alpha=-scale)


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of one stage."""

    muon: float
    adam: float
    indexer: float


def build_optimizers(named: list[tuple[str, nn.Parameter]], rates: Rates) -> list[torch.optim.Optimizer]:
    """Muon for the projections; AdamW for embeddings, head, norms, biases and router, and for all of the indexers.

    Every parameter group remembers its peak rate as `peak`.
    """
    by_adam = ("embed", "lm_head", "gate.weight")
    indexers = [p for n, p in named if ".indexer." in n]
    rest = [(n, p) for n, p in named if ".indexer." not in n]
    matrices = [p for n, p in rest if p.ndim >= 2 and not any(part in n for part in by_adam)]
    others = [p for n, p in rest if p.ndim < 2 or any(part in n for part in by_adam)]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, lr=rates.muon))
    for parameters, rate in ((others, rates.adam), (indexers, rates.indexer)):
        if parameters:
            optimizers.append(torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
