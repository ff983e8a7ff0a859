"""The reports of evaluations and similarity baselines: numbers, files, pages, the terminal."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report import HOSTILE, Page, console_messages, corners, needs_browser, rows_of, texts, xdata

from eval_fixtures import MadeUpEval, compared_events, dp_events, dp_record, made_up_document, triangles
from icsearch.core.errors import IcsearchError
from icsearch.core.pattern import Pattern
from icsearch.core.statistics import Difference
from icsearch.report import canvas, figures, numbers
from icsearch.report.eval_view import EvalView, view_eval
from icsearch.report.page import estimate_table, eval_section, measured_table, render_page, run_section
from icsearch.report.sentences import (
    compared_reading,
    eval_headline,
    eval_warnings,
    overlap_summary,
    similarity_reading,
)
from icsearch.report.tables import with_note
from icsearch.report.terminal import eval_table, short_verdict, summary_table
from icsearch.report.view import predictions, similarity_sum, view_run
from icsearch.report.write import (
    EVAL_CSV_COLUMNS,
    ReportError,
    eval_csv,
    write_eval_results,
    write_report,
    write_results,
)
from icsearch.runs.evaluation import verdict
from icsearch.runs.journal import Journal
from icsearch.runs.record import JOURNAL_NAME, RunRecord
from icsearch.runs.results import guessing_notes
from icsearch.search.proposals import table_of
from icsearch.search.protocol import LOSS
from icsearch.search.second_order import full_of
from run_fixtures import MadeUpRun, write_run

BARE = MadeUpEval(tasks=False, overlap=False, savings=False, in_sample=(), foreign=())


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return made_up_document()


@pytest.fixture(scope="module")
def view(document: dict[str, Any]) -> EvalView:
    return view_eval(document, "made-up")


def row(view: EvalView, name: str) -> Any:
    return next(row for row in view.rows if row.name == name)


def changed(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy in which every row but the first has these values."""
    copy = json.loads(json.dumps(document))
    for one in copy["rows"][1:]:
        one.update(changes)
    return copy


# --- scales ---------------------------------------------------------------------------------------------------------


def test_share_scale() -> None:
    scale = figures.ShareScale(0.1)
    assert [scale.css_class(v) for v in (1.0, 0.9, 0.899, 0.5, 0.2, 0.1, -1.0)] == [
        "h0", "h0", "h1", "h4", "h7", "h8", "h8",
    ]  # fmt: skip
    assert scale.labels([0.95, 0.1]) == [("h0", "≥ 0.9"), ("h8", "< 0.2")]
    assert scale.labels([]) == []
    assert figures.share_scale([0.84, 1.0]).step == pytest.approx(0.02)
    assert figures.share_scale([1.0]).step == 1e-3
    assert figures.share_scale([]).step == pytest.approx(0.1)


# --- the numbers of an evaluation -----------------------------------------------------------------------------------


def test_rows_are_the_documents(view: EvalView, document: dict[str, Any]) -> None:
    assert view.rows[0].is_baseline
    assert {row.name for row in view.rows} == {row["name"] for row in document["rows"]}
    counts = [row.full for row in view.rows]
    assert counts == sorted(counts, reverse=True)
    assert len(view.gaps) == 6
    assert all(gap.row.full == gap.uniform.full for gap in view.gaps)


def test_headline_is_the_best_at_the_smallest_retention(view: EvalView) -> None:
    best = min((r for r in view.rows if r.full == 2 and r.is_searched), key=lambda r: r.loss)
    assert view.smallest[0] is best
    text = eval_headline(view)
    gap = view.gap_of(best)
    assert gap is not None
    assert gap.closed is not None
    assert text.startswith(
        f"With the pattern “{best.name}”, 2 of 16 layers keep their indexer (12%) and the loss rises by "
    )
    assert f"{numbers.share(gap.closed)} of that gap is closed." in text
    assert "In-sample" not in text


def test_headline_says_that_it_is_in_sample_or_of_another_model() -> None:
    made_up = MadeUpEval(in_sample=("greedy run @1/8",), foreign=("greedy run @1/8",))
    text = eval_headline(view_eval(made_up_document(made_up)))
    assert "In-sample: it was searched on these very batches. The pattern was found on another model." in text


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        ((None, None), "nothing measurable ("),
        ((None, None), "): there is no gap to close"),
        ((1.04, 0.02), ": all of that gap is closed (104% ± 2%)."),
        ((1.04, 0.6), ": 104% ± 60% of that gap is closed, within two standard errors of nothing."),
        ((0.01, 0.02), "within two standard errors of nothing"),
        ((-0.5, 0.02), "uniform is better"),
    ],
)
def test_headline_claims_no_more_than_the_gap(
    document: dict[str, Any], gap: tuple[float | None, float | None], words: str
) -> None:
    copy = json.loads(json.dumps(document))
    for one in copy["gaps"]:
        one["gap_closed"], one["std_err"] = gap
    assert words in eval_headline(view_eval(copy))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"delta": 0.001, "std_err": 0.001}, "within one standard error (+0.0010 ± 0.0010"),
        ({"delta": 0.0015, "std_err": 0.001}, "within two standard errors (+0.0015 ± 0.0010"),
        ({"delta": 0.001, "std_err": 0.001}, "(+0.0010 ± 0.0010 nats per token). "),
        ({"delta": 0.03, "std_err": 0.12}, "(+0.03 ± 0.12 nats per token): too few tokens to exclude a clear loss."),
        ({"delta": -0.1, "std_err": 0.001}, "the loss falls by 0.1000 ± 0.0010"),
        ({"delta": 0.1, "std_err": math.nan}, "one sequence: no standard error"),
    ],
)
def test_headline_claims_no_more_than_the_loss(document: dict[str, Any], changes: Any, words: str) -> None:
    assert words in eval_headline(view_eval(changed(document, **changes)))


def test_headline_without_a_searched_pattern() -> None:
    document = made_up_document()
    document["rows"], document["gaps"] = document["rows"][:1], []
    assert re.match(r"Only the all-F model was evaluated: a loss of \d\.\d{4} nats", eval_headline(view_eval(document)))


def test_no_gap_where_uniform_is_better_than_the_model(document: dict[str, Any]) -> None:
    copy = json.loads(json.dumps(document))
    for row in copy["rows"]:
        if row["method"] == "uniform":
            row.update(delta=-0.00241, std_err=0.00024)
    for one in copy["gaps"]:
        one["gap_closed"] = one["std_err"] = None
    text = eval_headline(view_eval(copy))
    assert "has a lower loss than the all-F model, by 0.00241 ± 0.00024: there is no gap to close." in text
    assert "nothing measurable" not in text
    assert "uniform has a lower loss than all F: no gap to close" in render_page([], [view_eval(copy)])


def test_numbers_as_text() -> None:
    assert numbers.share(Difference(0.473, 0.031)) == "47% ± 3%"
    assert numbers.share(Difference(0.963, 0.004)) == "96.3% ± 0.4%"
    assert numbers.share(Difference(-0.5, 1e-6)) == "-50.0% ± <0.1%"
    assert [numbers.perplexity(v) for v in (8.02, 12345.6, 1e9, math.inf)] == ["8.02", "12,346", "1.0e+09", "∞"]
    assert numbers.shortened("short", 9) == "short"
    assert numbers.shortened("greedy some-long-run @1/4", 12) == "greedy… @1/4"
    assert with_note(Difference(0.0, 0.0)).text == "0"
    assert with_note(Difference(0.5, math.nan)).note == ""


# --- pictures -------------------------------------------------------------------------------------------------------


def marks(figure: Any, view: EvalView) -> dict[str, Any]:
    """The marks of a scatter by the name of their pattern; the unmodified model has none."""
    shown = [
        line for line in figure.axes[0].lines if line.get_marker() not in ("None", None, "") and xdata(line) != [0]
    ]
    places = {round(row.difference.delta, 12): row.name for row in view.rows if not row.is_baseline}
    return {places[round(float(line.get_ydata()[0]), 12)]: line for line in shown}


@pytest.mark.parametrize("size", [figures.CHART, figures.NARROW_CHART])
def test_scatter_holds_every_pattern_with_its_error(view: EvalView, size: tuple[float, float]) -> None:
    figure = figures.scatter(view, size)
    axes, found = figure.axes[0], marks(figure, view)
    assert set(found) == {row.name for row in view.rows[1:]}
    low, high = axes.get_ylim()
    bars = [bar.get_segments()[0] for bar in axes.collections]
    for (start, end), one in zip(
        bars, (row for name, *_ in figures.series(view) for row in view.rows[1:] if row.series == name), strict=True
    ):
        assert end[1] - start[1] == pytest.approx(2 * one.difference.std_err)
        assert low < start[1] <= end[1] < high
    for name, line in found.items():
        assert abs(xdata(line)[0] - row(view, name).shared) < 0.5
        assert axes.get_xlim()[0] < xdata(line)[0] < axes.get_xlim()[1]
        hollow = line.get_markerfacecolor() == canvas.PAPER
        assert hollow == (name == "greedy run @1/4")  # in-sample


def test_the_loss_axis_is_linear_about_zero_and_logarithmic_beyond(view: EvalView) -> None:
    axes, unit = figures.scatter(view).axes[0], figures.eval_scale(view).noise
    at = [axes.transData.transform((0, y))[1] for y in (0, unit / 2, unit, 10 * unit, 100 * unit)]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1])
    assert at[3] - at[2] == pytest.approx(at[4] - at[3])
    assert 0 in axes.get_yticks() and len(axes.get_yticks()) >= 3


def test_only_a_runs_nested_patterns_are_joined(view: EvalView) -> None:
    names = [name for name, *_ in figures.series(view)]
    assert set(names) == {"greedy run", "uniform", "dp-baseline", "published", "letters"}
    joined = [line for line in figures.scatter(view).axes[0].lines if len(xdata(line)) == 3]
    assert [line.get_color() for line in joined] == [figures.series(view)[names.index("greedy run")][2]]
    assert not figures.is_nested_run([row(view, "uniform 1/2"), row(view, "uniform 1/4")])
    assert not figures.is_nested_run([row(view, "greedy run @1/4"), row(view, "greedy run @1/2")])


def test_series_are_told_apart_by_colour_and_named(view: EvalView) -> None:
    names, _, colours = zip(*figures.series(view), strict=True)
    assert len(set(colours)) == len(names)
    assert colours[names.index("uniform")] == figures.SERIES[figures.UNIFORM_SERIES]
    legend = [text.get_text() for text in figures.scatter(view).legends[0].get_texts()]
    assert legend[1:] == list(names) and legend[0].startswith("the all-F model (")


def test_patterns_with_as_many_layers_do_not_hide_each_other(view: EvalView) -> None:
    places = [xdata(line)[0] for line in marks(figures.scatter(view), view).values()]
    assert len({round(x, 3) for x in places}) == len(places)


def test_strips_show_letters_and_overlap(view: EvalView) -> None:
    figure = figures.strips(view)
    full = corners(figure.axes[0], canvas.PALETTE["full"])
    heights = sorted({y for _, y in full})
    assert len(heights) == len(view.rows) - 1
    for y, one in zip(heights, view.rows[1:], strict=True):
        assert {x for x, at in full if at == y} == set(one.pattern.full_layers)
        assert "overlap" in overlap_summary(one) and overlap_summary(one) in texts(figure)
    assert "greedy run @1/4 (in-sample)" in texts(figure)
    for css, _ in figures.OVERLAP_SCALE.labels(share for one in view.rows for share in one.overlap.values()):
        shown = {(heights.index(y), x) for x, y in corners(figure.axes[0], canvas.PALETTE[css])}
        assert shown == {
            (index, layer)
            for index, one in enumerate(view.rows[1:])
            for layer, share in one.overlap.items()
            if figures.OVERLAP_SCALE.css_class(share) == css
        }
    bare = view_eval(made_up_document(BARE))
    legend = [text.get_text() for text in figures.strips(bare).legends[0].get_texts()]
    assert legend == ["F: runs its indexer", "S: borrows the selection before it"]
    assert len(corners(figures.strips(bare).axes[0], canvas.PALETTE["shared"])) == sum(r.shared for r in bare.rows)


def test_triangle_outlines_the_source_of_every_shared_layer() -> None:
    rows, pattern = triangles(6)["cosine"], Pattern("FSSFSS")
    axes = figures.triangle(rows, pattern).axes[0]
    assert corners(axes, "outline") == {(0, 1), (0, 2), (3, 4), (3, 5)}  # source, layer
    scale = figures.share_scale(value for row in rows for value in row)
    for css in {scale.css_class(value) for row in rows for value in row}:
        assert corners(axes, canvas.PALETTE[css]) == {
            (source, layer)
            for layer, row in enumerate(rows)
            for source, value in enumerate(row)
            if scale.css_class(value) == css
        }


@pytest.mark.parametrize("num_layers", [6, 47, 78])
def test_triangles_fit_the_page(num_layers: int) -> None:
    figure = figures.triangle(triangles(num_layers)["overlap"], Pattern.full(num_layers))
    assert figure.get_figwidth() * 96 < 560
    assert corners(figure.axes[0], "outline") == set()


# --- the page's rows ------------------------------------------------------------------------------------------------


def test_badges_stand_on_every_row_that_needs_them(view: EvalView) -> None:
    tables = eval_section(view, 1).tables
    for name in ("patterns", "gaps", "positions"):
        table = tables[name]
        assert table is not None
        assert [row[0].badges for row in rows_of(table) if row[0].text == "greedy run @1/4"] == [("in-sample",)]
        assert sum(len(row[0].badges) for row in rows_of(table)) <= 2
    assert any("In-sample: greedy run @1/4." in warning for warning in eval_warnings(view))


def test_gap_bars_stay_on_their_scale(view: EvalView) -> None:
    table = eval_section(view, 1).tables["gaps"]
    assert table is not None
    for *_, closed in rows_of(table):
        assert closed.bar is not None and 0 <= closed.bar <= 100
        assert (closed.css == "uniform") == closed.text.startswith("-")
        if closed.whisker:
            low, length = closed.whisker
            assert 0 <= low <= low + length <= 100 + 1e-9


def test_positions_have_a_bar_each(view: EvalView) -> None:
    table = eval_section(view, 1).tables["positions"]
    assert table is not None
    assert table.heads[1:] == ("tokens 0–255", "tokens 256–511", "tokens 512–1023", "tokens 1024–2047")
    for _, *cells in rows_of(table):
        bars = [cell.bar or 0.0 for cell in cells]
        assert bars[0] == 0
        assert all(0 <= bar <= 100 for bar in bars)
        assert bars == sorted(bars)


def test_patterns_of_the_same_cost_share_their_estimate(document: dict[str, Any]) -> None:
    table = estimate_table(document["cost_rows"], "all F")
    assert table is not None
    titles = [title for title, _ in table.groups]
    assert [title.split()[0] for title in titles] == ["50%", "62%", "69%", "75%", "88%"]
    assert "uniform 1/2" in titles[0]
    assert all("full" not in re.split(r", |: ", title) for title in titles)


def test_measured_ratios_by_phase_and_length(document: dict[str, Any]) -> None:
    table = measured_table(document["measured"])
    assert table is not None
    assert table.heads[1:] == ("prefill, 512", "prefill, 2,048", "decode, 512", "decode, 2,048")
    assert all(cell.text.endswith("×") for row in rows_of(table) for cell in row[1:])
    assert measured_table([]) is None
    (sparse,) = rows_of(measured_table(document["measured"][:1]) or table)
    assert len(sparse) == 2


# --- files ----------------------------------------------------------------------------------------------------------


def test_write_eval_results(tmp_path: Path, document: dict[str, Any]) -> None:
    written = write_eval_results(tmp_path, document)
    assert [path.name for path in written] == ["eval.csv", "report.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.csv", "report.html"]
    first = [path.read_bytes() for path in written]
    saved = json.loads(json.dumps(document))
    assert [path.read_bytes() for path in write_eval_results(tmp_path, saved)] == first


def test_csv_round_trip(view: EvalView) -> None:
    rows = list(csv.DictReader(io.StringIO(eval_csv(view))))
    assert set(EVAL_CSV_COLUMNS) < set(rows[0])
    for line, one in zip(rows, view.rows, strict=True):
        assert (line["name"], line["method"], Pattern(line["pattern"])) == (one.name, one.method, one.pattern)
        assert float(line["loss"]) == one.loss
        assert (float(line["delta"]), float(line["std_err"])) == (one.difference.delta, one.difference.std_err)
        assert (float(line["kl"]), float(line["kl_std_err"])) == (one.kl.delta, one.kl.std_err)
        assert (int(line["full_layers"]), line["in_sample"] == "true") == (one.full, one.in_sample)
        assert float(line["needle_generated"]) == one.tasks["needle", "generated"].share


def test_csv_without_tasks() -> None:
    header = eval_csv(view_eval(made_up_document(BARE))).splitlines()[0]
    assert header == ",".join(EVAL_CSV_COLUMNS)


def test_report_of_evaluations_and_runs(tmp_path: Path, document: dict[str, Any]) -> None:
    write_run(tmp_path / "run")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval.json").write_text(json.dumps(document), encoding="utf-8")
    for given, title in (
        (["one"], "made-up/model"),
        (["run", "one"], "1 evaluation and 1 run"),
        (["one", "two"], "2 evaluations"),
        (["run", "one", "run"], "1 evaluation and 2 runs"),
    ):
        write_report([tmp_path / name for name in given], tmp_path / "all.html")
        text = (tmp_path / "all.html").read_text(encoding="utf-8")
        assert f"<h1>{title}</h1>" in text
        assert text.count("<h1>") == 1
        assert Page(text).open == []
        assert 'id="run-1"' not in text or text.index('id="eval-1"') < text.index('id="run-1"')


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"format": "icsearch.eval/99"}',
        '{"format": "icsearch.eval/1"}',
        '{"format": "icsearch.eval/1", "rows": []}',
    ],
)
def test_unusable_evaluations_are_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "eval.json").write_text(content, encoding="utf-8")
    with pytest.raises(IcsearchError, match=r"eval\.json"):
        write_report([tmp_path], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_an_evaluation_without_a_baseline_is_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    copy = {**document, "rows": document["rows"][1:]}
    with pytest.raises(ReportError, match="full"):
        write_eval_results(tmp_path, copy)


# --- the page -------------------------------------------------------------------------------------------------------


MADE_UP = {
    "all parts": MadeUpEval(),
    "nothing optional": BARE,
    "deep": MadeUpEval(num_layers=47, savings=False),
    "one sequence": replace(BARE, num_sequences=1),
}


@pytest.mark.parametrize("made_up", MADE_UP.values(), ids=MADE_UP)
def test_page_is_whole_and_loads_nothing_from_outside(made_up: MadeUpEval) -> None:
    text = render_page([], [view_eval(made_up_document(made_up))])
    page = Page(text)
    assert page.open == []
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not {"script", "iframe", "object", "embed", "img"} & set(page.tags)
    assert page.handlers == []
    assert all(target.startswith(("data:", "#")) for target in re.findall(r"url\(['\"]?([^)]*)", text))
    assert not re.search(r"\bnan\b", text)


def test_page_has_its_parts(view: EvalView) -> None:
    text = render_page([], [view])
    for part in (
        eval_headline(view).split(":")[0],
        "All patterns",
        "8 of 16 layers keep their indexer (50%)",
        "variable tracking",
        "Loss against retention",
        "How much of the gap is closed",
        "Where in the text it costs",
        "The patterns, and what their S layers borrow",
        '<span class="badge">estimate</span>',
        "measured on this machine",
        "Where this comes from",
        str(view.document["model"]["fingerprint"]),
        *(row.pattern.letters for row in view.rows),
        *(row.verdict for row in view.rows),
    ):
        assert part in text, part
    assert text.count(">in-sample<") == 3  # table, gaps, positions
    assert text.count(">other model<") == 2  # no uniform pattern has as many F layers
    assert "greedy run @1/4 (in-sample)</text>" in text and "published:made-up (other model)</text>" in text  # strips


def test_a_loss_that_guessing_would_beat_stands_under_the_headline(document: dict[str, Any]) -> None:
    (note,) = guessing_notes(9.0, 1024)
    text = html.unescape(render_page([], [view_eval({**document, "notes": ["another note", note]})]))
    assert re.search(r'<p class="headline">[^<]*</p>\s*<p class="warn">Caution: ' + re.escape(note), text)
    assert text.count(note) == 1 and "<li>another note</li>" in text
    assert "Caution" not in render_page([], [view_eval(document)])


def test_missing_parts_are_left_out() -> None:
    text = render_page([], [view_eval(made_up_document(BARE))])
    for part in ("Tasks:", "borrow</h3>", ">estimate<", "measured on this machine", 'class="warn"'):
        assert part not in text, part
    bare = made_up_document(BARE)
    for name in ("gaps", "cost", "model", "calibration", "options", "environment"):
        bare[name] = type(bare[name])()
    for one in bare["rows"]:
        one["positions"] = []
    text = render_page([], [view_eval(bare)])
    assert "How much of the gap" not in text
    assert "Where in the text" not in text


def test_no_gap_to_close_is_said() -> None:
    document = made_up_document()
    document["gaps"][0].update(gap_closed=None, std_err=None)
    assert "uniform costs nothing measurable: no gap to close" in render_page([], [view_eval(document)])


def test_hostile_names_are_text() -> None:
    document = made_up_document(MadeUpEval(name=HOSTILE))
    for part in ("model", "options", "environment", "calibration"):
        document[part] = {**document[part], HOSTILE: HOSTILE}
    for one in document["rows"]:
        one["verdict"] = HOSTILE
        if one["method"] == "published":
            one["name"] = one["method"] = HOSTILE
        for task in one["tasks"]:
            task["kind"] += HOSTILE
    document["cost_rows"][3]["name"] = document["measured"][0]["name"] = HOSTILE
    for one in document["gaps"]:
        if one["name"].startswith("published"):
            one["name"] = HOSTILE
    page = Page(render_page([], [view_eval(document, HOSTILE)] * 2))
    assert page.open == []
    assert not {"script", "img"} & set(page.tags)
    assert page.handlers == []


# --- the terminal ---------------------------------------------------------------------------------------------------


def printed(renderable: Any) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(width=80, file=out).print(renderable)
    return out.getvalue()


@pytest.mark.parametrize("made_up", MADE_UP.values(), ids=MADE_UP)
def test_table_fits_80_columns(made_up: MadeUpEval) -> None:
    text = printed(eval_table(made_up_document(made_up)))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    if made_up.num_sequences > 1:
        assert "…" not in text.replace("FSSSSFSF", "") or made_up.num_layers > 16
    assert ("in-sample" in text) == bool(made_up.in_sample)


def test_in_sample_rows_are_marked(document: dict[str, Any]) -> None:
    lines = printed(eval_table(document)).splitlines()
    marked = [line for line in lines if line.startswith("greedy run @1/4*")]
    assert len(marked) == 3  # losses, tasks, gap closed
    assert any(line.startswith("published:made-up†") for line in lines)


def test_verdicts_are_short() -> None:
    found = {one["verdict"]: short_verdict(one["verdict"]) for one in made_up_document()["rows"]}
    assert found["the unmodified model"] == "unmodified"
    assert {"small loss", "clear loss", "heavy loss"} <= set(found.values())
    shorts = [
        short_verdict(verdict(Difference(*one), is_full=False))
        for one in ((0.001, 0.001), (0.03, 0.12), (-0.1, 0.001), (0.1, math.nan))
    ]
    assert shorts == ["no loss seen", "not known", "lower loss", "one sequence"]


def test_a_loss_that_is_not_known_is_not_called_none(document: dict[str, Any]) -> None:
    """Too few tokens: the difference is no more than noise, and all else says that the pattern hurts."""
    noise = {"delta": 0.03, "std_err": 0.12, "kl": 1.5, "top1_agreement": 0.37}
    copy = changed(document, **noise, verdict=verdict(Difference(0.03, 0.12), is_full=False))
    text = printed(eval_table(copy))
    assert "no loss seen" not in text
    assert text.count("not known") == len(copy["rows"])  # one a row but the first, and what it means
    assert max(map(len, text.splitlines())) <= 80
    page = render_page([], [view_eval(copy)])
    assert "not known: a loss of 0.01 nats per token or more is within two standard errors" in page
    assert "not known" not in printed(eval_table(document))


# --- similarity baselines -------------------------------------------------------------------------------------------


def test_predicted_sum_is_that_of_the_dynamic_program() -> None:
    record = dp_record(MadeUpRun())
    assert record.similarity is not None
    objective = record.similarity["objective"]
    assert similarity_sum(record.similarity["cosine"], record.pattern) == pytest.approx(objective, rel=1e-12)
    assert similarity_sum(record.similarity["cosine"], Pattern.full(16)) == 0


def test_section_sets_prediction_beside_the_loss() -> None:
    view = view_run(dp_record(MadeUpRun()))
    table, pictures = run_section(view, 1).tables["predictions"], run_section(view, 1).figures["similarity"]
    assert table is not None and len(rows_of(table)) == 5 and len(pictures) == 2
    assert [row[0].text for row in rows_of(table)][:2] == ["the all-F baseline", "chosen by similarity"]
    assert [row.similarity is None for row in predictions(view)] == [True, False, False, False, False]
    reading = similarity_reading(view)
    assert "12 S layers" in reading[0]
    assert "more similarity, and a higher loss" in reading[2]
    early = run_section(view_run(RunRecord.replay(dp_events(MadeUpRun(), chosen=False))), 1)
    assert early.tables["predictions"] is None and not early.figures["similarity"]


@pytest.mark.parametrize(
    ("delta", "error", "words"),
    [
        (0.001, 0.001, "more similarity did not buy a lower loss"),
        (-0.1, 0.001, "the better one"),
        (0.1, math.nan, "no standard error"),
    ],
)
def test_reading_says_what_the_losses_carry(delta: float, error: float, words: str) -> None:
    view = view_run(dp_record(MadeUpRun()))
    references = [replace(r, searched_minus_uniform=Difference(delta, error)) for r in view.references]
    assert words in similarity_reading(replace(view, references=tuple(references)))[2]


def test_what_all_measures_say_stands_beside_the_losses() -> None:
    record = RunRecord.replay(compared_events(MadeUpRun()))
    view = view_run(record)
    section = run_section(view, 1)
    table, rows = section.tables["predictions"], predictions(view)
    assert table is not None and len(section.figures["similarity"]) == 4
    assert table.heads[2:5] == ("similarity, mean", "Kascade: kept", "Fisher: predicted")
    by_name = {row.name: row for row in rows}
    assert list(by_name)[1:4] == ["chosen by similarity", "chosen by Kascade", "chosen by Fisher"]
    whole = table_of(record)
    for row, cells in zip(rows, rows_of(table), strict=True):
        if row.difference is None:
            assert (row.kept, row.foretold, cells[4].text) == (1, None, "–")
            continue
        assert row.foretold is not None and row.kept is not None
        assert row.foretold.delta == pytest.approx(whole.predict(full_of([row.pattern]))[LOSS, 0], rel=1e-9)
        assert row.difference == record.difference(row.pattern.letters)
        importance, sums = record.similarity_sums.importance, record.similarity_sums.kept
        kept = [1.0 if i == j else sums[i][j] / len(record.tokens) for i, j in enumerate(row.pattern.sources())]
        share = sum(a * b for a, b in zip(importance, kept, strict=True)) / sum(importance)
        assert row.kept == pytest.approx(share) and cells[3].text == f"{100 * share:.1f}%"
    kascade, fisher = compared_reading(view)
    assert f"{100 * (by_name['chosen by Kascade'].kept or 0):.1f}% of attention" in kascade
    assert numbers.difference(by_name["chosen by Fisher"].foretold) in fisher
    assert numbers.difference(by_name["chosen by Fisher"].difference) in fisher
    text = render_page([view])
    assert Page(text).open == [] and "--table FILE.npz" not in text
    assert "--table FILE.npz" in render_page([view_run(dp_record(MadeUpRun()))])


def test_unfinished_comparisons_are_shown_as_such() -> None:
    events = compared_events(MadeUpRun())
    for count in range(1, len(events)):
        record = RunRecord.replay(events[:count])
        text = render_page([view_run(record)])
        assert "unfinished" in text and Page(text).open == []
        printed(summary_table(record))


def test_page_of_a_similarity_baseline() -> None:
    text = render_page([view_run(dp_record(MadeUpRun()))])
    page = Page(text)
    assert page.open == []
    for part in (
        "What similarity says, and what the loss says",
        "chosen by similarity",
        "Similarity of attention outputs",
        "Overlap of selections",
        "Put it to use",
        dp_record(MadeUpRun()).pattern.letters,
    ):
        assert part in text, part
    for part in ("The loss curve", "The order in which", "What each flip", "Ties", "naive", "Searched against"):
        assert part not in text, part


def test_unfinished_similarity_baselines_are_shown_as_such() -> None:
    for count in (1, 2, 3, 4):
        record = RunRecord.replay(dp_events(MadeUpRun())[:count])
        text = render_page([view_run(record)])
        assert "unfinished" in text
        assert Page(text).open == []
        printed(summary_table(record))


def test_results_of_a_similarity_baseline(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "dp" / JOURNAL_NAME)
    journal.path.parent.mkdir()
    for event in dp_events(MadeUpRun()):
        journal.append(event)
    write_results(tmp_path / "dp", dp_record(MadeUpRun()))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "dp" / "curve.csv").read_text(encoding="utf-8"))))
    assert [(one["step"], one["layer"], one["full_layers"]) for one in rows] == [("0", "", "16"), ("1", "", "4")]
    write_run(tmp_path / "greedy")
    write_report([tmp_path / "greedy", tmp_path / "dp"], tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "2 runs compared" in text
    assert "dp-baseline, dynamic-program" in text


def test_summary_of_a_similarity_baseline() -> None:
    text = printed(summary_table(dp_record(MadeUpRun())))
    assert "chosen by similarity" in text
    assert "step" not in text
    assert max(map(len, text.splitlines())) <= 80


# --- a real browser -------------------------------------------------------------------------------------------------


@needs_browser
def test_browser_draws_the_pages_without_a_console_message(tmp_path: Path, document: dict[str, Any]) -> None:
    write_eval_results(tmp_path, document)
    both = tmp_path / "both.html"
    both.write_text(render_page([view_run(dp_record(MadeUpRun()))], [view_eval(document)]), encoding="utf-8")
    assert console_messages(tmp_path / "report.html", tmp_path / "profile-1") == []
    assert console_messages(both, tmp_path / "profile-2") == []
