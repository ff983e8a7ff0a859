"""A checkpoint four times as large as the memory that a process may have: streamed, it has the bits of a resident one.

The limit is RLIMIT_DATA: since Linux 4.7 it counts all private writable memory of a process, so the interpreter, torch
and transformers too, but neither what they map of files to read nor the system's cache of them. That it bites is
shown: under the same limit the resident model runs out of memory. (No control group could be made where this was
written, and RLIMIT_AS counts address space that nothing ever fills.)
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import tiny

pytestmark = pytest.mark.alone

ROOM = 160 << 20  # bytes beside the interpreter and its libraries: three layers, threads, and the work itself
LAYER_BYTES = 15_000_000  # at least, in float32
LAYER: dict[str, int] = {
    "hidden_size": 384,
    "intermediate_size": 3300,
    "moe_intermediate_size": 384,
    "n_routed_experts": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "first_k_dense_replace": 2,
}
SCRIPT = """
import json, resource, sys

import torch

from icsearch.model import loading
from icsearch.sweep.branches import cut_batches
from icsearch.model.checkpoint import open_checkpoint
from icsearch.core.pattern import Pattern
from icsearch.sweep.sweep import Sweeper

torch.set_num_threads(1)
loading.quiet_transformers()
directory, offload, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
dsa = loading.load(open_checkpoint(directory), offload=offload)
ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
batches = cut_batches(ids, torch.ones_like(ids, dtype=torch.bool), 1)
full = dsa.start_pattern
print(json.dumps(Sweeper(dsa).sweep([full, full.flip(1), full.flip(len(full) - 1)], batches).nll))
"""
BASELINE = """
import torch, transformers.models.glm_moe_dsa.modeling_glm_moe_dsa, accelerate
import icsearch.model.loading, icsearch.sweep.sweep
torch.set_num_threads(1)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData:")))
"""


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script; large blocks go back to the system once they are free, so that they count no longer."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_a_checkpoint_of_four_times_the_memory(tmp_path: Path) -> None:
    baseline = python(BASELINE)
    assert baseline.returncode == 0, baseline.stderr
    limit = int(baseline.stdout) * 1024 + ROOM
    layers = 4 * limit // LAYER_BYTES + 1
    directory = tiny.save_checkpoint(tmp_path / "large", shard_size="100MB", **LAYER, num_hidden_layers=layers)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert size >= 4 * limit
    streamed = python(SCRIPT, directory, "disk", limit)
    assert streamed.returncode == 0, streamed.stderr[-2000:]
    resident = python(SCRIPT, directory, "none", 0)
    assert resident.returncode == 0, resident.stderr[-2000:]
    assert json.loads(streamed.stdout) == json.loads(resident.stdout)
    refused = python(SCRIPT, directory, "none", limit)
    assert refused.returncode != 0
    assert "OutOfMemoryError" in refused.stderr.splitlines()[-1]
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] != limit  # that of the tests themselves is as it was
