"""The command line: bad input is one line and exit status 2; runs end, continue and refuse as the contract says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from icsearch.cli import app
from icsearch.commands.setup import batch_shape
from icsearch.model import layout
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.shape import BLOCK_ELEMENTS
from in_process import run

CSV = Path("curve.csv")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a refusal."""
    status, out, err = run(capsys, *arguments)
    assert status == 2, err
    lines = [line for line in err.splitlines() if line.startswith("icsearch: ")]
    assert len(lines) == 1, err
    assert err.splitlines()[-1] == lines[0]
    assert "Traceback" not in err
    assert out == ""
    return lines[0]


def greedy(model: Path, tokens: Path, out: Path, *more: object) -> list[object]:
    fixed = ["--batch-size", 2, "--threads", 1]
    return ["greedy", model, "--calibration", tokens, "--out", out, *fixed, *more]


def same_result(first: Path, second: Path) -> bool:
    """Equal pattern.json apart from what a run cost, and equal curve.csv to the last digit."""
    documents = [json.loads((run / "pattern.json").read_text()) for run in (first, second)]
    for document in documents:
        document.pop("cost")
    return documents[0] == documents[1] and (first / CSV).read_bytes() == (second / CSV).read_bytes()


@pytest.fixture(scope="module")
def finished(glm_checkpoint: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert app._run([str(part) for part in greedy(glm_checkpoint, tokens, out, "--num-shared", 3)], debug=True) == 0
    return out


def test_a_run_writes_the_contract(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"journal.jsonl", "pattern.json", "curve.csv", "curve.png", "report.html"} <= names
    document = json.loads((finished / "pattern.json").read_text())
    assert document["format"] == "icsearch.pattern/1"
    assert document["num_layers"] == 6
    assert document["pattern"].count("S") == 3
    assert document["full_layers"] == [i for i, letter in enumerate(document["pattern"]) if letter == "F"]
    assert document["retention"] == 0.5
    assert document["layer_indices"] == list(range(6))
    assert [step["step"] for step in document["steps"]] == [1, 2, 3]
    assert document["loss"] == document["steps"][-1]["loss"]
    assert document["cost"]["candidate_evaluations"] == 5 + 4 + 3
    assert set(document["calibration"]) >= {"fingerprint", "num_sequences", "seq_len", "source"}
    assert set(document["model"]) >= {"name_or_path", "model_type", "fingerprint"}


def test_finished_run_prints_its_result(
    capsys: pytest.CaptureFixture[str], finished: Path, glm_checkpoint: Path, tokens: Path
) -> None:
    before = (finished / "journal.jsonl").read_bytes()
    status, out, err = run(capsys, *greedy(glm_checkpoint, tokens, finished, "--num-shared", 3))
    assert status == 0
    assert json.loads((finished / "pattern.json").read_text())["pattern"] in out.replace(" ", "")
    assert "finished" in err
    assert (finished / "journal.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--num-shared", 2], "num_shared 3, now 2"),
        (["--num-shared", 3, "--stages", 2], "stages 1, now 2"),
        (["--num-shared", 3, "--dtype", "bfloat16"], "dtype float32, now bfloat16"),
        (["--num-shared", 3, "--keep-full", "2"], "keep_full"),
        (["--num-shared", 3, "--threads", "2"], "threads 1, now 2"),
    ],
)
def test_other_options_are_refused(
    capsys: pytest.CaptureFixture[str],
    finished: Path,
    glm_checkpoint: Path,
    tokens: Path,
    change: list[object],
    named: str,
) -> None:
    before = (finished / "journal.jsonl").read_bytes()
    line = refused(capsys, *greedy(glm_checkpoint, tokens, finished, *change))
    assert named in line
    assert "--fresh" in line
    assert (finished / "journal.jsonl").read_bytes() == before


def test_threads_of_a_run_are_taken_over(
    capsys: pytest.CaptureFixture[str], finished: Path, glm_checkpoint: Path, tokens: Path
) -> None:
    """Without --threads, a run goes on with the number it began with: the bits follow it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        arguments = ["greedy", glm_checkpoint, "--calibration", tokens, "--out", finished, "--batch-size", 2]
        assert run(capsys, *arguments, "--num-shared", 3)[0] == 0
    finally:
        torch.set_num_threads(before)


def test_other_model_and_other_tokens_are_refused(
    capsys: pytest.CaptureFixture[str], finished: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    other_model = tiny.save_checkpoint(tmp_path / "model", seed=7)
    other_tokens = tiny.save_tokens(tmp_path / "tokens", seed=7)
    assert "model fingerprint" in refused(capsys, *greedy(other_model, tokens, finished, "--num-shared", 3))
    line = refused(capsys, *greedy(glm_checkpoint, other_tokens, finished, "--num-shared", 3))
    assert "calibration fingerprint" in line


def test_fresh_starts_over(
    capsys: pytest.CaptureFixture[str], finished: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    status, _, _ = run(capsys, *greedy(glm_checkpoint, tokens, copy, "--num-shared", 2, "--fresh"))
    assert status == 0
    assert len(json.loads((copy / "pattern.json").read_text())["steps"]) == 2


def budget(checkpoint: Path, candidates: int, kept: int = 0, objective: str = "lm-loss") -> str:
    """Memory for so many candidates at once beside trunk and output, and `kept` bytes of states between steps."""
    found = layout.inspect(open_checkpoint(str(checkpoint)))
    options = {"dtype": "float32", "batch_size": 2, "block_elements": BLOCK_ELEMENTS["cpu"], "objective": objective}
    shape = batch_shape(found, options, seq_len=40)
    return f"{found.num_parameters * 4 + shape.layer_bytes + (candidates + 2) * shape.branch_bytes + kept}B"


# Room for 3 candidates, for 2, and for all of them with the states of every 2nd layer kept between steps.
@pytest.mark.parametrize(("candidates", "kept"), [(3, 0), (2, 0), (5, 192_000)])
def test_memory_budget_changes_no_bit(
    capsys: pytest.CaptureFixture[str],
    finished: Path,
    glm_checkpoint: Path,
    tokens: Path,
    tmp_path: Path,
    candidates: int,
    kept: int,
) -> None:
    memory = budget(glm_checkpoint, candidates, kept)
    arguments = greedy(glm_checkpoint, tokens, tmp_path / "run", "--num-shared", 3, "--memory", memory, "--quiet")
    status, _, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    assert same_result(tmp_path / "run", finished)
    first = json.loads((finished / "pattern.json").read_text())["cost"]
    second = json.loads((tmp_path / "run" / "pattern.json").read_text())["cost"]
    assert second["layer_evaluations"] > first["layer_evaluations"]  # the budget did split the sweeps, or keep less


@pytest.mark.parametrize(
    ("room", "kept"),
    [
        (480_000, "480.0 kB, every layer"),
        (479_999, "192.0 kB, every 2nd layer"),
        (0, "nothing: there is no room"),
    ],
)
def test_the_plan_says_what_is_kept_between_steps(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path, room: int, kept: str
) -> None:
    memory = budget(glm_checkpoint, 5, room)
    arguments = greedy(glm_checkpoint, tokens, tmp_path / "run", "--num-shared", 1, "--memory", memory)
    assert f"kept between steps  {kept}" in run(capsys, *arguments)[2]


def test_a_search_by_kl(capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path) -> None:
    """Room for the all-F model's final states, and no room: the same result, at another cost; continued as it began."""
    what = ["--num-shared", 3, "--objective", "kl"]
    for name, memory, row in (
        ("ample", "1GB", "25.6 kB of final states kept"),
        ("short", budget(glm_checkpoint, 1, objective="kl"), "runs along in"),
    ):
        arguments = greedy(glm_checkpoint, tokens, tmp_path / name, *what, "--memory", memory)
        status, out, err = run(capsys, *arguments)
        assert (status, row in " ".join(err.split())) == (0, True)
        assert "Chosen by the KL" in " ".join(out.split())
    assert same_result(tmp_path / "ample", tmp_path / "short")
    document = json.loads((tmp_path / "ample" / "pattern.json").read_text())
    assert document["objective"] == "kl"
    assert all(step["kl"] > 0 for step in document["steps"])
    line = refused(capsys, *greedy(glm_checkpoint, tokens, tmp_path / "ample", *what[:-1], "lm-loss"))
    assert "objective kl, now lm-loss" in line


def test_an_unknown_objective_is_refused(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    line = refused(capsys, *greedy(glm_checkpoint, tokens, tmp_path / "run", "--objective", "accuracy"))
    assert line == "icsearch: --objective 'accuracy' is unknown: give lm-loss or kl"


def test_stages_and_keep_full(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    arguments = greedy(glm_checkpoint, tokens, tmp_path / "run", "--num-shared", 3, "--stages", 2, "--keep-full", "1")
    assert run(capsys, *arguments)[0] == 0
    pattern = json.loads((tmp_path / "run" / "pattern.json").read_text())["pattern"]
    assert pattern == "FFSFSS"  # 1 and the blocks' first layers 0 and 3 stay


BAD_REQUESTS: dict[str, tuple[list[object], str]] = {
    "too many flips": (["--num-shared", 6], "give --num-shared 5 or less"),
    "too many for the stages": (["--num-shared", 4, "--stages", 3], "give --num-shared 3 or less"),
    "too many for keep-full": (["--num-shared", 5, "--keep-full", "3"], "give --num-shared 4 or less"),
    "no flips": (["--num-shared", 0], "give at least 1"),
    "negative flips": (["--num-shared", -2], "give at least 1"),
    "retention 1": (["--retention", 1], "nothing to flip"),
    "retention 0": (["--retention", 0], "out of range"),
    "retention words": (["--retention", "half"], "'half' is not a number"),
    "both": (["--retention", "1/2", "--num-shared", 2], "give one of them"),
    "keep-full beyond": (["--keep-full", "9"], "expected DSA layers 0 to 5"),
    "keep-full words": (["--keep-full", "1,x"], "'x'"),
    "keep-full negative": (["--keep-full=-1"], "'-1'"),
    "no stages": (["--stages", 0], "give 1 to 6"),
    "too many stages": (["--stages", 7], "give 1 to 6"),
    "nothing left by both": (
        ["--num-shared", 1, "--stages", 3, "--keep-full", "1,3,5"],
        "fewer --stages or less to --keep-full",
    ),
    "nothing left by the stages": (["--num-shared", 1, "--stages", 6], "give fewer --stages"),
    "nothing left by keep-full": (["--num-shared", 1, "--keep-full", "1,2,3,4,5"], "less to --keep-full"),
    "stages that do not come out": (["--stages", 4], "give --stages 3"),
    "unknown objective": (["--objective", "vibes"], "give lm-loss"),
    "unknown strategy": (["--strategy", "guess"], "give exact"),
    "a strategy that is no more": (["--strategy", "race+lazy"], "give exact"),
    "unknown device": (["--device", "abacus"], "give auto, cpu, cuda"),
    "unknown dtype": (["--dtype", "int4"], "give auto or float32"),
    "memory words": (["--memory", "lots"], "8GB or 500MB"),
    "memory too small": (["--memory", "1kB"], "raise --memory"),
    "batch size 0": (["--batch-size", 0], "--batch-size"),
    "threads 0": (["--threads", 0], "--threads"),
    "unknown option": (["--retenton", "1/4"], "--retenton"),
    "no such source": (["--calibration", "nowhere.txt"], "nowhere.txt"),
    "unknown extension": (["--calibration", "tokens.docx"], "tokens.docx"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path, case: str
) -> None:
    options, expected = BAD_REQUESTS[case]
    out = tmp_path / "run"
    assert expected in refused(capsys, *greedy(glm_checkpoint, tokens, out, *options))
    assert not (out / "journal.jsonl").exists() or case == "memory too small"


def test_an_unknown_device_is_refused_before_anything_is_made(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command: list[object] = ["greedy", glm_checkpoint, "--calibration", "demo", "--out", out, "--device", "tpu"]
    assert "give auto, cpu, cuda" in refused(capsys, *command)
    assert not out.exists()


def test_calibration_is_required(capsys: pytest.CaptureFixture[str], glm_checkpoint: Path) -> None:
    assert "--calibration" in refused(capsys, "greedy", glm_checkpoint)


def test_sequences_no_longer_than_a_selection(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tmp_path: Path
) -> None:
    short = tiny.save_tokens(tmp_path / "short", length=8)
    assert "index_topk of 8" in refused(capsys, *greedy(glm_checkpoint, short, tmp_path / "run"))
    assert "index_topk of 8" in refused(
        capsys, "greedy", glm_checkpoint, "--calibration", "demo", "--seq-len", 8, "--out", tmp_path / "run"
    )
    assert not (tmp_path / "run").exists()


def test_calibrate_then_hit_then_refuse(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tmp_path: Path
) -> None:
    arguments: list[object] = ["calibrate", glm_checkpoint, "demo", "--out", tmp_path / "c", "--seq-len", 32]
    assert "written" in run(capsys, *arguments, "--num-sequences", 3)[1]
    assert "reused" in run(capsys, *arguments, "--num-sequences", 3)[1]
    assert "num_sequences" in refused(capsys, *arguments, "--num-sequences", 4)
    assert "written" in run(capsys, *arguments, "--num-sequences", 4, "--fresh")[1]
    status, _, err = run(capsys, *greedy(glm_checkpoint, tmp_path / "c", tmp_path / "run", "--num-shared", 1))
    assert status == 0, err


def test_greedy_from_a_text_file_uses_its_cache(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} the cat sat on the mat " * 5}) + "\n" for i in range(40)))
    sizes = ["--seq-len", 32, "--num-sequences", 3, "--num-shared", 1]
    arguments = greedy(glm_checkpoint, text, tmp_path / "run", *sizes)
    assert "made now" in run(capsys, *arguments)[2]
    assert "from the cache" in run(capsys, *arguments)[2]


REFUSED_BEFORE_LOADING: dict[str, list[object]] = {
    "no such file": ["--calibration", "nowhere.txt"],
    "no such corpus": ["--calibration", "demo:nowhere"],
    "no memory": ["--calibration", "demo", "--num-sequences", 1, "--memory", "1MB"],
}


@pytest.mark.parametrize("case", REFUSED_BEFORE_LOADING)
def test_a_refusal_before_weights_are_read_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str
) -> None:
    """Nothing is said to be loading that is not."""
    more = REFUSED_BEFORE_LOADING[case]
    status, out, err = run(capsys, "eval", "demo", "--pattern", "full", "--out", tmp_path / "run", *more)
    lines = [line for line in err.splitlines() if not line.startswith("calibration: ")]
    assert (status, out, len(lines)) == (2, "", 1), err


def test_loading_is_said_when_it_begins(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    arguments = greedy(glm_checkpoint, tokens, tmp_path / "run", "--num-shared", 1)
    first = run(capsys, *arguments)[2].splitlines()
    assert "tokens (ready)" in first[0] and first[1] == f"loading {glm_checkpoint} ..."
    assert "loading " not in run(capsys, *arguments)[2]  # it is finished


def test_tokens_that_mean_nothing_are_noted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The demo on random tokens does worse than by guessing; on its own text better."""
    nonsense = tiny.save_tokens(tmp_path / "tokens", sequences=2, length=64)
    words = "tokens or its tokenizer"
    for command in ("greedy", "dp-baseline"):
        arguments = [command, "demo", "--calibration", nonsense, "--num-shared", 1, "--out", tmp_path / command]
        status, _, err = run(capsys, *arguments)
        assert (status, err.count(words)) == (0, 1), err
        assert (tmp_path / command / "report.html").read_text().count(words) == 1
        assert run(capsys, *arguments)[0] == 0
        assert (tmp_path / command / "journal.jsonl").read_text().count(words) == 1
    arguments = ["eval", "demo", "--pattern", "uniform:1/2", "--calibration"]
    status, _, err = run(capsys, *arguments, nonsense, "--out", tmp_path / "eval")
    assert (status, err.count(words)) == (0, 1), err
    assert (tmp_path / "eval" / "report.html").read_text().count(words) == 1
    sizes = ["--num-sequences", 1, "--seq-len", 64]
    status, _, err = run(capsys, *arguments, "demo", *sizes, "--out", tmp_path / "text")
    assert (status, words in err) == (0, False), err


def test_broken_checkpoints_through_the_command_line(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(glm_checkpoint, tmp_path / "model"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "truncated or damaged" in refused(capsys, *greedy(copy, tokens, tmp_path / "run"))
    weights.unlink()
    assert "found no weights" in refused(capsys, *greedy(copy, tokens, tmp_path / "run"))
    assert "no checkpoint at" in refused(capsys, *greedy(tmp_path / "none", tokens, tmp_path / "run"))
    assert "the hub did not deliver" in refused(capsys, *greedy(Path("zai-org/GLM-5"), tokens, tmp_path / "run"))


def test_out_is_a_file(capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    assert "give another --out" in refused(capsys, *greedy(glm_checkpoint, tokens, tmp_path / "run"))


def test_second_process_on_a_run_is_refused(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    from icsearch.runs.directory import RunDirectory

    with RunDirectory(tmp_path / "run").locked():
        assert "another icsearch is running" in refused(capsys, *greedy(glm_checkpoint, tokens, tmp_path / "run"))


def test_debug_shows_the_traceback(glm_checkpoint: Path) -> None:
    command = [sys.executable, "-m", "icsearch", "export", "none.json", "--engine", "vllm", "--debug"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" in result.stderr


def test_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"icsearch {app.__version__}\n")
    assert "greedy" in run(capsys)[1]


def test_export_and_report(capsys: pytest.CaptureFixture[str], finished: Path, tmp_path: Path) -> None:
    document = json.loads((finished / "pattern.json").read_text())
    status, out, _ = run(capsys, "export", finished / "pattern.json", "--engine", "vllm")
    assert status == 0
    assert document["pattern"] in out
    assert run(capsys, "export", finished, "--engine", "vllm")[1] == out  # a RUN will do
    status, out, _ = run(capsys, "export", finished / "pattern.json", "--engine", "vllm", "--retention", "5/6")
    assert document["steps"][0]["pattern"] in out
    page = tmp_path / "page.html"
    assert run(capsys, "report", finished, "--out", page)[0] == 0
    assert document["pattern"] in page.read_text()
    assert "holds 3 to 6 of 6" in refused(
        capsys, "export", finished / "pattern.json", "--engine", "vllm", "--retention", "1/6"
    )
    assert "tgi" in refused(capsys, "export", finished / "pattern.json", "--engine", "tgi")
    assert "no file" in refused(capsys, "export", tmp_path / "none.json", "--engine", "vllm")
    assert "journal.jsonl" in refused(capsys, "report", tmp_path, "--out", page)


# --- damaged options of an existing run ---------------------------------------------------------------------------

OPTION_DAMAGE: dict[str, list[Any]] = {
    "kernels": ["fast", 1, ["blockwise"]],
    "block_elements": ["x", 3, 4096.0, True, [1]],
    "threads": ["x", 0, {}],
    "batch_size": ["x", 0],
    "dtype": [32],
    "device": [0],
    "attention": [[]],
    "method": ["dream", None, 3],
    "strategy": [3, []],
    "objective": ["loss", {}],
    "refine": ["shuffle", True],
    "keep_full": ["0", [5, 1], {}],
    "num_shared": ["2", -1],
    "stages": [0, "x"],
}


@pytest.fixture(scope="module")
def searched(glm_checkpoint: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("damaged") / "run"
    assert app._run([str(part) for part in greedy(glm_checkpoint, tokens, out, "--num-shared", 1)], debug=False) == 0
    return out


@pytest.mark.parametrize("option", [*OPTION_DAMAGE, ""])
def test_damaged_options_are_one_line(
    option: str, searched: Path, glm_checkpoint: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a finished run and of one to be continued; by the command that searches and the one that reports."""
    journal = searched / "journal.jsonl"
    whole = journal.read_text()
    first, *rest = whole.splitlines(keepends=True)
    for value in OPTION_DAMAGE.get(option, [None, [], "x", 3]):
        start = json.loads(first)
        if option:
            start["options"][option] = value
        else:
            start["options"] = value
        for lines in (rest, rest[:1]):
            journal.write_text("".join([json.dumps(start) + "\n", *lines]))
            for command in (
                greedy(glm_checkpoint, tokens, searched, "--num-shared", 1),
                ["report", searched, "--out", searched / "page.html"],
            ):
                line = refused(capsys, *command)
                assert f"{option or 'options'} is" in line and "--fresh" in line, line
    journal.write_text(whole)
    if not option:  # the same journal for all of them
        assert run(capsys, *greedy(glm_checkpoint, tokens, searched, "--num-shared", 1))[0] == 0


@pytest.mark.parametrize(("strategy", "who"), [("race+lazy", "icsearch 0.1.0"), ("fastest", "now exact")])
def test_a_run_of_a_strategy_that_is_not_here_is_not_continued(
    strategy: str, who: str, searched: Path, glm_checkpoint: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was taken out is refused with the version that has it, by a report as well."""
    journal = searched / "journal.jsonl"
    whole = journal.read_text()
    journal.write_text(whole.replace('"strategy":"exact"', f'"strategy":"{strategy}"'))
    lines = [refused(capsys, *greedy(glm_checkpoint, tokens, searched, "--num-shared", 1))]
    if strategy == "race+lazy":
        lines.append(refused(capsys, "report", searched, "--out", searched / "page.html"))
    for line in lines:
        assert strategy in line and who in line and str(searched) in line and "--fresh" in line
    journal.write_text(whole)
