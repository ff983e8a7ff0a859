"""Texts, datasets and ready tokens that cannot be used: one line each, and nothing written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from bad_input import Place, Row


def parquet(columns: dict[str, list[Any]]) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        import pyarrow
        import pyarrow.parquet

        path = place.root / "t.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path

    return make


def cut_parquet(place: Place) -> Path:
    path = parquet({"text": ["The cat sat on the mat."] * 99})(place)
    return place.changed(path, lambda content: content[: len(content) // 2])


def pipe(place: Place) -> Path:
    path = place.root / "pipe.txt"
    os.mkfifo(path)
    return path


def link_to_nothing(place: Place) -> Path:
    path = place.root / "gone.txt"
    path.symlink_to("nowhere.txt")
    return path


def link_to_itself(place: Place) -> Path:
    path = place.root / "round.txt"
    path.symlink_to("round.txt")
    return path


ONE = json.dumps({"text": "The cat sat on the mat."}) + "\n"
EXPECTED = "expected demo, a .txt, .jsonl or .parquet file"
TEXTS: dict[str, tuple[Callable[[Place], object], str, str]] = {
    "empty": (lambda p: p.file("t.txt"), "t.txt is empty", "expected text in it"),
    "blank": (lambda p: p.file("t.txt", " \n\t\n"), "t.txt holds no text", "add text"),
    "a mark of UTF-8 alone": (lambda p: p.file("t.txt", b"\xef\xbb\xbf"), "t.txt holds no text", "add text"),
    "too short": (lambda p: p.file("t.txt", "The cat sat."), "too little text", "at least that many"),
    "Latin-1": (lambda p: p.file("t.txt", "Grüße\n".encode("latin-1")), "is not UTF-8 text (line 1", "iconv"),
    "UTF-16": (lambda p: p.file("t.txt", "The cat".encode("utf-16")), "is not UTF-8 text (line 1", "iconv"),
    "ends within a letter": (lambda p: p.file("t.txt", "Grü".encode()[:-1]), "is not UTF-8 text", "iconv"),
    "a program": (lambda p: p.file("t.txt", b"\x7fELF\x02\x01\x01\x00" * 99 + b"\xff"), "is not UTF-8 text", "iconv"),
    "a table": (lambda p: p.file("t.csv", "a,b"), "has the extension .csv", "expected .txt, .jsonl or .parquet"),
    "a compressed file": (lambda p: p.file("t.txt.gz", b"\x1f\x8b"), "has the extension .gz", "expected .txt"),
    "no extension": (lambda p: p.file("text", "The cat"), "has the extension (none)", "expected .txt"),
    "nothing": (lambda p: "nowhere.txt", "no file nowhere.txt", EXPECTED),
    "no name": (lambda p: "", "has no calibration.safetensors", EXPECTED),
    "a directory": (lambda p: p.file("d/x").parent, "has no calibration.safetensors", EXPECTED),
    "a pipe": (pipe, "pipe.txt is no regular file", EXPECTED),
    "a link to nothing": (link_to_nothing, "no file", EXPECTED),
    "a link to itself": (link_to_itself, "symbolic links", "give another one"),
    "a long name": (lambda p: "x" * 300 + ".txt", "File name too long", "give another one"),
    "no such part of the corpus": (lambda p: "demo:test", "no built-in corpus 'demo:test'", "demo:heldout"),
    "lines without text": (lambda p: p.file("t.jsonl", '{"body": "x"}\n'), "line 1 has no field text", "give --field"),
    "a broken line": (lambda p: p.file("t.jsonl", ONE * 2 + '{"text": \n' + ONE), "line 3 is not JSON", "per line"),
    "a list in a line": (lambda p: p.file("t.jsonl", ONE + '["x"]\n'), "line 2 is a JSON list", "expected an object"),
    "text is a number": (lambda p: p.file("t.jsonl", '{"text": 5}\n'), "holds a int", "expected a string"),
    "one document in many lines": (lambda p: p.file("t.jsonl", '{\n"text": "x"\n}\n'), "line 1 is not JSON", "object"),
    "a zero byte": (lambda p: p.file("t.jsonl", '{"text": "a\0b"}\n'), "line 1 is not JSON", "object per line"),
    "a deep line": (lambda p: p.file("t.jsonl", "[" * 100_000), "line 1 is not JSON", "object per line"),
    "a number of 5000 digits": (lambda p: p.file("t.jsonl", "1" * 5000), "line 1 is not JSON", "object per line"),
    "lines of Latin-1": (lambda p: p.file("t.jsonl", b'{"text": "\xe4"}\n'), "is not UTF-8 text (line 1", "iconv"),
    "null alone": (lambda p: p.file("t.jsonl", '{"text": null}\n'), "holds no text", "add text"),
    "no column": (parquet({"body": ["x"]}), "has no field text or messages or conversations (found: body)", "--field"),
    "a column of numbers": (parquet({"text": [1, 2]}), "column text holds a int", "expected a string"),
    "a column of lists": (parquet({"text": [[1]]}), "column text holds a list", "expected a string"),
    "a table without rows": (parquet({"text": np.array([], dtype=str).tolist()}), "holds no text", "add text"),
    "a cut table": (cut_parquet, "cannot be read as Parquet", "expected a whole .parquet file"),
    "no table": (lambda p: p.file("t.parquet", "PAR1 no PAR1"), "cannot be read as Parquet", "expected a whole"),
    "a dataset without a name": (lambda p: "hf:", "is not a dataset", "expected hf:NAME"),
    "too many parts of a dataset": (lambda p: "hf:a:b:c:d", "is not a dataset", "expected hf:NAME"),
    "a dataset of no name": (lambda p: "hf:../up", "neither a folder here nor a name", "expected NAME or OWNER/NAME"),
    "a file as a dataset": (lambda p: f"hf:{p.file('t.jsonl', ONE)}", "is a file", "give the file without hf:"),
    "an empty folder as a dataset": (lambda p: f"hf:{p.file('d/x').parent}", "cannot read hf:", "check the spec"),
    "a dataset, offline": (lambda p: "hf:nobody/nothing", "cannot read hf:nobody/nothing", "check the name"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, found, todo = TEXTS[case]
    place.refuses(Row(lambda p: p.calibrate(make(p)), found, todo), capfd)


SIZES = ("--seq-len", 32, "--num-sequences", 2)


@pytest.mark.parametrize("command", ["greedy", "dp-baseline", "eval"])
def test_a_search_leaves_nothing_behind_either(place: Place, capfd: pytest.CaptureFixture[str], command: str) -> None:
    more = SIZES if command != "eval" else (*SIZES, "--pattern", "full")
    row = Row(lambda p: p.search(command, *more, tokens=p.file("t.txt", b"\xff")), "is not UTF-8 text", "iconv")
    place.refuses(row, capfd)


# --- ready tokens ---


def tokens(manifest: Any = None, **arrays: Any) -> Callable[[Place], Path]:
    """A directory with these arrays, and the manifest as it is where it is text, else as JSON."""

    def make(place: Place) -> Path:
        directory = place.root / "tokens"
        directory.mkdir()
        save_file(arrays, directory / "calibration.safetensors")
        if manifest is not None:
            text = manifest if isinstance(manifest, str) else json.dumps(manifest)
            (directory / "calibration.json").write_text(text)
        return directory

    return make


def cut_tokens(place: Place) -> Path:
    directory = tokens(input_ids=IDS)(place)
    place.changed(directory / "calibration.safetensors", lambda content: content[:-9])
    return directory


IDS = np.arange(80, dtype=np.int64).reshape(2, 40)
MANIFEST = {"format": "icsearch.calibration/1"}
INT64 = "expected int64 [sequences, length]"
TOKENS: dict[str, tuple[Callable[[Place], object], str, str]] = {
    "of 32 bits": (tokens(input_ids=IDS.astype(np.int32)), "input_ids is int32 [2, 40]", INT64),
    "of floats": (tokens(input_ids=IDS.astype(np.float32)), "input_ids is float32 [2, 40]", INT64),
    "of one dimension": (tokens(input_ids=IDS[0].copy()), "input_ids is int64 [40]", INT64),
    "of no sequence": (tokens(input_ids=IDS[:0].copy()), "input_ids is empty, [0, 40]", "at least one sequence"),
    "of another name": (tokens(tokens=IDS), "has no input_ids (found: tokens)", INT64),
    "too short": (tokens(input_ids=IDS[:, :8].copy()), "not longer than the model's index_topk", "longer sequences"),
    "longer than the model": (
        tokens(input_ids=np.zeros((1, 600), np.int64)), "longer than the model's 512 positions", "--seq-len 512"
    ),
    "negative": (tokens(input_ids=-IDS), "79 token ids are outside the model's vocabulary of 300", "the tokenizer"),
    "beyond the vocabulary": (tokens(input_ids=IDS + 2**40), "outside the model's vocabulary of 300", "tokenizer"),
    "with a mask of bytes": (
        tokens(input_ids=IDS, loss_mask=np.ones((2, 40), np.uint8)), "loss_mask is uint8", "expected bool [2, 40]"
    ),
    "with a mask of another shape": (
        tokens(input_ids=IDS, loss_mask=np.ones((2, 39), np.bool_)), "loss_mask is bool [2, 39]", "expected bool"
    ),
    "with a mask of nothing": (
        tokens(input_ids=IDS, loss_mask=np.zeros((2, 40), np.bool_)), "counts no token of sequence 0", "mend the mask"
    ),
    "cut": (cut_tokens, "is damaged or cannot be read", "bring the tokens again"),
    "without their file": (
        lambda p: p.json("tokens/calibration.json", MANIFEST).parent, "is unfinished", "run icsearch calibrate"
    ),
    "described by a list": (tokens([], input_ids=IDS), "holds a list", "delete it if"),
    "described by half a file": (tokens('{"format"', input_ids=IDS), "is not JSON", "delete it if"),
    "of another version": (
        tokens({"format": "icsearch.calibration/9"}, input_ids=IDS), "'icsearch.calibration/9'", "expected 'icsearch"
    ),
    "that were changed": (
        tokens({**MANIFEST, "fingerprint": "0" * 64}, input_ids=IDS), "fingerprint", "delete both files"
    ),
    "of another number": (tokens({**MANIFEST, "num_sequences": 3}, input_ids=IDS), "num_sequences 2", "says 3"),
    "of another tokenizer": (
        tokens({**MANIFEST, "tokenizer_fingerprint": "0" * 64}, input_ids=IDS), "another tokenizer", "calibrate"
    ),
    "whose source is a number": (tokens({**MANIFEST, "source": 5}, input_ids=IDS), "source is 5", "expected text"),
    "whose revision is a number": (
        tokens({**MANIFEST, "source_revision": 5}, input_ids=IDS), "source_revision is 5", "expected text"
    ),
    "said twice": (
        tokens('{"format": "icsearch.calibration/1", "format": "x"}', input_ids=IDS), "'format' twice", "delete it if"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENS)
def test_ready_tokens(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, found, todo = TOKENS[case]
    commands = (lambda p: p.greedy(tokens=make(p)), lambda p: p.baseline(tokens=make(p)))
    place.refuses(Row(commands[list(TOKENS).index(case) % 2], found, todo), capfd)


CACHE_DAMAGE: dict[str, tuple[dict[str, Any] | str, str, str]] = {
    "of another version": ({"format": "icsearch.calibration/2"}, "'icsearch.calibration/2'", "expected 'icsearch"),
    "of another source": ({"source_fingerprint": "0" * 64}, "another source_fingerprint", "start over with --fresh"),
    "of another length": ({"seq_len": 33}, "seq_len 32", "says 33"),
    "its seed is text": ({"seed": "0"}, "another seed", "start over with --fresh"),
}


@pytest.mark.parametrize("case", CACHE_DAMAGE)
def test_a_cache_that_is_another(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    from icsearch.cli import app

    change, found, todo = CACHE_DAMAGE[case]
    assert app._run([str(word) for word in place.calibrate("demo")], debug=True) == 0
    manifest = place.root / "out" / "calibration.json"
    changed = change if isinstance(change, str) else json.dumps({**json.loads(manifest.read_text()), **change})
    manifest.write_text(changed)
    place.refuses(Row(lambda p: p.calibrate("demo"), found, todo), capfd)
