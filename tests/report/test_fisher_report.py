"""What a search on a second-order table leaves: its files, its page and its lines in a terminal."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_report import Page, console_messages, needs_browser

from fisher_fixtures import fisher_events, fisher_record
from icsearch.core.errors import PatternError
from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import load_pattern_file
from icsearch.core.statistics import Difference, paired_difference
from icsearch.report import canvas, figures, fisher_page, sentences
from icsearch.report.fisher_view import FINALIST, FLIP, PATH, UNIFORM, FisherView
from icsearch.report.page import render_page
from icsearch.report.terminal import summary_table
from icsearch.report.view import RunView, view_run
from icsearch.report.write import CSV_COLUMNS, ReportError, curve_csv, model_card, write_report, write_results
from icsearch.runs.journal import Event, Journal
from icsearch.runs.record import JOURNAL_NAME, RunRecord, load_run
from icsearch.runs.results import cost, pattern_file
from icsearch.search.proposals import table_of
from icsearch.search.second_order import full_of
from run_fixtures import MadeUpRun

ON_PATH, OFF_PATH = MadeUpRun(seed=6), MadeUpRun(seed=3)  # where the pattern found lies


def view_of(made_up: MadeUpRun, **more: Any) -> RunView:
    return view_run(fisher_record(made_up, **more), "made up")


@pytest.fixture(scope="module")
def on_path() -> RunView:
    return view_of(ON_PATH)


@pytest.fixture(scope="module")
def off_path() -> RunView:
    return view_of(OFF_PATH)


def fisher_of(view: RunView) -> FisherView:
    assert view.fisher is not None
    return view.fisher


def written(directory: Path, made_up: MadeUpRun, until: str = "", **more: Any) -> Path:
    """A RUN directory, its journal cut behind the last event before `until` happens, or whole."""
    directory.mkdir(parents=True, exist_ok=True)
    journal = Journal(directory / JOURNAL_NAME)
    for event in cut(fisher_events(made_up, **more), until):
        journal.append(event)
    return directory


def _scores(what: Callable[[Event], bool]) -> Callable[[Event], bool]:
    return lambda event: event["event"] == "losses" and what(event)


BEFORE: dict[str, Callable[[Event], bool]] = {
    "": lambda event: False,
    "table": lambda event: event["event"] == "fisher",
    "baseline": _scores(lambda event: event["step"] == 0),
    "flips": _scores(lambda event: event["step"] == 1),
    "proposal": lambda event: event["event"] == "proposed",
    "commits": lambda event: event["event"] == "commit",
    "second commit": lambda event: event["event"] == "commit" and event["step"] == 2,
    "finalists": lambda event: event["event"] == "proposed" and event["round"] == 1,
    "round": _scores(lambda event: event["step"] > 1),
    "choice": lambda event: event["event"] == "chosen",
    "end": lambda event: event["event"] == "finish",
}


def cut(events: list[Event], until: str) -> list[Event]:
    return events[: next((i for i, event in enumerate(events) if BEFORE[until](event)), len(events))]


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_every_measured_pattern_is_there_once_with_what_the_table_said(off_path: RunView) -> None:
    record, fisher = off_path.record, fisher_of(off_path)
    assert {known.pattern.letters for known in fisher.measured} == set(record.nll) - {record.start_pattern.letters}
    assert len(fisher.measured) == len(record.nll) - 1
    predicted = table_of(record).predict(full_of([known.pattern for known in fisher.measured]))  # [2, P]
    for known, (loss, kl) in zip(fisher.measured, predicted.T.tolist(), strict=True):
        assert known.predicted.loss.delta == pytest.approx(loss, abs=1e-12)
        assert known.predicted.kl.delta == pytest.approx(kl, abs=1e-12)
        assert known.measured.loss == record.difference(known.pattern.letters)
        assert known.measured.kl == record.mean_kl(known.pattern.letters)
        assert known.predicted.kl.std_err > 0 and known.heldout is None


def test_errors_of_predictions_are_taken_over_sequences(on_path: RunView) -> None:
    fisher, rows = fisher_of(on_path), on_path.record.fisher
    (flip,) = (known for known in fisher.measured if known.kind == FLIP and known.layer == 3)
    kl = [sum(draw[3][2] ** 2 for draw in draws) / 4 for draws in rows.drawn]  # two draws
    loss = [true[3][2] + square for true, square in zip(rows.true, kl, strict=True)]
    for found, sums in ((flip.predicted.kl, kl), (flip.predicted.loss, loss)):
        expected = paired_difference(sums, [0.0] * len(sums), on_path.record.tokens)
        assert (found.delta, found.std_err) == pytest.approx((expected.delta, expected.std_err))
    assert fisher.pair_kl[3][2].delta == pytest.approx(flip.predicted.kl.delta)
    assert fisher.pair_loss[3][2].std_err == pytest.approx(flip.predicted.loss.std_err)
    assert [len(row) for row in fisher.pair_kl] == list(range(16))


def test_kinds_are_those_of_the_journal(off_path: RunView) -> None:
    record, fisher = off_path.record, fisher_of(off_path)
    by_kind = {kind: [k for k in fisher.measured if k.kind == kind] for kind in (FLIP, PATH, FINALIST, UNIFORM)}
    assert sorted(known.layer or 0 for known in by_kind[FLIP]) == list(range(1, 16))
    assert all(known.pattern == Pattern("F" * 16).flip(known.layer or 0) for known in by_kind[FLIP])
    assert len(by_kind[PATH]) == 11  # its first step is a single flip
    assert {known.pattern.letters for known in by_kind[FINALIST]} <= set(chain(*record.proposals[1:]))
    rounds = range(1, len(record.proposals))
    assert {known.told for known in by_kind[FINALIST]} == {f"round {number}" for number in rounds}
    assert {known.told for known in by_kind[UNIFORM]} == {"uniform 1/2", "uniform 1/4", "uniform 1/8"}


def test_the_curve_is_the_nested_path_and_the_pattern_may_lie_off_it(on_path: RunView, off_path: RunView) -> None:
    for view in (on_path, off_path):
        assert [point.pattern.letters for point in view.steps] == view.record.proposals[0]
        assert view.final.pattern == view.record.pattern == view.record.frontier()[4]
        assert len(view.cells) == 12 and all(cell.committed for cell in view.cells)
    assert on_path.final is on_path.points[-1]
    assert off_path.off_curve is not None and off_path.off_curve.step == 12
    assert off_path.off_curve.difference.delta < off_path.points[-1].difference.delta
    assert off_path.off_curve in off_path.off_path and on_path.off_path == ()


def test_uniform_patterns_stand_beside_the_best_of_their_size(off_path: RunView) -> None:
    assert off_path.same_retention is not None
    assert off_path.same_retention.searched is off_path.final
    half, eighth = (next(r for r in off_path.references if r.label == f"uniform 1/{n}") for n in (2, 8))
    assert half.searched is not None and half.searched.pattern == off_path.record.frontier()[8]
    assert eighth.searched is None  # nothing but itself was measured at that size


def test_too_few_patterns_have_no_order(on_path: RunView) -> None:
    fisher = fisher_of(on_path)
    assert replace(fisher, measured=fisher.measured[:2]).ranked() is None
    assert sentences.foretold(replace(fisher, measured=())) == ""
    ranked = fisher.ranked(FLIP)
    assert ranked is not None and ranked.patterns == 15 and 0.8 < ranked.kl < 1


# --- files ------------------------------------------------------------------------------------------------------------


def test_pattern_json_holds_the_path_and_the_frontier(tmp_path: Path) -> None:
    record = load_run(written(tmp_path, OFF_PATH))
    write_results(tmp_path, record)
    file, fisher = load_pattern_file(tmp_path / "pattern.json"), fisher_of(view_run(record))
    assert (file.method, file.pattern) == ("fisher", record.pattern)
    assert [step.pattern for step in file.steps] == record.proposals[0]
    for step in file.steps:
        known = fisher.of(Pattern(step.pattern))
        assert known is not None
        assert step.predicted_loss == record.loss("F" * 16) + known.predicted.loss.delta
        assert (step.predicted_kl, step.kl) == (known.predicted.kl.delta, known.measured.kl.delta)
    assert {best.full_layers: best.pattern for best in file.frontier} == {
        count: pattern.letters for count, pattern in record.frontier().items()
    }
    for best in file.frontier:
        assert (best.loss, best.kl) == (record.loss(best.pattern), record.kl.loss(best.pattern))
        assert (best.delta, best.std_err) == pytest.approx(astuple(record.difference(best.pattern)))
    assert load_pattern_file(tmp_path / "pattern.json") == file
    assert pattern_file(record).to_json()["steps"][0].keys() == file.steps[0].to_json().keys() - {
        "predicted_loss", "predicted_kl",
    }  # fmt: skip


def astuple(difference: Difference) -> tuple[float, float]:
    return difference.delta, difference.std_err


def test_a_retention_gives_the_best_that_was_measured(tmp_path: Path) -> None:
    record = load_run(written(tmp_path, OFF_PATH))
    file = pattern_file(record)
    assert file.at_retention(Fraction(1, 4)) == record.pattern != Pattern(record.proposals[0][-1])
    assert file.at_retention(Fraction(15, 16)) == record.frontier()[15]
    assert file.at_retention(Fraction(1, 2)) == record.frontier()[8]
    for less in (Fraction(3, 16), Fraction(1, 8)):  # uniform patterns were measured there, and nothing was searched
        with pytest.raises(PatternError, match=r"it holds 4 to 16 of 16; search with a smaller --retention"):
            file.at_retention(less)
    with pytest.raises(PatternError, match="search with a smaller --retention"):
        file.at_retention(Fraction(1, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["frontier"][0].pop("kl"), "kl is missing"),
        (lambda d: d["frontier"][0].update(pattern="FSX"), "pattern is 'FSX'"),
        (lambda d: d["frontier"][0].update(full_layers=3), "full_layers is 3"),
        (lambda d: d["frontier"][0].update(full_layers=True), "full_layers is True"),
        (lambda d: d["frontier"][0].update(std_err="none"), "std_err is 'none'"),
        (lambda d: d.update(frontier={}), "frontier is a JSON object"),
        (lambda d: d["steps"][0].update(predicted_loss="low"), "predicted_loss is 'low'"),
        (lambda d: d["steps"][0].update(predicted_kl=[]), "predicted_kl is a list"),
    ],
)
def test_damage_is_named(change: Callable[[Any], object], message: str, tmp_path: Path) -> None:
    write_results(tmp_path, load_run(written(tmp_path, ON_PATH)))
    document = json.loads((tmp_path / "pattern.json").read_text())
    change(document)
    (tmp_path / "pattern.json").write_text(json.dumps(document))
    with pytest.raises(PatternError, match=f"is damaged .*{re.escape(message)}"):
        load_pattern_file(tmp_path / "pattern.json")


def test_what_exact_greedy_would_take_is_checked(tmp_path: Path) -> None:
    told = fisher_events(ON_PATH)
    told[0]["exact"] = {"candidate_evaluations": 100, "layer_evaluations": "many"}
    with pytest.raises(Exception, match="layer_evaluations is 'many'"):
        RunRecord.replay(told)


def test_one_sequence_has_no_errors(tmp_path: Path) -> None:
    record = load_run(written(tmp_path, MadeUpRun(num_sequences=1, num_shared=3)))
    write_results(tmp_path, record)
    assert json.loads((tmp_path / "pattern.json").read_text())["frontier"][1]["kl_std_err"] is None
    assert len(load_pattern_file(tmp_path / "pattern.json").frontier) == len(record.frontier())
    assert "nan" not in (tmp_path / "report.html").read_text().replace("provenance", "")


def test_the_cost_counts_each_pattern_once(off_path: RunView) -> None:
    record = off_path.record
    told = cost(record)
    assert told["candidate_evaluations"] == len(record.nll) - 4  # all F and three uniform ones
    assert told["table_layer_evaluations"] == 16 * 5
    assert (told["table_seconds"], told["exact_layer_evaluations"]) == (3.0, 2000)
    parts = sum(len(patterns) for patterns in record.asked.values()) * 8
    assert told["layer_evaluations"] == 80 + parts
    text = sentences.table_cost(record)
    assert text.startswith(
        f"{80 + parts} layer evaluations, as many as in {(80 + parts) / 16:.1f} forwards (table 80, "
    )
    assert "exact greedy takes 2,000 for as many flips (counted, not run)" in text


def test_the_parts_of_the_cost_add_up() -> None:
    record = fisher_record(OFF_PATH, heldout=True)
    spent = {**record.fisher.measuring, "table": record.fisher.layer_sequences}
    assert set(spent) == {"baseline and uniform", "single flips", "nested path", "rounds", "table"}
    assert record.heldout is not None
    assert sum(spent.values()) + record.heldout.layer_sequences == record.layer_sequences
    assert ", held out " in sentences.table_cost(record)


def test_csv_has_what_was_predicted(off_path: RunView) -> None:
    rows = list(csv.DictReader(io.StringIO(curve_csv(off_path))))
    more = ("kl", "kl_std_err", "predicted_loss", "predicted_kl")
    assert tuple(rows[0]) == (*CSV_COLUMNS[:-1], *more, CSV_COLUMNS[-1])
    assert [row["pattern"] for row in rows[1:]] == off_path.record.proposals[0]
    assert (rows[0]["kl"], rows[0]["predicted_loss"], rows[0]["predicted_kl"]) == ("0.0", "", "")
    for row in rows[1:]:
        known = fisher_of(off_path).of(Pattern(row["pattern"]))
        assert known is not None
        assert float(row["kl"]) == known.measured.kl.delta
        assert float(row["predicted_loss"]) == off_path.points[0].loss + known.predicted.loss.delta


# --- words ------------------------------------------------------------------------------------------------------------


def test_where_the_pattern_was_found(on_path: RunView, off_path: RunView) -> None:
    assert sentences.found_where(on_path).endswith("with 4 F layers that were measured, none is clearly better.")
    found, path = off_path.record.pattern.letters, off_path.record.proposals[0][-1]
    change = off_path.record.difference(found, path)
    text = sentences.found_where(off_path)
    number = next(n for n, letters in enumerate(off_path.record.proposals) if found in letters)
    assert number >= 1
    assert text.startswith(
        f"This pattern is not on the nested path (round {number}): its loss minus that of the path’s"
    )
    assert f"{change.delta:+.4f}"[:6] in text and change.delta < 0
    heldout = view_of(OFF_PATH, heldout=True)
    assert sentences.found_where(heldout).endswith("; held-out sequences chose among the best.")


def test_headlines(on_path: RunView) -> None:
    text = sentences.headline(on_path)
    assert text.startswith("4 of 16 layers keep their indexer (25%); the loss rises by ")
    assert ". The KL to the all-F baseline comes to " in text
    by_kl = sentences.headline(view_of(ON_PATH, objective="kl"))
    assert ". Chosen by the KL to the all-F baseline, which comes to " in by_kl


@pytest.mark.parametrize(
    ("until", "words"),
    [
        ("table", "The baseline is not scored yet"),
        ("baseline", "The baseline is not scored yet"),
        ("flips", "Not finished; table made: 16 of 16 layers"),
        ("proposal", "Not finished; table made: 16 of 16 layers"),
        ("commits", "Not finished; path proposed: 16 of 16 layers"),
        ("second commit", "Not finished; nested path measured: 15 of 16 layers"),
        ("finalists", "Not finished; nested path measured: 4 of 16 layers"),
        ("round", "Not finished; in round 1: 4 of 16 layers"),
        ("choice", "Not finished; in round LAST: 4 of 16 layers"),
        ("end", "Not finished; in round LAST: 4 of 16 layers"),
    ],
)
def test_unfinished_runs_are_shown_as_far_as_they_are(until: str, words: str, tmp_path: Path) -> None:
    run = written(tmp_path / "run", OFF_PATH, until)
    record = load_run(run)
    words = words.replace("LAST", str(len(record.proposals) - 1))
    assert sentences.headline(view_run(record)).startswith(words)
    write_report([run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert Page(text).open == []
    assert ("What it costs to borrow" in text) is (until != "table")
    assert ("Predicted and measured" in text) is (until not in ("table", "baseline"))
    assert ("The single flips, layer by layer" in text) is (until not in ("table", "baseline", "flips"))
    assert "This pattern is not on the nested path" not in text or until == "end"
    with pytest.raises(ReportError, match="is not finished"):
        model_card([run])
    terminal_of(record)


def terminal_of(record: RunRecord) -> list[str]:
    out = io.StringIO()
    Console(width=80, file=out).print(summary_table(record))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    return lines


def test_the_terminal_shows_loss_and_kl(off_path: RunView) -> None:
    record = off_path.record
    lines = terminal_of(record)
    assert record.pattern.letters in lines
    assert any(line.startswith("searched, off the path") for line in lines)
    assert any(line.startswith("nested path ") for line in lines)
    assert not any("…" in line for line in lines)
    for commit in record.commits:
        assert any(line.lstrip().startswith(f"{commit.step} ") and commit.pattern in line for line in lines)
    text = " ".join(lines)
    for sentence in (sentences.found_where(off_path), sentences.foretold(fisher_of(off_path))):
        assert sentence in " ".join(text.split())
    assert "tied" not in text and "tie " not in text
    assert len(terminal_of(fisher_record(MadeUpRun(num_layers=40, num_shared=30, num_sequences=3)))) < 60


# --- pictures ---------------------------------------------------------------------------------------------------------


def containers(figure: Any) -> dict[str, Any]:
    return {container.get_label(): container for container in figure.axes[0].containers}


@pytest.mark.parametrize("name", ["loss", "kl"])
def test_the_scatter_shows_each_measured_pattern_once(off_path: RunView, name: str) -> None:
    fisher = fisher_of(off_path)
    figure = fisher_page.foretold(fisher, name, off_path.record.pattern)
    drawn = containers(figure)
    assert set(drawn) == set(fisher_page.PLURALS.values())
    for kind, label in fisher_page.PLURALS.items():
        some = [known for known in fisher.measured if known.kind == kind]
        points = drawn[label].lines[0].get_xydata().tolist()
        assert points == [[getattr(known.predicted, name).delta, getattr(known.measured, name).delta] for known in some]
        across, up = (lines.get_segments() for lines in drawn[label].lines[2])
        for known, bar in zip(some, across, strict=True):
            assert bar[1][0] - bar[0][0] == pytest.approx(2 * getattr(known.predicted, name).std_err)
        for known, bar in zip(some, up, strict=True):
            assert bar[1][1] - bar[0][1] == pytest.approx(2 * getattr(known.measured, name).std_err)
    found = fisher.of(off_path.record.pattern)
    (circle,) = (line for line in figure.axes[0].lines if line.get_label() == "pattern found")
    assert found is not None
    assert circle.get_xydata().tolist() == [[getattr(found.predicted, name).delta, getattr(found.measured, name).delta]]
    flips = [known for known in fisher.measured if known.kind == FLIP]
    costliest = sorted(flips, key=lambda flip: -getattr(flip.measured, name).delta)[: fisher_page.NAMED]
    assert [text.get_text() for text in figure.axes[0].texts] == [str(flip.layer) for flip in costliest]
    assert canvas.svg(figure, "run-1-kl", "scatter", "t", "d").startswith("<svg")


def test_axes_are_logarithmic_where_all_is_above_nothing(off_path: RunView) -> None:
    fisher = fisher_of(off_path)
    found = off_path.record.pattern
    assert fisher_page.foretold(fisher, "loss", found).axes[0].get_xscale() == "symlog"
    assert fisher_page.foretold(fisher, "kl", found).axes[0].get_xscale() == "log"
    nothing = replace(fisher.measured[0].measured, kl=Difference(0.0, 0.0))
    without = replace(fisher, measured=(replace(fisher.measured[0], measured=nothing), *fisher.measured[1:]))
    assert fisher_page.foretold(without, "kl", found).axes[0].get_yscale() == "symlog"


def test_the_table_is_drawn_with_the_source_of_each_layer(off_path: RunView) -> None:
    fisher, pattern = fisher_of(off_path), off_path.record.pattern
    for figure in fisher_page.pair_costs(fisher, pattern):
        (outline,) = (patch for patch in figure.axes[0].patches if not patch.get_fill())
        path = outline.get_path()
        drawn = {(round(x - 0.04), round(y - 0.04)) for x, y in path.vertices[path.codes == path.MOVETO]}
        assert drawn == {(source, layer) for layer, source in enumerate(pattern.sources()) if source != layer}
    scale = figures.kl_scale([0.1, 0.0002, 0.0, 0.03])
    assert scale.labels([0.0, 0.03])[0] == ("h0", "≤ 0.00020")
    assert [scale.css_class(cost) for cost in (0.0, 0.0002, 0.03)] == ["h0", "h0", "h5"]
    assert figures.kl_scale([]).css_class(0.0) == "h0"


def test_the_curve_has_the_kl_and_what_was_found_off_the_path(on_path: RunView, off_path: RunView) -> None:
    figure = figures.curve([off_path])
    drawn = containers(figure)
    kl = drawn["nested path, KL"].lines[0].get_xydata().tolist()
    assert kl == [[point.shared, point.kl.delta if point.kl else None] for point in off_path.points]
    stars = drawn["best measured, off the path"].lines[0].get_xydata().tolist()
    assert stars == [[point.shared, point.difference.delta] for point in off_path.off_path]
    assert len(stars) >= 1
    low, high = figure.axes[0].get_ylim()
    assert all(low < y < high for _, y in kl + stars)
    assert "best measured, off the path" not in containers(figures.curve([on_path]))
    together = figures.curve([on_path, off_path])
    assert [line.get_marker() for line in together.axes[0].lines].count("*") == 1


# --- the page ---------------------------------------------------------------------------------------------------------


def test_page_has_its_parts(off_path: RunView) -> None:
    text = render_page([off_path])
    assert Page(text).open == []
    for part in (
        "Predicted and measured",
        "Rank correlation",
        "The single flips, layer by layer",
        "The finalists",
        "What it costs to borrow",
        "The nested path",
        "the best that was measured with as many",
        "layer evaluations of exact greedy",
        "counted, not run",
        "Stars: the best measured",
    ):
        assert part in text, part
    for part in ("<h3>Ties</h3>", "What each flip would have cost", "naive", "Algorithm 1"):
        assert part not in text, part
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_the_finalists_are_listed_best_first(off_path: RunView) -> None:
    table = fisher_page.finalist_table(off_path, fisher_of(off_path))
    assert table is not None
    rows = [row for _, rows in table.groups for row in rows]
    record = off_path.record
    listed = [row[0].text for row in rows]
    assert listed == sorted((p for p in record.nll if p.count("F") == 4), key=record.loss)
    assert [row[0].badges for row in rows] == [("found",), *[()] * (len(rows) - 1)]
    assert all(row[1].note.startswith("±") and row[4].note.startswith("±") for row in rows)
    heldout = view_of(OFF_PATH, heldout=True)
    table = fisher_page.finalist_table(heldout, fisher_of(heldout))
    assert table is not None and table.heads[-1] == "held-out loss"
    assert [row[-1].text == "–" for _, rows in table.groups for row in rows].count(False) == 4


def test_runs_of_both_kinds_on_one_page_and_a_card(tmp_path: Path) -> None:
    from run_fixtures import write_run

    runs = [written(tmp_path / "fisher", OFF_PATH), tmp_path / "greedy", written(tmp_path / "half", OFF_PATH, "flips")]
    write_run(tmp_path / "greedy", OFF_PATH)
    write_report(runs, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert Page(text).open == []
    assert "Stars: the best measured of their size, off a nested path." in text
    assert "3 runs compared" in text and "fisher, second-order" in text and text.count("<h3>Ties</h3>") == 1
    card = model_card(runs[:2])
    assert "fisher, second-order, by lm-loss" in card
    assert load_run(runs[0]).pattern.letters in card


def test_swaps_behind_a_search_on_the_table(tmp_path: Path) -> None:
    """With little measured there are swaps left to make; loss and KL are told of both sets."""
    run = written(tmp_path / "run", MadeUpRun(seed=7, num_sequences=8), refined=True, rounds=1, finalists=1)
    record = load_run(run)
    assert record.refinement is not None and record.refinement.swaps and record.heldout is not None
    view = view_run(record)
    assert view.refinement is not None and view.off_curve is not None and view.off_curve in view.off_path
    start, end = record.refinement.start.letters, record.pattern.letters
    changes = {row.name: row.change for row in view.refinement.sets}
    assert changes["searched on"] == record.difference(end, start)
    assert changes["searched on, KL"] == record.kl.difference(end, start) != changes["searched on"]
    assert changes["held out, KL"] == record.heldout.kl.difference(end, start)
    assert sentences.found_where(view) == "" and "swaps " in sentences.table_cost(record)
    assert {known.told for known in fisher_of(view).measured if known.kind == FINALIST} >= {"swaps"}
    write_results(run, record)
    told = load_pattern_file(run / "pattern.json").refinement
    assert told is not None and told["kl_delta"] == record.kl.difference(end, start).delta
    text = (run / "report.html").read_text(encoding="utf-8")
    assert Page(text).open == [] and "Refinement by swaps" in text
    assert any(line.startswith("searched, then swaps") for line in terminal_of(record))
    unmoved = fisher_record(MadeUpRun(seed=29, num_sequences=8), refined=True, rounds=1, finalists=1)
    assert "held-out" not in sentences.found_where(view_run(unmoved)) != ""


def test_a_page_of_many_layers_is_no_larger_than_a_picture() -> None:
    made_up = MadeUpRun(num_layers=78, num_shared=58, num_sequences=3)
    assert len(render_page([view_of(made_up)]).encode()) < 1_200_000


@needs_browser
def test_browser_draws_the_page_without_a_console_message(tmp_path: Path) -> None:
    run = written(tmp_path / "run", OFF_PATH)
    write_results(run, load_run(run))
    assert console_messages(run / "report.html", tmp_path / "profile") == []
