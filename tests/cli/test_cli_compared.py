"""dp-baseline compares: the patterns of Kascade's score and of a second-order table are scored beside its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import refused, run
from test_cli_eval import baseline

import tiny
from icsearch.cli import app
from icsearch.commands.baseline import NO_KASCADE
from icsearch.core.pattern import Pattern
from icsearch.runs.record import RunRecord, load_run
from icsearch.search.protocol import LOSS
from icsearch.search.second_order import SecondOrderTable, full_of

SHARED = ["--num-shared", 3]
EVERY = [Pattern.from_full_layers({0, *more}, 6) for more in combinations(range(1, 6), 2)]


@pytest.fixture(scope="module")
def table(glm_checkpoint: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fisher.npz of a finished search on the same batches, with another seed for its labels than the default."""
    out = tmp_path_factory.mktemp("fisher") / "run"
    arguments = ["fisher", glm_checkpoint, "--calibration", tokens, "--out", out, "--batch-size", 2, "--threads", 1]
    more = [*SHARED, "--draws", 2, "--rounds", 1, "--finalists", 1, "--seed", 5, "--quiet"]
    assert app._run([str(word) for word in (*arguments, *more)], debug=True) == 0
    return out / "fisher.npz"


@pytest.fixture(scope="module")
def compared(table: Path, glm_checkpoint: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dp-baseline with all three measures."""
    out = tmp_path_factory.mktemp("compared") / "run"
    arguments = baseline(glm_checkpoint, tokens, out, *SHARED, "--table", table)
    assert app._run([str(word) for word in arguments], debug=True) == 0
    return out


def test_each_measure_has_its_best_pattern_and_all_are_scored(compared: Path, table: Path) -> None:
    record = load_run(compared)
    assert list(record.compared) == ["kascade", "fisher"]
    assert all(record.nll.is_complete(event["pattern"]) for event in record.compared.values())
    with np.load(compared / "similarity.npz") as arrays:
        kascade = arrays["kascade"]

    def of_kascade(pattern: Pattern) -> float:  # summed over all layers: those that stay F keep all of their attention
        return float(sum(kascade[layer, source] for layer, source in enumerate(pattern.sources())))

    assert of_kascade(Pattern(record.compared["kascade"]["pattern"])) == max(map(of_kascade, EVERY))
    with np.load(table) as arrays:
        prices = SecondOrderTable(arrays["drawn"], arrays["true"], record.tokens).predict(full_of(EVERY))[LOSS]
    assert Pattern(record.compared["fisher"]["pattern"]) == EVERY[int(prices.argmin())]
    assert record.compared["fisher"]["objective"] == pytest.approx(prices.min(), rel=1e-9)


def test_the_run_is_still_the_similarity_s(compared: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path) -> None:
    """Its pattern, and every loss, are those of a run without a table."""
    assert app._run([str(word) for word in baseline(glm_checkpoint, tokens, tmp_path / "r", *SHARED)], debug=True) == 0
    with_table, without = load_run(compared), load_run(tmp_path / "r")
    assert with_table.pattern == without.pattern
    assert list(without.compared) == ["kascade"] and without.compared["kascade"] == with_table.compared["kascade"]
    assert without.nll == {letters: with_table.nll[letters] for letters in without.nll}
    assert with_table.similarity == without.similarity


def test_what_must_stay_full_stays_by_every_measure(
    capsys: pytest.CaptureFixture[str], table: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    more = [*SHARED, "--table", table, "--stages", 2, "--keep-full", 5]
    assert run(capsys, *baseline(glm_checkpoint, tokens, tmp_path, *more))[0] == 0
    record = load_run(tmp_path)
    assert {event["pattern"] for event in record.compared.values()} == {"FSSFSF"} == {record.pattern.letters}


def test_cut_behind_any_event_and_continued(
    compared: Path, table: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    lines = (compared / "journal.jsonl").read_bytes().splitlines(keepends=True)
    expected = load_run(compared)
    kinds = [json.loads(line)["event"] for line in lines]
    assert {"similarity", "fisher", "chosen", "compared", "losses"} < set(kinds)
    for kept in range(1, len(lines)):
        if kinds[kept] == kinds[kept - 1] == "losses":
            continue  # one place among losses is enough
        out = tmp_path / str(kept)
        out.mkdir()
        (out / "journal.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:10])
        arguments = baseline(glm_checkpoint, tokens, out, *SHARED, "--table", table)
        assert app._run([str(word) for word in arguments], debug=True) == 0
        assert whole(load_run(out)) == whole(expected), kinds[kept]
        names = ("pattern.json", "similarity.npz")
        assert [(out / name).exists() for name in names] == [True, True]


def whole(record: RunRecord) -> tuple[Any, ...]:
    return record.nll, record.similarity, record.fisher.drawn, record.chosen, record.compared, record.finished


def test_a_similarity_of_before_has_no_score(
    capsys: pytest.CaptureFixture[str], compared: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    """From a file with it all is as it was measured; from one without, as earlier versions wrote, a note says so."""
    for name in ("similarity.npz", "similarity.json"):
        shutil.copy(compared / name, tmp_path / name)
    stored = tmp_path / "similarity.npz"
    assert run(capsys, *baseline(glm_checkpoint, tokens, tmp_path / "with", *SHARED, "--similarity", stored))[0] == 0
    again, first = load_run(tmp_path / "with"), load_run(compared)
    assert again.similarity is not None and first.similarity is not None
    for row, other in zip(again.similarity["kascade"], first.similarity["kascade"], strict=True):
        assert row == pytest.approx(other, rel=1e-12)
    assert again.compared["kascade"]["pattern"] == first.compared["kascade"]["pattern"]
    with np.load(stored) as arrays:
        old = {name: arrays[name] for name in ("cosine", "overlap")}
    np.savez(stored, **old)
    assert run(capsys, *baseline(glm_checkpoint, tokens, tmp_path / "old", *SHARED, "--similarity", stored))[0] == 0
    record = load_run(tmp_path / "old")
    assert record.compared == {} and NO_KASCADE in record.notes and NO_KASCADE not in again.notes


def test_without_attention_weights_a_note_says_so(
    capsys: pytest.CaptureFixture[str], glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    more = [*SHARED, "--kernels", "reference"]
    assert run(capsys, *baseline(glm_checkpoint, tokens, tmp_path, *more))[0] == 0
    record = load_run(tmp_path)
    assert record.compared == {} and record.notes.count(NO_KASCADE) == 1
    with np.load(tmp_path / "similarity.npz") as arrays:
        assert set(arrays) == {"cosine", "overlap"}


def copied(table: Path, folder: Path, **manifest: Any) -> Path:
    for name in ("fisher.npz", "fisher.json"):
        shutil.copy(table.with_name(name), folder / name)
    described = folder / "fisher.json"
    described.write_text(json.dumps({**json.loads(described.read_text()), **manifest}))
    return folder / "fisher.npz"


def cut(table: Path, folder: Path) -> Path:
    path = copied(table, folder)
    path.write_bytes(path.read_bytes()[:200])
    return path


def with_nan(table: Path, folder: Path) -> Path:
    path = copied(table, folder)
    with np.load(path) as arrays:
        np.savez(path, drawn=arrays["drawn"] * np.nan, true=arrays["true"])
    return path


TABLES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "nowhere": (lambda table, folder: folder / "none.npz", "no file"),
    "of another model": (lambda table, folder: copied(table, folder, model="0"), "another model"),
    "of other batches": (lambda table, folder: copied(table, folder, calibration="0"), "another calibration"),
    "of both": (lambda table, folder: copied(table, folder, model="0", calibration="0"), "another model; another cal"),
    "of other numerics": (
        lambda table, folder: copied(
            table, folder, numerics={**json.loads(table.with_suffix(".json").read_text())["numerics"], "batch_size": 3}
        ),
        "batch_size 3, now 2",
    ),
    "of more draws than it has": (lambda table, folder: copied(table, folder, draws=3), "drawn of"),
    "of no draws": (lambda table, folder: copied(table, folder, draws=0), "draws"),
    "cut": (cut, "cannot use"),
    "not finite": (with_nan, "drawn of"),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_do_not_fit(
    capsys: pytest.CaptureFixture[str], table: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path, case: str
) -> None:
    make, found = TABLES[case]
    line = refused(capsys, *baseline(glm_checkpoint, tokens, tmp_path / "run", "--table", make(table, tmp_path)))
    assert found in line and "leave --table out" in line
    assert not (tmp_path / "run").exists()


def test_a_table_of_another_model(
    capsys: pytest.CaptureFixture[str], table: Path, tokens: Path, tmp_path: Path
) -> None:
    other = tiny.save_checkpoint(tmp_path / "other", seed=9)
    assert "another model" in refused(capsys, *baseline(other, tokens, tmp_path / "run", "--table", table))


def test_a_run_goes_on_as_it_began(
    capsys: pytest.CaptureFixture[str], compared: Path, glm_checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    """With a table or without one: what was begun without is not finished with another column."""
    out = Path(shutil.copytree(compared, tmp_path / "run"))
    line = refused(capsys, *baseline(glm_checkpoint, tokens, out, *SHARED))
    assert "draws 2, now None" in line and "repeat its command" in line
