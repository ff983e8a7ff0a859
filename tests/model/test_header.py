"""Headers of safetensors files, whole, damaged and hostile; safetensors' own reader is the judge."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save

from icsearch.core.errors import IcsearchError, ModelError
from icsearch.model.checkpoint import INDEX_NAME, open_checkpoint
from icsearch.model.header import MAX_HEADER_BYTES, Entry, make_header, read_header
from icsearch.model.shards import Shards

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.int8), "c": np.zeros((0, 3))}
WHOLE = save(TENSORS, {"format": "pt"})


def packed(header: Any, data: int = 8, length: int | None = None) -> bytes:
    """A file of that header (bytes, or what JSON makes of it) and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def entry(start: Any = 0, end: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def twice(first: bytes, second: bytes) -> bytes:
    return b'{"x":' + first + b',"x":' + second + b"}"


F32 = json.dumps(entry()).encode()
DAMAGED = {
    "empty file": (b"", "a header of 0 bytes in a file of 0"),
    "seven bytes": (bytes(7), "in a file of 7"),
    "length beyond the file": (packed({"x": entry()}, length=10**6), "a header of 1000000 bytes in a file of"),
    "length of 2^63": (packed({"x": entry()}, length=2**63), "a huge integer bytes in a file of"),
    "length of all ones": (b"\xff" * 64, "a huge integer bytes in a file of"),
    "length zero": (packed({"x": entry()}, length=0), "not JSON"),
    "length too short": (packed({"x": entry()}, length=20), "not JSON"),
    "length too long": (packed({"x": entry()}, data=20, length=70), "not JSON"),
    "a list": (packed([1, 2]), "no JSON object"),
    "a number": (packed(b"1"), "no JSON object"),
    "a text": (packed(b'"x"'), "no JSON object"),
    "a byte order mark": (packed(b"\xef\xbb\xbf" + b'{"x":' + F32 + b"}"), "not JSON"),
    "not UTF-8": (packed(b'{"\xff": 1}'), "not JSON"),
    "not JSON": (packed(b'{"x": }'), "not JSON"),
    "a number of 5000 digits": (packed(b'{"x": ' + b"1" * 5000 + b"}"), "not JSON"),
    "nested a million deep": (packed(b'{"x":' + b"[" * 10**6), "nested too deeply|not JSON"),
    "half a surrogate pair": (packed(b'{"\\ud800": ' + F32 + b"}"), "not JSON"),
    "a name twice": (packed(twice(F32, F32)), "'x' comes twice"),
    "a key twice inside": (packed(b'{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "twice"),
    "an entry that is a list": (packed({"x": [0, 8]}), "expected dtype, shape and data_offsets"),
    "no dtype": (packed({"x": {"shape": [2], "data_offsets": [0, 8]}}), "expected dtype, shape"),
    "dtype a number": (packed({"x": entry(dtype=4)}), "expected dtype, shape"),
    "shape a number": (packed({"x": entry(shape=2)}), "expected dtype, shape"),
    "shape of texts": (packed({"x": entry(shape=["2"])}), "expected dtype, shape"),
    "shape of truths": (packed({"x": entry(shape=[True, 2])}), "expected dtype, shape"),
    "shape below zero": (packed({"x": entry(shape=[-1, -2])}), "expected dtype, shape"),
    "shape null": (packed({"x": entry(shape=None)}), "expected dtype, shape"),
    "shape of 2^60 each": (packed({"x": entry(shape=[2**52, 2**52])}), "8 bytes for F32"),
    "a thousand dimensions": (packed({"x": entry(shape=[2**52] * 1000)}), "1000 dimensions"),
    "three offsets": (packed({"x": {**entry(), "data_offsets": [0, 4, 8]}}), "expected dtype, shape"),
    "offsets null": (packed({"x": {**entry(), "data_offsets": None}}), "expected dtype, shape"),
    "offsets with fractions": (packed({"x": entry(0.0, 8.0)}), "expected dtype, shape"),
    "offset below zero": (packed({"x": entry(-8, 0)}), "expected dtype, shape"),
    "offset of 2^64": (packed({"x": entry(0, 2**64)}), "expected dtype, shape"),
    "offsets reversed": (packed({"x": entry(8, 0)}), "-8 bytes for F32"),
    "offsets reversed, unknown type": (packed({"x": entry(8, 0, dtype="F99")}), "begins at byte"),
    "data beyond the file": (packed({"x": entry(0, 16, (4,))}), "end at byte .* of"),
    "bytes after the last tensor": (packed({"x": entry()}, data=9), "end at byte .* of"),
    "a hole": (packed({"x": entry(), "y": entry(12, 20)}, data=20), "begins at byte .*: expected"),
    "two in one place": (packed({"x": entry(), "y": entry()}), "begins at byte .*: expected"),
    "half in one place": (packed({"x": entry(), "y": entry(4, 12)}, data=12), "begins at byte .*: expected"),
    "size that does not fit the shape": (packed({"x": entry(shape=(3,))}), "8 bytes for F32 of shape"),
    "half a byte": (packed({"x": entry(0, 1, (3,), "F4")}, data=1), "1 bytes for F4"),
    "metadata a list": (packed({"__metadata__": ["x"], "x": entry()}), "__metadata__ is a list"),
    "metadata of numbers": (packed({"__metadata__": {"x": 1}, "x": entry()}), "__metadata__ is a JSON object"),
    "cut in the data": (WHOLE[:-1], "end at byte"),
    "cut in the header": (WHOLE[:40], "bytes in a file of 40"),
}
# What transformers and safetensors let pass, and is refused here: which of two tensors is meant, nobody can know.
STRICTER = {"a name twice", "a key twice inside", "a thousand dimensions", "offsets reversed, unknown type"}


def judged(content: bytes) -> bool:
    """Whether safetensors itself takes these bytes for a file."""
    try:
        deserialize(content)
    except SafetensorError:
        return False
    return True


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_headers_are_one_line(tmp_path: Path, case: str) -> None:
    content, reason = DAMAGED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    for read in (read_header, lambda path: Shards([path]), lambda path: open_checkpoint(str(path.parent))):
        with pytest.raises(ModelError, match=rf"shard model\.safetensors .*({reason}).*download it again") as caught:
            read(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(tmp_path))
    if case not in STRICTER:
        assert not judged(content)


def test_a_header_that_is_too_large(tmp_path: Path) -> None:
    """A sparse file: the header would fit into it, but nobody should read so much."""
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)
    for read in (read_header, lambda path: Shards([path])):
        with pytest.raises(ModelError, match="expected at most 100000000"):
            read(path)


def test_a_whole_header(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(WHOLE)
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    found = {one.name: (one.shape, WHOLE[one.start : one.start + one.bytes]) for one in header.entries}
    assert found == {name: (array.shape, array.tobytes()) for name, array in TENSORS.items()}
    assert [one.start for one in header.entries] == sorted(one.start for one in header.entries)


def test_blanks_around_a_header(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed(b" \n" + json.dumps({"x": entry()}).encode() + b"   "))
    assert judged(path.read_bytes())
    assert [(one.name, one.bytes) for one in read_header(path).entries] == [("x", 8)]


dtypes = st.sampled_from(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F16", "BF16", "I32", "F32", "I64", "F64"])
names = st.text(st.characters(codec="utf-8"), max_size=6)
SIZES = {"F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}


@st.composite
def entries(draw: st.DrawFn) -> list[Entry]:
    made = []
    for name in draw(st.lists(names, max_size=5, unique=True)):
        dtype, shape = draw(dtypes), tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
        made.append(Entry(name, dtype, shape, 0, int(np.prod(shape, dtype=int)) * SIZES.get(dtype, 1)))
    return made


@given(entries(), st.dictionaries(names, names, max_size=3))
@settings(max_examples=150, deadline=None)
def test_what_we_write_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, made: list[Entry], free: dict[str, str]
) -> None:
    head, data = make_header(made, free), bytes(sum(one.bytes for one in made))
    assert len(head) % 8 == 0
    path = tmp_path_factory.getbasetemp() / "made.safetensors"
    path.write_bytes(head + data)
    with safe_open(path, framework="numpy") as file:
        assert (file.metadata() or {}) == free
        assert set(file.keys()) == {one.name for one in made}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        assert {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()} == {
            one.name: (one.dtype, one.shape) for one in made
        }
    found = read_header(path)
    assert found.metadata == free
    assert {(one.name, one.dtype, one.shape, one.bytes) for one in found.entries} == {
        (one.name, one.dtype, one.shape, one.bytes) for one in made
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 30) | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
likely = st.fixed_dictionaries(
    {},
    optional={
        "dtype": dtypes | json_values,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    },
)
headers = (
    st.dictionaries(st.sampled_from(["__metadata__", "x", "y", "z"]), likely | json_values, max_size=3).map(json.dumps)
    | json_values.map(json.dumps)
    | st.text(max_size=60)
).map(lambda text: text.encode(errors="surrogatepass"))
files = st.one_of(
    st.binary(max_size=80),
    st.tuples(headers, st.integers(0, 40)).map(lambda pair: packed(*pair)),
    st.tuples(headers, st.integers(0, 40), st.integers(0, 2**64 - 1)).map(lambda parts: packed(*parts)),
    st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=8)).map(
        lambda pair: WHOLE[: pair[0]] + pair[1] + WHOLE[pair[0] + len(pair[1]) :]
    ),
    st.integers(0, len(WHOLE)).map(lambda end: WHOLE[:end]),
)


@given(files)
@settings(max_examples=600, deadline=None)
def test_whatever_the_bytes_it_is_one_line_or_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except IcsearchError as error:
        assert "\n" not in str(error) and error.exit_status == 2
        return
    assert all(8 <= one.start <= one.start + one.bytes <= len(content) for one in header.entries)
    assert Shards([path]).keys() == {one.name for one in header.entries}
    if judged(content):
        expected = {name: bytes(found["data"]) for name, found in deserialize(content)}
        assert {one.name: content[one.start : one.start + one.bytes] for one in header.entries} == expected
    else:  # types that only a later safetensors knows
        assert any(one.dtype not in SIZES and one.dtype not in ("BOOL", "U8", "I8") for one in header.entries)


def indexed(directory: Path, weight_map: Any) -> Path:
    """A checkpoint of one shard, and an index that says this."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "one.safetensors").write_bytes(WHOLE)
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return directory


OUTSIDE = {
    "above": "../outside.safetensors",
    "above, twice named": "x/../../outside.safetensors",
    "absolute": "/outside.safetensors",
    "a folder": "x/one.safetensors",
    "the folder above": "..",
    "the folder itself": ".",
    "nothing": "",
    "the same, longer": "./one.safetensors",
}
NOT_THERE = {
    "a NUL byte": ("one\0.safetensors", "expected a file name inside"),
    "300 letters": ("x" * 300, "cannot use the path"),
    "half a surrogate pair": ("\ud800.safetensors", "expected a file name inside"),
    "an escape sequence": ("\x1b[2J.safetensors", r"names '\\x1b\[2J.safetensors': expected a file name inside"),
    "two lines": ("one\n.safetensors", "expected a file name inside"),
    "missing": ("two.safetensors", "is missing"),
    "a number": (1, "expected a file name"),
    "null": (None, "expected a file name"),
    "a list": (["one.safetensors"], "expected a file name"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_no_index_leads_out_of_its_directory(tmp_path: Path, case: str) -> None:
    (tmp_path / "outside.safetensors").write_bytes(WHOLE)
    name = OUTSIDE[case] if case != "absolute" else str(tmp_path / "outside.safetensors")
    checkpoint = indexed(tmp_path / "model", {"a": "one.safetensors", "b": name})
    (checkpoint / "x").mkdir()
    (checkpoint / "x" / "one.safetensors").write_bytes(WHOLE)
    with pytest.raises(ModelError, match="expected a file name inside"):
        open_checkpoint(str(checkpoint))


@pytest.mark.parametrize("case", NOT_THERE)
def test_an_index_that_names_no_file(tmp_path: Path, case: str) -> None:
    name, reason = NOT_THERE[case]
    with pytest.raises(ModelError, match=reason) as caught:
        open_checkpoint(str(indexed(tmp_path / "model", {"a": name})))
    assert "\n" not in str(caught.value)


shard_names = st.sampled_from(["one.safetensors", "../outside.safetensors", "x/one.safetensors", "..", ""]) | st.text(
    max_size=8
)
indexes = st.fixed_dictionaries(
    {}, optional={"weight_map": st.dictionaries(st.sampled_from("abx"), shard_names, max_size=3) | json_values}
).map(json.dumps) | json_values.map(json.dumps)


@given(indexes)
@settings(max_examples=200, deadline=None)
def test_whatever_an_index_says_all_shards_lie_in_its_directory(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    base = tmp_path_factory.getbasetemp() / "index"
    if not base.exists():
        base.mkdir()
        (base / "outside.safetensors").write_bytes(WHOLE)
        indexed(base / "model", {})
        (base / "model" / "x").mkdir()
        (base / "model" / "x" / "one.safetensors").write_bytes(WHOLE)
    (base / "model" / INDEX_NAME).write_text(text)
    try:
        shards = open_checkpoint(str(base / "model")).shards
    except IcsearchError as error:
        assert "\n" not in str(error) and error.exit_status == 2
        return
    assert shards == (base / "model" / "one.safetensors",)


INDEX_KINDS: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("case", INDEX_KINDS)
def test_a_shard_that_is_no_file(tmp_path: Path, case: str) -> None:
    checkpoint = indexed(tmp_path / "model", {"a": "two.safetensors"})
    INDEX_KINDS[case](checkpoint / "two.safetensors")
    with pytest.raises(ModelError, match=r"is no file|is missing|cannot use the path") as caught:
        open_checkpoint(str(checkpoint))
    assert "\n" not in str(caught.value)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path in paths:
        path.write_bytes(WHOLE)
    with pytest.raises(ModelError, match=r"tensor \w is in two shards, one\.safetensors and two\.safetensors"):
        Shards(paths)
