"""Model cards: read back as the hub's own library reads them, each figure that of the saved JSON."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard

from eval_fixtures import MadeUpEval, made_up_document
from icsearch.cli import app
from icsearch.engines.export import export
from icsearch.engines.table import ENGINES
from icsearch.report import write
from icsearch.report.card import TAGS, dataset_of
from icsearch.report.write import ReportError
from icsearch.runs import results as run_results
from icsearch.runs.record import load_run
from icsearch.runs.results import guessing_notes
from run_fixtures import MadeUpRun, write_run

HUB, COMMIT = "zai-org/GLM-5", "0123456789abcdef0123456789abcdef01234567"


def run_directory(folder: Path, **changes: Any) -> Path:
    write_run(folder, MadeUpRun(**{"num_layers": 8, "num_shared": 5, "name": HUB, "revision": COMMIT, **changes}))
    return folder


def eval_directory(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    made_up = MadeUpEval(**{"name": HUB, "revision": COMMIT, **changes})
    (folder / "eval.json").write_text(json.dumps(made_up_document(made_up)))
    return folder


def card_of(*runs: Path) -> ModelCard:
    return ModelCard(write.model_card(runs))


def metric(results: list[EvalResult], kind: str, label: str) -> float:
    (found,) = [one for one in results if one.metric_type == kind and label in str(one.metric_name)]
    return float(found.metric_value)


def test_a_search(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    file = run_results.pattern_file(load_run(run))
    card = card_of(run)
    assert card.data.base_model == HUB
    assert card.data.library_name == "transformers"
    assert card.data.tags == list(TAGS)
    assert card.data.model_name == "GLM-5 with shared indexers"
    found = card.data.eval_results
    assert metric(found, "loss", "searched, 3 of 8 indexers, in-sample") == file.loss
    assert metric(found, "loss", "baseline, 8 of 8 indexers, in-sample") == file.baseline_loss
    assert f"[{HUB}](https://huggingface.co/{HUB})" in card.text
    assert f"revision {COMMIT[:16]}, fingerprint" in card.text
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


def test_a_loss_that_guessing_would_beat_stands_beside_the_results(tmp_path: Path) -> None:
    (note,) = guessing_notes(9.0, 1024)
    run, evaluation = run_directory(tmp_path / "run", notes=("another note", note)), eval_directory(tmp_path / "eval")
    assert card_of(run, evaluation).text.splitlines().count(f"**Caution**: {note}.") == 1
    document = json.loads((evaluation / "eval.json").read_text())
    (evaluation / "eval.json").write_text(json.dumps({**document, "notes": [note]}))
    assert card_of(run, evaluation).text.splitlines().count(f"**Caution**: {note}.") == 2
    assert "Caution" not in card_of(run_directory(tmp_path / "other")).text


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


# By docs/engines.md: whose settings a card writes out, and whom it names behind them.
SERVED = {
    "glm_moe_dsa": (
        ["vLLM", "SGLang"],
        ["lmdeploy", "atom", "vllm-ascend", "prime-rl", "transformers", "trtllm", "llamacpp", "xllm"],
    ),
    "deepseek_v32": (["vLLM", "SGLang"], ["atom", "vllm-ascend"]),
    "deepseek_v4": (["ATOM", "vllm-ascend"], ["paddlefleet"]),
    "minimax_m3_vl": (["ATOM"], []),  # vLLM's two numbers do not give this pattern
    "hy_v4": (["transformers"], []),
    "mistral_large4": (["transformers"], []),
    "axk2": ([], []),
    "qwen4_exp": ([], []),
}


@pytest.mark.parametrize("model_type", SERVED)
def test_only_engines_that_are_known_to_serve_the_family(model_type: str, tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", model_type=model_type)
    text = card_of(run).text
    shown, others = SERVED[model_type]
    assert re.findall(r"^With ([^,]+),", text, re.MULTILINE) == shown
    assert re.findall(r"\(`([\w-]+)`\)", text) == others
    in_python = f"No engine is known to take a pattern for `{model_type}` models; in Python, `icsearch.load(MODEL, "
    assert (in_python in text) is (shown == [])
    assert ("--hf-overrides" in text) is ("vLLM" in shown or "ATOM" in shown)
    assert "may ignore the pattern" not in text and "not known here" not in text


@pytest.mark.parametrize("model_type", [name for name, (shown, _) in SERVED.items() if shown])
def test_settings_and_warnings_are_those_of_the_export(model_type: str, tmp_path: Path) -> None:
    file = run_results.pattern_file(load_run(run_directory(tmp_path / "run", model_type=model_type)))
    text, known = card_of(tmp_path / "run").text, []
    for engine in ENGINES.values():
        head = f"With {engine.title}, {engine.how}:"
        assert (head in text) is (engine.title in SERVED[model_type][0])
        if head in text:
            found, section = export(file, engine.name), text.partition(head)[2]
            assert section.startswith(f"\n\n```\n{found.text}\n```")
            told = [f"- {warning}" for warning in found.warnings]
            own = section.partition("\nWith ")[0]
            listed = own.partition(f"--engine {engine.name}`:\n\n")[2].split("\n\n")[0]
            assert listed.strip().splitlines() == told
            known.append(told)
    assert any(known)


def test_a_stage_that_would_start_on_s_is_told(tmp_path: Path) -> None:
    text = card_of(run_directory(tmp_path / "run", num_layers=16, num_shared=13)).text
    assert "pipeline stages, one would start on S: give --serve-pp 2" in text.partition("--engine vllm`:")[2]
    even = tuple(range(2, 16, 2))  # where 2, 4 and 8 stages begin
    none = run_directory(tmp_path / "none", num_layers=16, num_shared=8, keep_full=even)
    assert "Warnings" not in card_of(none).text


def test_an_engine_that_two_numbers_tell_is_named_where_they_give_the_pattern(tmp_path: Path) -> None:
    assert "`megatron`" not in card_of(run_directory(tmp_path / "no")).text
    native = run_directory(tmp_path / "yes", num_layers=8, num_shared=0, native_shared=(2, 4, 6))
    assert run_results.pattern_file(load_run(native)).pattern.letters == "FFSFSFSF"
    assert "Megatron-LM (`megatron`)" in card_of(native).text
    minimax = {"num_layers": 8, "num_shared": 0, "native_shared": (2, 4, 6), "model_type": "minimax_m3_vl"}
    text = card_of(run_directory(tmp_path / "minimax", **minimax)).text
    assert re.findall(r"^With ([^,]+),", text, re.MULTILINE) == ["vLLM", "ATOM"]
    assert '"index_topk_freq": 2, "index_skip_topk_offset": 1}' in text


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


@pytest.mark.parametrize("name", ["/home/secret/my-model", "secret/my-model", "../secret/my-model/"])
def test_no_path_of_this_machine_is_published(name: str, tmp_path: Path) -> None:
    card = write.model_card([run_directory(tmp_path / "run", name=name, revision=None)])
    assert "secret" not in card and "huggingface.co" not in card
    assert "Patterns for `my-model`:" in card
    assert ModelCard(card).data.base_model is None
    assert ModelCard(card).data.model_name == "my-model with shared indexers"


def test_a_run_that_does_not_say_where_its_checkpoint_came_from_links_nowhere(tmp_path: Path) -> None:
    """As those of earlier versions: their name may be a hub id or a directory, and nothing tells which."""
    run = run_directory(tmp_path / "run")
    journal = run / "journal.jsonl"
    start, *rest = journal.read_text().splitlines(keepends=True)
    changed = json.loads(start)
    del changed["model"]["revision"]
    journal.write_text(json.dumps(changed) + "\n" + "".join(rest))
    card = card_of(run)
    assert card.data.base_model is None and "huggingface.co" not in card.text
    assert "Patterns for `GLM-5`:" in card.text


def test_an_evaluation_of_a_copy_does_not_hide_the_hub_id_of_the_search(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", num_layers=16)
    copy = eval_directory(tmp_path / "eval")
    document = json.loads((copy / "eval.json").read_text())
    document["model"] |= {"name_or_path": "models/copy", "revision": None}
    (copy / "eval.json").write_text(json.dumps(document))
    card = card_of(run, copy)
    assert card.data.base_model == HUB and "models/copy" not in card.text


@pytest.fixture
def hub_cache(glm_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub's own client, with one checkpoint in it; tests have no network."""
    repository = tmp_path / "cache" / f"models--{HUB.replace('/', '--')}"
    shutil.copytree(glm_checkpoint, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return repository


@pytest.mark.parametrize("local", [True, False])
def test_where_the_checkpoint_came_from_is_told_by_the_run(
    local: bool, hub_cache: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative directory with the name of a hub id, and that hub id, each reported on from where the other lies."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    shutil.copytree(hub_cache / "snapshots" / COMMIT, there / HUB)
    monkeypatch.chdir(there if local else here)
    texts = tmp_path / "texts"
    shutil.copytree(tokens, texts)
    manifest = {"source": "hf:my/texts:test", "source_revision": None if local else "0123abc"}
    (texts / "calibration.json").write_text(json.dumps({"format": "icsearch.calibration/1", **manifest}))
    fixed = ("--calibration", str(texts), "--batch-size", "2", "--threads", "1", "--quiet")
    greedy = ["greedy", HUB, *fixed, "--num-shared", "1", "--out", str(tmp_path / "run")]
    assert app._run(greedy, debug=True) == 0
    monkeypatch.chdir(here if local else there)
    model = json.loads((tmp_path / "run" / "pattern.json").read_text())["model"]
    assert (model["name_or_path"], model["revision"]) == (HUB, None if local else COMMIT)
    data = card_of(tmp_path / "run").data
    assert data.base_model == (None if local else HUB)
    assert {one.dataset_type for one in data.eval_results} == {"custom" if local else "my/texts"}
    assert app._run(greedy, debug=True) == 0  # the same weights by the other way: the run is the same


# Whether the hub delivered it, and what the card says then.
SOURCES = {
    "hf:HuggingFaceFW/fineweb:sample-10BT": ("HuggingFaceFW/fineweb", "HuggingFaceFW/fineweb", "sample-10BT", None),
    "hf:a/b:c:train": ("a/b", "a/b", "c", "train"),
    "hf:a/b:test": ("a/b", "a/b", None, "test"),
    "hf:a/b::odd": ("a/b", "a/b", None, "odd"),
    "hf:wikitext": ("wikitext", "wikitext", None, None),
}
LOCAL_SOURCES = {
    "hf:/home/me/texts": ("custom", "texts", None, None),
    "hf:my/texts": ("custom", "texts", None, None),
    "my/texts": ("custom", "texts", None, None),
    "/home/me/texts.jsonl": ("custom", "texts.jsonl", None, None),
    "demo:heldout": ("custom", "icsearch's demo:heldout texts", None, None),
    "the-model": ("custom", "own tokens", None, None),
}


@pytest.mark.parametrize("source", [*SOURCES, *LOCAL_SOURCES])
def test_what_was_measured_on(source: str) -> None:
    calibration = {"source": source, "source_revision": "0123abc" if source in SOURCES else None}
    dataset = dataset_of(calibration, "the-model")
    found = EvalResult(task_type="text-generation", metric_type="loss", metric_value=1.0, **dataset)
    expected = {**SOURCES, **LOCAL_SOURCES}[source]
    assert (found.dataset_type, found.dataset_name, found.dataset_config, found.dataset_split) == expected


def test_a_dataset_that_nothing_says_the_hub_delivered_is_not_named_as_its_own() -> None:
    """As in runs of earlier versions: hf:NAME can be a folder."""
    assert dataset_of({"source": "hf:my/texts"}, "m") == {"dataset_type": "custom", "dataset_name": "texts"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = run_directory(tmp_path / "run"), tmp_path / "card.md"
    assert app._run(["report", str(run), "--model-card"], debug=False) == 0
    shown = capsys.readouterr().out
    assert app._run(["report", str(run), "--model-card", "--out", str(out)], debug=False) == 0
    assert out.read_text() == shown
    out.write_text("# My own README")
    capsys.readouterr()
    assert app._run(["report", str(run), "--model-card", "--out", str(out)], debug=False) == 2
    assert "exists: give another --out, or remove it first" in capsys.readouterr().err
    assert out.read_text() == "# My own README"
    assert app._run(["report", str(run)], debug=False) == 2
    assert "--out FILE.html" in capsys.readouterr().err
    assert app._run(["report", str(run), "--model-card", "--out", str(tmp_path / "no" / "card.md")], debug=False) == 2


def test_no_torch_for_a_card(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    code = f"import sys; from icsearch.cli import app; app._run(['report', {str(run)!r}, '--model-card'], True); " + (
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
