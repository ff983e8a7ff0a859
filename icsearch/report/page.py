"""The self-contained HTML page: what goes where, rendered by the templates beside the package."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icsearch.core.errors import IcsearchError
from icsearch.engines.export import Export, export
from icsearch.report import numbers
from icsearch.report.choices import arithmetic_note, guarantee, leaves_out, step_note, what_was_left_out
from icsearch.report.curve import CurvePicture, comparison_picture, run_picture
from icsearch.report.eval_page import eval_section
from icsearch.report.eval_view import EvalView
from icsearch.report.heatmap import HeatPicture, heat_picture, scale_of
from icsearch.report.parts import Fact, Provenance, Tile, provenance, value_and_error
from icsearch.report.prediction import SimilaritySection, similarity_section
from icsearch.report.refined import RefinementSection, refinement_section
from icsearch.report.streaming import weights_sentence
from icsearch.report.view import Point, Reference, RunView, Tie, headline, kink_sentence
from icsearch.runs import results
from icsearch.runs.results import split_notes

if TYPE_CHECKING:
    from jinja2 import Environment

TIES_SHOWN = 8


@dataclass(frozen=True)
class StripCell:
    """One layer of the pattern strip. `serves`: the line goes on to an S layer behind it, in the same row."""

    layer: int
    full: bool
    native: bool
    serves: bool
    tooltip: str


@dataclass(frozen=True)
class StripRow:
    """The layers of one pipeline stage; `label` is empty where there are no stages."""

    label: str
    cells: tuple[StripCell, ...]


@dataclass(frozen=True)
class StepRow:
    """One flip in the order of the search, as text; `css` is the colour class of its cost."""

    step: int
    layer: str
    full: int
    loss: str
    delta: str
    kl: str  # empty where the search went by the loss
    cost: str
    css: str
    ties: int
    note: str


@dataclass(frozen=True)
class TieRow:
    step: int
    layer: int
    others: tuple[str, ...]
    more: int


@dataclass(frozen=True)
class ReferenceRow:
    """Searched against uniform at one number of F layers, as text; a dash where the run has no such pattern."""

    name: str
    full: int
    uniform: str
    searched: str
    saved: str
    avoided: str


@dataclass(frozen=True)
class RunSection:
    """One run, ready for the template."""

    number: int
    view: RunView
    title: str
    headline: str
    cautions: tuple[str, ...]
    kink: str
    tiles: tuple[Tile, ...]
    strip: tuple[StripRow, ...]
    curves: tuple[CurvePicture, ...]
    similarity: SimilaritySection | None
    heat: HeatPicture | None
    refinement: RefinementSection | None
    references: tuple[ReferenceRow, ...]
    steps: tuple[StepRow, ...]
    guarantee: str
    leaves_out: bool
    left_out: str
    ties: tuple[TieRow, ...]
    exports: tuple[Export, ...]
    export_error: str
    cost: tuple[Fact, ...]
    provenance: Provenance
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ComparisonRow:
    name: str
    index: int
    model: str
    method: str
    kept: str
    baseline: str
    delta: str
    uniform: str
    status: str


def render_page(views: Sequence[RunView], evaluations: Sequence[EvalView] = ()) -> str:
    """The whole page: the evaluations, then the runs; several runs are compared before their own sections."""
    sections = [run_section(view, number) for number, view in enumerate(views, start=1)]
    evaluated = [eval_section(view, number) for number, view in enumerate(evaluations, start=1)]
    several = len(views) > 1
    return (
        _environment()
        .get_template("report.html")
        .render(
            sections=sections,
            evaluations=evaluated,
            title=_title([*(one.title for one in evaluated), *(one.title for one in sections)], len(evaluated)),
            alone=len(sections) + len(evaluated) == 1,
            comparison=[comparison_row(view, index) for index, view in enumerate(views)] if several else [],
            comparison_curves=[comparison_picture(views, size) for size in ("wide", "narrow")] if several else [],
            comparison_notes=comparison_notes(views) if several else [],
        )
    )


def _title(titles: Sequence[str], evaluations: int) -> str:
    """The model where there is one section, else what there is."""
    runs = len(titles) - evaluations
    if len(titles) == 1:
        return titles[0]
    if not evaluations:
        return f"{runs} runs compared"
    names = [numbers.plural(evaluations, "evaluation"), *([numbers.plural(runs, "run")] if runs else [])]
    return " and ".join(names)


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Every string of a journal is somebody's input: autoescape is on for all templates, whatever their ending.
    environment = Environment(
        loader=PackageLoader("icsearch.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["minus"] = minus
    environment.filters["counted"] = numbers.plural
    return environment


def minus(text: str) -> str:
    """Numbers with a true minus sign: ``-0.1`` becomes ``−0.1``, ``all-F`` stays."""
    return re.sub(r"(?<![\w.])-(?=[\d.])", "−", text)


def run_section(view: RunView, number: int) -> RunSection:
    """Everything that the page says about one run."""
    exports, export_error = _exports(view)
    draws_curve = not view.by_similarity
    cautions, notes = split_notes(view.record.notes)
    return RunSection(
        number=number,
        view=view,
        title=str(view.start["model"].get("name_or_path", "model")),
        headline=headline(view),
        cautions=cautions,
        kink=kink_sentence(view),
        tiles=tuple(_tiles(view)),
        strip=strip_rows(view),
        curves=tuple(run_picture(view, size) for size in ("wide", "narrow")) if view.points and draws_curve else (),
        similarity=similarity_section(view),
        heat=heat_picture(view),
        refinement=refinement_section(view.record),
        references=tuple(_reference_row(reference) for reference in view.references),
        steps=tuple(_step_rows(view)),
        guarantee=guarantee(view.record),
        leaves_out=leaves_out(view.record),
        left_out=what_was_left_out(view.record),
        ties=tuple(_tie_row(tie) for tie in view.ties),
        exports=exports,
        export_error=export_error,
        cost=tuple(_cost_facts(view)),
        provenance=_provenance(view),
        notes=(*notes, *arithmetic_note(view.record)),
    )


# --- the parts ----------------------------------------------------------------------------------------------------


def strip_rows(view: RunView) -> tuple[StripRow, ...]:
    """The pattern as rows of layers, one row per pipeline stage."""
    cells = _strip_cells(view)
    staged = len(view.blocks) > 1
    return tuple(
        StripRow(f"stage {i} · layers {first}–{last - 1}" if staged else "", tuple(cells[first:last]))
        for i, (first, last) in enumerate(view.blocks, start=1)
    )


def _strip_cells(view: RunView) -> list[StripCell]:
    pattern = view.record.pattern
    cells = []
    for layer, source in enumerate(pattern.sources()):
        full, native = pattern.is_full(layer), layer in view.native_shared
        use = "runs its own indexer" if full else f"uses the selection of layer {source}"
        own = ", as the checkpoint itself does" if native else ""
        decoder = view.layer_indices[layer]
        where = f" (decoder layer {decoder})" if decoder != layer else ""
        serves = layer + 1 < len(pattern) and not pattern.is_full(layer + 1)
        cells.append(StripCell(layer, full, native, serves, f"layer {layer}{where} {use}{own}"))
    return cells


def _tiles(view: RunView) -> list[Tile]:
    if not view.points:
        return []
    final, baseline = view.final, view.points[0]
    tiles = [
        Tile("indexers kept", f"{final.full} of {view.num_layers}", numbers.percent(final.pattern.retention)),
        Tile("loss", numbers.loss(final.loss), f"baseline {numbers.loss(baseline.loss)}"),
        Tile("cost, nats per token", *value_and_error(final.difference)),
    ]
    if final.kl is not None:
        tiles.append(Tile("KL to all-F, nats per token", *value_and_error(final.kl)))
    if reference := view.same_retention:
        tiles.append(Tile("uniform, as many F", *value_and_error(reference.difference)))
    return tiles


def _reference_row(reference: Reference) -> ReferenceRow:
    searched, saved = reference.searched, reference.searched_minus_uniform
    return ReferenceRow(
        name=reference.label,
        full=len(reference.pattern.full_layers),
        uniform=numbers.difference(reference.difference),
        searched=numbers.difference(searched.difference) if searched else "–",
        saved=numbers.difference(saved) if saved else "–",
        avoided=numbers.percent(reference.avoided) if reference.avoided is not None else "–",
    )


def _step_rows(view: RunView) -> list[StepRow]:
    scale = scale_of(view)
    rows = []
    for point in view.steps:
        cost = view.step_cost(point.step)
        rows.append(
            StepRow(
                step=point.step,
                layer=_layer_name(point),
                full=point.full,
                loss=numbers.loss(point.loss),
                delta=numbers.difference(point.difference),
                kl=numbers.with_error(point.kl.delta, point.kl.std_err, sign=False) if point.kl else "",
                cost=numbers.difference(cost) if cost else "–",
                css=scale.css_class(cost.delta) if cost else "h0",
                ties=len(view.record.commits[point.step - 1].ties),
                note=step_note(view.record.commits[point.step - 1]),
            )
        )
    return rows


def _layer_name(point: Point) -> str:
    same = point.layer == point.decoder_layer
    return f"{point.layer}" if same else f"{point.layer} (decoder {point.decoder_layer})"


def _tie_row(tie: Tie) -> TieRow:
    shown = tuple(f"{layer} ({numbers.difference(difference)})" for layer, difference in tie.others[:TIES_SHOWN])
    return TieRow(tie.step, tie.layer, shown, max(0, len(tie.others) - TIES_SHOWN))


def _exports(view: RunView) -> tuple[tuple[Export, ...], str]:
    """What engines are given, and why one of them cannot be given this pattern."""
    if not view.points:
        return (), ""
    found, refusals = [], []
    for name in ("vllm", "sglang", "transformers"):
        try:
            found.append(export(results.pattern_file(view.record), name))
        except IcsearchError as error:
            refusals.append(str(error))
    return tuple(found), "; ".join(dict.fromkeys(refusals))


def _cost_facts(view: RunView) -> list[Fact]:
    cost = results.cost(view.record)
    run, naive = cost["layer_evaluations"], cost["naive_layer_evaluations"]
    facts = [Fact("layer evaluations", numbers.count(run), "counted")]
    if not view.by_similarity:
        scored = Fact("patterns scored in the search", numbers.count(cost["candidate_evaluations"]), "counted")
        facts = [scored, *facts, Fact("layer evaluations of a naive search", numbers.count(naive), "calculated")]
    if run > 0 and not view.by_similarity:
        facts.append(Fact("naive / done", f"{naive / run:.2f}×", "calculated"))
    facts.append(Fact("time spent scoring", numbers.duration(cost["seconds"]), "measured"))
    if read := weights_sentence(view.record):
        facts.append(Fact("weights read", read, "counted"))
    return facts


def _provenance(view: RunView) -> Provenance:
    start = view.start
    run = {
        "icsearch": start.get("icsearch_version"),
        "started": start.get("time"),
        "state": "finished" if view.finished else "unfinished",
        "layers with an indexer": view.num_layers,
        "decoder layers": start.get("decoder_layers"),
        "counted tokens": numbers.count(sum(view.record.tokens)),
    }
    return provenance([("Run", run), *((name.capitalize(), start.get(name) or {}) for name in _PROVENANCE)])


_PROVENANCE = ("model", "calibration", "options", "environment")


# --- several runs ---------------------------------------------------------------------------------------------------


def comparison_row(view: RunView, index: int) -> ComparisonRow:
    """One line of the table on top of a page with several runs."""
    options = view.start["options"]
    stages = options.get("stages") or 1
    method = f"{options.get('method')}, {options.get('strategy')}" + (f", {stages} stages" if stages > 1 else "")
    method += ", by KL" if view.record.by_kl else ""
    final = view.final if view.points else None
    uniform = view.same_retention
    return ComparisonRow(
        name=view.name,
        index=index,
        model=str(view.start["model"].get("name_or_path")),
        method=method,
        kept=f"{final.full} of {view.num_layers}" if final else f"– of {view.num_layers}",
        baseline=numbers.loss(view.points[0].loss) if final else "–",
        delta=numbers.difference(final.difference) if final else "–",
        uniform=numbers.difference(uniform.difference) if uniform else "–",
        status="finished" if view.finished else "unfinished",
    )


def comparison_notes(views: Sequence[RunView]) -> list[str]:
    """What keeps the runs from being compared directly: other models, other batches."""
    notes = []
    for part, what in (("model", "models"), ("calibration", "calibration batches")):
        if len({view.start[part].get("fingerprint") for view in views}) > 1:
            notes.append(f"These runs are on different {what}: each curve is against its own baseline.")
    return notes
