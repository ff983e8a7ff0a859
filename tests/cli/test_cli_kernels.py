"""`--kernels` on the command line: chosen, recorded, compared when a run goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import greedy, refused, run

from icsearch.commands.requests import CalibrationRequest, RunRequest
from icsearch.commands.setup import kernel_options
from icsearch.core.errors import IcsearchError, ModelError
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.layout import inspect
from icsearch.model.shape import BLOCK_ELEMENTS


def options(directory: Path) -> dict[str, Any]:
    start = json.loads((directory / "journal.jsonl").read_text().splitlines()[0])
    found: dict[str, Any] = start["options"]
    return found


def test_both_kernels_search(
    family_checkpoint: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That their losses agree but for ties is in test_kernels; ties move those of a random model by percents."""
    losses = set()
    for kernels in ("blockwise", "reference"):
        out = tmp_path / kernels
        assert run(capsys, *greedy(family_checkpoint, tokens, out, "--num-shared", 2, "--kernels", kernels))[0] == 0
        assert options(out)["kernels"] == kernels
        losses.add(json.loads((out / "pattern.json").read_text())["baseline_loss"])
    assert len(losses) == 2  # so the option reached the model


def test_a_run_goes_on_with_its_own_kernels_or_not_at_all(
    glm_checkpoint: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = greedy(glm_checkpoint, tokens, out, "--num-shared", 1)
    assert run(capsys, *command, "--kernels", "reference")[0] == 0
    assert run(capsys, *command)[0] == 0  # auto is what the run began with
    assert options(out)["kernels"] == "reference"
    assert "belongs to the block-wise kernels" in refused(capsys, *command, "--block-elements", 4096)
    message = refused(capsys, *command, "--kernels", "blockwise")
    assert "kernels reference, now blockwise" in message


def test_block_elements_are_recorded_and_kept(
    glm_checkpoint: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = greedy(glm_checkpoint, tokens, out, "--num-shared", 1)
    assert run(capsys, *command, "--block-elements", 2048)[0] == 0
    assert options(out)["block_elements"] == 2048
    assert run(capsys, *command)[0] == 0
    assert "block_elements 2048, now 4096" in refused(capsys, *command, "--block-elements", 4096)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--kernels", "fast"], "--kernels 'fast' is unknown: give auto or blockwise or reference"),
        (["--block-elements", 3], "--block-elements 3 is too small: give 1024 or more"),
        (["--kernels", "reference", "--block-elements", 4096], "--block-elements belongs to the block-wise kernels"),
    ],
)
def test_bad_kernels(
    more: list[object],
    expected: str,
    glm_checkpoint: Path,
    tokens: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert expected in refused(capsys, *greedy(glm_checkpoint, tokens, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def request(**more: Any) -> RunRequest:
    return RunRequest(CalibrationRequest("model", "demo"), Path("run"), **more)


def test_families_without_arithmetic_run_the_reference_modules(glm_checkpoint: Path) -> None:
    layout = replace(inspect(open_checkpoint(str(glm_checkpoint))), has_arithmetic=False)
    assert kernel_options(request(), layout, {}) == {"kernels": "reference"}
    with pytest.raises(ModelError, match="give auto or reference"):
        kernel_options(request(kernels="blockwise"), layout, {})


def test_runs_from_before_the_option_go_on_with_the_reference(glm_checkpoint: Path) -> None:
    layout = inspect(open_checkpoint(str(glm_checkpoint)))
    assert kernel_options(request(), layout, {"threads": 1}) == {"kernels": "reference"}
    new = kernel_options(request(device="cpu"), layout, {})
    assert new == {"kernels": "blockwise", "block_elements": BLOCK_ELEMENTS["cpu"]}


def test_a_request_is_checked_however_it_is_made() -> None:
    with pytest.raises(IcsearchError, match="--kernels"):
        request(kernels="none")
