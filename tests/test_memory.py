"""What a container leaves of its memory: read from the files of a control group, made up here."""

from __future__ import annotations

from pathlib import Path

import pytest

from icsearch import memory


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Half of 1000 bytes used, most of that by files that were read."""
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("500\n")
    (tmp_path / "memory.stat").write_text("anon 100\nactive_file 150\ninactive_file 250\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_cached_files_give_way(group: Path) -> None:
    assert memory._cgroup_allowance() == 900


def test_what_is_used_beyond_the_limit(group: Path) -> None:
    (group / "memory.current").write_text("1600\n")
    assert memory._cgroup_allowance() == 0


def test_no_limit(group: Path) -> None:
    (group / "memory.max").write_text("max\n")
    assert memory._cgroup_allowance() is None


@pytest.mark.parametrize("name", ["memory.max", "memory.current", "memory.stat"])
def test_no_control_groups(group: Path, name: str) -> None:
    (group / name).unlink()
    assert memory._cgroup_allowance() is None
