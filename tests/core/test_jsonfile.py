"""The one reader of JSON files: every bad file is one line of the caller's own error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from icsearch.core.errors import IcsearchError
from icsearch.core.jsonfile import FLAG, NUMBER, FieldError, check_fields, layers, letters, optional, read_object, whole
from icsearch.core.jsonfile import write_object as write


class OwnError(IcsearchError):
    """The caller's."""


def read(path: Path, version: str | None = None) -> dict[str, Any]:
    return read_object(path, expected="a list of ships", advice="build one", error=OwnError, version=version)


CONTENT = {
    "empty": b"",
    "cut": b'{"a": 1',
    "not UTF-8": b'{"a": "\xff"}',
    "a list": b"[]",
    "a text": b'"x"',
    "nested deeply": b"[" * 100_000 + b"]" * 100_000,
    "objects nested deeply": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of 5000 digits": b'{"a": ' + b"1" * 5000 + b"}",
    "another version": b'{"format": "ships/2"}',
    "no version": b"{}",
    "a version of another type": b'{"format": [["ships/1"]]}',
}


@pytest.mark.parametrize("case", CONTENT)
def test_bad_files_are_one_line(tmp_path: Path, case: str) -> None:
    path = tmp_path / "ships.json"
    path.write_bytes(CONTENT[case])
    with pytest.raises(OwnError, match=r"ships\.json .*expected .*build one") as caught:
        read(path, "ships/1")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", ['{"a": 1, "a": 1}', '{"b": [{"a": 1, "a": 2}]}', '{"\\u0061": 1, "a": 2}'])
def test_what_is_said_twice_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "ships.json").write_text(content)
    with pytest.raises(OwnError, match="ships.json has 'a' twice: expected a list of ships; build one"):
        read(tmp_path / "ships.json")


@pytest.mark.parametrize("name", ["none.json", "", "x" * 300, "nul\0byte", "ships.json/inside"])
def test_bad_paths_are_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "ships.json").write_text("{}")
    with pytest.raises(OwnError, match="expected a list of ships; build one") as caught:
        read(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def test_written_is_strict_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "ships.json"
    write(path, {"a": [math.nan, (math.inf, {"b": -math.inf})], "c": 0.1 + 0.2, "d": "\udcff", "e": True})
    expected = {"a": [None, [None, {"b": None}]], "c": 0.1 + 0.2, "d": "\udcff", "e": True}
    assert read(path) == expected == json.loads(path.read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (whole(1, 9), [1, 9], [0, 10, True, 1.0, "1", None]),
        (NUMBER, [0, -1.5, 10**6], [True, math.nan, math.inf, 10**400, "1", None]),
        (optional(FLAG), [True, False, None], [0, "true"]),
        (letters(3), ["FSF"], ["FS", "SFF", "fsf", "FSF\n", 3]),
        (layers(4), [[], [0, 3]], [[3, 0], [1, 1], [4], [-1], [True], "0", None]),
    ],
)
def test_kinds(kind: Any, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        check_fields({"x": value}, {"x": kind})
    for value in bad:
        with pytest.raises(FieldError, match="x is .*: expected "):
            check_fields({"x": value}, {"x": kind})
