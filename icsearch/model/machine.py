"""The machine: its memory, what running out of it looks like, and what the bits of a loss depend on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from icsearch.core.errors import OutOfMemoryError
from icsearch.core.text import first_line

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_ROOTS = {"": ("", "unified"), "memory": ("memory",)}  # of what limits memory, by controller: version 2 names none
_CPU_ALLOCATION_FAILED = ("DefaultCPUAllocator", "std::bad_alloc")  # of tensors, of what libraries need beside them


# The files of a control group that say what it may take and takes, and how the lines on cached files begin.
_FILES = (
    ("memory.max", "memory.current", ""),  # version 2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # version 1
)


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
    """What the limits of this process's control group, and of those that it lies in, leave; None without a limit."""
    allowed = [_left(group, *files) for group in _own_groups() for files in _FILES]
    return min((size for size in allowed if size is not None), default=None)


def _own_groups() -> list[Path]:
    """The directories of all control groups that this process is in, as far as they are to be seen here.

    In a container the own group is often the root of what is to be seen, whatever its path is outside.
    """
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:  # no /proc here
        lines = []
    groups = [_CGROUPS / root for roots in _ROOTS.values() for root in roots]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        own = Path(path.lstrip("/"))
        if ".." not in own.parts:  # else it lies outside of what is to be seen
            roots = [root for name in controllers.split(",") for root in _ROOTS.get(name, ())]
            groups += [_CGROUPS / root / group for root in roots for group in (own, *own.parents)]
    return list(dict.fromkeys(groups))


def _left(group: Path, limit_file: str, used_file: str, prefix: str) -> int | None:
    """What a control group may still take; None where it has no limit, or no such files.

    Cached files count as used there, but they give way: the checkpoint that was just read is among them.
    """
    try:
        limit = (group / limit_file).read_text().strip()
        used = int((group / used_file).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(stat[f"{prefix}active_file"]) + int(stat[f"{prefix}inactive_file"])
        return None if limit == "max" else max(int(limit) - max(used - cached, 0), 0)
    except (OSError, ValueError, KeyError):
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


def environment(device: str) -> dict[str, Any]:
    """What the bits of a loss depend on, beside the options."""
    on_cuda, cpu = device.startswith("cuda"), f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device_name": torch.cuda.get_device_name(device) if on_cuda else cpu,
    }
