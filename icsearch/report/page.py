"""The self-contained HTML page: what stands where. The templates lay it out; the words are those of `sentences`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from icsearch.core.pattern import Pattern
from icsearch.engines.engine import ExportError
from icsearch.engines.export import Export, exports_of_type
from icsearch.report import canvas, figures, fisher_page, fisher_view, numbers, sentences
from icsearch.report.eval_view import EvalRow, EvalView, Gap
from icsearch.report.tables import Cell, Row, Table, Tile, difference_tile, make_table, minus, with_note
from icsearch.report.view import Refined, RunView, Swap, predictions
from icsearch.runs import results
from icsearch.runs.results import split_notes
from icsearch.runs.schema import PHASES
from icsearch.search.protocol import LOSS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIES_SHOWN = 8
LONGEST_LIST = 160  # characters of a list of texts; the digests of all sequences would fill a page

# (title, its (key, value) pairs as text) for each group
Provenance = tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


@dataclass(frozen=True)
class Section:
    """A run or an evaluation, ready for its template. Parts that it lacks are None or empty."""

    view: RunView | EvalView
    number: int
    headline: str
    cautions: tuple[str, ...]
    tiles: tuple[Tile, ...]
    tables: dict[str, Table | None]
    figures: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]
    provenance: Provenance
    strip: tuple[tuple[str, tuple[Cell, ...]], ...] = ()
    order: tuple[Cell, ...] = ()
    exports: tuple[Export, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)  # by the engine's title, why it cannot be given the pattern
    export_error: str = ""
    noise: str = ""


def render_page(views: Sequence[RunView], evaluations: Sequence[EvalView] = ()) -> str:
    """The whole page: the evaluations, then the runs; several runs are compared before their own sections."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    evaluated = [eval_section(view, number) for number, view in enumerate(evaluations, start=1)]
    sections = [run_section(view, number) for number, view in enumerate(views, start=1)]
    several = len(views) > 1
    counted = [numbers.plural(len(part), what) for part, what in ((evaluated, "evaluation"), (sections, "run")) if part]
    title = " and ".join(counted) if evaluated else f"{len(views)} runs compared"
    alone = len(sections) + len(evaluated) == 1
    if alone:
        title = (sections or evaluated)[0].view.model_name
    # Every string of a journal is somebody's input: autoescape is on for all templates, whatever their ending.
    environment = Environment(
        loader=PackageLoader("icsearch.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"minus": minus, "counted": numbers.plural, "loss": numbers.loss}
    environment.globals["say"] = sentences
    return environment.get_template("report.html").render(
        sections=sections,
        evaluations=evaluated,
        title=title,
        palette=canvas.PALETTE,
        alone=alone,
        comparison=comparison_table(views) if several else None,
        comparison_figures=_charts("runs", "Loss curves of the runs", partial(figures.curve, views)) if several else (),
        comparison_notes=sentences.comparison_notes(views) if several else [],
    )


# --- pieces of both kinds -------------------------------------------------------------------------------------------


def provenance(own: tuple[str, Mapping[str, Any]], document: Mapping[str, Any]) -> Provenance:
    """The title and facts of a section, then the groups of its document that say something, as text."""
    names = ("model", "calibration", "options", "environment")
    groups = [own, *((name.capitalize(), document.get(name)) for name in names)]
    return tuple(
        (title, tuple((key.replace("_", " "), _plain(value)) for key, value in group.items()))
        for title, group in groups
        if group
    )


def _plain(value: Any) -> str:
    """A value of a JSON document as a reader expects it."""
    if value is None or value == [] or value == {}:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        items = [str(item) for item in value]
        if len(items) > 2 and len(", ".join(items)) > LONGEST_LIST and isinstance(value[0], str):
            items = [*items[:2], f"… ({len(items)} in all)"]
        return ", ".join(items)
    return json.dumps(value) if isinstance(value, Mapping) else str(value)


def _charts(name: str, title: str, draw: Callable[[tuple[float, float]], Figure]) -> tuple[str, ...]:
    """A chart of losses twice: wide, and narrow for a phone."""
    what = "The loss of patterns above that of the unmodified model, by the number of shared layers."
    sizes = {"wide": figures.CHART, "narrow": figures.NARROW_CHART}
    return tuple(canvas.svg(draw(size), f"{name}-{css}", f"chart {css}", title, what) for css, size in sizes.items())


# --- a run ----------------------------------------------------------------------------------------------------------


def run_section(view: RunView, number: int) -> Section:
    """Everything that the page says about one run."""
    cautions, notes = split_notes(view.record.notes)
    exports, refused, export_error = _exports(view)
    if view.record.start["options"].get("kernels") == "blockwise":
        notes = (*notes, sentences.BLOCKWISE_KERNELS)
    name, order = f"run-{number}", _order(view)
    drawn: dict[str, tuple[str, ...]] = dict.fromkeys(("curve", "heat", "similarity", "pairs", "foretold"), ())
    if view.points and not view.by_similarity:
        drawn["curve"] = _charts(f"{name}-curve", "Loss curve", partial(figures.curve, [view]))
    if view.cells and not view.record.by_table:
        figure = figures.heatmap(view)
        drawn["heat"] = (
            canvas.svg(figure, f"{name}-heat", "heat", "Heatmap of candidate costs", "The table has its numbers."),
        )
    if view.fisher is not None:
        found = view.record.pattern
        for key, figure in zip(("pair-kl", "pair-loss"), fisher_page.pair_costs(view.fisher, found), strict=True):
            told = "What it costs each layer to use an earlier one’s selection."
            drawn["pairs"] += (canvas.svg(figure, f"{name}-{key}", "heat triangle", "The second-order table", told),)
        for key in ("loss", "kl") if view.fisher.measured else ():
            figure = fisher_page.foretold(view.fisher, key, found)
            told = "Each pattern that was measured, by what the table had predicted."
            drawn["foretold"] += (canvas.svg(figure, f"{name}-{key}", "scatter", "Predicted and measured", told),)
    if view.record.similarity:
        drawn["similarity"] = tuple(
            canvas.svg(
                figure,
                f"{name}-measure-{at}",
                "heat triangle",
                title,
                "Each layer under the selections of the layers before it.",
            )
            for at, (title, figure) in enumerate(zip(sentences.measures(view), _measures(view), strict=True))
        )
    return Section(
        view,
        number,
        sentences.headline(view),
        cautions,
        tuple(_run_tiles(view)),
        {
            "references": _reference_table(view) if view.references and not view.record.similarity else None,
            "predictions": _prediction_table(view) if view.record.similarity else None,
            "sets": _set_table(view.refinement) if view.refinement else None,
            "made": _swap_table(view.refinement.made) if view.refinement else None,
            "refused": _swap_table(view.refinement.refused) if view.refinement else None,
            "heat": _heat_table(view) if drawn["heat"] else None,
            "steps": _step_table(view, order) if view.steps else None,
            "ties": _tie_table(view) if view.ties else None,
            "flips": fisher_page.flip_table(view.fisher) if view.fisher else None,
            "finalists": fisher_page.finalist_table(view, view.fisher) if view.fisher and view.points else None,
            "cost": _cost_table(view),
        },
        drawn,
        notes,
        _run_provenance(view),
        strip=strip(view),
        order=order,
        exports=exports,
        refused=refused,
        export_error=export_error,
        noise=numbers.compact(figures.run_scale(view).noise),
    )


def strip(view: RunView) -> tuple[tuple[str, tuple[Cell, ...]], ...]:
    """The pattern as rows of layers, one labelled row for each pipeline stage; `serves`: an S layer follows."""
    pattern, cells = view.record.pattern, []
    for layer, source in enumerate(pattern.sources()):
        full, native, decoder = pattern.is_full(layer), layer in view.native_shared, view.start["layer_indices"][layer]
        serves = layer + 1 < len(pattern) and not pattern.is_full(layer + 1)
        css = ["full" if full else "shared", *(["native"] if native else []), *(["serves"] if serves else [])]
        where = f" (decoder layer {decoder})" if decoder != layer else ""
        use = "runs its own indexer" if full else f"uses the selection of layer {source}"
        own = ", as the checkpoint itself does" if native else ""
        cells.append(Cell("F" if full else "S", str(layer), " ".join(css), f"layer {layer}{where} {use}{own}"))
    staged = len(view.blocks) > 1
    return tuple(
        (f"stage {i} · layers {first}–{last - 1}" if staged else "", tuple(cells[first:last]))
        for i, (first, last) in enumerate(view.blocks, start=1)
    )


def _run_tiles(view: RunView) -> list[Tile]:
    if not view.points:
        return []
    final, baseline = view.final, view.points[0]
    tiles = [
        Tile("indexers kept", f"{final.full} of {view.num_layers}", numbers.percent(final.pattern.retention)),
        Tile("loss", numbers.loss(final.loss), f"baseline {numbers.loss(baseline.loss)}"),
        difference_tile("cost, nats per token", numbers.difference(final.difference)),
    ]
    if final.kl is not None:
        tiles.append(difference_tile("KL, nats per token", numbers.difference(final.kl, sign=False)))
    if reference := view.same_retention:
        tiles.append(difference_tile("uniform, as many F", numbers.difference(reference.difference)))
    return tiles


def _reference_table(view: RunView) -> Table:
    """Searched against uniform at one number of F layers; a dash where the run has no such pattern."""
    rows = [
        (
            reference.label,
            str(reference.full),
            numbers.difference(reference.difference),
            numbers.difference(reference.searched.difference if reference.searched else None),
            numbers.difference(reference.searched_minus_uniform),
            numbers.percent(reference.avoided) if reference.avoided is not None else "–",
        )
        for reference in view.references
    ]
    heads = ("pattern", "F layers", "uniform", "searched", "searched − uniform", "cost avoided")
    return make_table(heads, {"": rows})


def _measures(view: RunView) -> list[Figure]:
    """What each of `sentences.measures` says of every layer and source, with the pattern that it chose."""
    similarity, chosen = view.record.similarity or {}, view.record.pattern
    others = {name: Pattern(event["pattern"]) for name, event in view.record.compared.items()}
    draw = partial(figures.triangle, side=figures.NARROW_TRIANGLE if others else figures.TRIANGLE)
    pictures = [draw(similarity["cosine"], chosen)]
    if "kascade" in others:
        lost = [[row[-1] - score for score in row[:-1]] for row in similarity["kascade"]]
        scale = figures.kl_scale([score for row in lost for score in row])
        pictures.append(draw(lost, others["kascade"], scale))
    if "fisher" in others:
        pairs = fisher_view.pair_costs(view.tables, LOSS)
        pictures.append(fisher_page.loss_costs(pairs, others["fisher"], draw))
    return [*pictures, draw(similarity["overlap"], chosen)]


def _prediction_table(view: RunView) -> Table:
    """What the measures say of each pattern, those that the run has, and what was measured."""
    rows = predictions(view)
    columns: dict[str, list[str]] = {
        "F layers": [str(row.full) for row in rows],
        "similarity, sum": ["–" if row.similarity is None else f"{row.similarity:.4f}" for row in rows],
        "mean per S layer": ["–" if row.mean is None else f"{row.mean:.4f}" for row in rows],
    }
    if any(row.kept is not None for row in rows):
        columns["Kascade: kept"] = [numbers.exact_percent(row.kept) for row in rows]
    if any(row.foretold for row in rows):
        columns["Fisher: predicted"] = [numbers.difference(row.foretold) for row in rows]
    if len(columns) > 3:  # no room for the sum
        full, _, mean, *more = columns.items()
        columns = dict([full, ("similarity, mean", mean[1]), *more])
    columns["loss"] = [numbers.loss(row.loss) for row in rows]
    columns["above baseline"] = [numbers.difference(row.difference) for row in rows]
    names = [Cell(row.name, row.pattern.letters if view.record.compared else "") for row in rows]
    return make_table(("pattern", *columns), {"": zip(names, *columns.values(), strict=True)})


def _set_table(refined: Refined) -> Table:
    rows = [
        (
            row.name,
            str(row.sequences),
            numbers.loss(row.before),
            numbers.loss(row.after),
            numbers.difference(row.change),
        )
        for row in refined.sets
    ]
    heads = ("sequences", "how many", "loss before", "loss after", "change")
    return make_table(heads, {"": rows}, texts=["sequences"])


def _swap_table(swaps: Sequence[Swap]) -> Table | None:
    heads = ("indexer of layer", "goes to layer", "change, searched on", "change, held out", "pattern behind it")
    rows = [
        (
            str(swap.trial.from_layer),
            str(swap.trial.to_layer),
            numbers.difference(swap.change),
            numbers.difference(swap.heldout),
            Cell(swap.trial.pattern, css="letters"),
        )
        for swap in swaps
    ]
    return make_table(heads, {"": rows}, texts=[heads[-1]]) if rows else None


def _heat_table(view: RunView) -> Table:
    """The numbers of the heatmap: a row for each step, a column for each layer."""
    steps: dict[int, dict[int, Cell]] = {}
    for cell in view.cells:
        text = numbers.compact(cell.cost.delta) + ("=" if cell.tied else "")
        css = "committed" if cell.committed else ""
        steps.setdefault(cell.step, {})[cell.layer] = Cell(text, css=css, title=numbers.difference(cell.cost))
    rows: list[Row] = [
        (str(step), *(cells.get(layer, "") for layer in range(view.num_layers))) for step, cells in steps.items()
    ]
    return make_table(("step", *map(str, range(view.num_layers))), {"": rows}, css="dense")


def _step_table(view: RunView, order: Sequence[Cell]) -> Table:
    """The flips in the order of the search."""
    if view.fisher is not None:
        return fisher_page.path_table(view, view.fisher)
    rows: list[Row] = []
    for point, layer in zip(view.steps, order, strict=True):
        kl = [numbers.difference(point.kl, sign=False)] if point.kl else []
        ties = len(view.record.commits[point.step - 1].ties)
        rows.append(
            (
                str(point.step),
                layer.text,
                str(point.full),
                numbers.loss(point.loss),
                numbers.difference(point.difference),
                *kl,
                layer.title,
                str(ties or ""),
            )
        )
    by_kl = ["KL to baseline"] if view.record.by_kl else []
    cost = f"{'KL' if view.record.by_kl else 'cost'} of this flip"
    heads = ("step", "layer", "F left", "loss", "above baseline", *by_kl, cost, "tied with")
    return make_table(heads, {"": rows})


def _order(view: RunView) -> tuple[Cell, ...]:
    """The layer of each flip, in the colour of its cost."""
    scale, cells = figures.run_scale(view), []
    costs = {cell.step: cell.cost for cell in view.cells if cell.committed}
    for point in view.steps:
        cost = costs.get(point.step)
        name = (
            str(point.layer) if point.layer == point.decoder_layer else f"{point.layer} (decoder {point.decoder_layer})"
        )
        css = scale.css_class(cost.delta) if cost else "h0"
        cells.append(Cell(name, css=css, title=numbers.difference(cost)))
    return tuple(cells)


def _tie_table(view: RunView) -> Table:
    others = f"tied layers (their {view.objective} minus the committed one's)"
    rows = []
    for tie in view.ties:
        shown = [f"{layer} ({numbers.difference(difference)})" for layer, difference in tie.others[:TIES_SHOWN]]
        more = f" and {len(tie.others) - TIES_SHOWN} more" if len(tie.others) > TIES_SHOWN else ""
        rows.append((str(tie.step), str(tie.layer), minus(", ".join(shown)) + more))
    return make_table(("step", "committed", others), {"": rows}, texts=[others])


def _exports(view: RunView) -> tuple[tuple[Export, ...], dict[str, str], str]:
    """What engines are given, which cannot be given this pattern and why, and what is said where none can."""
    if not view.points:
        return (), {}, ""
    try:
        exports, refused = exports_of_type(results.pattern_file(view.record))
    except ExportError as error:
        return (), {}, str(error)
    unknown = sentences.no_engine(view.start["model"].get("model_type")).replace("`", "")
    return tuple(exports), refused, "" if exports else unknown


def _cost_table(view: RunView) -> Table:
    """What the run took, each number with what kind it is: counted, measured, or calculated by a formula."""
    cost = results.cost(view.record)
    run, naive = cost["layer_evaluations"], cost["naive_layer_evaluations"]
    rows = [("layer evaluations", numbers.count(run), "counted")]
    if not view.by_similarity:
        rows.insert(0, ("patterns scored in the search", numbers.count(cost["candidate_evaluations"]), "counted"))
    if view.record.by_table:
        rows += fisher_page.cost_rows(view.record, cost)
    elif not view.by_similarity:
        rows.append(("layer evaluations of a naive search", numbers.count(naive), "calculated"))
    if run > 0 and not view.by_similarity and not view.record.by_table:
        rows.append(("naive / done", numbers.ratio(naive / run), "calculated"))
    rows.append(("time spent scoring", numbers.duration(cost["seconds"] - cost.get("table_seconds", 0.0)), "measured"))
    if read := sentences.weights_sentence(view.record):
        rows.append(("weights read", read, "counted"))
    return make_table(("what", "how much", "kind"), {"": rows}, texts=("what", "kind"), css="narrow")


def _run_provenance(view: RunView) -> Provenance:
    start = view.start
    run = {
        "icsearch": start.get("icsearch_version"),
        "started": start.get("time"),
        "state": "finished" if view.record.finished else "unfinished",
        "layers with an indexer": view.num_layers,
        "decoder layers": start.get("decoder_layers"),
        "counted tokens": numbers.count(sum(view.record.tokens)),
    }
    return provenance(("Run", run), start)


def comparison_table(views: Sequence[RunView]) -> Table:
    """The table on top of a page with several runs."""
    rows = []
    for index, view in enumerate(views):
        options, uniform = view.start["options"], view.same_retention
        stages = options.get("stages") or 1
        method = f"{options.get('method')}, {options.get('strategy')}" + (f", {stages} stages" if stages > 1 else "")
        final = view.final if view.points else None
        rows.append(
            (
                Cell(view.name, css=f"s{index % len(canvas.SERIES)}"),
                view.model_name,
                method + (", by KL" if view.record.by_kl else ""),
                f"{final.full if final else '–'} of {view.num_layers}",
                numbers.loss(view.points[0].loss) if final else "–",
                numbers.difference(final.difference if final else None),
                numbers.difference(uniform.difference if uniform else None),
                Cell("finished") if view.record.finished else Cell("", badges=("unfinished",)),
            )
        )
    heads = ("run", "model", "method", "F layers", "baseline", "cost", "uniform, as many F", "state")
    return make_table(heads, {"": rows}, texts=("run", "model", "method", "state"))


# --- an evaluation --------------------------------------------------------------------------------------------------


def eval_section(view: EvalView, number: int) -> Section:
    """Everything that the page says about one evaluation."""
    cautions, notes = split_notes(view.document.get("notes") or ())
    strips = canvas.svg(
        figures.strips(view), f"eval-{number}-strips", "heat", "Patterns, layer by layer", "The letters stand below."
    )
    cost = view.document.get("cost") or {}
    told = {"icsearch": view.document.get("icsearch_version"), "layers with an indexer": view.num_layers}
    if "layer_evaluations" in cost:
        told["layer evaluations"] = numbers.count(cost["layer_evaluations"])
    if "seconds" in cost:
        told["time spent measuring"] = numbers.duration(cost["seconds"])
    return Section(
        view,
        number,
        sentences.eval_headline(view),
        cautions,
        tuple(_eval_tiles(view)),
        {
            "patterns": pattern_table(view),
            "gaps": _gap_table(view.gaps) if view.gaps else None,
            "all_tokens": _all_tokens_table(view) if view.counted_name else None,
            "positions": _position_table(view),
            "estimates": estimate_table(view.document.get("cost_rows") or (), view.baseline_name),
            "measured": measured_table(view.document.get("measured") or ()),
        },
        {
            "scatter": _charts(f"eval-{number}-scatter", "Loss against retention", partial(figures.scatter, view)),
            "strips": (strips,),
        },
        notes,
        provenance(("Evaluation", told), view.document),
        noise=numbers.compact(figures.eval_scale(view).noise),
    )


def _eval_tiles(view: EvalView) -> list[Tile]:
    tiles = [Tile("unmodified", numbers.loss(view.baseline.loss), "nats per token")]
    best = next(iter(view.smallest), None)
    if best is None:
        return tiles
    tiles.append(Tile("indexers kept", f"{best.full} of {view.num_layers}", best.name))
    tiles.append(difference_tile("cost, nats per token", numbers.difference(best.difference)))
    gap = view.gap_of(best)
    if gap is not None:
        tiles.append(difference_tile("uniform, as many F", numbers.difference(gap.uniform.difference)))
    if gap is not None and gap.closed is not None:
        tiles.append(difference_tile("gap closed", numbers.share(gap.closed)))
    return tiles


def pattern_table(view: EvalView) -> Table:
    """All patterns, by number of F layers, most first."""
    groups: dict[str, list[Row]] = {}
    for row in view.rows:
        unmodified = row.is_baseline
        tasks: dict[tuple[str, str], Cell | str] = {
            column: Cell(f"{100 * hits.share:.0f}%", f"{100 * hits.low:.0f}–{100 * hits.high:.0f}")
            for column, hits in row.tasks.items()
        }
        groups.setdefault(sentences.kept(row.full, view.num_layers), []).append(
            (
                _named(row, row.verdict),
                numbers.loss(row.loss),
                "–" if unmodified else with_note(row.difference),
                numbers.perplexity(row.perplexity),
                "–" if unmodified else with_note(row.kl, sign=False),
                "–" if unmodified else f"{100 * row.top1_agreement:.1f}%",
                *(tasks.get(column, "–") for column in view.task_columns),
            )
        )
    answered = [f"{kind.replace('_', ' ')}, {way}" for kind, way in view.task_columns]
    heads = ("pattern", "loss", "above baseline", "perplexity", "KL", "same top token", *answered)
    return make_table(heads, groups, css="patterns")


def _all_tokens_table(view: EvalView) -> Table:
    """Over the tokens that a mask counts, and over all of them."""
    rows = []
    for row in view.rows:
        if (beside := row.all_tokens) is None or row.is_baseline:
            continue
        counted, everything = ((with_note(part.difference), with_note(part.kl, sign=False)) for part in (row, beside))
        rows.append((_named(row), *counted, *everything))
    heads = ("pattern", f"loss, {view.counted_name}", f"KL, {view.counted_name}", "loss, all tokens", "KL, all tokens")
    return make_table(heads, {"": rows})


def _named(row: EvalRow, note: str = "") -> Cell:
    return Cell(row.name, note, css="name", badges=sentences.badges(row))


def _gap_table(gaps: Sequence[Gap]) -> Table:
    """How much of uniform's loss each pattern avoids."""
    rows = []
    for gap in sorted(gaps, key=lambda gap: (-gap.row.full, gap.row.loss)):
        cost, uniform = numbers.difference(gap.row.difference), numbers.difference(gap.uniform.difference)
        closed = Cell(sentences.gap_closed(gap) + ("" if gap.closed else ": no gap to close"))
        if gap.closed:
            share, error = 100 * gap.closed.delta, 100 * numbers.finite(gap.closed.std_err)
            low, high = (min(max(end, 0.0), 100.0) for end in (share - error, share + error))
            bar, css = (max(share, 0.0), "full") if share >= 0 else (-share, "uniform")
            closed = Cell(closed.text, css=css, bar=min(bar, 100.0), whisker=(low, high - low) if high > low else None)
        rows.append((_named(gap.row), cost, gap.uniform.name, uniform, closed))
    heads = ("pattern", "above baseline", "uniform, as many F", "uniform above baseline", "gap closed")
    return make_table(heads, {"": rows}, texts=("pattern", "uniform, as many F", "gap closed"), css="bars")


def _position_table(view: EvalView) -> Table | None:
    """Loss differences by position, with bars that are linear up to the noise and logarithmic beyond."""
    buckets = next((row.positions for row in view.rows if row.positions), ())
    if not buckets:
        return None
    scale = figures.eval_scale(view)
    rows = [row for row in view.rows if not row.is_baseline and len(row.positions) == len(buckets)]
    highest = max([scale.noise, *(bucket.difference.delta for row in rows for bucket in row.positions)])
    cells = []
    for row in rows:
        bars = []
        for bucket in row.positions:
            delta, value = bucket.difference.delta, with_note(bucket.difference)
            length = math.log1p(max(delta, 0.0) / scale.noise) / math.log1p(highest / scale.noise)
            bars.append(Cell(value.text, value.note, scale.css_class(delta), bar=100 * length))
        cells.append((_named(row), *bars))
    heads = ("pattern", *(f"tokens {bucket.first}–{bucket.last - 1}" for bucket in buckets))
    return make_table(heads, {"": cells}, texts=heads, css="bars")


def estimate_table(costs: Sequence[Mapping[str, Any]], baseline: str) -> Table | None:
    """Patterns of the same cost together; the unmodified model, which saves nothing, is left out."""
    names: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for cost in costs:
        if any(row["removed_share"] for row in cost["rows"]):
            rows = tuple(
                (
                    numbers.count(row["context"]),
                    numbers.percent(row["indexer_share_full"]),
                    numbers.percent(row["indexer_share_pattern"]),
                    numbers.percent(row["removed_share"]),
                    numbers.ratio(row["prefill_speedup_estimate"]),
                    numbers.ratio(row["decode_speedup_estimate"]),
                )
                for row in cost["rows"]
            )
            names.setdefault(rows, []).append(cost["name"])
    groups = {
        f"{rows[0][3]} of the indexer work removed: {', '.join(names[rows])}": rows
        for rows in sorted(names, key=lambda rows: rows[0][3])
    }
    heads = ("context, tokens", f"indexers’ share, {baseline}", "indexers’ share, pattern", "removed")
    estimated = ("prefill, estimated", "decode, estimated")
    return make_table((*heads, *estimated), groups, css="patterns") if groups else None


def measured_table(measured: Sequence[Mapping[str, Any]]) -> Table | None:
    """Timed ratios: a row for each pattern, a column for each length and phase."""
    if not measured:
        return None
    columns = sorted({(PHASES.index(timing["phase"]), timing["length"]) for timing in measured})
    known = {(timing["name"], PHASES.index(timing["phase"]), timing["length"]): timing for timing in measured}
    rows: list[Row] = []
    for name in dict.fromkeys(timing["name"] for timing in measured):
        timings = [known.get((name, *column)) for column in columns]
        cells = [Cell(numbers.ratio(t["median"]), f"{t['min']:.2f}–{t['max']:.2f}") if t else "–" for t in timings]
        rows.append((Cell(name, css="name"), *cells))
    heads = ("pattern", *(f"{PHASES[phase]}, {numbers.count(length)}" for phase, length in columns))
    return make_table(heads, {"": rows})
