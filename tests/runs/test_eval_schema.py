"""What an evaluation's files must be: what is written fits, and what does not is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from eval_fixtures import MadeUpEval, eval_events, made_up_document
from icsearch.core.jsonfile import FieldError, strict
from icsearch.runs.schema import check_document, check_eval_start, check_later

EVALUATION = MadeUpEval(num_sequences=2)


def document() -> dict[str, Any]:
    """An eval.json as it is read back."""
    found: dict[str, Any] = json.loads(json.dumps(strict(made_up_document(EVALUATION))))
    return found


def test_what_is_written_fits() -> None:
    check_document(document())
    start, *later = eval_events(EVALUATION)
    check_eval_start(start)
    for event in later:
        check_later(event, start)


def test_one_sequence_has_no_errors_and_fits() -> None:
    check_document(json.loads(json.dumps(strict(made_up_document(MadeUpEval(num_sequences=1))))))


Edit = Callable[[dict[str, Any]], object]
DOCUMENTS: dict[str, tuple[Edit, str]] = {
    "no rows": (lambda d: d.pop("rows"), "rows is missing"),
    "empty rows": (lambda d: d["rows"].clear(), "rows is an empty list"),
    "a row of text": (lambda d: d["rows"].append("full"), "rows is a list"),
    "a loss of text": (lambda d: d["rows"][0].update(loss="low"), "loss is 'low'"),
    "no loss": (lambda d: d["rows"][0].pop("loss"), "loss is missing"),
    "an infinite loss": (lambda d: d["rows"][0].update(loss=float("inf")), "loss is inf"),
    "other letters": (lambda d: d["rows"][0].update(pattern="SF"), "pattern is 'SF'"),
    "another length": (lambda d: d["rows"][1].update(pattern="FS"), "pattern is 'FS': expected 16 letters"),
    "a flag of text": (lambda d: d["rows"][0].update(in_sample="no"), "in_sample is 'no'"),
    "a bucket without its end": (lambda d: d["rows"][1]["positions"][0].pop("last"), "positions is a list"),
    "an overlap of text": (lambda d: d["rows"][1].update(borrowed_overlap={"1": "x"}), "borrowed_overlap is"),
    "an overlap of no layer": (lambda d: d["rows"][1].update(borrowed_overlap={"x": 1}), "borrowed_overlap is"),
    "a task without hits": (lambda d: d["rows"][0]["tasks"][0].update(forced={}), "tasks is a list"),
    "a gap of text": (lambda d: d["gaps"][0].update(gap_closed="all"), "gaps is a list"),
    "a model of text": (lambda d: d.update(model="glm"), "model is 'glm'"),
    "a model of a number": (lambda d: d["model"].update(name_or_path=3), "name_or_path is 3"),
    "notes by number": (lambda d: d.update(notes=3), "notes is 3"),
    "costs of text": (lambda d: d.update(cost_rows=["x"]), "cost_rows is a list"),
    "timings of another phase": (lambda d: d.update(measured=[{"phase": "idle"}]), "measured is a list"),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_damaged_documents(case: str) -> None:
    edit, message = DOCUMENTS[case]
    found = document()
    edit(found)
    with pytest.raises(FieldError, match=message):
        check_document(found)


STARTS: dict[str, tuple[Edit, str]] = {
    "another event": (lambda e: e.update(event="measures"), "event is 'measures': expected start"),
    "no tokens": (lambda e: e["tokens"].clear(), "tokens is a list: expected at least one sequence"),
    "a first S": (lambda e: e.update(start_pattern="SF"), "start_pattern is 'SF'"),
    "edges that fall": (lambda e: e["bucket_edges"].reverse(), "bucket_edges is a list"),
    "too few buckets": (lambda e: e["bucket_tokens"][0].pop(), "bucket_tokens is a list"),
    "a pattern without a name": (lambda e: e["patterns"][0].pop("name"), "patterns is a list"),
    "nothing to choose": (lambda e: e.update(choosing_queries=0), "choosing_queries is 0"),
    "no options": (lambda e: e.pop("options"), "options is missing"),
}


@pytest.mark.parametrize("case", STARTS)
def test_damaged_starts(case: str) -> None:
    edit, message = STARTS[case]
    start = copy.deepcopy(eval_events(EVALUATION)[0])
    edit(start)
    with pytest.raises(FieldError, match=message):
        check_eval_start(start)


FULL = "F" * 16
MEASURES: dict[str, tuple[Edit, str]] = {
    "another event": (lambda e: e.update(event=["x"]), "event is a list: expected one of measures"),
    "sequences beyond": (lambda e: e.update(sequences=[0, 3]), "sequences is a list: expected a range within 0 to 2"),
    "too few sums": (lambda e: e["patterns"][FULL]["nll"].pop(), "nll is a list: expected a list of 2 x"),
    "no sums": (lambda e: e["patterns"][FULL].pop("kl"), "kl is missing"),
    "sums of text": (lambda e: e["patterns"][FULL].update(agree=["1", "2"]), "agree is a list"),
    "too few buckets": (lambda e: e["patterns"][FULL]["bucket_nll"][0].pop(), "bucket_nll is a list"),
    "a pattern of other letters": (lambda e: e["patterns"].update(FX={}), "patterns has 'FX'"),
    "a pattern of text": (lambda e: e["patterns"].update({FULL: "x"}), f"patterns has '{FULL}'"),
    "no time": (lambda e: e.update(seconds=-1), "seconds is -1"),
}


@pytest.mark.parametrize("case", MEASURES)
def test_damaged_measures(case: str) -> None:
    edit, message = MEASURES[case]
    start, event = copy.deepcopy(eval_events(EVALUATION)[:2])
    edit(event)
    with pytest.raises(FieldError, match=message):
        check_later(event, start)
