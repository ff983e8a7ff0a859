"""Rows of datasets as documents: any field, lists of paragraphs, and chats by the checkpoint's own template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

import in_process
import tiny
from icsearch.calibration.cache import of_field
from icsearch.calibration.fields import document_of, template_of
from icsearch.calibration.sources import ReadyTokens, parse_source
from icsearch.core.errors import CalibrationError

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "Who sat?"}, {"role": "assistant", "content": "The cat."}]
SHARED = [{"from": "human", "value": "Who sat?"}, {"from": "gpt", "value": "The cat."}]  # as ShareGPT has it
PARTS = [  # of several kinds, as multimodal models have them
    {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "sat?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "The cat."}]},
]
CHAT = "<user>Who sat?\n<assistant>The cat.\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny.save_checkpoint(tmp_path_factory.mktemp("m"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows in a file of its kind, or in a folder that save_to_disk wrote; as SOURCE."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
        return f"hf:{path}"
    return str(path)


def documents(source: str, tokenizer: Any, field: str | None = None) -> list[str]:
    parsed = parse_source(source, field)
    assert not isinstance(parsed, ReadyTokens)
    parsed.render = template_of(tokenizer)
    return sorted(parsed.documents(0))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "folder"])
@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("messages", MESSAGES, CHAT),
        ("conversations", SHARED, CHAT),
        ("messages", PARTS, CHAT),
        ("body", "One.", "One."),
        ("body", ["One.", "Two."], "One.\nTwo."),
    ],
)
def test_what_a_row_holds(tmp_path: Path, tokenizer: Any, name: str, field: str, value: Any, expected: str) -> None:
    """The same documents from every kind of file; other fields are not looked at."""
    source = written(tmp_path / name, [{"id": 1, field: value}])
    assert documents(source, tokenizer, field) == [expected]
    if field == "messages" and name != "folder":  # found by itself where rows have no text
        assert documents(source, tokenizer) == [expected]


def test_text_goes_before_messages(tmp_path: Path, tokenizer: Any) -> None:
    source = written(tmp_path / "a.jsonl", [{"messages": MESSAGES, "text": "One."}])
    assert documents(source, tokenizer) == ["One."] and documents(source, tokenizer, "messages") == [CHAT]


def test_the_first_row_chooses_for_all(tmp_path: Path, tokenizer: Any) -> None:
    """Whether or not anybody has asked for the choice before: what decides the cache is what is read."""
    source = written(tmp_path / "a.jsonl", [{"messages": MESSAGES}, {"text": "One."}])
    for asked_before in (False, True):
        parsed = parse_source(source)
        assert not isinstance(parsed, ReadyTokens)
        parsed.render = template_of(tokenizer)
        assert not asked_before or parsed.chosen_field == "messages"
        with pytest.raises(CalibrationError, match=r"line 2 has no field messages \(found: text\): give --field"):
            list(parsed.documents(0))


def test_a_template_that_writes_the_prefix_too(tokenizer: Any) -> None:
    """Every document gets the tokenizer's prefix in front: what a template writes of it is not doubled."""

    class Prefixed:
        chat_template = "x"

        def apply_chat_template(self, chat: Any, tokenize: bool) -> str:
            return "<s>" + chat[0]["content"]

        def decode(self, ids: list[int]) -> str:
            return "<s>" * len(ids)

    assert template_of(Prefixed(), [0])([{"role": "user", "content": "<s>One."}]) == "<s>One."


def test_batches_of_chats_are_found_again_by_their_template(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"The cat sat on mat {i}. " * 8}, MESSAGES[1]]} for i in range(40)
    ]
    source = written(tmp_path / "a.jsonl", chats)
    words = ("calibrate", checkpoint, source, "--seq-len", 64, "--num-sequences", 4, "--out", tmp_path / "c")
    assert "written" in in_process.run(capsys, *words)[1]
    assert "reused" in in_process.run(capsys, *words)[1]
    assert "reused" in in_process.run(capsys, *words, "--field", "messages")[1]
    assert json.loads((tmp_path / "c" / "calibration.json").read_text())["field"] == "messages"
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE + "\n")
    try:
        status, _, err = in_process.run(capsys, *words)
    finally:
        (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    assert status == 2 and "built with another chat_template" in err


def test_the_key_of_plain_text_is_as_it_was(tmp_path: Path, tokenizer: Any) -> None:
    source = parse_source(written(tmp_path / "a.jsonl", [{"text": "One."}]), "text")
    assert not isinstance(source, ReadyTokens) and of_field(source, tokenizer) == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "holds a int: expected a string, a list of strings, or chat messages"),
        ([1, 2], "holds a list: expected a string"),
        ([{"who": "me"}], "has a message .*: expected role and content"),
        ([{"role": "user", "content": 3}], "has a message .*: expected role and content"),
    ],
)
def test_what_is_no_document(value: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        document_of(value, "a.jsonl, line 1: field x", lambda chat: "")


def test_a_chat_without_a_template_or_with_one_that_refuses(tmp_path: Path, tokenizer: Any) -> None:
    source = written(tmp_path / "a.jsonl", [{"messages": MESSAGES}])
    with pytest.raises(CalibrationError, match="has no chat template: put its chat_template.jinja"):
        documents(source, None)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(CalibrationError, match=r"refuses a chat of user, assistant \(.*alternate.*\): leave"):
            documents(source, tokenizer)
    finally:
        tokenizer.chat_template = TEMPLATE
    with pytest.raises(CalibrationError, match="holds a chat, which takes the model's tokenizer"):
        document_of(MESSAGES, "x", None)


@pytest.mark.parametrize("source", ["demo", "a.txt"])
def test_a_field_of_what_has_no_rows(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("One.")
    with pytest.raises(CalibrationError, match="--field body is of rows, and .* has none: leave it out"):
        parse_source(source, "body")
