"""One small random checkpoint of each family for the whole session, and the model of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from family_batches import Made

import tiny_families
from icsearch.model import loading
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.model import DsaModel

loading.quiet_transformers()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes a checkpoint of a family, each kind once."""
    known: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = f"{family} {changes}"
        if key not in known:
            known[key] = tiny_families.save_checkpoint(tmp_path_factory.mktemp(family), family, **changes)
        return known[key]

    return make


@pytest.fixture(scope="session", params=sorted(tiny_families.CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def checkpoint(family: str, made: Made) -> Path:
    return made(family)


@pytest.fixture(scope="session")
def dsa(checkpoint: Path) -> DsaModel:
    """Tests leave it as it was."""
    return loading.load(open_checkpoint(str(checkpoint)))
