"""Copies of checkpoints as files: what is linked, what is new, and that a copy is whole or not there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from icsearch.engines import copy as copying
from icsearch.engines.copy import (
    Copied,
    CopyError,
    check_outside,
    fill_directory,
    free_place,
    plan_copy,
    whole_directory,
)
from icsearch.model.checkpoint import open_checkpoint

NEW = {"config.json": '{"new": true}\n'}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two shards, an index, and what else lies in such a directory."""
    folder = tmp_path / "source"
    (folder / "encoding").mkdir(parents=True)
    for number in (1, 2):
        tensors = {f"{number}.{name}": torch.full((4,), float(number)) for name in ("kept", "spare")}
        save_file(tensors, folder / f"model-{number}.safetensors")
    names = {f"{n}.{name}": f"model-{n}.safetensors" for n in (1, 2) for name in ("kept", "spare")}
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {names}}}'.replace("'", '"'))
    for name in ("config.json", "tokenizer.json", "encoding/code.py", ".hidden", "old.bin", "consolidated.safetensors"):
        (folder / name).write_text("{}")
    return folder


def copy(source: Path, out: Path, dropped: dict[str, set[str]], tell: Callable[[str], None] = print) -> Copied:
    plan = plan_copy(open_checkpoint(str(source)), dropped, NEW)
    with whole_directory(free_place(out)) as directory:
        return fill_directory(plan, directory, tell)


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_what_is_linked_and_what_is_new(source: Path, tmp_path: Path) -> None:
    done = copy(source, tmp_path / "out", {"model-2.safetensors": {"2.spare"}})
    expected = {"config.json", "tokenizer.json", "encoding/code.py", "model-1.safetensors", "model-2.safetensors"}
    assert files(tmp_path / "out") == expected
    same = {name for name in expected if (tmp_path / "out" / name).samefile(source / name)}
    assert same == {"model-1.safetensors"}
    assert load_file(tmp_path / "out" / "model-2.safetensors").keys() == {"2.kept"}
    assert (tmp_path / "out" / "config.json").read_text() == NEW["config.json"]
    assert (done.linked, done.copied, done.rewritten) == (1, 2, 1)
    assert done.rewritten_bytes == (tmp_path / "out" / "model-2.safetensors").stat().st_size
    assert done.copied_bytes == 4


def test_an_edit_of_the_copy_changes_no_small_file_of_the_source(source: Path, tmp_path: Path) -> None:
    copy(source, tmp_path / "out", {})
    for name in ("config.json", "tokenizer.json", "encoding/code.py"):
        with open(tmp_path / "out" / name, "a") as file:
            file.write("edited")
        assert (source / name).read_text() == "{}"


def test_weights_that_the_index_does_not_name_are_left_out(source: Path) -> None:
    plan = plan_copy(open_checkpoint(str(source)), {}, NEW)
    assert plan.left_out == ("consolidated.safetensors", "old.bin")


def test_a_shard_that_loses_all_is_gone(source: Path, tmp_path: Path) -> None:
    copy(source, tmp_path / "out", {"model-2.safetensors": {"2.kept", "2.spare"}})
    assert "model-2.safetensors" not in files(tmp_path / "out")


def test_links_of_the_hub_cache_are_the_files_they_lead_to(source: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    for number, name in enumerate(sorted(files(source))):
        (source / name).rename(blobs / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / str(number))
    copy(snapshot, tmp_path / "out", {"model-2.safetensors": {"2.spare"}})
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_symlink()
    assert (tmp_path / "out" / "model-1.safetensors").samefile(snapshot / "model-1.safetensors")
    assert (tmp_path / "out" / "encoding" / "code.py").read_text() == "{}"
    shutil.rmtree(blobs)
    assert load_file(tmp_path / "out" / "model-1.safetensors").keys() == {"1.kept", "1.spare"}


def test_a_linked_folder_is_not_followed(source: Path, tmp_path: Path) -> None:
    (source / "loop").symlink_to(source)
    (source / "dangling.json").symlink_to("nowhere")
    copy(source, tmp_path / "out", {})
    assert files(tmp_path / "out") == files(source) - {"old.bin", "consolidated.safetensors", ".hidden"} - {
        "model.safetensors.index.json"
    }


def test_where_nothing_can_be_linked_it_is_copied(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    heard: list[str] = []
    done = copy(source, tmp_path / "out", {}, heard.append)
    assert (done.linked, done.copied) == (0, 4)
    assert not (tmp_path / "out" / "model-1.safetensors").samefile(source / "model-1.safetensors")
    assert (tmp_path / "out" / "model-1.safetensors").read_bytes() == (source / "model-1.safetensors").read_bytes()
    assert "0 shards linked (0 B)" in heard[0] and "4 files copied" in heard[0] and "free" in heard[0]


OTHER = Path("/dev/shm")


@pytest.mark.skipif(not OTHER.is_dir(), reason="no second file system")
def test_on_another_file_system_it_is_copied(source: Path, tmp_path: Path) -> None:
    if OTHER.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("the temporary directory lies there too")
    out = OTHER / f"icsearch-test-{os.getpid()}"
    try:
        assert copy(source, out / "out", {}).linked == 0
        assert load_file(out / "out" / "model-1.safetensors").keys() == {"1.kept", "1.spare"}
    finally:
        shutil.rmtree(out, ignore_errors=True)


def test_room_is_looked_at_first(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the free space that the system reports; here it reports very little."""
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(copying.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CopyError, match=r"has 100 B free, and the copy needs 1\.0 MB .*1 shard rewritten"):
        copy(source, tmp_path / "out", {"model-2.safetensors": {"2.spare"}})
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_file_that_cannot_be_written_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """A real limit on the size of files, in a process of its own: the copy of a large tokenizer hits it."""
    (source / "tokenizer.json").write_bytes(bytes(10**6))
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pathlib import Path; from icsearch.engines.copy import *\n"
        "from icsearch.model.checkpoint import open_checkpoint\n"
        "source, out = map(Path, sys.argv[1:])\n"
        "plan = plan_copy(open_checkpoint(str(source)), {}, {})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))\n"
        "with whole_directory(out) as directory: fill_directory(plan, directory, print)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, source, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1 and "File too large" in result.stderr and "tokenizer.json" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_killed_process_leaves_no_copy_and_the_next_one_tidies_up(source: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from icsearch.engines.copy import *\n"
        "with whole_directory(Path(sys.argv[1])) as directory:\n"
        "    (directory / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (left,) = (path for path in tmp_path.iterdir() if path.name.startswith(".out."))
    others = [tmp_path / f".out.{os.getpid()}x.tmp", tmp_path / f".other.{left.name.split('.')[2]}.tmp"]
    for path in others:
        path.mkdir()
    copy(source, tmp_path / "out", {})
    assert not left.exists()
    assert all(path.exists() for path in others)
    assert "half" not in files(tmp_path / "out")


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "out") as directory:
        (directory / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_parents_are_made_and_an_empty_directory_is_taken(source: Path, tmp_path: Path) -> None:
    copy(source, tmp_path / "a" / "b", {})
    assert "tokenizer.json" in files(tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    copy(source, tmp_path / "link", {})
    assert (tmp_path / "link").is_symlink()
    assert files(tmp_path / "empty") == files(tmp_path / "a" / "b")


def test_what_came_meanwhile_is_not_written_over(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CopyError, match="the finished copy cannot become"), whole_directory(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")
    assert files(tmp_path / "out") == {"mine"}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.parametrize("place", ["~nosuchuser/x", "nul\0byte", "x" * 300, "config.json/x", "loop/x"])
def test_places_that_cannot_be(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (source.parent / "loop").symlink_to("loop")
    shutil.copy(source / "config.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CopyError) as caught:
        copy(source, Path(place), {})
    assert "\n" not in str(caught.value) and caught.value.exit_status == 2
    assert {path.name for path in tmp_path.iterdir()} == {"source", "loop", "config.json"}


@pytest.mark.parametrize("place", ["source", "source/inside", "source/../source/x", "link/x"])
def test_places_in_the_source_are_refused(source: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to("source")
    with pytest.raises(CopyError, match="lies inside of the checkpoint"):
        check_outside((tmp_path / place).resolve(), source)
    check_outside(tmp_path / "source-2", source)


def test_places_that_are_taken_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CopyError, match="is a file"):
        free_place(tmp_path / "file")
    with pytest.raises(CopyError, match="is not empty"):
        free_place(tmp_path)
    (tmp_path / "empty").mkdir()
    assert free_place(tmp_path / "empty") == (tmp_path / "empty").resolve()
    monkeypatch.chdir(tmp_path / "empty")
    for place in (Path(), Path("."), tmp_path / "empty"):
        with pytest.raises(CopyError, match="is the working directory"):
            free_place(place)
