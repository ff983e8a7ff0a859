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

from icsearch.resources import demo_checkpoint
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
    assert {"hours", "flops", "share", "memory", "devices", "efficiency"} <= set(document["kinds"])
    assert document["search"] | {"num_sequences": 64, "seq_len": 65536, "stages": 4} == document["search"]
    for placement in document["placements"]:
        memory = placement["memory"]
        assert memory["total"] == memory["weights"] + memory["states"] + memory["call"]
        assert placement["fits"] == (memory["missing"] == 0)
        assert set(placement["strategies"]) == ({"exact", "race", "lazy", "race+lazy"} if placement["fits"] else set())
    exact = next(one["strategies"]["exact"] for one in document["placements"] if one["fits"])
    assert {"layer_evaluations", "flops", "weight_bytes_per_step", "hours_per_step", "hours"} <= set(exact)


def test_a_plan_in_words(capsys: Capture) -> None:
    status, out, err = run(capsys, "plan", "demo")
    assert (status, err) == (0, "")
    for word in (
        "one device",
        "race+lazy",
        "counted",
        "measured",
        "estimated",
        "recommended: icsearch greedy",
    ):
        assert word in out


def test_the_recommended_command_is_one_that_greedy_takes(capsys: Capture) -> None:
    document = planned(capsys, "demo", "--devices", "1xcpu", "--num-shared", 3, "--keep-full", "5,9")
    command = document["recommended"]["command"]
    assert command.startswith("icsearch greedy demo --calibration ") and "--keep-full 5,9" in command
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
    code = "import sys; from icsearch import cli; cli._run(['plan', 'demo'], True); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_own_numbers_of_a_device(capsys: Capture) -> None:
    plain = planned(capsys, GLM, *LONG)
    own = ("--device-memory", "400GB", "--device-flops", "2000T", "--bandwidth", "10TB/s", "--read-rate", "20GB/s")
    better = planned(capsys, GLM, *LONG, *own)
    assert better["devices"]["memory"] == 400 * 10**9 and "as given" in better["devices"]["source"]
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
    assert command.startswith("torchrun --nproc-per-node 8 -m icsearch greedy MODEL ") and "--offload " in command
    options = [word for word in shlex.split(command) if word.startswith("--") and word != "--nproc-per-node"]
    help_text = run(capsys, "greedy", "--help")[1]
    assert all(option in help_text for option in options)
