"""A built wheel, installed elsewhere, does all that the checkout does."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's contents in a folder of their own, as pip lays them into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run_elsewhere(installed: Path, *arguments: str) -> str:
    """The package from the wheel, in a folder without the checkout; the checkout's own copy is shut out."""
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import icsearch; "
        f"assert icsearch.__file__.startswith({str(installed)!r}), icsearch.__file__; "
        "from icsearch.__main__ import main; main()"
    )
    command = [sys.executable, "-I", "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=installed.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_carries_what_it_needs(installed: Path) -> None:
    package = installed / "icsearch"
    assert (package / "demo" / "model.safetensors").exists()
    assert (package / "demo" / "tokenizer.json").exists()
    assert (package / "patterns" / "glm-5-1-4.json").exists()
    assert (package / "report" / "templates" / "report.html").exists()
    assert (package / "py.typed").exists()
    assert not (installed / "tests").exists()


def test_wheel_exports_a_published_pattern(installed: Path) -> None:
    pattern = installed / "icsearch" / "patterns" / "glm-5-1-4.json"
    assert "index_topk_pattern" in run_elsewhere(installed, "export", str(pattern), "--engine", "vllm")


def test_wheel_searches_the_demo(installed: Path, tmp_path: Path) -> None:
    size = ["--seq-len", "48", "--num-sequences", "2", "--num-shared", "1"]
    out = str(tmp_path / "run")
    shown = run_elsewhere(installed, "greedy", "demo", "--calibration", "demo", "--out", out, *size)
    assert "report.html" in shown
    assert (tmp_path / "run" / "report.html").exists()
