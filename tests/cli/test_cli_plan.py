"""`icsearch plan` on the command line: a table, JSON, and one line for what is wrong. No torch."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_cli import refused, run

from icsearch.core.files import demo_checkpoint
from icsearch.planning.forecast import FISHER
from icsearch.planning.page import duration
from icsearch.search.registry import STRATEGIES
from plan_fixtures import DEEPSEEK, GLM

Capture = pytest.CaptureFixture[str]
LONG = ("--devices", "8xH200", "--seq-len", 65536, "--num-sequences", 64, "--stages", 4)


def planned(capsys: Capture, *arguments: object) -> dict[str, Any]:
    status, out, err = run(capsys, "plan", *arguments, "--json")
    assert (status, err) == (0, "")
    document: dict[str, Any] = json.loads(out)
    return document


@pytest.mark.parametrize("model", [GLM, DEEPSEEK])
def test_a_plan_as_json_says_what_every_number_is(model: str, capsys: Capture) -> None:
    document = planned(capsys, model, *LONG)
    assert document["format"] == "icsearch.plan/1"
    assert {"hours", "flops", "memory", "devices"} <= set(document["kinds"])
    assert document["search"] | {"num_sequences": 64, "seq_len": 65536, "stages": 4} == document["search"]
    for placement in document["placements"]:
        memory = placement["memory"]
        assert memory["total"] == memory["weights"] + memory["states"] + memory["call"]
        assert placement["fits"] == (memory["missing"] == 0)
        assert set(placement["strategies"]) == ({FISHER, *STRATEGIES} if placement["fits"] else set())
    exact = next(one["strategies"]["exact"] for one in document["placements"] if one["fits"])
    assert {"layer_evaluations", "flops", "weight_bytes_per_step", "hours_per_step", "hours", "binds"} <= set(exact)


def test_a_plan_in_words(capsys: Capture) -> None:
    status, out, err = run(capsys, "plan", "demo")
    assert (status, err) == (0, "")
    for word in (
        "one device",
        "counted",
        "estimated",
        "waits for",
        "recommended:\nicsearch fisher",
        "one device: fisher is fastest there. It waits for computing: computing takes",
    ):
        assert " ".join(word.split()) in " ".join(out.split())


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("model", [GLM, "demo"])
def test_a_plan_fits_the_terminal(model: str, columns: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """No number is cut; the command alone is one line whatever the width, so that it can be pasted."""
    monkeypatch.setenv("COLUMNS", str(columns))
    more = LONG if model == GLM else ()
    _, out, _ = run(capsys, "plan", model, *more)
    *lines, command = out.splitlines()
    assert max(map(len, lines)) <= columns
    assert "…" not in out and "(s)" not in out
    assert command == planned(capsys, model, *more)["recommended"]["command"]


def test_what_cpu_memory_must_hold_is_said(capsys: Capture) -> None:
    out = " ".join(run(capsys, "plan", GLM, *LONG)[1].split())
    assert "from cpu the weights are in the node's CPU memory: 1.5 TB with dp 1, " in out
    assert "from cpu" not in run(capsys, "plan", "demo")[1]


def test_a_model_too_large_for_the_machine_is_planned_for_gpus(capsys: Capture) -> None:
    line = refused(capsys, "plan", GLM, "--devices", "1xcpu", "--device-memory", "16GB")
    assert "plan for GPUs, such as --devices 8xH200" in line


def test_weights_that_are_dequantised_are_said_to_be(capsys: Capture) -> None:
    _, out, _ = run(capsys, "plan", GLM, *LONG)
    assert "746.0 GB on disk in FP8; dequantised as they are read: 1.5 TB in bfloat16" in " ".join(out.split())
    assert "MB, on disk and in memory (float32)" in run(capsys, "plan", "demo")[1]


def test_the_command_repeats_what_the_plan_was_made_for(tmp_path: Path, capsys: Capture) -> None:
    """The size of a batch, the memory, and a path with a blank."""
    directory = tmp_path / "my model"
    directory.mkdir()
    (directory / "config.json").write_bytes((demo_checkpoint() / "config.json").read_bytes())
    document = planned(capsys, directory, "--batch-size", 3, "--device-memory", "400MB")
    words = shlex.split(document["recommended"]["command"])
    assert words[2] == str(directory)
    assert words[words.index("--batch-size") + 1] == "3"
    assert words[words.index("--memory") + 1] == "320MB"
    assert document["placements"][0]["memory"]["budget"] == 320 * 10**6
    assert "--memory" not in planned(capsys, directory)["recommended"]["command"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0432, "0.043 s"), (2.591, "2.6 s"), (48, "48 s"), (200, "3.3 min"), (5900, "98 min"), (18720, "5.2 h")],
)
def test_times_are_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds / 3600) == text


def test_the_recommended_command_is_one_that_greedy_takes(capsys: Capture) -> None:
    document = planned(capsys, "demo", "--devices", "1xcpu", "--num-shared", 3, "--keep-full", "5,9")
    command = document["recommended"]["command"]
    assert command.startswith("icsearch fisher demo --calibration ") and "--keep-full 5,9" in command
    options = [word for word in shlex.split(command) if word.startswith("--")]
    status, help_text, _ = run(capsys, "greedy", "--help")
    assert status == 0 and all(option in help_text for option in options)


def test_a_directory_needs_no_weights(tmp_path: Path, capsys: Capture) -> None:
    config = demo_checkpoint() / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    documents = [planned(capsys, model, "--devices", "2xcpu") for model in (tmp_path, tmp_path / "config.json", "demo")]
    assert documents[0]["placements"] == documents[1]["placements"] == documents[2]["placements"]
    assert str(tmp_path) in documents[1]["recommended"]["command"]  # which has the weights, some day


def test_torch_is_never_imported() -> None:
    code = "import sys; from icsearch.cli import app; app._run(['plan', 'demo'], True); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_own_numbers_of_a_device(capsys: Capture) -> None:
    plain = planned(capsys, GLM, *LONG)
    own = ("--device-memory", "400GB", "--device-flops", "2000T", "--bandwidth", "10TB/s", "--read-rate", "20GB/s")
    better = planned(capsys, GLM, *LONG, *own)
    assert better["devices"]["memory"] == 400 * 10**9 and better["devices"]["sources"]["memory"] == "as given"
    fitting = [sum(one["fits"] for one in document["placements"]) for document in (plain, better)]
    assert fitting[0] < fitting[1]  # now some are resident


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", "8xK20"), "--devices '8xK20' is unknown"),
        (("--bandwidth", "fast"), "--bandwidth 'fast' is not a rate"),
        (("--device-memory", "much"), "is not a size"),
        (("--seq-len", 2048), "not longer than index_topk 2048"),
        (("--retention", "1/4", "--num-shared", 3), "give one of them"),
        (("--dtype", "int4"), "--dtype 'int4' is unknown"),
        (("--devices", "1xH200", "--device-memory", "10GB"), "nothing fits 1xH200"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[object, ...], message: str, capsys: Capture) -> None:
    assert message in refused(capsys, "plan", GLM, *arguments)


def test_a_model_without_indexers_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 4}')
    assert "is a llama model and has no indexers" in refused(capsys, "plan", tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "expected a model's config.json" in refused(capsys, "plan", tmp_path)


def test_the_command_of_several_processes_has_options_that_exist(capsys: Capture) -> None:
    command = planned(capsys, GLM, *LONG)["recommended"]["command"]
    assert command.startswith("torchrun --nproc-per-node 8 -m icsearch fisher MODEL ") and "--offload " in command
    options = [word for word in shlex.split(command) if word.startswith("--") and word != "--nproc-per-node"]
    help_text = run(capsys, "greedy", "--help")[1]
    assert all(option in help_text for option in options)
