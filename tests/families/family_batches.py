"""Batches of random tokens, and how checkpoints are made, for the tests of families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from icsearch.sweep.branches import Batch, cut_batches
from tiny import VOCABULARY

LENGTH = 40
Made = Callable[..., Path]  # makes a checkpoint of a family, with changes to its config


def random_ids(sequences: int = 2, length: int = LENGTH, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def random_batches(sequences: int = 3, batch_size: int = 2) -> list[Batch]:
    ids = random_ids(sequences)
    return cut_batches(ids, torch.ones_like(ids, dtype=torch.bool), batch_size)
