"""lm-evaluation-harness on a patched model, with a small local task: log-likelihoods and generation with KV cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import refused, run
from test_cli_eval import evaluation

QUESTIONS = [{"question": f"the cat sat on {n} mats and the dog", "answer": " sat"} for n in range(4)]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
GENERATE = """generation_kwargs:
  max_gen_toks: 3
  until: ["\\n"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOOSE = """doc_to_choice: [" sat", " ran"]
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path, name: str, output_type: str, more: str) -> Path:
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    path = folder / f"{name}.yaml"
    path.write_text(TASK.format(name=name, data=data, output_type=output_type, more=more))
    return path


def test_local_tasks(capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install 'icsearch[lm-eval]'")
    generate = write_task(tmp_path, "local_generate", "generate_until", GENERATE)
    choose = write_task(tmp_path, "local_choose", "multiple_choice", CHOOSE)
    arguments = evaluation(glm_checkpoint, tokens, tmp_path / "eval", "FSSSSS")
    status, _, err = run(capsys, *arguments, "--lm-eval", f"{generate},{choose}")
    assert status == 0, err
    results = json.loads((tmp_path / "eval" / "eval.json").read_text())["lm_eval"]
    assert [entry["pattern"] for entry in results] == ["FFFFFF", "FSSSSS"]
    for entry in results:
        assert 0 <= entry["results"]["local_choose"]["acc,none"] <= 1
        assert 0 <= entry["results"]["local_generate"]["exact_match,none"] <= 1


def test_without_the_extra(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    glm_checkpoint: Path,
    tokens: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    arguments = evaluation(glm_checkpoint, tokens, tmp_path / "eval", "FSSSSS")
    assert "pip install 'icsearch[lm-eval]'" in refused(capsys, *arguments, "--lm-eval", "arc_easy")
