"""Shared fixtures. Threads are set before torch starts: two cores are easily swamped."""

from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no C++ stacks from the ranks that are forked where torch is

import pytest
import torch
from hypothesis import HealthCheck, settings

import tiny

# On a busy machine an example may take any time: no test is about that.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# What a shell starts in the background ignores Ctrl-C, what nohup starts a hang-up; commands that the tests end would
# inherit that.
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)


@pytest.fixture(scope="session", params=sorted(tiny.FAMILIES))
def family_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint of each family in turn."""
    return tiny.save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def glm_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random glm_moe_dsa checkpoint."""
    return tiny.save_checkpoint(tmp_path_factory.mktemp("glm"))


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 x 40 random tokens."""
    return tiny.save_tokens(tmp_path_factory.mktemp("tokens"))
