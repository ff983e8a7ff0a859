"""The commands as functions: the same files as the commands write, a callback, and options that keep step."""

from __future__ import annotations

import json
import pkgutil
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import icsearch
import tiny
from icsearch.api import CalibrationOptions, EvalOptions, SearchOptions
from icsearch.cli import app
from icsearch.commands.requests import CalibrationRequest, EvalRequest, FisherRequest, GreedyRequest, read_retention
from icsearch.core.files import demo_checkpoint
from icsearch.core.pattern import num_full


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tokens(tmp_path_factory.mktemp("few"), sequences=2, length=24)


def command(*arguments: object) -> None:
    assert app._run([*map(str, arguments), "--quiet"], debug=True) == 0


def document(path: Path) -> dict[str, Any]:
    """The content of a result, without what it cost."""
    content: dict[str, Any] = json.loads(path.read_text())
    return {**content, "cost": None}


def test_a_search_is_the_commands(glm_checkpoint: Path, few: Path, tmp_path: Path) -> None:
    """The same result, and the same options, so that either goes on with the other's run."""
    found = icsearch.find_pattern(
        glm_checkpoint, few, tmp_path / "api", retention=0.5, keep_full=[2], batch_size=1, memory="1GB", stages=2
    )
    options = ["--retention", "1/2", "--keep-full", "2", "--batch-size", 1, "--stages", 2]
    command("greedy", glm_checkpoint, "--calibration", few, "--out", tmp_path / "command", *options)
    command("greedy", glm_checkpoint, "--calibration", few, "--out", tmp_path / "api", *options)
    assert document(tmp_path / "api" / "pattern.json") == document(tmp_path / "command" / "pattern.json")
    assert found == icsearch.load_pattern_file(tmp_path / "api" / "pattern.json")
    assert (tmp_path / "api" / "report.html").exists()


def test_the_callback_hears_each_new_step_and_may_end_the_search(
    glm_checkpoint: Path, few: Path, tmp_path: Path
) -> None:
    heard: list[icsearch.Step] = []

    def stop(step: icsearch.Step) -> None:
        heard.append(step)
        if step.step == 2:
            raise StopIteration("enough")

    with pytest.raises(StopIteration, match="enough"):
        icsearch.find_pattern(glm_checkpoint, few, tmp_path / "run", num_shared=3, on_step=stop)
    assert not (tmp_path / "run" / "pattern.json").exists()
    for _ in range(2):  # goes on, and then returns the finished run
        found = icsearch.find_pattern(glm_checkpoint, few, tmp_path / "run", num_shared=3, on_step=heard.append)
        assert tuple(heard) == found.steps


def test_progress(glm_checkpoint: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    icsearch.find_pattern(glm_checkpoint, few, tmp_path / "quiet", num_shared=1)
    assert capsys.readouterr().out == ""
    icsearch.find_pattern(glm_checkpoint, few, tmp_path / "loud", num_shared=1, progress=True)
    assert "step 1/1" in capsys.readouterr().err


def test_an_evaluation_is_the_commands(glm_checkpoint: Path, few: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command("greedy", glm_checkpoint, "--calibration", few, "--num-shared", 2, "--out", run)
    view = icsearch.evaluate_patterns(
        glm_checkpoint, [run, icsearch.Pattern("FSSSSS"), "uniform:1/2"], few, tmp_path / "api", retentions=["5/6"]
    )
    patterns = ["--pattern", run, "--pattern", "FSSSSS", "--pattern", "uniform:1/2", "--retention", "5/6"]
    command("eval", glm_checkpoint, "--calibration", few, "--out", tmp_path / "command", *patterns)
    assert document(tmp_path / "api" / "eval.json") == document(tmp_path / "command" / "eval.json")
    assert [row.pattern.letters.count("F") for row in view.rows] == [6, 5, 3, 1]
    assert view.rows[0].is_baseline


def test_one_pattern_alone_needs_no_list(glm_checkpoint: Path, few: Path, tmp_path: Path) -> None:
    view = icsearch.evaluate_patterns(glm_checkpoint, "uniform:1/2", few, tmp_path / "one")
    assert [row.name for row in view.rows] == ["full", "uniform 1/2"]


def test_calibrate_is_the_commands(glm_checkpoint: Path, tmp_path: Path) -> None:
    made = icsearch.calibrate(glm_checkpoint, "demo", tmp_path / "api", seq_len=32, num_sequences=3, seed=5)
    assert made.input_ids.shape == (3, 32)
    sizes = ["--seq-len", 32, "--num-sequences", 3, "--seed", 5]
    assert (
        app._run([*map(str, ["calibrate", glm_checkpoint, "demo", "--out", tmp_path / "command", *sizes])], True) == 0
    )
    for name in ("calibration.safetensors", "calibration.json"):
        assert (tmp_path / "api" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
    with pytest.raises(icsearch.IcsearchError, match="num_sequences"):
        icsearch.calibrate(glm_checkpoint, "demo", tmp_path / "api", seq_len=32, num_sequences=4, seed=5)


def test_export_takes_a_result_a_file_and_a_run(glm_checkpoint: Path, few: Path, tmp_path: Path) -> None:
    found = icsearch.find_pattern(glm_checkpoint, few, tmp_path / "run", num_shared=2)
    texts = {
        icsearch.export_pattern(one, "vllm").text
        for one in (found, tmp_path / "run", tmp_path / "run" / "pattern.json")
    }
    assert len(texts) == 1
    assert found.pattern.letters in texts.pop()
    assert found.steps[0].pattern in icsearch.export_pattern(found, "vllm", Fraction(5, 6)).text


def test_export_takes_a_published_pattern_as_the_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    name = "published:demo-greedy"
    assert app._run(["export", name, "--engine", "vllm"], debug=True) == 0
    assert capsys.readouterr().out == f"{icsearch.export_pattern(name, 'vllm').text}\n"
    with pytest.raises(icsearch.IcsearchError, match="known are"):
        icsearch.export_pattern("published:gpt", "vllm")


@pytest.mark.parametrize("repair", [None, "same", "none"])
def test_export_for_a_pipeline_is_the_commands(repair: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    name, config = "published:demo-greedy", demo_checkpoint() / "config.json"
    made = icsearch.export_pattern(name, "sglang", "1/4", model_config=config, serve_pp=2, repair=repair)
    options = [
        "--retention",
        "1/4",
        "--model-config",
        config,
        "--serve-pp",
        2,
        *(["--repair", repair] if repair else []),
    ]
    assert app._run([*map(str, ["export", name, "--engine", "sglang", *options])], debug=True) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{made.text}\n"
    warnings = [line.removeprefix("warning: ") for line in shown.err.splitlines() if line.startswith("warning: ")]
    assert warnings == list(made.warnings)
    assert any("stage 2 would start on S" in warning for warning in warnings)


def test_a_checkpoint_of_a_published_pattern(tmp_path: Path) -> None:
    made = icsearch.export_checkpoint("published:demo-greedy", tmp_path / "copy", model="demo", retention="1/2")
    assert made.pattern.letters.count("F") == 8


@pytest.mark.parametrize(("retention", "full"), [(5 / 7, 10), ("5/7", 10), (Fraction(5, 7), 10), (0.25, 4), (1, 14)])
def test_a_float_keeps_as_many_layers_as_its_fraction(retention: str | float | Fraction, full: int) -> None:
    """5/7 as a float is a little more than 5/7: of 14 layers, 11 would be kept."""
    assert num_full(read_retention(retention), 14) == full


@pytest.mark.parametrize("retention", [0.0, -0.5, 1.5, float("nan"), float("inf"), 1e-300])
def test_floats_that_are_no_retention(retention: float) -> None:
    with pytest.raises(icsearch.IcsearchError, match="retention"):
        read_retention(retention)


def test_a_checkpoint_is_the_commands(glm_checkpoint: Path, few: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    icsearch.find_pattern(glm_checkpoint, few, run, num_shared=3)
    made = icsearch.export_checkpoint(run, tmp_path / "api", retention="4/6", drop_indexers=True)
    options = ["--retention", "4/6", "--drop-indexers"]
    assert app._run([*map(str, ["export", run, "--checkpoint", tmp_path / "command", *options])], debug=True) == 0
    names = sorted(path.name for path in (tmp_path / "command").iterdir())
    assert names == sorted(path.name for path in made.out.iterdir())
    assert all((made.out / name).read_bytes() == (tmp_path / "command" / name).read_bytes() for name in names)
    assert made.pattern.letters.count("F") == 4


def test_bad_requests_are_the_commands(glm_checkpoint: Path, few: Path, tmp_path: Path) -> None:
    with pytest.raises(icsearch.IcsearchError, match="retention 2 is out of range"):
        icsearch.find_pattern(glm_checkpoint, few, tmp_path / "run", retention=2)
    with pytest.raises(icsearch.IcsearchError, match="--strategy 'fast' is unknown"):
        icsearch.find_pattern(glm_checkpoint, few, tmp_path / "run", strategy="fast")
    with pytest.raises(icsearch.IcsearchError, match="--threads 0 is out of range: give at least 1"):
        icsearch.find_pattern(glm_checkpoint, few, tmp_path / "run", threads=0)
    with pytest.raises(icsearch.IcsearchError, match="--retention and --num-shared both say how far to go"):
        icsearch.find_pattern(glm_checkpoint, few, tmp_path / "run", retention="1/2", num_shared=2)
    with pytest.raises(TypeError, match="retenton"):
        icsearch.find_pattern(glm_checkpoint, few, tmp_path / "run", retenton=0.5)  # type: ignore[call-arg]
    assert not (tmp_path / "run").exists()


def names(kind: type) -> set[str]:
    return {one.name for one in fields(kind)}


def test_the_options_are_those_of_the_requests() -> None:
    given = {"model", "source", "calibration", "out", "patterns"}
    alone = {"dp", "pp"}  # of several processes, which a launcher starts
    calibration = names(CalibrationRequest) - given
    assert set(CalibrationOptions.__annotations__) == calibration
    searches = names(GreedyRequest) | names(FisherRequest)
    assert set(SearchOptions.__annotations__) == (searches | calibration) - given - alone
    # An evaluation's requests have the name `patterns` for what is an argument here.
    assert set(EvalOptions.__annotations__) == (names(EvalRequest) | calibration) - given


def test_no_public_name_is_that_of_a_module() -> None:
    """A module that is imported becomes an attribute of the package, in place of a lazy name."""
    modules = {module.name for module in pkgutil.iter_modules(icsearch.__path__)}
    assert modules.isdisjoint(icsearch.__all__)


def test_every_public_name_is_there_and_documented() -> None:
    for name in icsearch.__all__:
        found = getattr(icsearch, name)
        assert name == "__version__" or found.__doc__
    assert dir(icsearch) == sorted(icsearch.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = icsearch.nothing
