"""export and import on the command line: what is to be pasted comes out whole, and what is wrong in one line."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from icsearch.core.files import published_patterns
from in_process import run

LONG = published_patterns() / "glm-5-1-4.json"
DEMO = published_patterns() / "demo-greedy.json"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith(("warning: ", "note: "))]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("columns", ["80", "20"])
def test_what_is_pasted_is_never_wrapped(columns: str) -> None:
    letters = json.loads(LONG.read_text())["pattern"]
    command = [sys.executable, "-m", "icsearch", "export", str(LONG), "--engine", "vllm"]
    environment = {**os.environ, "COLUMNS": columns, "TERM": "xterm"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == (f'--hf-overrides \'{{"use_index_cache": true, "index_topk_pattern": "{letters}"}}\'\n')
    _, value = shlex.split(done.stdout)
    back = subprocess.run(
        [*command[:3], "import", value, "--engine", "vllm"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert back.stdout == f"{letters}\n"


def test_a_repair_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "export", DEMO, "--engine", "vllm", "--retention", "1/4", "--serve-pp", "2")
    assert status == 0
    assert '"FFSSSSFSFSSFSSSS"' in out
    assert "stage 2 would start on S (layer 8)" in err and "estimated from the run's losses" in err
    assert "vLLM: add this flag" in err
    _, same, _ = run(capsys, "export", DEMO, "--engine", "vllm", "--retention", "1/4", "--serve-pp", "2",
                     "--repair", "same")  # fmt: skip
    assert same.count("F") == '"FFSSSSFSSSSFSSSS"'.count("F")
    assert "--serve-pp 0,8" in refused(capsys, "export", DEMO, "--engine", "trtllm", "--serve-pp", "2")


def test_published_patterns_go_by_their_name(capsys: pytest.CaptureFixture[str]) -> None:
    by_name = run(capsys, "export", "published:glm-5-1-4", "--engine", "vllm")
    assert by_name == run(capsys, "export", LONG, "--engine", "vllm")
    assert "known are" in refused(capsys, "export", "published:gpt", "--engine", "vllm")


def test_minimax_m3_in_the_two_engines_that_share_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config, file = tmp_path / "config.json", tmp_path / "pattern.json"
    sparse = {"sparse_attention_freq": [0, 0, 1, 1, 1, 1]}
    text = {"num_hidden_layers": 6, "sparse_attention_config": sparse}
    config.write_text(json.dumps({"model_type": "minimax_m3_vl", "text_config": text}))
    assert run(capsys, "import", "atom:freq:3", "--model-config", config, "--out", file)[0] == 0
    assert json.loads(file.read_text())["pattern"] == "FSSF"
    _, vllm, err = run(capsys, "export", file, "--engine", "vllm", "--model-config", config)
    keys = {"use_index_cache": True, "index_topk_freq": 3, "index_skip_topk_offset": 0}
    assert json.loads(shlex.split(vllm)[1]) == {"text_config": keys}
    assert "on ROCm alone" in err
    _, atom, _ = run(capsys, "export", file, "--engine", "atom", "--model-config", config)
    assert json.loads(shlex.split(atom)[1]) == {"use_index_cache": True, "index_topk_pattern": "FSSF"}
    for engine, flag in (("vllm", vllm), ("atom", atom)):
        back = run(capsys, "import", shlex.split(flag)[1], "--engine", engine, "--model-config", config)
        assert (back[0], back[1]) == (0, "FSSF\n")
    other = tmp_path / "other.json"
    letters = '{"use_index_cache": true, "index_topk_pattern": "FSFF"}'
    assert run(capsys, "import", letters, "--engine", "atom", "--model-config", config, "--out", other)[0] == 0
    assert "nearest that they can give is FFFF (freq 1," in refused(capsys, "export", other, "--engine", "vllm")
    nested = json.dumps({"text_config": {"use_index_cache": True, "index_topk_freq": 3}})
    assert "outside of it" in refused(capsys, "import", nested, "--engine", "atom", "--model-config", config)


def test_a_run_at_a_retention(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run_directory = tmp_path / "run"
    run_directory.mkdir()
    (run_directory / "pattern.json").write_bytes(DEMO.read_bytes())
    command = ("export", "--engine", "vllm")
    early = run(capsys, *command, run_directory, "--retention", "1/2")
    assert run(capsys, *command, f"{run_directory}@1/2") == early
    assert early[1] != run(capsys, *command, run_directory)[1]
    assert "give one of them" in refused(capsys, *command, f"{run_directory}@1/2", "--retention", "1/2")
    odd = tmp_path / "run@1"
    odd.write_bytes(DEMO.read_bytes())
    assert run(capsys, *command, odd)[0] == 0  # what exists is taken as it is


def test_a_config_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config, new = tmp_path / "config.json", tmp_path / "new.json"
    config.write_text(json.dumps({"model_type": "glm_moe_dsa", "num_hidden_layers": 78}))
    command = ("export", LONG, "--engine", "trtllm", "--model-config", config, "--out", new)
    assert run(capsys, *command)[1] == f"wrote {new}\n"
    assert run(capsys, "import", new, "--engine", "trtllm") == (0, json.loads(LONG.read_text())["pattern"] + "\n", "")
    assert "exists" in refused(capsys, *command)


def test_a_gguf_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from test_gguf import make

    pattern = tmp_path / "pattern.json"
    assert run(capsys, "import", "freq:2,offset:1", "--engine", "vllm", "--layers", 4, "--out", pattern)[0] == 0
    old, new = make(tmp_path / "old.gguf"), tmp_path / "new.gguf"
    assert run(capsys, "export", pattern, "--engine", "llamacpp", "--gguf", old, "--out", new)[0] == 0
    assert run(capsys, "import", new)[1] == "FSFS\n"
    assert "give --out" in refused(capsys, "export", pattern, "--engine", "llamacpp", "--gguf", old)


def test_import_writes_a_pattern_that_export_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pattern = tmp_path / "pattern.json"
    status, out, err = run(capsys, "import", "megatron:freq:4", "--layers", 10, "--out", pattern)
    assert (status, out, err) == (0, "FSSSFSSSFS\n", f"wrote {pattern}\n")
    out = run(capsys, "export", pattern, "--engine", "megatron")[1]
    assert out == "--dsa-indexer-topk-freq 4 --dsa-indexer-skip-topk-offset 1\n"


def test_letters_are_saved(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    letters, pattern = json.loads(LONG.read_text())["pattern"], tmp_path / "pattern.json"
    assert run(capsys, "import", letters, "--out", pattern) == (0, f"{letters}\n", f"wrote {pattern}\n")
    assert letters in run(capsys, "export", pattern, "--engine", "vllm")[1]


OVERRIDES = '{"use_index_cache": true, "index_topk_pattern": "FFSS"}'
OBJECT = "give the JSON object behind --hf-overrides alone, as one argument, and --engine NAME"


@pytest.mark.parametrize(
    ("pasted", "part"),
    [
        (["-tp", "8", "--hf-overrides", OVERRIDES], OBJECT),
        (["vllm", "serve", "MODEL", f"--hf-overrides={OVERRIDES}", "-pp", "2"], OBJECT),
        ([f"vllm serve MODEL -tp 8 --hf-overrides '{OVERRIDES}'"], OBJECT),
        (["python", "-m", "sglang.launch_server", "--json-model-override-args", OVERRIDES], "--engine sglang"),
        (["vllm serve x -tp 8"], "give the JSON object that it lays over the model's config"),
    ],
)
def test_a_command_line_is_refused_with_the_part_to_give(
    capsys: pytest.CaptureFixture[str], pasted: list[str], part: str
) -> None:
    line = refused(capsys, "import", *pasted)
    assert line.startswith("icsearch: a command line is not read here: give ") and part in line


def test_options_of_import_come_from_a_file_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ours = tmp_path / "ours.toml"
    ours.write_text("[import]\nlayers = 5\nengine = 'vllm'\n")
    assert run(capsys, "import", "freq:4", "--config", ours)[:2] == (0, "FFSSS\n")
    assert run(capsys, "import", OVERRIDES, "--config", ours)[:2] == (0, "FFSSF\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["import", "vllm:freq:4"], "give --layers N"),
        (["import", "freq:4", "--layers", "4", "--model-config", "x"], "give one of them"),
        (["import", "freq:4", "--laers", "4"], "cannot read 'freq:4 --laers 4'"),
        (["import"], "SOURCE"),
        (["import", "none.json"], "no file none.json"),
        (["import", "FFSFSS", "--engine", "vllm"], "these letters are a pattern already"),
        (["export", "ffsfss", "--engine", "vllm"], "icsearch import FFSFSS --out pattern.json writes one"),
        (
            ["import", OVERRIDES],
            "the text is read by each engine in its own way, and none is named: give --engine NAME",
        ),
        (["import", "freq:4", "--layers", "4", "--engine", "tgi"], "unknown engine 'tgi'"),
        (["export", LONG, "--engine", "megatron"], "the nearest that they can give is"),
        (["export", DEMO, "--engine", "vllm", "--out", "x.json"], "paste what is printed"),
        (["export", DEMO, "--engine", "vllm", "--repair", "same"], "give both, or leave it out"),
        (["import", "freq:4", "--layers", "4", "--out", DEMO], "exists: give another --out"),
        (
            ["import", "freq:4", "--layers", "4", "--out", "no/where.json"],
            "cannot write no/where.json: no is no directory",
        ),
        (["export", DEMO, "--engine", "vllm", "--serve-pp", "3", "--repair", "x"], "expected add, same, none"),
    ],
)
def test_bad_input_in_one_line(capsys: pytest.CaptureFixture[str], arguments: list[Any], words: str) -> None:
    assert words in refused(capsys, *arguments)


def test_an_engines_settings_are_evaluated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overrides = json.dumps({"use_index_cache": True, "index_topk_pattern": "FFFF" + "S" * 12})
    shorter = tmp_path / "overrides.json"
    shorter.write_text(json.dumps({"use_index_cache": True, "index_topk_pattern": "FFSS"}))
    status, _, err = run(
        capsys, "eval", "demo", "--calibration", "demo", "--num-sequences", 2, "--out", tmp_path / "eval",
        "--pattern", f"vllm:{overrides}", "--pattern", f"vllm:{shorter}", "--pattern", "megatron:freq:4", "--quiet",
    )  # fmt: skip
    assert (status, err) == (0, "")
    document = json.loads((tmp_path / "eval" / "eval.json").read_text())
    letters = {row["pattern"] for row in document["rows"]}
    assert letters == {"F" * 16, "FFFF" + "S" * 12, "FFSS" + "F" * 12, "FSSS" * 4}
    assert any("past the end vLLM takes F" in note for note in document["notes"])
