"""The stability benchmarks: Kendall's tau on orders whose value is known, and the ranking by subsets of sequences."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest
from test_search import START

from icsearch.core.pattern import Pattern
from icsearch.runs.journal import Journal
from icsearch.runs.record import load_run

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "stability.py"
spec = importlib.util.spec_from_file_location("stability", SCRIPT)
assert spec is not None
assert spec.loader is not None
stability = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stability)


@pytest.mark.parametrize(
    ("second", "tau"),
    [
        ([1.0, 2.0, 3.0, 4.0], 1.0),
        ([4.0, 3.0, 2.0, 1.0], -1.0),
        ([2.0, 1.0, 4.0, 3.0], 1 / 3),  # two of six pairs reversed
        ([1.0, 1.0, 3.0, 4.0], 5 / 30**0.5),  # one tie
    ],
)
def test_kendall_tau(second: list[float], tau: float) -> None:
    assert stability.kendall_tau([1.0, 2.0, 3.0, 4.0], second) == pytest.approx(tau)


# --- which objective needs how many sequences -------------------------------------------------------------------------


@pytest.fixture
def objectives(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which imports its neighbour as scripts do."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("objectives")


def made_up_kl_run(directory: Path, sequences: int = 20) -> Path:
    """Single flips that cost ever more; the loss has twenty times the noise of the KL."""
    chance, letters = random.Random(0), [Pattern.full(6).flip(layer).letters for layer in range(1, 6)]
    options = {**START["options"], "objective": "kl"}
    journal = Journal(directory / "journal.jsonl")
    journal.append({**START, "options": options, "tokens": [10] * sequences, "references": {}})
    for step, patterns in ((0, ["FFFFFF"]), (1, letters)):
        exact = [[float(i)] * sequences for i, _ in enumerate(patterns)]
        tables = {
            name: [[value + chance.gauss(0, noise) for value in row] for row in exact]
            for name, noise in (("nll", 4.0), ("kl", 0.2))
        }
        event = {"event": "losses", "step": step, "sequences": [0, sequences], "patterns": patterns}
        journal.append({**event, **tables, "layer_sequences": 1, "seconds": 0.1})
    return directory


def test_the_objective_with_less_noise_needs_fewer_sequences(objectives: ModuleType, tmp_path: Path) -> None:
    record = load_run(made_up_kl_run(tmp_path))
    by_loss, by_kl = (objectives.rows(record, table, 50) for table in (record.nll, record.kl))
    assert [row.sequences for row in by_kl] == [4, 8, 12, 16]
    assert [row.disjoint is None for row in by_kl] == [False, False, True, True]  # of 20 sequences
    assert by_kl[0].mean == by_kl[0].disjoint == by_kl[0].same_first == 1.0
    assert by_loss[0].mean < by_loss[-1].mean < 1.0
    assert by_loss[0].low <= by_loss[0].mean
    text = objectives.table_of(record, 50)
    assert "5 single flips, 50 random subsets for each n, against all 20 sequences" in text
    assert len(text.splitlines()) == 2 + 4 + 1


def test_a_run_without_kl_is_refused(objectives: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(tmp_path / "journal.jsonl").append(START)
    monkeypatch.setattr("sys.argv", ["objectives.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="has no KL: give a run of --objective kl"):
        objectives.main()
