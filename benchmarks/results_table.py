"""A results table, from an eval.json.

Usage: python benchmarks/results_table.py runs/results/eval/eval.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from icsearch.report.numbers import with_error
from icsearch.runs.evaluation import load_eval


def line(row: dict[str, Any], gaps: dict[str, str]) -> str:
    """One pattern as a row of a Markdown table."""
    tasks = " / ".join(f"{task['generated']['accuracy']:.0%}" for task in row["tasks"])
    cost = with_error(row["delta"], row["std_err"]) if row["name"] != "full" else ""
    cells = (row["name"], f"`{row['pattern']}`", f"{row['loss']:.4f}", cost, f"{row['kl']:.4f}", tasks)
    return "| " + " | ".join((*cells, gaps.get(row["name"], ""))) + " |"


def table(document: dict[str, Any]) -> str:
    """All rows, with the gap closed beside those that have a uniform pattern of the same size."""
    gaps = {
        gap["name"]: f"{gap['gap_closed']:.0%} ± {gap['std_err']:.0%}"
        for gap in document["gaps"]
        if gap["gap_closed"] is not None
    }
    kinds = " / ".join(task["kind"] for task in document["rows"][0]["tasks"])
    head = [f"| pattern | letters | loss | above full | KL | {kinds} | gap closed |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*head, *(line(row, gaps) for row in document["rows"])])


if __name__ == "__main__":
    print(table(load_eval(Path(sys.argv[1]))))
