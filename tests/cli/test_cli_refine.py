"""`icsearch greedy --refine swaps` through the command line, on tiny checkpoints."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from test_cli import greedy, refused, run, same_result

import tiny
from fault_harness import Commands, whole_lines
from icsearch.search import swaps

SHARED = ["--num-shared", 3]


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 x 40 random tokens, others than the calibration's."""
    return tiny.save_tokens(tmp_path_factory.mktemp("heldout"), sequences=6, seed=2)


def refine(model: Path, tokens: Path, out: Path, heldout: object, *more: object) -> list[object]:
    return greedy(model, tokens, out, *(more or SHARED), "--refine", "swaps", "--refine-on", heldout)


@pytest.fixture(scope="module")
def finished(glm_checkpoint: Path, tokens: Path, heldout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a refinement, by the real command."""
    out = tmp_path_factory.mktemp("runs") / "refined"
    ended = Commands(out.parent / "output").run(refine(glm_checkpoint, tokens, out, heldout))
    assert ended.status == 0, ended.err
    assert "then swaps" in ended.err
    assert "moves scored" in ended.out
    return out


def document(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "pattern.json").read_text())
    return found


def test_a_run_writes_its_refinement(finished: Path) -> None:
    found = document(finished)
    refinement = found["refinement"]
    assert refinement["start_pattern"] == found["steps"][-1]["pattern"]
    assert refinement["pattern"] == found["pattern"]
    assert refinement["loss"] == found["loss"] <= refinement["start_loss"]
    assert refinement["heldout"]["loss"] <= refinement["heldout"]["start_loss"]
    assert refinement["heldout"]["num_sequences"] == 6
    assert found["cost"]["refinement_evaluations"] > 0
    assert "Refinement by swaps" in (finished / "report.html").read_text()


# --- resumed and refused --------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_killed_in_the_refinement_and_continued(
    finished: Path, glm_checkpoint: Path, tokens: Path, heldout: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    commands, command = Commands(tmp_path / "output"), refine(glm_checkpoint, tokens, out, heldout)
    killed = commands.start(command).until(lambda: b'"refine"' in whole_lines(out)).send(signal.SIGKILL).end()
    assert killed.status in (-signal.SIGKILL, 0)
    before = whole_lines(out)
    assert commands.run(command).status == 0
    assert (out / "journal.jsonl").read_bytes().startswith(before)
    assert same_result(out, finished)


def test_a_finished_run_prints_its_result(
    capsys: pytest.CaptureFixture[str], finished: Path, glm_checkpoint: Path, tokens: Path, heldout: Path
) -> None:
    before = (finished / "journal.jsonl").read_bytes()
    status, out, err = run(capsys, *refine(glm_checkpoint, tokens, finished, heldout))
    assert status == 0
    assert "moves scored" in out
    assert "is finished" in err
    assert (finished / "journal.jsonl").read_bytes() == before


def test_other_refinements_are_refused(
    capsys: pytest.CaptureFixture[str], finished: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    other = tiny.save_tokens(tmp_path / "other", sequences=6, seed=3)
    line = refused(capsys, *refine(glm_checkpoint, tokens, finished, other))
    assert "refine_on fingerprint" in line
    assert "--fresh" in line
    line = refused(capsys, *greedy(glm_checkpoint, tokens, finished, *SHARED))
    assert "refine swaps, now None" in line


def test_a_run_without_refinement_says_nothing_of_one(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, heldout: Path, tmp_path: Path
) -> None:
    """So that runs of earlier versions go on."""
    out = tmp_path / "run"
    assert run(capsys, *greedy(glm_checkpoint, tokens, out, *SHARED))[0] == 0
    assert "refine" not in (out / "journal.jsonl").read_text()
    assert "refine" not in (out / "pattern.json").read_text()
    assert "refine None, now swaps" in refused(capsys, *refine(glm_checkpoint, tokens, out, heldout))


BAD_REQUESTS: dict[str, tuple[list[object], str]] = {
    "no held-out sequences": (["--refine", "swaps"], "needs --refine-on DIR|SOURCE"),
    "held-out sequences for nothing": (["--refine-on", "demo:heldout"], "give both, or neither"),
    "unknown refinement": (["--refine", "shuffle", "--refine-on", "demo"], "give swaps"),
    "no such source": (["--refine", "swaps", "--refine-on", "nowhere.txt"], "nowhere.txt"),
    "the calibration itself": (["--refine", "swaps", "--refine-on", "TOKENS"], "shares 5 of its 5 sequences"),
    "other lengths": (["--refine", "swaps", "--refine-on", "LONG"], "sequences of 48 tokens, the calibration of 40"),
    "one sequence": (["--refine", "swaps", "--refine-on", "ONE"], "--refine-on is one sequence"),
    "too short": (["--refine", "swaps", "--refine-on", "SHORT"], "index_topk of 8"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path, case: str
) -> None:
    options, expected = BAD_REQUESTS[case]
    sets = {"LONG": (5, 48), "ONE": (1, 40), "SHORT": (5, 8)}
    made = {name: tiny.save_tokens(tmp_path / name, *size, seed=4) for name, size in sets.items()}
    given = [{**made, "TOKENS": tokens}.get(str(option), option) for option in options]
    assert expected in refused(capsys, *greedy(glm_checkpoint, tokens, tmp_path / "run", *SHARED, *given))
    assert not (tmp_path / "run" / "journal.jsonl").exists()


def test_one_calibration_sequence(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, heldout: Path, tmp_path: Path
) -> None:
    one = tiny.save_tokens(tmp_path / "one", sequences=1, seed=5)
    assert "--calibration is one sequence" in refused(capsys, *refine(glm_checkpoint, one, tmp_path / "run", heldout))


def test_the_demo_texts_are_held_out_by_themselves(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tmp_path: Path
) -> None:
    sizes = ["--seq-len", 32, "--num-sequences", 3, "--num-shared", 4, "--refine", "swaps"]
    out = tmp_path / "run"
    status, _, err = run(capsys, *greedy(glm_checkpoint, Path("demo"), out, *sizes))
    assert status == 0, err
    heldout = document(out)["refinement"]["heldout"]
    assert (heldout["num_sequences"], heldout["seq_len"]) == (3, 32)
    assert "heldout" in heldout["source"]
    assert (out / "refine-on" / "calibration.json").exists()


# --- swaps that are made --------------------------------------------------------------------------------------------


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gain counts: random models have hardly any beyond the noise."""
    monkeypatch.setattr(swaps, "QUALIFY_ERRORS", 0.0)
    monkeypatch.setattr(swaps, "CONFIRM_ERRORS", 0.0)


@pytest.mark.usefixtures("eager")
def test_swaps_are_made_exported_and_evaluated(
    capsys: pytest.CaptureFixture[str], tokens: Path, heldout: Path, tmp_path: Path
) -> None:
    deep = tiny.save_checkpoint(tmp_path / "deep", num_hidden_layers=8, seed=2)
    out = tmp_path / "run"
    status, printed, err = run(capsys, *refine(deep, tokens, out, heldout, *SHARED))
    assert status == 0, err
    found = document(out)
    refinement = found["refinement"]
    assert len(refinement["swaps"]) == 1, "another seed is needed"
    assert found["pattern"] != refinement["start_pattern"] == found["steps"][-1]["pattern"]
    assert "swap made: layer" in err
    assert "searched, then swaps" in printed
    for retention, expected in ((None, found["pattern"]), ("5/8", found["pattern"]), ("6/8", None)):
        expected = expected or found["steps"][-2]["pattern"]
        at = [] if retention is None else ["--retention", retention]
        assert expected in run(capsys, "export", out, "--engine", "vllm", *at)[1]
    _check_eval(capsys, deep, heldout, out, tmp_path / "eval")


def _check_eval(capsys: pytest.CaptureFixture[str], model: Path, heldout: Path, out: Path, to: Path) -> None:
    """On the held-out sequences the refined pattern is in-sample, and the nested ones before it are not."""
    specs = [part for at in ("", "@5/8", "@6/8") for part in ("--pattern", f"{out}{at}")]
    arguments = ["eval", model, "--calibration", heldout, "--out", to, "--batch-size", 2, "--threads", 1, *specs]
    status, _, err = run(capsys, *arguments)
    assert status == 0, err
    found = document(out)
    rows = json.loads((to / "eval.json").read_text())["rows"]
    by_pattern = {row["pattern"]: row for row in rows}
    assert {found["pattern"], found["steps"][-2]["pattern"]} < set(by_pattern)
    assert by_pattern[found["pattern"]]["loss"] == found["refinement"]["heldout"]["loss"]
    assert by_pattern[found["pattern"]]["in_sample"]
    assert not by_pattern[found["steps"][-2]["pattern"]]["in_sample"]


def test_swaps_go_by_the_kl_where_the_search_does(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, heldout: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    status, printed, err = run(capsys, *refine(glm_checkpoint, tokens, out, heldout, *SHARED, "--objective", "kl"))
    assert status == 0, err
    assert "searched on, KL" in printed
    refinement = document(out)["refinement"]
    assert refinement["kl_delta"] <= 0 and refinement["heldout"]["kl_delta"] <= 0
    assert "It is made where the KL falls" in (out / "report.html").read_text()
