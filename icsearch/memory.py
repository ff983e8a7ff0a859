"""Memory of the machine: what is free, and what running out of it looks like."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from icsearch.errors import OutOfMemoryError, first_line

_CGROUP = Path("/sys/fs/cgroup")
_CPU_ALLOCATION_FAILED = ("DefaultCPUAllocator", "std::bad_alloc")  # of tensors, of what libraries need beside them


def free_bytes(device: torch.device) -> int:
    """Bytes free now on the device; on CPU not more than the process's control group still allows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    allowed = _cgroup_allowance()
    return available if allowed is None else min(available, allowed)


def resident_bytes() -> int:
    """What this process has in CPU memory now."""
    return int(psutil.Process().memory_info().rss)


def _cgroup_allowance() -> int | None:
    """What a container's limit leaves (control groups, version 2), or None where there is no limit.

    Cached files count as used there, but they give way: the checkpoint that was just read is among them.
    """
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cached = int(stat["active_file"]) + int(stat["inactive_file"])
        return None if limit == "max" else max(int(limit) - max(used - cached, 0), 0)
    except (OSError, ValueError, KeyError):  # no control groups here
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """True for a failed allocation on CPU or CUDA."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_ALLOCATION_FAILED)


def out_of_memory(error: BaseException) -> OutOfMemoryError:
    """The error for the user: what ran out, and which option to change."""
    return OutOfMemoryError(
        f"out of memory ({first_line(error)}): lower --memory so that fewer branches live at once, "
        "or --batch-size, or --seq-len; the run continues where it stopped"
    )
