"""Results as Markdown tables.

Usage: python benchmarks/tables.py benchmarks/results/kernels.json [benchmarks/results/search.json ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def range_of(spread: Json, unit: str = "") -> str:
    """Median, with min and max where there are several."""
    middle = f"{number(spread['median'])}{unit}"
    if spread["repeats"] == 1:
        return middle
    return f"{middle} ({number(spread['min'])} to {number(spread['max'])})"


def number(value: float) -> str:
    """Three digits, without exponents for what people read as plain numbers."""
    if value == 0 or 0.001 <= abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1e}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


def measured_on(document: Json) -> str:
    """A line that says where the numbers are from."""
    found = document["machine"]
    commits = " and ".join(document.get("commits") or [document["commit"]])
    return (
        f"Measured {document['date'][:10]} at commit {commits}: {found['cpu']}, {found['threads']} threads "
        f"of {found['cores']} cores, {found['cpu_capability']}, Python {found['python']}, torch {found['torch']}, "
        f"transformers {found['transformers']}."
    )


def kernels_table(document: Json) -> str:
    """Forwards, ties, and goals."""
    forwards = [_forward_row(row) for row in document["lengths"]]
    head = ("tokens", "stock", "ours", "times as fast", "peak above the model: stock", "ours", "whole process: ours")
    compared = [_tie_row(row) for row in document["compared"]]
    tie_head = (
        "checkpoint:tokens", "ties at the edge", "nearly", "selections unlike stock's", "of these exact ties",
        "unlike stock's under our rule", "of these within rounding", "loss: stock - ours", "the same, our rule in both",
        "stock moved by its inputs' last bit", "ours, latest - earliest",
    )  # fmt: skip
    goals = [(goal["goal"], number(goal["measured"]), "yes" if goal["reached"] else "no") for goal in document["goals"]]
    parts = [table(head, forwards), table(tie_head, compared), table(("goal", "measured", "reached"), goals)]
    return "\n\n".join([*parts, measured_on(document)])


def _forward_row(row: Json) -> list[str]:
    stock, ours = row.get("stock"), row["ours"]
    return [
        str(row["length"]),
        range_of(stock["seconds"], " s") if stock else "–",
        range_of(ours["seconds"], " s"),
        range_of(row["speedup"]) if stock else "–",
        megabytes(stock["peak_above_loaded_bytes"]) if stock else "–",
        megabytes(ours["peak_above_loaded_bytes"]),
        megabytes(ours["peak_bytes"]),
    ]


def _tie_row(row: Json) -> list[str]:
    counts, losses = row["selections"], row["losses"]
    queries = counts["queries"]
    return [
        row["name"],
        f"{counts['tied_at_the_edge'] / queries:.2%} of {queries}",
        f"{counts['within_rounding_of_a_tie'] / queries:.3%}",
        str(counts["stock_differs"]),
        str(counts["stock_differs_exact_tie"]),
        str(counts["earliest_differs"]),
        str(counts["earliest_differs_within_rounding"]),
        f"{losses['stock'] - losses['ours']:+.1e}",
        f"{losses['stock_earliest'] - losses['ours']:+.1e}",
        f"{losses['stock_earliest_nudged'] - losses['stock_earliest']:+.1e}",
        f"{losses['ours_latest'] - losses['ours']:+.1e}",
    ]


def search_table(document: Json) -> str:
    """One table for each case."""
    return "\n\n".join([*(_case_table(case) for case in document["cases"]), measured_on(document)])


def _case_table(case: Json) -> str:
    title = (
        f"**{case['model']}**, {case['layers']} layers, {case['sequences']} x {case['length']} tokens, "
        f"{case['flips']} flips:"
    )
    head = (
        "search", "seconds", "times as fast as stock", "without the report's references", "as exact",
        "layer evaluations", "of exact's", "candidates", "peak above the model", "pattern is stock's",
        "pattern is exact's", "losses against stock", "loss - exact's",
    )  # fmt: skip
    stock: Json = next((row for row in case["rows"] if row["variant"] == "stock"), {})
    rows = [_search_row(row, case, stock.get("estimated", False)) for row in case["rows"]]
    return "\n\n".join([title, table(head, rows), *_tie_line(case)])


def _search_row(row: Json, case: Json, estimated: bool) -> list[str]:
    """`estimated`: whether the stock search's time is, and with it every ratio to it."""
    mark = " (estimate)"
    whole = "" if row["flips"] == case["flips"] else f", first {row['flips']} flips"
    against_stock = row.get("times_as_fast_as_stock")
    bare = row.get("times_as_fast_as_stock_without_references")
    against_exact = row.get("times_as_fast_as_exact")
    return [
        row["variant"] + whole,
        range_of(row["seconds"]) + (mark if row["estimated"] else ""),
        range_of(against_stock) + (mark if estimated else "") if against_stock else "–",
        range_of(bare) + (mark if estimated else "") if bare else "–",
        range_of(against_exact) if against_exact else "–",
        number(row["layer_evaluations"]),
        f"{row['layer_evaluations_share_of_exact']:.2f}" if "layer_evaluations_share_of_exact" in row else "–",
        number(row["candidate_evaluations"]),
        megabytes(row["peak_above_loaded_bytes"]),
        _against_stock(row),
        _yes(row.get("same_pattern_as_exact")),
        _losses(row),
        _loss_difference(row),
    ]


def _yes(value: bool | None) -> str:
    return "–" if value is None else "yes" if value else "no"


def _against_stock(row: Json) -> str:
    if "same_pattern_as_stock" in row:
        return _yes(row["same_pattern_as_stock"])
    if "judged_steps" in row:
        return f"{_yes(row['same_path_as_stock'])} (first {row['judged_steps']} steps)"
    return "–"


def _losses(row: Json) -> str:
    """The largest relative difference, and of how many committed patterns."""
    if "largest_relative_loss_difference" not in row:
        return "–"
    return f"{row['largest_relative_loss_difference']:.0e} ({row['judged_commits']})"


def _loss_difference(row: Json) -> str:
    if "loss_minus_exact" not in row:
        return "–"
    return (
        "same bits" if row["bit_equal_to_exact"] and row["same_pattern_as_exact"] else f"{row['loss_minus_exact']:+.1e}"
    )


def _tie_line(case: Json) -> list[str]:
    if "tie_rule_moves_stock_losses_by" not in case:
        return []
    moved = f"{case['tie_rule_moves_stock_losses_by']:.0e}"
    kept = case.get("tie_rule_keeps_stock_pattern")
    pattern = "" if kept is None else f"; it {'keeps' if kept else 'changes'} the pattern that stock finds"
    return [f"The rule for ties moves stock's own losses by up to {moved} (relative){pattern}."]


PRINTERS: dict[str, Callable[[Json], str]] = {
    "icsearch.bench.kernels/1": kernels_table,
    "icsearch.bench.search/1": search_table,
}


def main() -> None:
    for path in sys.argv[1:]:
        document = json.loads(Path(path).read_text())
        print(PRINTERS[document["format"]](document), end="\n\n")


if __name__ == "__main__":
    main()
