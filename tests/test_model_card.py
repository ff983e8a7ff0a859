"""Model cards: read back as the hub's own library reads them, each figure that of the saved JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard

from eval_fixtures import MadeUpEval, made_up_document
from icsearch import cli, report
from icsearch.report import ReportError
from icsearch.report.card_metadata import TAGS, dataset_of, is_hub_id
from icsearch.runs import results
from icsearch.runs.record import load_run
from run_fixtures import MadeUpRun, write_run

HUB = "zai-org/GLM-5"


def run_directory(folder: Path, **changes: Any) -> Path:
    write_run(folder, MadeUpRun(**{"num_layers": 8, "num_shared": 5, "name": HUB, **changes}))
    return folder


def eval_directory(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text(json.dumps(made_up_document(MadeUpEval(**{"name": HUB, **changes}))))
    return folder


def card_of(*runs: Path) -> ModelCard:
    return ModelCard(report.model_card(runs))


def metric(results: list[EvalResult], kind: str, label: str) -> float:
    (found,) = [one for one in results if one.metric_type == kind and label in str(one.metric_name)]
    return float(found.metric_value)


def test_a_search(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    file = results.pattern_file(load_run(run))
    card = card_of(run)
    assert card.data.base_model == HUB
    assert card.data.library_name == "transformers"
    assert card.data.tags == list(TAGS)
    assert card.data.model_name == "GLM-5 with shared indexers"
    found = card.data.eval_results
    assert metric(found, "loss", "searched, 3 of 8 indexers, in-sample") == file.loss
    assert metric(found, "loss", "baseline, 8 of 8 indexers, in-sample") == file.baseline_loss
    assert f"```\n{file.pattern}\n```" in card.text
    assert file.pattern.letters in card.text.partition("--hf-overrides")[2]  # vLLM's flag
    assert "In-sample" in card.text


def test_an_evaluation(tmp_path: Path) -> None:
    folder = eval_directory(tmp_path / "eval")
    document = json.loads((folder / "eval.json").read_text())
    card = card_of(folder)
    found = card.data.eval_results
    for row in document["rows"]:
        label = f"{row['name']}, {len(row['full_layers'])} of 16 indexers"
        assert metric(found, "loss", label) == row["loss"]
        assert metric(found, "perplexity", label) == row["perplexity"]
        if row["method"] != "full":
            assert metric(found, "kl_divergence", label) == row["kl"]
            assert f"`{row['pattern']}`: {row['verdict']}" in card.text
    assert "(in-sample)" in card.text
    lines = [line for line in card.text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(document["rows"])
    assert len({line.count("|") for line in lines}) == 1


def test_a_search_and_its_evaluation_are_one_card(tmp_path: Path) -> None:
    run, evaluation = run_directory(tmp_path / "run", num_layers=16), eval_directory(tmp_path / "eval")
    fingerprint = json.loads((run / "journal.jsonl").read_text().splitlines()[0])["model"]["fingerprint"]
    document = json.loads((evaluation / "eval.json").read_text())
    if document["model"]["fingerprint"] != fingerprint:
        document["model"]["fingerprint"] = fingerprint
        (evaluation / "eval.json").write_text(json.dumps(document))
    card = card_of(run, evaluation)
    assert "## Evaluation" in card.text and "layers keep their indexer" in card.text
    assert len(card.data.eval_results) > len(card_of(evaluation).data.eval_results)


def test_several_checkpoints_and_unfinished_runs_are_refused(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    other = run_directory(tmp_path / "other")
    journal = other / "journal.jsonl"
    start, *rest = journal.read_text().splitlines(keepends=True)
    changed = json.loads(start)
    changed["model"]["fingerprint"] = "another"
    journal.write_text(json.dumps(changed) + "\n" + "".join(rest))
    with pytest.raises(ReportError, match="of one checkpoint, and these are of 2"):
        card_of(run, other)
    with pytest.raises(ReportError, match="is not finished"):
        card_of(run_directory(tmp_path / "begun", stop_after=2))
    with pytest.raises(ReportError, match="no run to report on"):
        card_of()


def test_no_path_of_this_machine_is_published(tmp_path: Path) -> None:
    card = report.model_card([run_directory(tmp_path / "run", name=str(tmp_path / "secret" / "my-model"))])
    assert str(tmp_path) not in card and "secret" not in card
    assert "my-model" in card
    assert ModelCard(card).data.base_model is None


SOURCES = {
    "hf:HuggingFaceFW/fineweb:sample-10BT": ("HuggingFaceFW/fineweb", "HuggingFaceFW/fineweb", "sample-10BT", None),
    "hf:a/b:c:train": ("a/b", "a/b", "c", "train"),
    "hf:/home/me/texts": ("custom", "texts", None, None),
    "/home/me/texts.jsonl": ("custom", "texts.jsonl", None, None),
    "demo:heldout": ("custom", "icsearch's demo:heldout texts", None, None),
    "the-model": ("custom", "own tokens", None, None),
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_was_measured_on(source: str) -> None:
    found = EvalResult(
        task_type="text-generation", metric_type="loss", metric_value=1.0, **dataset_of(source, "the-model")
    )
    assert (found.dataset_type, found.dataset_name, found.dataset_config, found.dataset_split) == SOURCES[source]


@pytest.mark.parametrize(("name", "expected"), [(HUB, True), ("demo", False), ("/a/b", False), ("a/b/c", False)])
def test_hub_ids(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = run_directory(tmp_path / "run"), tmp_path / "card.md"
    assert cli._run(["report", str(run), "--model-card"], debug=False) == 0
    shown = capsys.readouterr().out
    assert cli._run(["report", str(run), "--model-card", "--out", str(out)], debug=False) == 0
    assert out.read_text() == shown
    out.write_text("# My own README")
    capsys.readouterr()
    assert cli._run(["report", str(run), "--model-card", "--out", str(out)], debug=False) == 2
    assert "exists: give another --out, or remove it first" in capsys.readouterr().err
    assert out.read_text() == "# My own README"
    assert cli._run(["report", str(run)], debug=False) == 2
    assert "--out FILE.html" in capsys.readouterr().err
    assert cli._run(["report", str(run), "--model-card", "--out", str(tmp_path / "no" / "card.md")], debug=False) == 2


def test_no_torch_for_a_card(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    code = f"import sys; from icsearch import cli; cli._run(['report', {str(run)!r}, '--model-card'], True); " + (
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
