"""Runs whose weights are streamed: the results of resident ones, counted reading, shards that are lost meanwhile."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import greedy, refused, run, same_result
from test_cli_eval import baseline, evaluation

import tiny
from icsearch.commands.greedy import greedy as search
from icsearch.commands.progress import Quiet
from icsearch.commands.requests import CalibrationRequest, GreedyRequest
from icsearch.commands.setup import batch_shape
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.layout import inspect
from icsearch.model.loading import Reader

REFERENCE = ["--kernels", "reference"]  # small working memory at these lengths, and fast


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers in many shards, so that three of them are far from all."""
    return tiny.save_checkpoint(tmp_path_factory.mktemp("deep"), num_hidden_layers=12)


@pytest.fixture(scope="module")
def resident(deep: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose weights were all on the device."""
    from icsearch.cli import app

    out = tmp_path_factory.mktemp("resident") / "run"
    arguments = greedy(deep, tokens, out, "--num-shared", 4, *REFERENCE)
    assert app._run([*map(str, arguments), "--offload", "none"], debug=True) == 0
    return out


def losses(out: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "losses"]


def checkpoint_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def read_by_step(out: Path) -> dict[int, int]:
    found: dict[int, int] = {}
    for event in losses(out):
        found[event["step"]] = found.get(event["step"], 0) + event.get("weight_bytes", 0)
    return found


def test_streamed_runs_have_the_results_of_resident_ones(
    capsys: pytest.CaptureFixture[str], deep: Path, tokens: Path, resident: Path, tmp_path: Path
) -> None:
    """And read the checkpoint at most 1.05 times a step, all sequences being one wave."""
    arguments = greedy(deep, tokens, tmp_path / "run", "--num-shared", 4, *REFERENCE, "--offload", "disk")
    status, out, err = run(capsys, *arguments)
    assert status == 0
    assert same_result(tmp_path / "run", resident)
    assert all(event["sequences"] == [0, 5] for event in losses(tmp_path / "run"))
    read, size = read_by_step(tmp_path / "run"), checkpoint_bytes(deep)
    assert read.keys() == set(range(5))
    assert all(0 < count <= 1.05 * size for count in read.values())
    assert "streamed from the checkpoint's shards, layer by layer: as asked for" in " ".join(err.split())
    cost = json.loads((tmp_path / "run" / "pattern.json").read_text())["cost"]
    assert cost["weight_bytes"] == sum(read.values())
    assert cost["weight_bytes_per_step"] == round(sum(read[step] for step in range(1, 5)) / 4)
    times = cost["weight_bytes_per_step"] / size
    assert f"{times:.2f} times the checkpoint" in " ".join(out.split())
    assert f"{times:.2f} times the checkpoint" in (tmp_path / "run" / "report.html").read_text()
    assert "weights were streamed layer by layer" in (tmp_path / "run" / "journal.jsonl").read_text()


def test_resident_runs_read_nothing(resident: Path) -> None:
    assert all("weight_bytes" not in event for event in losses(resident))
    assert "weight_bytes" not in json.loads((resident / "pattern.json").read_text())["cost"]


def budget(deep: Path, layers: int, branches: int, objective: str = "lm-loss") -> int:
    """Memory for so many layers of the largest kind and branches of one batch, beside what is no layer and one call."""
    layout = inspect(open_checkpoint(str(deep)))
    options = {"batch_size": 2, "dtype": "float32", "objective": objective}
    shape = batch_shape(layout, options, 40)
    outside = layout.num_parameters - sum(layout.layer_parameters)
    return 4 * (outside + layers * max(layout.layer_parameters)) + shape.layer_bytes + branches * shape.branch_bytes


class Planned(Quiet):
    """Keeps the plan that was shown."""

    def planned(self, rows: Sequence[tuple[str, str]], layer_sequences: int, done: int) -> None:
        self.rows = dict(rows)


@pytest.mark.parametrize("objective", ["lm-loss", pytest.param("kl", marks=pytest.mark.slow)])
def test_auto_streams_what_does_not_fit(deep: Path, tokens: Path, tmp_path: Path, objective: str) -> None:
    """And nothing else; with less memory in more waves and sweeps, and with the same losses.

    The step has 11 candidates on 3 batches, one of them a reference scored before. Not even three branches fit beside
    all twelve layers.
    """
    calibration = CalibrationRequest(str(deep), str(tokens))
    request = GreedyRequest(
        calibration, tmp_path, num_shared=1, objective=objective, batch_size=2, threads=1, kernels="reference"
    )
    memories = (10**9, budget(deep, 3, 30, objective), budget(deep, 3, 8, objective), budget(deep, 3, 4, objective))
    waves, patterns, read, found = [], [], [], []
    for number, memory in enumerate(memories):
        plan, out = Planned(), tmp_path / str(number)
        record = search(replace(request, out=out, memory=memory), plan)
        assert ("do not fit into memory" in plan.rows["weights"]) == (number > 0)
        assert plan.rows["weights"].startswith("resident:") == (number == 0)
        waves.append(len({tuple(event["sequences"]) for event in losses(out)}))
        patterns.append(max(len(event["patterns"]) for event in losses(out)))
        read.append(sum(record.weight_bytes.values()))
        found.append((record.nll, record.kl, record.pattern))
    assert found[1:] == found[:1] * 3
    assert waves == [3, 2, 3, 3]
    assert patterns[0] == 10 > patterns[2] > patterns[3]
    assert read == sorted(read) and read[0] == 0 and len(set(read)) == 4


def test_what_does_not_even_fit_in_parts_is_refused(
    capsys: pytest.CaptureFixture[str], deep: Path, tokens: Path, tmp_path: Path
) -> None:
    command = greedy(deep, tokens, tmp_path / "run", "--num-shared", 3, *REFERENCE)
    assert "memory budget" in refused(capsys, *command, "--memory", budget(deep, 3, 2))
    assert "memory budget" in refused(capsys, *command, "--memory", budget(deep, 6, 9), "--offload", "none")
    assert "--offload 'tape' is unknown" in refused(capsys, *command, "--offload", "tape")


@pytest.mark.parametrize("cut", [2, pytest.param(5, marks=pytest.mark.slow), 8])
def test_a_run_goes_on_in_another_mode_and_in_other_waves(
    capsys: pytest.CaptureFixture[str], deep: Path, tokens: Path, resident: Path, tmp_path: Path, cut: int
) -> None:
    """Resident, batch by batch, up to some event; then streamed, all sequences at once, which overlaps; and back."""
    lines = (resident / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_bytes(b"".join(lines[:cut]))
    command = greedy(deep, tokens, tmp_path, "--num-shared", 4, *REFERENCE)
    status, _, err = run(capsys, *command, "--offload", "disk")
    assert status == 0, err
    assert same_result(tmp_path, resident)
    streamed = (tmp_path / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_bytes(b"".join(streamed[: cut + 2]))
    assert run(capsys, *command, "--offload", "none")[0] == 0
    assert same_result(tmp_path, resident)


def test_dp_baseline_streams(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    for where in ("none", "disk"):
        assert run(capsys, *baseline(glm_checkpoint, tokens, tmp_path / where, "--offload", where))[0] == 0
    assert same_result(tmp_path / "none", tmp_path / "disk")
    with np.load(tmp_path / "none" / "similarity.npz") as one, np.load(tmp_path / "disk" / "similarity.npz") as other:
        assert all((one[name] == other[name]).all() for name in ("cosine", "overlap", "kascade"))
    events = [json.loads(line) for line in (tmp_path / "disk" / "journal.jsonl").read_text().splitlines()]
    read = sum(event.get("weight_bytes", 0) for event in events if event["event"] == "similarity")
    assert 0 < read <= 1.05 * checkpoint_bytes(glm_checkpoint)


def test_evaluations_stream(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    documents = []
    for where in ("none", "disk"):
        command = evaluation(glm_checkpoint, tokens, tmp_path / where, "uniform:1/2", "FSSSSS")
        assert run(capsys, *command, "--offload", where)[0] == 0
        documents.append(json.loads((tmp_path / where / "eval.json").read_text()))
    assert documents[0]["rows"] == documents[1]["rows"] and documents[0]["gaps"] == documents[1]["gaps"]
    assert 0 < documents[1]["cost"]["weight_bytes"] <= 1.05 * checkpoint_bytes(glm_checkpoint)
    told = set(documents[1]["notes"]) - set(documents[0]["notes"])
    assert told == {"weights were streamed layer by layer (--offload disk): the same bits"}
    command = evaluation(glm_checkpoint, tokens, tmp_path / "tasks", "FSSSSS")
    assert "--measure runs the model token by token" in refused(capsys, *command, "--offload", "disk", "--measure", 8)


def shorter(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


@pytest.mark.parametrize(
    "damage", [pytest.param(shorter, id="shorter"), pytest.param(Path.unlink, id="gone", marks=pytest.mark.slow)]
)
def test_a_shard_that_is_lost_in_mid_run(
    capsys: pytest.CaptureFixture[str],
    deep: Path,
    tokens: Path,
    resident: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Any,
) -> None:
    """One line that names the shard, status 1, the journal as far as it came; repaired, the run ends as ever."""
    model = Path(shutil.copytree(deep, tmp_path / "model"))
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shard = model / index["weight_map"]["model.layers.11.mlp.gate.weight"]
    read, reads = Reader.read_layer, []

    def damaging(reader: Reader, index: int) -> int:
        reads.append(index)
        if len(reads) == 18:  # in the second pass
            damage(shard)
        return read(reader, index)

    command = greedy(model, tokens, tmp_path / "run", "--num-shared", 4, *REFERENCE, "--offload", "disk")
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read_layer", damaging)
        status, out, err = run(capsys, *command)
    lines = [line for line in err.splitlines() if line.startswith("icsearch: ")]
    assert (status, out, len(lines)) == (1, "", 1)
    assert f"shard {shard.name} of" in lines[0] and "cannot be read" in lines[0]
    known = len(losses(tmp_path / "run"))
    assert known >= 1
    assert run(capsys, *command)[0] == 2  # the damage is found before anything is loaded
    shutil.copy2(deep / shard.name, shard)
    assert run(capsys, *command)[0] == 0
    assert (tmp_path / "run" / "curve.csv").read_bytes() == (resident / "curve.csv").read_bytes()


def test_cpu_memory_on_a_cpu_device_is_no_other_place(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    status, _, err = run(capsys, *greedy(glm_checkpoint, tokens, tmp_path, "--num-shared", 1, "--offload", "cpu"))
    assert status == 0
    assert "resident: --offload cpu is what a CPU device does anyway" in " ".join(err.split())
    assert all("weight_bytes" not in event for event in losses(tmp_path))
