"""A checkpoint as files: what can be named, and what is fetched. No network."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from icsearch.core.errors import ModelError
from icsearch.model.checkpoint import open_checkpoint
from icsearch.planning.modelfile import open_model_file


@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 300, "x" * 300 + "/y", "nul\0byte", ""])
def test_names_of_no_checkpoint_are_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(name)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "~/nowhere", "/x/y", "nowhere/", "a/../b", ".hidden/x"])
def test_a_path_is_not_looked_for_on_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="^no checkpoint at "):
        open_checkpoint(name)
    with pytest.raises(ModelError, match=r"^nothing at "):
        open_model_file(name)


def test_nothing_is_not_the_working_directory(glm_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(glm_checkpoint)
    assert open_checkpoint(".").directory.samefile(glm_checkpoint)
    with pytest.raises(ModelError, match="MODEL is empty: expected a directory"):
        open_checkpoint("")


def test_a_checkpoint_of_this_machine_has_no_revision(glm_checkpoint: Path) -> None:
    """Of one that the hub delivered it is the commit: tests/test_model_card.py."""
    assert [open_checkpoint(name).revision for name in ("demo", str(glm_checkpoint))] == [None, None]


@pytest.mark.parametrize("trust", [False, True])
def test_python_files_are_fetched_only_when_trusted(
    trust: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetch(repo_id: str, allow_patterns: list[str], **_: Any) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(ModelError, match=r"no config\.json in"):
        open_checkpoint("owner/name", trust_remote_code=trust)
    assert any(fnmatch("modeling_own.py", pattern) for pattern in asked) is trust
    assert "*.safetensors" in asked
