"""What a container leaves of its memory: read from the files of control groups, made up here."""

from __future__ import annotations

from pathlib import Path

import pytest

from icsearch.model import machine

UNLIMITED = 2**63 - 4096  # what version 1 says where there is no limit


def write_group(directory: Path, limit: str = "1000", used: int = 500) -> Path:
    """A group of version 2: most of what is used are files that were read."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{used}\n")
    (directory / "memory.stat").write_text("anon 100\nactive_file 150\ninactive_file 250\n")
    return directory


def write_old_group(directory: Path, limit: int = UNLIMITED) -> Path:
    """A group of version 1: half of 400 bytes are files that were read, those of groups within it included."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (directory / "memory.usage_in_bytes").write_text("400\n")
    (directory / "memory.stat").write_text(
        "active_file 1\ninactive_file 1\ntotal_active_file 150\ntotal_inactive_file 50\n"
    )
    return directory


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the control groups are mounted; the process is in the root of them until a test says otherwise."""
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "mount")
    monkeypatch.setattr(machine, "_OWN_CGROUPS", tmp_path / "own")
    is_in(tmp_path / "mount", "0::/")
    return tmp_path / "mount"


def is_in(groups: Path, *lines: str) -> None:
    """Put the process into these groups."""
    (groups.parent / "own").write_text("".join(f"{line}\n" for line in lines))


def test_cached_files_give_way(groups: Path) -> None:
    write_group(groups)
    assert machine._cgroup_allowance() == 900


def test_what_is_used_beyond_the_limit(groups: Path) -> None:
    write_group(groups, used=1600)
    assert machine._cgroup_allowance() == 0


def test_no_limit(groups: Path) -> None:
    write_group(groups, "max")
    assert machine._cgroup_allowance() is None


@pytest.mark.parametrize("name", ["memory.max", "memory.current", "memory.stat"])
def test_no_control_groups(groups: Path, name: str) -> None:
    (write_group(groups) / name).unlink()
    assert machine._cgroup_allowance() is None


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"a.slice/job.scope": "700"}, 600),  # its own
        ({"a.slice": "600"}, 500),  # that of a group around it
        ({"a.slice": "600", "a.slice/job.scope": "700", "": "2000"}, 500),
        ({"a.slice/other.scope": "200"}, None),  # somebody else's
    ],
)
def test_the_smallest_limit_on_the_way_counts(groups: Path, limits: dict[str, str], left: int | None) -> None:
    is_in(groups, "0::/a.slice/job.scope")
    for name in ("a.slice", "a.slice/job.scope"):
        write_group(groups / name, "max")
    for name, limit in limits.items():
        write_group(groups / name, limit)
    assert machine._cgroup_allowance() == left


def test_a_container_sees_its_own_group_as_the_root(groups: Path) -> None:
    """Whatever its path is outside: that one is not to be seen here, or lies above."""
    write_group(groups, "800")
    for path in ("/docker/0123", "/../0123"):
        is_in(groups, f"0::{path}")
        assert machine._cgroup_allowance() == 700


def test_version_1(groups: Path) -> None:
    is_in(groups, "9:cpu,cpuacct:/other", "5:memory:/docker/0123", "1:name=systemd:/docker/0123")
    write_old_group(groups / "memory")
    write_old_group(groups / "memory" / "docker" / "0123", 1500)
    write_old_group(groups / "memory" / "other", 10)  # another controller's path
    assert machine._cgroup_allowance() == 1300
    write_old_group(groups / "memory" / "docker", 900)
    assert machine._cgroup_allowance() == 700


def test_both_versions_side_by_side(groups: Path) -> None:
    is_in(groups, "3:memory:/job", "0::/job")
    write_old_group(groups / "memory" / "job", 2000)
    write_group(groups / "unified" / "job", "1000")
    assert machine._cgroup_allowance() == 900


def test_without_proc_the_root_counts(groups: Path) -> None:
    (groups.parent / "own").unlink()
    write_group(groups)
    assert machine._cgroup_allowance() == 900
