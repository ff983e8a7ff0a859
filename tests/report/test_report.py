"""The report: its numbers, its files, and its page, opened in a real browser where there is one."""

from __future__ import annotations

import csv
import html
import io
import math
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba

from icsearch.core.errors import JournalError
from icsearch.core.pattern import Pattern
from icsearch.core.pattern_file import load_pattern_file
from icsearch.core.statistics import Difference
from icsearch.engines.table import ENGINES
from icsearch.report import canvas, figures, numbers
from icsearch.report.page import provenance, render_page, run_section, strip
from icsearch.report.sentences import headline, kink_sentence
from icsearch.report.tables import Cell, Table, minus
from icsearch.report.terminal import summary_table
from icsearch.report.view import RunView, find_kink, view_run
from icsearch.report.write import CSV_COLUMNS, ReportError, curve_csv, model_card, write_report, write_results
from icsearch.runs.journal import Journal
from icsearch.runs.record import JOURNAL_NAME, RunRecord, load_run
from icsearch.runs.results import guessing_notes
from run_fixtures import MadeUpRun, events, write_run

HOSTILE = "</style><script>alert(1)</script><img src=x onerror=\"alert('&')\">"


def rows_of(table: Table) -> list[tuple[Cell, ...]]:
    return [row for _, rows in table.groups for row in rows]


def view_of(made_up: MadeUpRun, name: str = "") -> RunView:
    return view_run(RunRecord.replay(events(made_up)), name)


@pytest.fixture(scope="module")
def small() -> RunView:
    return view_of(MadeUpRun())


@pytest.fixture(scope="module")
def staged() -> RunView:
    return view_of(MadeUpRun(num_layers=40, num_shared=24, stages=4, num_sequences=5))


@pytest.fixture(scope="module")
def unfinished() -> RunView:
    return view_of(MadeUpRun(stop_after=5))


# --- the kink -------------------------------------------------------------------------------------------------------


def test_kink_of_two_lines_is_found_exactly() -> None:
    xs = [float(x) for x in range(21)]
    kink = find_kink(xs, [0.01 * x + 0.2 * max(0, x - 13) for x in xs])
    assert kink is not None
    assert kink.x == 13
    assert kink.slope_before == pytest.approx(0.01)
    assert kink.slope_after == pytest.approx(0.21)
    assert kink.fit[1] == pytest.approx((13, 0.13))


def test_kink_with_noise_and_an_offset() -> None:
    noise = random.Random(1)
    xs = [float(x) for x in range(3, 40)]
    kink = find_kink(xs, [1 + 0.1 * max(0, x - 25) + noise.gauss(0, 0.01) for x in xs])
    assert kink is not None
    assert abs(kink.x - 25) <= 1


@pytest.mark.parametrize(
    "curve",
    [
        lambda x: 0.0,
        lambda x: 0.3 * x + 1,
        lambda x: 0.2 * x + 0.05 * math.sin(7 * x),
        lambda x: math.sqrt(x),  # bends, but flattens
        lambda x: min(x, 10.0),
    ],
)
def test_no_clear_kink(curve: object) -> None:
    xs = [float(x) for x in range(21)]
    assert find_kink(xs, [curve(x) for x in xs]) is None  # type: ignore[operator]


def test_too_few_points_for_a_kink() -> None:
    assert find_kink([0, 1, 2, 3], [0, 0, 1, 2]) is None
    assert find_kink([], []) is None


# --- numbers and scales ---------------------------------------------------------------------------------------------


def test_numbers_have_the_digits_of_their_error() -> None:
    assert numbers.with_error(0.041234, 0.0035) == "+0.0412 ± 0.0035"
    assert numbers.with_error(-0.000021, 0.00018) == "-0.00002 ± 0.00018"
    assert numbers.with_error(12.87, 1.1) == "+12.9 ± 1.1"
    assert numbers.with_error(0.5, math.nan) == "+0.5000"
    assert numbers.with_error(0.5, 0.0) == "+0.5000 ± 0.0000"


def test_other_numbers() -> None:
    assert numbers.percent(0.25) == "25%"
    assert numbers.percent(0.0625) == "6.2%"
    assert numbers.count(12345.0) == "12,345"
    assert numbers.count(10.5) == "10.5"
    assert [numbers.duration(s) for s in (4.21, 48, 200, 18720)] == ["4.2 s", "48 s", "3 min 20 s", "5 h 12 min"]
    assert [numbers.compact(v) for v in (0.0, 0.00042, 0.0131, 1.52, 151.0)] == ["0", "0.00042", "0.013", "1.5", "151"]
    assert minus("-0.1 (all-F at -.2, 1-2)") == "−0.1 (all-F at −.2, 1-2)"


def test_cost_scale_is_neutral_within_the_noise_and_logarithmic_beyond() -> None:
    scale = figures.CostScale(0.001)
    costs = (0.0, 0.001, -0.001, 0.0011, 0.003, 0.01, 0.0101, 1e9, 0.02, -0.02, -1e9)
    assert [scale.css_class(c) for c in costs] == [
        "h0", "h0", "h0", "h1", "h1", "h2", "h3", "h8", "h3", "c3", "c4",
    ]  # fmt: skip
    assert figures.cost_scale([1.0], [0.0012, math.nan, 0.003, 0.0001]).noise == 0.001
    assert figures.cost_scale([0.5, 3.0], [math.nan]).css_class(3.0) == "h8"


def test_a_legend_goes_from_the_lowest_class_to_the_highest() -> None:
    scale = figures.CostScale(0.001)
    assert scale.labels([0.002, -0.002]) == [("c1", "≥ -0.0032"), ("h0", "within ±0.0010"), ("h1", "≤ 0.0032")]
    assert scale.labels([1e9, -1e9])[0] == ("c4", "< -0.032")
    assert scale.labels([1e9, -1e9])[-1] == ("h8", "> 3.2")
    assert len(scale.labels([1e9, -1e9])) == 13


# --- the numbers of a run -------------------------------------------------------------------------------------------


def test_points_are_the_curve(small: RunView) -> None:
    assert [point.step for point in small.points] == list(range(13))
    assert [point.shared for point in small.points] == list(range(13))
    assert small.points[0].loss == small.record.loss("F" * 16)
    assert small.final.pattern == small.record.pattern


def test_cells_are_the_costs_to_the_pattern_before_the_step(small: RunView) -> None:
    assert len(small.cells) == sum(15 - step for step in range(12))
    before = small.points[3].pattern
    for cell in (cell for cell in small.cells if cell.step == 4):
        expected = small.record.loss(before.flip(cell.layer).letters) - small.record.loss(before.letters)
        assert cell.cost.delta == pytest.approx(expected, abs=1e-12)
    committed = [cell.layer for cell in small.cells if cell.committed]
    assert committed == [commit.layer for commit in small.record.commits]


def test_the_costs_of_the_steps_add_up_to_the_cost_of_the_pattern(small: RunView) -> None:
    costs = [cell.cost for cell in small.cells if cell.committed]
    assert len(costs) == 12
    assert sum(cost.delta for cost in costs) == pytest.approx(small.final.difference.delta, abs=1e-12)


def test_references_are_paired_with_the_searched_pattern_of_their_size(small: RunView) -> None:
    by_name = {reference.label: reference for reference in small.references}
    assert list(by_name) == ["uniform 1/2", "uniform 1/4", "uniform 1/8"]
    quarter = by_name["uniform 1/4"]
    assert small.same_retention is quarter
    assert quarter.searched is small.final
    assert quarter.avoided is not None
    assert 0 < quarter.avoided < 1
    assert quarter.searched_minus_uniform is not None
    assert quarter.searched_minus_uniform.delta < 0
    assert by_name["uniform 1/8"].searched is None


def test_ties_are_those_of_the_journal(small: RunView) -> None:
    tied = {tie.step: tuple(layer for layer, _ in tie.others) for tie in small.ties}
    assert tied == {commit.step: commit.ties for commit in small.record.commits if commit.ties}
    assert tied, "the made-up run is meant to have ties"
    assert all(difference.is_tie for tie in small.ties for _, difference in tie.others)


def test_headline_carries_numbers_and_errors(small: RunView, unfinished: RunView) -> None:
    final = small.final.difference
    text = headline(small)
    assert text.startswith("4 of 16 layers keep their indexer (25%); the loss rises by ")
    assert numbers.with_error(final.delta, final.std_err, sign=False) in text
    assert "The uniform pattern with as many F layers costs" in text
    assert headline(unfinished).startswith("Not finished; after 5 flips: 11 of 16")


def against_uniform(view: RunView, uniform: Difference, searched: Difference) -> str:
    """The headline where the final pattern and the uniform one with as many F layers cost that."""
    final = replace(view.final, difference=searched)
    reference = view.same_retention
    assert reference is not None
    reference = replace(reference, difference=uniform, searched=final)
    return headline(replace(view, points=(*view.points[:-1], final), references=(reference,)))


@pytest.mark.parametrize(
    ("uniform", "searched", "words"),
    [
        ((0.4, 0.03), 0.1, "costs +0.400 ± 0.030: the search avoids 75% of that."),
        ((0.4, 0.03), -0.016, "costs +0.400 ± 0.030: the search avoids all of that."),
        ((0.4, 0.03), 0.5, "costs +0.400 ± 0.030."),
        ((-0.002, 0.003), -0.004, "costs nothing measurable (-0.0020 ± 0.0030)."),
        ((0.005, 0.003), -0.004, "costs nothing measurable (+0.0050 ± 0.0030)."),
        ((-0.002, math.nan), -0.004, "changes the loss by -0.0020."),
    ],
)
def test_what_is_avoided_is_a_cost(small: RunView, uniform: tuple[float, float], searched: float, words: str) -> None:
    text = against_uniform(small, Difference(*uniform), Difference(searched, 0.001))
    assert text.endswith(f"The uniform pattern with as many F layers {words}")


@pytest.mark.parametrize("num_shared", [1, 12])
def test_the_page_counts_and_spaces_its_sentences(num_shared: int) -> None:
    text = render_page([view_of(MadeUpRun(num_shared=num_shared))])
    assert not re.search(r"\b1 (steps|flips|layers|sequences)\b", text)
    assert "sequences. The naive search" in " ".join(text.split())
    assert ("<summary>The step with its loss</summary>" in text) == (num_shared == 1)


def test_one_sequence_has_no_error_and_claims_none() -> None:
    view = view_of(MadeUpRun(num_sequences=1, num_shared=3))
    assert "one sequence: no standard error" in headline(view)
    assert "nan" not in render_page([view]).replace("provenance", "")


def test_baseline_not_scored_yet() -> None:
    view = view_run(RunRecord.replay(events(MadeUpRun())[:1]))
    assert view.points == ()
    assert "not scored yet" in headline(view)
    assert "not scored yet" in render_page([view])
    assert "What each flip" not in render_page([view])


# --- pictures -------------------------------------------------------------------------------------------------------


def xdata(artist: Any) -> list[float]:
    return [float(x) for x in artist.get_xdata()]


def lines(figure: Any, marker: str) -> list[Any]:
    """The marks of a picture with this sign, a line each."""
    return [line for line in figure.axes[0].lines if line.get_marker() == marker]


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def corners(axes: Any, colour: str) -> set[tuple[float, float]]:
    """Upper left corners of the cells with this colour, or of the outlined ones."""
    found = set()
    for patch in axes.patches:
        own = patch.get_facecolor() if patch.get_fill() else "outline"
        if own == (to_rgba(colour) if colour != "outline" else colour):
            path = patch.get_path()
            found |= {(round(x - 0.04, 3), round(y - 0.04, 3)) for x, y in path.vertices[path.codes == path.MOVETO]}
    return {corner for corner in found if corner[0] >= 0}


def test_the_curve_is_that_of_the_points_with_their_errors(small: RunView) -> None:
    axes = figures.curve([small]).axes[0]
    (curve,) = lines(axes.figure, "o")
    assert xdata(curve) == [point.shared for point in small.points]
    assert list(curve.get_ydata()) == [point.difference.delta for point in small.points]
    bars = axes.collections[0].get_segments()
    for (low, high), point in zip(bars, small.points, strict=True):
        assert high[1] - low[1] == pytest.approx(2 * point.difference.std_err)
        assert axes.get_ylim()[0] <= low[1] <= high[1] <= axes.get_ylim()[1]
    assert axes.get_title(loc="left").startswith("made-up/model: loss above baseline (2.")
    assert axes.get_xlabel() == "shared layers (S) of 16"
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()][-1] == "uniform, same batches"


def test_far_uniform_patterns_are_named_at_the_edge(small: RunView) -> None:
    figure = figures.curve([small])
    (inside,) = lines(figure, "D")
    (edge,) = lines(figure, "^")
    assert 8.0 in xdata(inside) and xdata(edge) == [14.0]
    by_name = {text.split(":")[0]: text for text in texts(figure)}
    assert "±" in by_name["uniform 1/8"] and "±" not in by_name["uniform 1/2"]


def test_labels_at_the_edge_lie_on_nothing_and_within_the_picture(small: RunView) -> None:
    """A curve that stays below its baseline, a uniform pattern near it, and two far above it."""
    points = tuple(replace(p, difference=Difference(-0.002 * (p.step > 0), 0.0025)) for p in small.points)
    costs = (0.0025, 0.43, 0.39)
    references = tuple(
        replace(r, difference=Difference(cost, 0.0025)) for r, cost in zip(small.references, costs, strict=True)
    )
    for size in (figures.CHART, figures.NARROW_CHART):
        figure = figures.curve([replace(small, points=points, references=references, kink=None)], size)
        FigureCanvasAgg(figure).draw()
        axes = figure.axes[0]
        labels = [text for text in axes.texts if text.get_text().startswith("uniform")]
        assert [("±" in text.get_text()) for text in labels] == [False, True, True]
        above = [text.get_window_extent() for text in labels[1:]]
        assert not above[0].overlaps(above[1])
        highest = axes.transData.transform((0, 0.005))[1]  # the end of the error bar that is shown highest
        assert all(box.y0 >= highest and box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in above)


def test_the_kink_is_drawn_where_it_is(small: RunView) -> None:
    assert small.kink is not None
    dashed = [line for line in figures.curve([small]).axes[0].lines if line.get_linestyle() == "--"]
    assert xdata(dashed[0]) == [x for x, _ in small.kink.fit]
    assert set(xdata(dashed[1])) == {small.kink.x}
    assert f"kink: {round(small.kink.x)} shared layers" in texts(figures.curve([small]))
    assert not any("kink" in text for text in texts(figures.curve([replace(small, kink=None)])))


def test_comparison_is_by_share_of_layers(small: RunView, staged: RunView) -> None:
    figure = figures.curve([small, staged])
    curves = lines(figure, "o")
    assert [xdata(curve)[-1] for curve in curves] == pytest.approx([75.0, 60.0])
    assert [len(xdata(curve)) for curve in curves] == [13, 25]
    assert len({curve.get_color() for curve in curves}) == 2
    assert figure.axes[0].get_xlabel() == "shared layers (S), % of all"


def test_every_run_is_in_the_legend(small: RunView, staged: RunView) -> None:
    figure = figures.curve([replace(small, name="_hidden"), replace(staged, name="$x$")])
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["_hidden", "$x$"]


def test_heatmap_has_a_cell_for_each_candidate_in_the_colour_of_its_cost(small: RunView) -> None:
    axes, scale = figures.heatmap(small).axes[0], figures.run_scale(small)
    for css in {scale.css_class(cell.cost.delta) for cell in small.cells}:
        expected = {(cell.layer, cell.step - 1) for cell in small.cells if scale.css_class(cell.cost.delta) == css}
        assert corners(axes, canvas.PALETTE[css]) == expected
    assert corners(axes, "outline") == {(cell.layer, cell.step - 1) for cell in small.cells if cell.committed}
    (dots,) = lines(axes.figure, ".")
    assert len(xdata(dots)) == sum(cell.tied for cell in small.cells) > 0
    reached = {layer for layer, _ in corners(axes, canvas.PALETTE["full"])}
    assert reached == set(small.final.pattern.full_layers)


def test_the_numbers_of_the_heatmap_stand_in_a_table(small: RunView) -> None:
    table = run_section(small, 1).tables["heat"]
    assert table is not None
    assert len(rows_of(table)) == 12 and len(table.heads) == 17
    for cell in small.cells:
        number = rows_of(table)[cell.step - 1][cell.layer + 1]
        assert number.title == numbers.difference(cell.cost)
        assert float(number.text.rstrip("=")) == pytest.approx(cell.cost.delta, rel=0.06, abs=1e-8)
        assert (number.css == "committed") == cell.committed and number.text.endswith("=") == cell.tied
    assert sum(cell.text != "" for row in rows_of(table) for cell in row[1:]) == len(small.cells)


def test_pipeline_stages_share_a_row_in_each_round(staged: RunView) -> None:
    assert [figures.step_rows(staged)[step] for step in range(1, 9)] == [0, 0, 0, 0, 1, 1, 1, 1]
    axes, scale = figures.heatmap(staged).axes[0], figures.run_scale(staged)
    coloured = [corners(axes, canvas.PALETTE[css]) for css, _ in scale.labels(c.cost.delta for c in staged.cells)]
    assert sum(map(len, coloured)) == len(staged.cells)
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["1–4", "5–8"]
    borders = [line for line in axes.lines if line.get_marker() == "None" and len(set(xdata(line))) == 1]
    assert [xdata(line)[0] for line in borders] == [10, 20, 30]


@pytest.mark.parametrize("draw", [lambda view: figures.curve([view]), figures.heatmap])
def test_pictures_are_the_same_bytes_and_leave_no_settings_behind(small: RunView, draw: Any) -> None:
    before = dict(matplotlib.rcParams)
    assert canvas.png(draw(small)) == canvas.png(draw(small))
    first, again = (canvas.svg(draw(small), "run-1", "chart", "title", "words") for _ in range(2))
    assert first == again
    assert dict(matplotlib.rcParams) == before
    assert not Gcf.figs  # pyplot knows of none


def test_a_picture_on_a_page_has_its_own_ids_the_pages_colours_and_words(small: RunView) -> None:
    one, two = (canvas.svg(figures.curve([small]), name, "chart", "A & B", "words") for name in ("run-1", "run-2"))
    ids = [set(re.findall(r' id="([^"]*)"', text)) for text in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    for text, own in zip((one, two), ids, strict=True):
        used = re.findall(r'href="#([^"]*)"', text) + re.findall(r"url\(#([^)]*)\)", text)
        assert used and set(used) <= own
    assert "<title" in one and "A &amp; B</title>" in one and "words</desc>" in one
    assert "var(--s0)" in one and "#0072b2" not in one
    assert "<style" not in one and "DejaVu" not in one and "xmlns" not in one
    assert "shared layers (S) of 16</text>" in one


@pytest.mark.parametrize("name", [HOSTILE, "$\\alpha$ and $", "a\x00b\x1b[31m\udce4", "x" * 500, "名前"])
def test_any_name_is_text_in_a_picture(name: str) -> None:
    told = events(MadeUpRun(num_shared=3))
    told[0]["model"]["name_or_path"] = name
    view = view_run(RunRecord.replay(told), name)
    figure = figures.curve([view])
    title = figure.axes[0].get_title(loc="left")
    assert "�" not in title and title.isprintable() and not figure.axes[0].title.get_parse_math()
    for drawn in (figure, figures.curve([view, view])):
        text = canvas.svg(drawn, "a", "chart", "t", "d")
        assert "<script" not in text and "<img" not in text
    if "alpha" in name:
        assert "$\\alpha$ and $: loss" in canvas.svg(figure, "a", "chart", "t", "d")
    assert canvas.png(figure).startswith(b"\x89PNG")


def test_strip_rows_are_the_stages(staged: RunView) -> None:
    rows = strip(staged)
    assert [label for label, _ in rows] == [f"stage {i + 1} · layers {10 * i}–{10 * i + 9}" for i in range(4)]
    assert "".join(cell.text for _, cells in rows for cell in cells) == staged.record.pattern.letters


def test_native_shared_layers_are_marked() -> None:
    ((_, cells),) = strip(view_of(MadeUpRun(native_shared=(3, 7), num_shared=4)))
    assert [layer for layer, cell in enumerate(cells) if "native" in cell.css] == [3, 7]
    assert "as the checkpoint itself does" in cells[3].title


# --- files ----------------------------------------------------------------------------------------------------------


def test_write_results(tmp_path: Path) -> None:
    record = write_run(tmp_path)
    written = write_results(tmp_path, record)
    assert [path.name for path in written] == ["pattern.json", "curve.csv", "curve.png", "report.html"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([JOURNAL_NAME, *(p.name for p in written)])
    assert load_pattern_file(tmp_path / "pattern.json").pattern == record.pattern
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_the_same_bytes_from_the_saved_journal(tmp_path: Path) -> None:
    first = {p.name: p.read_bytes() for p in write_results(tmp_path, write_run(tmp_path))}
    again = {p.name: p.read_bytes() for p in write_results(tmp_path, load_run(tmp_path))}
    assert first == again


def test_csv_round_trip(small: RunView) -> None:
    rows = list(csv.DictReader(io.StringIO(curve_csv(small))))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert (rows[0]["step"], rows[0]["layer"], rows[0]["delta"]) == ("0", "", "0.0")
    for row, point in zip(rows, small.points, strict=True):
        assert float(row["loss"]) == point.loss
        assert float(row["delta"]) == point.difference.delta
        assert float(row["std_err"]) == point.difference.std_err
        assert Pattern(row["pattern"]) == point.pattern
        assert int(row["full_layers"]) == point.full


def test_results_need_a_scored_baseline(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no complete loss"):
        write_results(tmp_path, RunRecord.replay(events(MadeUpRun())[:1]))
    assert list(tmp_path.iterdir()) == []


def test_write_report_of_several_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "one", MadeUpRun(name="made-up/one"))
    write_run(tmp_path / "two", MadeUpRun(name="made-up/two", num_layers=20, stop_after=4, seed=3))
    write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "all.html")
    page = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert "2 runs compared" in page
    assert "These runs are on different models" in page
    assert page.count('class="run"') == 2
    assert page.count(">unfinished</span>") == 2  # in the table and in the run's section


def test_an_engine_that_cannot_be_given_the_pattern_hides_no_other(tmp_path: Path) -> None:
    write_run(tmp_path / "run", MadeUpRun(model_type="minimax_m3_vl"))
    write_report([tmp_path / "run"], tmp_path / "all.html")
    page = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert page.count("vLLM reads no letters for MiniMax M3") == 1
    assert "<h4>ATOM</h4>" in page and "<h4>vLLM</h4>" not in page
    assert "<h4>SGLang</h4>" not in page  # it is told by other means, as the table of engines says


@pytest.mark.parametrize("model_type", ["glm_moe_dsa", "hy_v4", "axk2"])
def test_a_page_and_a_card_name_the_same_engines(model_type: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", MadeUpRun(model_type=model_type))
    write_report([tmp_path / "run"], tmp_path / "all.html")
    page, card = (tmp_path / "all.html").read_text(encoding="utf-8"), model_card([tmp_path / "run"])
    assert re.findall(r"<h4>([^<]+)</h4>\s*<p class", page) == re.findall("^With ([^,]+),", card, re.MULTILINE)
    folded = [engine for engine in ENGINES.values() if f"<summary>{engine.title}</summary>" in page]
    assert {engine.name for engine in folded} == set(re.findall(r"\(`([\w-]+)`\)", card))
    assert ("No engine is known" in page) is ("No engine is known" in card) is (model_type == "axk2")


def test_a_page_of_ours_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    out, longest = tmp_path / "report.html", "m" * 5000
    write_run(tmp_path / "one", MadeUpRun(name=longest))
    write_run(tmp_path / "two", MadeUpRun(name="made-up/two"))
    write_report([tmp_path / "one"], out)
    write_report([tmp_path / "two"], out)
    page = out.read_text(encoding="utf-8")
    assert "made-up/two" in page and longest not in page
    for own in ("<title>mine</title>", "", "# icsearch report"):
        out.write_text(own)
        with pytest.raises(ReportError, match="exists and is no page of icsearch: give another --out"):
            write_report([tmp_path / "two"], out)
        assert out.read_text() == own


def test_bad_input(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with pytest.raises(JournalError, match="holds no journal"):
        write_report([tmp_path], tmp_path / "out.html")
    with pytest.raises(JournalError, match="holds no journal"):
        write_report([tmp_path / "nowhere"], tmp_path / "out.html")
    with pytest.raises(ReportError, match="create it"):
        write_report([tmp_path / "run"], tmp_path / "missing" / "out.html")
    with pytest.raises(ReportError, match="is a directory"):
        write_report([tmp_path / "run"], tmp_path)
    with pytest.raises(ReportError, match="no run to report on"):
        write_report([], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_unknown_journal_version(tmp_path: Path) -> None:
    Journal(tmp_path / JOURNAL_NAME).append({"event": "start", "format": "icsearch.journal/99"})
    with pytest.raises(JournalError, match=r"icsearch\.journal/99"):
        write_report([tmp_path], tmp_path / "out.html")


def test_damaged_start_event(tmp_path: Path) -> None:
    Journal(tmp_path / JOURNAL_NAME).append({"event": "start", "format": "icsearch.journal/1"})
    with pytest.raises(JournalError, match="damaged"):
        write_report([tmp_path], tmp_path / "out.html")


def test_report_and_export_start_without_heavy_imports() -> None:
    code = (
        "import sys, icsearch.report.write, icsearch.engines.export\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'jinja2', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the terminal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made_up",
    [
        MadeUpRun(),
        MadeUpRun(num_layers=78, num_shared=58, stages=4, num_sequences=4),
        MadeUpRun(stop_after=0),
        MadeUpRun(num_sequences=1, num_shared=2),
    ],
)
def test_summary_fits_80_columns_without_a_terminal(made_up: MadeUpRun) -> None:
    from rich.console import Console

    out = io.StringIO()
    record = RunRecord.replay(events(made_up))
    Console(width=80, file=out).print(summary_table(record))
    text = out.getvalue()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert record.pattern.letters in text.splitlines()
    assert len(text.splitlines()) < 50


def test_the_steps_of_a_search_by_kl_show_a_pattern_of_16_layers() -> None:
    """With a column more, and still within 80 columns."""
    from rich.console import Console

    out, told = io.StringIO(), events(MadeUpRun())
    told[0]["options"]["objective"] = "kl"
    for event in told:
        if event["event"] == "losses":
            event["kl"] = [[0.0001 * value for value in sums] for sums in event["nll"]]
    record = RunRecord.replay(told)
    Console(width=80, file=out).print(summary_table(record))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for commit in record.commits:
        assert any(line.lstrip().startswith(f"{commit.step} ") and commit.pattern in line for line in lines)


# --- the page -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, attributes that could load something, and whether tags are closed in order."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in {"src", "href", "xlink:href", "srcset", "data", "action"}]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("made_up", [MadeUpRun(), MadeUpRun(num_layers=30, num_shared=20, stages=3, stop_after=7)])
def test_page_is_whole_and_loads_nothing_from_outside(made_up: MadeUpRun) -> None:
    text = render_page([view_of(made_up)])
    page = Page(text)
    assert page.open == []
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not {"script", "iframe", "object", "embed", "img"} & set(page.tags)
    assert page.handlers == []
    assert "@import" not in text
    assert all(target.startswith(("data:", "#")) for target in re.findall(r"url\(['\"]?([^)]*)", text))


@pytest.mark.parametrize(("num_layers", "kilobytes"), [(16, 200), (78, 800)])
def test_a_page_is_no_larger_than_a_picture(num_layers: int, kilobytes: int) -> None:
    made_up = MadeUpRun(num_layers=num_layers, num_shared=3 * num_layers // 4, num_sequences=3)
    assert len(render_page([view_of(made_up)]).encode()) < 1000 * kilobytes


def test_page_has_its_parts(small: RunView) -> None:
    text = render_page([small])
    for part in (
        "In-sample",
        "The loss curve",
        "How the kink is found",
        "Searched against uniform",
        "What each flip would have cost",
        "The order in which layers went",
        "Ties",
        "Put it to use",
        "--hf-overrides",
        "--json-model-override-args",
        "What the search took",
        "Where this comes from",
        "all-F baseline",
        small.record.pattern.letters,
        str(small.start["model"]["fingerprint"]),
        str(small.start["calibration"]["fingerprint"]),
        kink_sentence(small),
    ):
        assert part in text, part


def test_a_loss_that_guessing_would_beat_stands_under_the_headline(small: RunView) -> None:
    (note,) = guessing_notes(9.0, 1024)
    text = html.unescape(render_page([view_of(MadeUpRun(notes=("another note", note)))]))
    assert re.search(r'<p class="headline">[^<]*</p>\s*<p class="warn">Caution: ' + re.escape(note), text)
    assert text.count(note) == 1 and "<li>another note</li>" in text
    assert "Caution" not in render_page([small])


def test_no_kink_is_looked_for_in_too_few_steps(small: RunView) -> None:
    short = view_of(MadeUpRun(num_shared=3))
    assert kink_sentence(short) == "Too few steps for a kink."
    assert "How the kink is found" not in render_page([short])
    assert "Too few" not in kink_sentence(small)


def test_strings_of_the_journal_are_escaped() -> None:
    made_up = MadeUpRun(name=HOSTILE, notes=(HOSTILE,), num_shared=2)
    lines = events(made_up)
    for part in ("calibration", "environment", "options"):
        lines[0][part][HOSTILE] = HOSTILE
    lines[0]["references"] = {HOSTILE: Pattern.uniform(16, Fraction(1, 2)).letters}
    view = view_run(RunRecord.replay(lines), HOSTILE)
    for text in (render_page([view]), render_page([view, view])):
        page = Page(text)
        assert page.open == []
        assert not {"script", "img"} & set(page.tags)
        assert page.handlers == []
        assert "&lt;script&gt;" in text


# --- a real browser -------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome found")


def console_messages(page: Path, profile: Path) -> list[str]:
    """Open a page in headless Chromium, let it draw, and return what it wrote to the console."""
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}",
        "--enable-logging=stderr",
        "--v=0",
        f"--screenshot={profile / 'page.png'}",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert (profile / "page.png").stat().st_size > 0
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
def test_browser_draws_the_report_without_a_console_message(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_results(tmp_path / name, write_run(tmp_path / name))
    write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "both.html")
    # The page's own security policy refuses every outside load, and a refusal is a console message.
    assert console_messages(tmp_path / "one" / "report.html", tmp_path / "profile-1") == []
    assert console_messages(tmp_path / "both.html", tmp_path / "profile-2") == []


@needs_browser
def test_browser_would_tell_of_an_outside_load(tmp_path: Path, small: RunView) -> None:
    page = tmp_path / "page.html"
    outside = '<img src="https://example.org/x.png"><script>1</script>'
    page.write_text(render_page([small]).replace("</main>", outside + "</main>"), encoding="utf-8")
    messages = " ".join(console_messages(page, tmp_path / "profile"))
    assert "example.org" in messages
    assert "script" in messages


# --- notes ------------------------------------------------------------------------------------------------------------


def test_an_exact_search_says_what_it_is(small: RunView) -> None:
    assert "Algorithm 1" in render_page([small])


def test_block_wise_runs_name_their_tie_rule(small: RunView) -> None:
    assert "the earliest token is chosen" not in render_page([small])
    options = {**small.start["options"], "kernels": "blockwise"}
    blockwise = replace(small.record, start={**small.start, "options": options})
    assert "of equal index scores the earliest token is chosen" in render_page([replace(small, record=blockwise)])


def test_long_lists_of_where_it_comes_from_are_cut() -> None:
    digests, layers = [f"{number:016x}" for number in range(24)], list(range(0, 78, 4))
    ((_, rows),) = provenance(("Calibration", {"sequences": digests, "keep_full": layers}), {})
    assert dict(rows)["sequences"] == f"{digests[0]}, {digests[1]}, … (24 in all)"
    ((_, one),) = provenance(("Options", {"patterns": [["full", "F" * 300]]}), {})
    assert dict(one)["patterns"] == str(["full", "F" * 300])
    assert dict(rows)["keep full"] == ", ".join(map(str, layers))  # what somebody chose is there whole
