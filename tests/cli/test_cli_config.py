"""Config files and environment variables: their order, their errors, and that a run cannot tell them from flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

import tiny
from icsearch.cli import app
from icsearch.cli.config import ConfigError, read_tables
from icsearch.core.files import published_patterns
from in_process import run


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that bad input ends with."""
    status, out, err = run(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    return err.strip()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def planned(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What `plan --json` understood."""
    status, out, err = run(capsys, "plan", "demo", "--json", *arguments)
    assert status == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def test_flags_above_the_environment_above_the_command_above_common(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = write(tmp_path / "both.toml", "[common]\nnum-shared = 2\nseq_len = 64\n[plan]\nnum-shared = 3\n")
    common = write(tmp_path / "common.toml", "[common]\nnum-shared = 2\n")

    def shared(*arguments: object) -> object:
        return planned(capsys, *arguments)["search"]["num_shared"]

    assert shared() == 12  # the default, a retention of 1/4
    assert shared("--config", common) == 2
    assert shared("--config", both) == 3
    monkeypatch.setenv("ICSEARCH_PLAN_NUM_SHARED", "4")
    assert shared("--config", both) == 4
    assert shared("--config", both, "--num-shared", 5) == 5
    assert shared("--num-shared", 5, "--config", both) == 5
    monkeypatch.delenv("ICSEARCH_PLAN_NUM_SHARED")
    monkeypatch.setenv("ICSEARCH_CONFIG", str(both))
    assert shared() == 3
    assert shared("--config", common) == 2
    status, out, _ = run(capsys, "--config", common, "plan", "demo", "--json")
    assert (status, json.loads(out)["search"]["num_shared"]) == (0, 2)
    status, out, _ = run(capsys, "--config", common, "plan", "demo", "--json", "--config", both)
    assert (status, json.loads(out)["search"]["num_shared"]) == (0, 3)


def test_an_empty_variable_says_nothing_and_an_empty_value_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typer's convention for variables; typed, or in a file, nothing is a value like any other."""
    monkeypatch.setenv("ICSEARCH_PLAN_RETENTION", "")
    half = write(tmp_path / "half.toml", '[common]\nretention = "1/2"\n')
    assert planned(capsys, "--config", half)["search"]["num_shared"] == 8
    assert "retention '' is not a number" in refused(capsys, "plan", "demo", "--config", half, "--retention", "")
    empty = write(tmp_path / "empty.toml", '[common]\nretention = ""\n')
    assert "retention '' is not a number" in refused(capsys, "plan", "demo", "--config", empty)


def test_a_run_cannot_tell_where_an_option_came_from(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun with flags, gone on with a file and with the environment: finished; and the same first event otherwise."""
    tokens = tiny.save_tokens(tmp_path / "tokens", sequences=3, length=32)
    values = {"objective": "kl", "num-shared": 1, "batch-size": 1, "stages": 2, "keep-full": "2,4"}
    flags = [part for name, value in values.items() for part in (f"--{name}", value)]
    greedy = ["greedy", glm_checkpoint, "--calibration", tokens, "--quiet"]
    assert run(capsys, *greedy, "--out", tmp_path / "flags", *flags)[0] == 0

    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    config = write(tmp_path / "run.toml", "\n".join(["[common]", "seed = 0", "[greedy]", *lines]))
    assert run(capsys, *greedy, "--out", tmp_path / "flags", "--config", config)[0] == 0
    assert run(capsys, *greedy, "--out", tmp_path / "file", "--config", config)[0] == 0
    for name, value in values.items():
        monkeypatch.setenv(f"ICSEARCH_GREEDY_{name.upper().replace('-', '_')}", str(value))
    assert run(capsys, *greedy, "--out", tmp_path / "environment")[0] == 0
    first = [
        json.loads((tmp_path / name / "journal.jsonl").read_text().splitlines()[0])["options"]
        for name in ("flags", "file", "environment")
    ]
    assert first[0] == first[1] == first[2]
    assert first[0]["keep_full"] == [2, 4]


def test_required_options_several_values_and_flags(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tmp_path: Path
) -> None:
    tokens = tiny.save_tokens(tmp_path / "tokens", sequences=2, length=32)
    config = write(
        tmp_path / "eval.toml",
        f"[common]\ncalibration = '{tokens}'\nquiet = true\nout = '{tmp_path / 'eval'}'\n"
        '[eval]\npattern = ["uniform:1/2", "FSSSSS"]\ncontext = 1000\n',
    )
    status, out, err = run(capsys, "eval", glm_checkpoint, "--config", config)
    assert (status, err) == (0, "")
    assert all(name in out for name in ("full", "uniform 1/2", "FSSSSS"))
    document = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert document["options"]["contexts"] == [1000]


def test_of_two_that_exclude_one_another_the_stronger_place_counts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--num-shared and --retention; from the same place, both are refused, as on the command line."""
    config = write(tmp_path / "a.toml", '[common]\nretention = "1/2"\n')
    own = write(tmp_path / "own.toml", '[common]\nretention = "1/2"\n[plan]\nnum-shared = 3\n')
    both = write(tmp_path / "both.toml", '[plan]\nretention = "1/2"\nnum-shared = 3\n')

    def shared(*arguments: object) -> object:
        return planned(capsys, *arguments)["search"]["num_shared"]

    assert shared("--config", config) == 8
    assert shared("--config", config, "--num-shared", 5) == 5
    assert shared("--config", own) == 3
    assert shared("--config", own, "--retention", "3/4") == 4
    assert "give one of them" in refused(capsys, "plan", "demo", "--config", both)
    monkeypatch.setenv("ICSEARCH_PLAN_NUM_SHARED", "6")
    assert shared("--config", config) == 6
    assert shared("--config", config, "--retention", "3/4") == 4
    monkeypatch.setenv("ICSEARCH_PLAN_RETENTION", "3/4")
    assert "give one of them" in refused(capsys, "plan", "demo")


EXPORTED = published_patterns() / "demo-greedy.json"


@pytest.mark.parametrize("file", ['engine = "vllm"\nserve-pp = 2\nrepair = "same"', "serve-pp = 2", 'out = "x"'])
@pytest.mark.parametrize("table", ["export", "common"])
def test_a_typed_checkpoint_stands_above_an_engine_of_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, file: str, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that belongs to the engine; and so does one of the environment."""
    config = write(tmp_path / "a.toml", f"[{table}]\n{file}\n")
    export = ["export", EXPORTED, "--config", config]
    status, out, err = run(capsys, *export, "--checkpoint", tmp_path / "typed")
    assert status == 0, err
    assert "config.json" in out
    monkeypatch.setenv("ICSEARCH_EXPORT_CHECKPOINT", str(tmp_path / "variable"))
    assert run(capsys, *export)[0] == 0
    names = [sorted(path.name for path in (tmp_path / place).iterdir()) for place in ("typed", "variable")]
    assert names[0] == names[1]
    line = refused(capsys, *export, "--serve-pp", 2)  # from a stronger place than the variable's
    assert "--serve-pp and --checkpoint both say what to export: give one of them" in line


def test_a_typed_engine_stands_above_a_checkpoint_of_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = f"[export]\ncheckpoint = '{tmp_path / 'copy'}'\nmodel = 'demo'\ndrop-indexers = true\n"
    config = write(tmp_path / "a.toml", text)
    expected = run(capsys, "export", EXPORTED, "--engine", "vllm")
    assert expected[0] == 0
    assert run(capsys, "export", EXPORTED, "--config", config, "--engine", "vllm") == expected
    own = write(tmp_path / "own.toml", text.replace("[export]", "[common]") + "[export]\nengine = 'vllm'\n")
    assert run(capsys, "export", EXPORTED, "--config", own) == expected
    both = write(tmp_path / "both.toml", text + "engine = 'vllm'\n")
    assert "--engine and --checkpoint both say what to export" in refused(capsys, "export", EXPORTED, "--config", both)
    assert not (tmp_path / "copy").exists()


def test_every_flag_can_be_taken_back() -> None:
    group: Any = typer.main.get_command(app.app)
    flags = [one for command in group.commands.values() for one in command.params if getattr(one, "is_flag", False)]
    flags = [one for one in flags if one.name != "help"]
    assert {"fresh", "model_card", "drop_indexers"} <= {one.name for one in flags}
    for one in flags:
        assert one.secondary_opts == [f"--no-{one.name.replace('_', '-')}"]


def test_a_run_that_a_file_would_throw_away_is_kept(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tiny.save_tokens(tmp_path / "tokens", sequences=2, length=32)
    config = write(tmp_path / "a.toml", "[greedy]\nfresh = true\nquiet = true\n")
    out = tmp_path / "run"
    greedy = ["greedy", glm_checkpoint, "--calibration", tokens, "--num-shared", 1, "--out", out]
    assert run(capsys, *greedy, "--config", config)[0] == 0
    journal = (out / "journal.jsonl").stat().st_ino
    assert run(capsys, *greedy, "--config", config, "--no-fresh")[0] == 0
    monkeypatch.setenv("ICSEARCH_GREEDY_FRESH", "0")
    assert run(capsys, *greedy, "--config", config)[0] == 0
    assert (out / "journal.jsonl").stat().st_ino == journal
    status, _, err = run(capsys, *greedy, "--config", config, "--no-fresh", "--no-quiet")
    assert (status, err != "") == (0, True)


def test_every_command_takes_a_file_and_each_of_its_options_there() -> None:
    group: Any = typer.main.get_command(app.app)
    for name, command in group.commands.items():
        options = [one for one in command.params if one.param_type_name == "option" and one.name != "help"]
        assert "config" in {one.name for one in options}, name
        for one in options:
            assert one.opts == [f"--{one.name.replace('_', '-')}"], "a variable is called by the parameter's name"


BAD_FILES: dict[str, tuple[str, str]] = {
    "not TOML": ("[greedy\nseed = 1", "is not TOML ("),
    "an unknown option": ('[greedy]\nretenton = "1/4"', "[greedy] has no option 'retenton': did you mean retention?"),
    "an unknown option with _": ("[eval]\nseqlen = 1", "[eval] has no option 'seqlen': did you mean seq-len?"),
    "an option of another command": ("[export]\nseed = 1", "[export] has no option 'seed': expected one of "),
    "an option of none": ("[common]\nzzz = 1", "[common] has no option 'zzz'"),
    "an argument": ('[greedy]\nmodel = "demo"', "[greedy] has no option 'model'"),
    "a config in a config": ('[greedy]\nconfig = "x"', "[greedy] has no option 'config'"),
    "an unknown table": ("[gredy]\nseed = 1", "unknown table 'gredy': did you mean greedy?"),
    "no table": ("seed = 1", "seed stands in no table: write it below [common]"),
    "a table that is none": ("greedy = 1", "greedy is 1: expected a table, [greedy]"),
    "a word for a flag": ('[greedy]\nquiet = "yes"', "[greedy] quiet is 'yes': expected true or false"),
    "a flag for a number": ("[greedy]\nseed = true", "[greedy] seed is True: expected a text or a number"),
    "a list": ("[greedy]\nseed = [1]", "[greedy] seed is a list: expected a text or a number"),
    "a list for one of the commands": (
        '[common]\nretention = ["1/2"]',
        "[common] retention is a list: expected a text",
    ),
    "a list of lists": ("[eval]\npattern = [[1]]", "[eval] pattern is a list: expected a text or a number, or a list"),
    "a date": ("[greedy]\nseed = 2026-11-21", "expected a text or a number"),
    "twice": ("[greedy]\nseq-len = 9\nseq_len = 9", "[greedy] says an option twice"),
    "a word for a number": ('[greedy]\nseed = "x"', "(from the config file "),
    "a fraction for a whole number": ("[greedy]\nbatch-size = 2.5", "'--batch-size'"),
    "out of range": ("[common]\nseq-len = 1", "'--seq-len'"),
    "a text that is unknown": ('[greedy]\nstrategy = "fast"', "--strategy 'fast' is unknown"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str) -> None:
    text, expected = BAD_FILES[case]
    config = write(tmp_path / "bad.toml", text)
    out = tmp_path / "run"
    greedy = ["greedy", "demo", "--calibration", "demo", "--out", out]
    line = refused(capsys, *greedy, "--config", config)
    assert expected in line
    assert refused(capsys, "--config", config, *greedy) == line
    assert "bad.toml" in line or "--strategy" in line
    assert not out.exists()


@pytest.mark.parametrize("content", [b"\xff[greedy]", b"a = " + b"[" * 5000])
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not TOML"):
        read_tables(path)


def test_no_file_and_a_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    greedy = ["greedy", "demo", "--calibration", "demo"]
    assert "no config file" in refused(capsys, *greedy, "--config", tmp_path / "none.toml")
    assert "cannot read" in refused(capsys, *greedy, "--config", tmp_path)


def test_a_bad_value_says_which_variable_it_came_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICSEARCH_GREEDY_SEQ_LEN", "long")
    line = refused(capsys, "greedy", "demo", "--calibration", "demo")
    assert "(from the environment, ICSEARCH_GREEDY_SEQ_LEN)" in line


def test_nothing_is_read_that_was_not_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a search does follows from its command: a file that happens to lie in the directory changes nothing."""
    write(tmp_path / "icsearch.toml", "[common]\nnum-shared = 2\n")
    monkeypatch.chdir(tmp_path)
    assert planned(capsys)["search"]["num_shared"] == 12


@pytest.mark.parametrize(
    ("arguments", "command"), [(["greedy", "demo", "--pp", 0], "greedy"), (["eval", "demo"], "eval"), (["nope"], "")]
)
def test_usage_errors_point_to_the_help_of_their_command(
    capsys: pytest.CaptureFixture[str], arguments: list[object], command: str
) -> None:
    where = f"icsearch {command} --help".replace("  ", " ")
    assert refused(capsys, *arguments).endswith(f"(see {where})")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("ICSEARCH_GREEDY_NUM_SHARD", "did you mean ICSEARCH_GREEDY_NUM_SHARED?"),
        ("ICSEARCH_GREDY_SEED", "did you mean ICSEARCH_GREEDY_SEED?"),
        ("ICSEARCH_DP_BASELINE_SED", "did you mean ICSEARCH_DP_BASELINE_SEED?"),
        ("ICSEARCH_CONFG", "did you mean ICSEARCH_CONFIG?"),
        ("ICSEARCH_EVAL_0123456789012345", "expected ICSEARCH_COMMAND_OPTION, such as"),
        ("ICSEARCH_GREEDY_CONFIG", "the config file of all commands is named by ICSEARCH_CONFIG"),
    ],
)
def test_a_variable_that_no_option_has_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, nearest: str
) -> None:
    """Whichever command it was meant for."""
    monkeypatch.setenv(name, "1")
    line = refused(capsys, "plan", "demo", "--json")
    assert f"variable {name}: {nearest}" in line and line.endswith("; or unset it")


def test_variables_that_no_option_is_refused_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ICSEARCH_DEBUG is read by the program itself; Kubernetes sets some for a service of that name."""
    strangers = ("ICSEARCH_SERVICE_HOST", "ICSEARCH_PORT_29500_TCP_ADDR", "ICSEARCH_HOME")
    for name in (*strangers, "ICSEARCH_DEBUG", "ICSEARCH_DP_BASELINE_TIMEOUT", "ICSEARCH_IMPORT_LAYERS", "ICSEARCHING"):
        monkeypatch.setenv(name, "1")
    assert planned(capsys)
