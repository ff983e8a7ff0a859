"""Whole files or none, what killed processes leave, and paths that no file can have."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from icsearch.core import files
from icsearch.core.errors import ModelError
from icsearch.core.files import is_disk_full, make_directory, remove_stale_temporaries, typed_path, write_atomically


def test_text_of_a_path_that_is_no_utf8(tmp_path: Path) -> None:
    write_atomically(tmp_path / "report.html", f"run {os.fsdecode(b'caf' + bytes([0xFF]))} é")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "run caf\\udcff é"
    assert os.listdir(tmp_path) == ["report.html"]


def test_temporaries_of_dead_processes_are_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = [tmp_path / f".eval.json.{dead.pid}.tmp", tmp_path / ".report.html.9999999999.tmp"]
    kept = [
        tmp_path / f".eval.json.{os.getpid()}.tmp",
        tmp_path / ".report.html.1.tmp",
        tmp_path / ".eval.json.tmp",
        tmp_path / f"eval.json.{dead.pid}.tmp",
        tmp_path / ".x.0.tmp",
    ]
    for path in [*stale, *kept]:
        path.write_text("")
    (tmp_path / f".folder.{dead.pid}.tmp").mkdir()
    assert remove_stale_temporaries(tmp_path) == sorted(stale)
    assert all(path.exists() for path in kept)
    assert remove_stale_temporaries(tmp_path / "none") == []


@pytest.mark.parametrize("text", ["~nosuchuser/x", "x" * 300, "/tmp/" + "y" * 300, "nul\0byte"])
def test_paths_that_can_name_no_file(text: str) -> None:
    with pytest.raises(ModelError, match="cannot use the path .*: give another one") as caught:
        typed_path(text, ModelError)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 200


def test_paths_that_may_exist_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert typed_path("~/x", ModelError) == tmp_path / "x"
    assert typed_path(str(tmp_path), ModelError) == tmp_path
    (tmp_path / "file").write_text("")
    assert typed_path(str(tmp_path / "file" / "inside"), ModelError) == tmp_path / "file" / "inside"


def test_directories_are_made_with_their_parents(tmp_path: Path) -> None:
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="/file"):
        make_directory(tmp_path / "file" / "b")
    with pytest.raises(FileExistsError):
        make_directory(tmp_path / "file")


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """As does a limit on the size of files; what was begun is taken away, what was there stays."""
    target = tmp_path / "report.html"
    target.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_atomically(target, "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert is_disk_full(caught.value)
    assert caught.value.filename == str(target)
    assert os.listdir(tmp_path) == ["report.html"]
    assert target.read_text() == "old"
    assert not is_disk_full(FileNotFoundError())


def test_a_text_is_read_whole_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_READ_BYTES", 4)
    (tmp_path / "text").write_bytes("aü\n".encode())
    assert files.read_text(tmp_path / "text") == "aü\n"
    (tmp_path / "text").write_bytes(b"12345")
    with pytest.raises(OSError, match="File too large"):
        files.read_text(tmp_path / "text")
