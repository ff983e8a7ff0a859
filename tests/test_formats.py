"""docs/formats.md: a section on every format that the code names, and in it every field that the code writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from doc_pages import ROOT
from eval_fixtures import dp_record
from fisher_fixtures import fisher_record
from icsearch.commands.plan import plan as make_plan
from icsearch.planning.page import document
from icsearch.runs import results
from icsearch.runs.fisher_file import save_table
from icsearch.runs.record import RunRecord
from icsearch.runs.similarity_file import save_similarity
from plan_fixtures import plan_request
from run_fixtures import MadeUpRun, events

FORMAT = re.compile(r"icsearch\.[a-z]+/\d+")


def sections() -> dict[str, str]:
    """The section of docs/formats.md on each format, by the name in its heading."""
    parts = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8").split("\n## ")
    headed = [(FORMAT.search(part.partition("\n")[0]), part) for part in parts]
    return {found[0]: part for found, part in headed if found}


def test_every_format_of_the_code_has_a_section() -> None:
    named: set[str] = set()
    for path in sorted((ROOT / "icsearch").rglob("*.py")):
        named.update(FORMAT.findall(path.read_text(encoding="utf-8")))
    assert len(named) == 9
    assert set(sections()) == named


def pattern(folder: Path) -> Any:
    return results.pattern_file(RunRecord.replay(events(MadeUpRun()))).to_json()


def similarity(folder: Path) -> Any:
    save_similarity(folder, dp_record(MadeUpRun()))
    return json.loads((folder / "similarity.json").read_text())


def fisher(folder: Path) -> Any:
    save_table(folder, fisher_record(MadeUpRun()))
    return json.loads((folder / "fisher.json").read_text())


def fisher_pattern(folder: Path) -> Any:
    record = fisher_record(MadeUpRun())
    said = dict.fromkeys(record.nll, (0.1, 0.1))
    return results.pattern_file(record, said).to_json()


def plan(folder: Path) -> Any:
    return document(make_plan(plan_request("demo", "2xH200", sequences=24, seq_len=None)))


WRITTEN = {
    "pattern": pattern,
    "similarity": similarity,
    "fisher": fisher,
    "fisher's pattern": fisher_pattern,
    "plan": plan,
}
# Objects whose keys are no fields, but what the fields below them are of.
BY_NAME = {"rows", "strategies", "kinds"}


def fields(value: Any, name: str = "") -> set[str]:
    """The names of all fields in a document, at any depth."""
    if isinstance(value, list):
        return {found for one in value for found in fields(one, name)}
    if not isinstance(value, dict):
        return set()
    below = {found for key, one in value.items() for found in fields(one, key)}
    return below if name in BY_NAME else below | set(value)


@pytest.mark.parametrize("name", WRITTEN)
def test_every_field_is_described(name: str, tmp_path: Path) -> None:
    written = WRITTEN[name](tmp_path)
    section = sections()[written["format"]]
    described = set(re.findall(r"`(\w+)`", section))
    assert fields(written) - {"format"} <= described
    assert len(fields(written)) >= 3
