"""The page's part on a second-order table: what it foretold beside what was measured, and the table itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from icsearch.core.pattern import Pattern
from icsearch.core.statistics import Difference
from icsearch.report import figures, numbers
from icsearch.report.canvas import INK, MUTED, PALETTE, SERIES, drawing, fit, new_figure, note
from icsearch.report.fisher_view import FINALIST, FLIP, PATH, UNIFORM, FisherView, Measured
from icsearch.report.tables import Cell, Row, Table, make_table, with_note
from icsearch.report.view import RunView
from icsearch.runs import results
from icsearch.runs.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SQUARE = 3.3  # inches of a scatter's axes
SQUARE_MARGINS = (0.8, 0.15, 0.1, 0.5)
NAMED = 3  # single flips whose layers stand above them
FINALISTS_SHOWN = 24
SIGNS = {FLIP: ("o", SERIES[0]), PATH: ("s", SERIES[2]), FINALIST: ("^", SERIES[3]), UNIFORM: ("D", PALETTE["uniform"])}
PLURALS = {FLIP: "single flips", PATH: "nested path", FINALIST: "finalists", UNIFORM: "uniform"}


@drawing()
def foretold(fisher: FisherView, name: str, found: Pattern) -> Figure:
    """Predicted against measured, `name` "loss" or "kl", with both errors; `found` is circled.

    Both axes are logarithmic; of what is not all above nothing, linear up to the lower errors of the measured.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter

    def pair(known: Measured) -> tuple[Difference, Difference]:
        return getattr(known.predicted, name), getattr(known.measured, name)

    figure, axes = new_figure()
    pairs = [pair(known) for known in fisher.measured]
    ends = [one.delta + side * numbers.finite(one.std_err) for both in pairs for one in both for side in (-1, 0, 1)]
    errors = sorted(measured.std_err for _, measured in pairs if measured.std_err > 0)
    unit = float(f"{errors[len(errors) // 4]:.0e}") if errors else max(map(abs, ends)) / 1e3 or 1e-6
    smallest = min(one.delta for both in pairs for one in both)
    logarithmic, high = smallest > 0, 1.25 * max(unit, *ends)
    low = smallest / 1.6 if logarithmic else min(-unit / 2, *ends)
    for kind, (sign, colour) in SIGNS.items():
        some = [pair(known) for known in fisher.measured if known.kind == kind]
        if some:
            axes.errorbar(
                [predicted.delta for predicted, _ in some],
                [measured.delta for _, measured in some],
                xerr=[numbers.finite(predicted.std_err) for predicted, _ in some],
                yerr=[numbers.finite(measured.std_err) for _, measured in some],
                color=colour,
                marker=sign,
                markersize=5,
                linestyle="none",
                elinewidth=0.7,
                label=PLURALS[kind],
            )
    if known := fisher.of(found):
        predicted, measured = pair(known)
        axes.plot(
            [predicted.delta], [measured.delta], "o", color=INK, markersize=11, fillstyle="none", label="pattern found"
        )
    flips = [known for known in fisher.measured if known.kind == FLIP]
    for known in sorted(flips, key=lambda flip: -pair(flip)[1].delta)[:NAMED]:
        predicted, measured = pair(known)
        if measured.delta > 2 * unit:
            place = (predicted.delta, measured.delta)
            note(axes, str(known.layer), place, (-4, 7), SERIES[0], "right", bbox=None, weight="bold")
    axes.plot([low, high], [low, high], color=MUTED, linewidth=0.9, zorder=1.1)
    for axis, setter in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        if logarithmic:
            setter("log")
        else:
            setter("symlog", linthresh=unit, linscale=0.5)
        beside = axis is axes.xaxis  # labels that would run together
        least = low if logarithmic else (5 if beside else 1) * unit
        decades = [10.0**power for power in range(-9, 4) if 10.0**power >= least]
        below = [-decade for decade in decades if decade <= -low]
        axis.set_major_locator(FixedLocator([*below[-1 if beside else 0 :], 0.0, *decades]))
        axis.set_minor_locator(FixedLocator([]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-").replace("-", "−")))
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.grid(linewidth=0.6)
    axes.set_xlabel("predicted by the table, nats per token")
    axes.set_ylabel("measured, nats per token")
    return fit(figure, axes, SQUARE, SQUARE, SQUARE_MARGINS, 1.35)


def pair_costs(fisher: FisherView, found: Pattern) -> tuple[Figure, Figure]:
    """What it costs each layer alone to borrow from each earlier one, by the table: KL, and loss."""
    kl = [[pair.delta for pair in row] for row in fisher.pair_kl]
    scale = figures.kl_scale([cost for row in kl for cost in row])
    return figures.triangle(kl, found, scale), loss_costs(fisher.pair_loss, found)


def loss_costs(pairs: list[list[Difference]], found: Pattern, draw: Callable[..., Figure] = figures.triangle) -> Figure:
    """The loss part, in a triangle of any size."""
    costs = [[pair.delta for pair in row] for row in pairs]
    errors = (pair.std_err for row in pairs for pair in row)
    return draw(costs, found, figures.cost_scale([cost for row in costs for cost in row], errors))


def _prices(known: Measured) -> tuple[Cell, ...]:
    """Measured and predicted loss, measured and predicted KL."""
    return (
        with_note(known.measured.loss),
        with_note(known.predicted.loss),
        with_note(known.measured.kl, sign=False),
        with_note(known.predicted.kl, sign=False),
    )


PRICES = ("loss above baseline", "predicted loss", "KL to baseline", "predicted KL")


def flip_table(fisher: FisherView) -> Table | None:
    """The single flips by layer."""
    flips = sorted((known for known in fisher.measured if known.kind == FLIP), key=lambda flip: flip.layer or 0)
    rows: list[Row] = [(str(flip.layer), *_prices(flip)) for flip in flips]
    return make_table(("layer", *PRICES), {"": rows}, css="priced") if rows else None


def finalist_table(view: RunView, fisher: FisherView) -> Table | None:
    """What was measured with as many F layers as the pattern found, best first."""
    finalists = fisher.finalists(view.final.full)
    by_kl, found = view.record.by_kl, view.final.pattern
    finalists.sort(key=lambda known: (known.measured.kl if by_kl else known.measured.loss).delta)
    held = any(known.heldout for known in finalists)
    rows: list[Row] = []
    for known in finalists[:FINALISTS_SHOWN]:
        badges = ("found",) if known.pattern == found else ()
        cells = [Cell(known.pattern.letters, known.told, "letters", badges=badges), *_prices(known)]
        rows.append((*cells, with_note(known.heldout) if known.heldout else "–") if held else cells)
    heads = ("pattern", *PRICES, *(["held-out loss"] if held else []))
    return make_table(heads, {"": rows}, css="priced") if len(rows) > 1 else None


def path_table(view: RunView, fisher: FisherView) -> Table:
    """The nested path, each step measured and predicted."""
    rows: list[Row] = []
    for point in view.steps:
        known = fisher.of(point.pattern)
        rows.append((str(point.step), str(point.layer), str(point.full), *(_prices(known) if known else ())))
    return make_table(("step", "layer", "F left", *PRICES), {"": rows}, css="priced")


def cost_rows(record: RunRecord, cost: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The parts of the layer evaluations, and what exact greedy would have taken."""
    parts = results.table_parts(record)
    rows = [(f"of these, {part}", numbers.count(evaluations), "counted") for part, evaluations in parts.items()]
    if (exact := cost["exact_layer_evaluations"]) is not None:
        rows.append(("layer evaluations of exact greedy", numbers.count(exact), "counted, not run"))
        rows.append(("exact greedy / done", numbers.ratio(exact / max(cost["layer_evaluations"], 1)), "counted"))
    if record.fisher.layer_sequences:
        rows.append(("time spent on the table", numbers.duration(cost["table_seconds"]), "measured"))
    return rows
