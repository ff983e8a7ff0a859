"""Sources, packing, cache and checks of calibration batches. No network, no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from icsearch.calibration import batches, corpus, sources
from icsearch.calibration import cache as storing
from icsearch.core.errors import CalibrationError

VOCAB = 300
TEXT = "the miller of the old mill by the river knows the road to the next village and back again"


def make_tokenizer(bos: bool = False, eos: bool = True, text: str = TEXT) -> PreTrainedTokenizerFast:
    """A byte-level BPE, trained here."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text] * 4, trainer)
    if bos:
        start = backend.token_to_id("<|start|>")
        backend.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", start)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>" if eos else None, bos_token="<|start|>" if bos else None
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """A CalibrationError of one line that names all `parts`."""
    with pytest.raises(CalibrationError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def text_file(path: Path, count: int = 40, separator: str = "\n<|endoftext|>\n") -> Path:
    path.write_text(separator.join(f"Document {i}: {TEXT}." for i in range(count)), encoding="utf-8")
    return path


def build(
    source: str, tokenizer: Any, seq_len: int = 32, num_sequences: int = 4, seed: int = 0, vocab_size: int = VOCAB
) -> batches.Calibration:
    parsed = sources.parse_source(source)
    assert isinstance(parsed, sources.TextSource)
    key = storing.cache_key(parsed, "t", seq_len, num_sequences, seed)
    return batches.build(parsed, tokenizer, key, vocab_size=vocab_size)


def obtain(source: str, tokenizer: Any, cache: Path, **changes: Any) -> tuple[batches.Calibration, bool]:
    options: dict[str, Any] = {
        "seq_len": None,
        "num_sequences": None,
        "default_seq_len": 32,
        "default_num_sequences": 4,
        "seed": 0,
        "limits": batches.Limits(VOCAB, 4, 64),
    }
    return storing.obtain(source, lambda: tokenizer, cache, **{**options, **changes})


def texts(source: str, seed: int = 0) -> list[str]:
    parsed = sources.parse_source(source)
    assert isinstance(parsed, sources.TextSource)
    return list(parsed.documents(seed))


# --- packing -------------------------------------------------------------------------------------------------

EOS = -1
DOCUMENTS = st.lists(st.integers(0, 30), max_size=12).map(
    lambda lengths: [[doc * 100 + i for i in range(length)] for doc, length in enumerate(lengths)]
)


@given(DOCUMENTS, st.integers(1, 12), st.sampled_from([None, EOS]))
def test_packed_sequences_keep_the_rule(documents: list[list[int]], seq_len: int, eos: int | None) -> None:
    sequences = list(batches.pack(documents, seq_len, eos))
    assert all(len(sequence) == seq_len for sequence in sequences)
    tokens = [token for sequence in sequences for token in sequence if token != EOS]
    assert tokens == sorted(set(tokens))  # order kept, nothing twice
    for before, sequence in zip([[EOS], *sequences], sequences, strict=False):
        first = sequence[0]
        starts_a_document = first % 100 == 0 and first != EOS
        goes_on_as_one_document = before[-1] == first - 1 and is_run(sequence, eos)
        assert starts_a_document or goes_on_as_one_document or (seq_len == 1 and first == EOS)


def is_run(sequence: list[int], eos: int | None) -> bool:
    """One document from the first token on, with its end at the end of the sequence at the earliest."""
    run = sequence[:-1] if eos is not None and sequence[-1] == eos else sequence
    return run == list(range(run[0], run[0] + len(run)))


@given(DOCUMENTS, st.integers(1, 12), st.sampled_from([None, EOS]))
def test_packing_equals_its_slow_twin(documents: list[list[int]], seq_len: int, eos: int | None) -> None:
    assert list(batches.pack(documents, seq_len, eos)) == pack_by_the_words(documents, seq_len, eos)


def pack_by_the_words(documents: list[list[int]], seq_len: int, eos: int | None) -> list[list[int]]:
    """The rule one token at a time."""
    queue = [[*document, *([] if eos is None else [eos])] for document in documents if document]
    done: list[list[int]] = []
    now: list[int] = []
    while queue:
        while queue[0] and len(now) < seq_len:
            now.append(queue[0].pop(0))
        if len(now) == seq_len:
            done.append(now)
            now = []
            if len(queue[0]) < seq_len:
                queue.pop(0)
        else:
            queue.pop(0)
    return done


def test_packing_by_example() -> None:
    short, crossing, long = [1, 2], [11, 12, 13], list(range(21, 32))
    packed = list(batches.pack([short, crossing, [], long, short, short], 4, EOS))
    # `crossing` is cut after one token; `long` (11 and EOS) fills three sequences.
    assert packed == [[1, 2, EOS, 11], [21, 22, 23, 24], [25, 26, 27, 28], [29, 30, 31, EOS], [1, 2, EOS, 1]]


def test_packing_takes_documents_as_it_needs_them() -> None:
    taken: list[int] = []

    def documents() -> Iterator[list[int]]:
        for number in range(100):
            taken.append(number)
            yield [number] * 4

    assert list(islice(batches.pack(documents(), 4, None), 3)) == [[0] * 4, [1] * 4, [2] * 4]
    assert taken == [0, 1, 2]


# --- building ------------------------------------------------------------------------------------------------


def test_built_in_corpus_and_manifest(tokenizer: Any) -> None:
    built = build("demo", tokenizer, seed=3)
    assert built.input_ids.shape == (4, 32) and built.input_ids.dtype == np.int64 and built.loss_mask is None
    assert built.counted_tokens() == [31] * 4
    first = next(iter(corpus.documents("calibration", 3)))
    assert first.startswith(tokenizer.decode(built.input_ids[0].tolist()))
    manifest = built.manifest
    assert manifest["format"] == "icsearch.calibration/1" and manifest["fingerprint"] == built.fingerprint
    assert (manifest["num_sequences"], manifest["seq_len"], manifest["seed"]) == (4, 32, 3)
    assert manifest["corpus_version"] == corpus.CORPUS_VERSION and manifest["counted_tokens"] == 124
    assert manifest["source"] == "demo" and manifest["tokenizer_fingerprint"] == "t" and manifest["documents"] >= 1


def test_splits_of_the_built_in_corpus(tokenizer: Any) -> None:
    plain, named, heldout = (build(s, tokenizer).fingerprint for s in ("demo", "demo:calibration", "demo:heldout"))
    assert plain == named != heldout


def test_seed_decides_the_order_and_nothing_else(tokenizer: Any, tmp_path: Path) -> None:
    path = str(text_file(tmp_path / "a.txt"))
    assert build(path, tokenizer).fingerprint == build(path, tokenizer).fingerprint
    assert build(path, tokenizer).fingerprint != build(path, tokenizer, seed=1).fingerprint
    assert sorted(texts(path, 0)) == sorted(texts(path, 1)) and texts(path, 0) != texts(path, 1)


def test_bos_where_the_tokenizer_adds_one_and_eos_where_it_has_one(tmp_path: Path) -> None:
    path = str(text_file(tmp_path / "a.txt"))
    both, neither = make_tokenizer(bos=True), make_tokenizer(eos=False)
    assert batches.document_prefix(both) == [both.bos_token_id] and batches.document_prefix(neither) == []
    ids = build(path, both, seq_len=128).input_ids
    assert (ids[:, 0] == both.bos_token_id).all() and (ids == both.eos_token_id).any()
    assert not (build(path, neither).input_ids == both.eos_token_id).any()


def test_a_long_document_fills_several_sequences(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text(f"{TEXT} " * 40, encoding="utf-8")
    built = build(str(path), tokenizer)
    assert built.manifest["documents"] == 1
    assert path.read_text().startswith(tokenizer.decode(built.input_ids.reshape(-1).tolist()))


def test_too_little_text(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f"{TEXT} " * 3, encoding="utf-8")
    tokens = len(tokenizer(path.read_text())["input_ids"]) + 1
    filled = tokens // 32
    with refused(f"{tokens} tokens in 1 documents", f"fill {filled} seq", "need 3200", f"--num-sequences {filled}, "):
        build(str(path), tokenizer, num_sequences=100)
    with refused("fill 0 sequences", "need 40000 tokens", "a smaller --seq-len (at least 2)"):
        build(str(path), tokenizer, seq_len=10_000)
    with refused("need 400 tokens: give a source with at least that many, or 364 with --seq-len 91; "):
        obtain(str(path), tokenizer, tmp_path / "cache", seq_len=100, limits=batches.Limits(VOCAB, 90, 128))
    path.write_text("  \n\n ", encoding="utf-8")
    with refused("holds no text"):
        build(str(path), tokenizer)


def test_requests_that_make_no_sense(tokenizer: Any) -> None:
    with refused("--seq-len is 1"):
        build("demo", tokenizer, seq_len=1)
    with refused("--num-sequences is 0"):
        build("demo", tokenizer, num_sequences=0)
    with refused("no tokenizer", "calibration.safetensors"):
        build("demo", None)
    with refused("no tokenizer"):
        batches.tokenizer_fingerprint(None)
    with refused("outside the model's vocabulary of 100", "tokenizer that belongs"):
        build("demo", tokenizer, vocab_size=100)


def test_no_more_is_read_than_needed(tokenizer: Any) -> None:
    taken = 0

    class Counted(sources.BuiltIn):
        def documents(self, seed: int) -> Iterator[str]:
            nonlocal taken
            for taken in range(1, 1_000_000):  # noqa: B007
                yield TEXT

    counted = Counted("x")
    batches.build(counted, tokenizer, storing.cache_key(counted, "t", 32, 4, 0), vocab_size=VOCAB)
    assert taken == batches.BATCH_DOCUMENTS


# --- sources -------------------------------------------------------------------------------------------------


def test_text_file_is_one_document_unless_separated(tmp_path: Path) -> None:
    path = tmp_path / "a.TXT"
    path.write_bytes(b"\xef\xbb\xbfOne.\r\n\r\nStill one.\n\x0cStill.\n---\nStill <|endoftext|> one.")
    assert texts(str(path)) == ["One.\n\nStill one.\n\x0cStill.\n---\nStill <|endoftext|> one."]
    path.write_text("<|endoftext|>\nOne.\n\n<|endoftext|>\n <|endoftext|> \nTwo.\n<|endoftext|>", encoding="utf-8")
    assert sorted(texts(str(path))) == ["One.\n\n", "Two.\n"]


def test_huge_documents_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARS", 100)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 7)
    path = tmp_path / "a.txt"
    path.write_text("äöü€" * 200, encoding="utf-8")
    pieces = list(sources.TextFile("a", path=path).read())
    assert "".join(pieces) == "äöü€" * 200 and {90 < len(piece) <= 100 for piece in pieces[:-1]} == {True}
    assert sorted(texts(str(path))) == sorted(pieces)
    assert [len(piece) for piece in sources.usable(["x" * 250, " ", ""])] == [100, 100, 50]


def test_json_lines_and_parquet(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    rows = [{"text": "One", "id": 1}, {"id": "mixed", "text": "Two\n2"}, {"text": None}, {"text": " "}]
    lines.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    assert sorted(texts(str(lines))) == ["One", "Two\n2"]
    column = pyarrow.array(["One", None, "Two\n2", ""], pyarrow.large_string())
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3, 4], "text": column}), table)
    assert sorted(texts(str(table))) == ["One", "Two\n2"]


def test_half_a_character_in_json_is_replaced(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a \\ud800 b"}', encoding="utf-8")
    assert texts(str(path)) == ["a ? b"]


def test_sources_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("a.csv").write_text("x")
    Path("bare").write_text("x")
    Path("folder").mkdir()
    Path("half").mkdir()
    Path("half/calibration.json").write_text("{}")
    for text, parts in {
        "missing.txt": ("no file missing.txt", "hf:NAME"),
        "": ("directory", "calibration.safetensors"),
        "empty.txt": ("is empty",),
        "a.csv": (".csv", ".txt, .jsonl or .parquet"),
        "bare": ("(none)",),
        "folder": ("has no calibration.safetensors", "hf:folder"),
        "half": ("unfinished", "icsearch calibrate"),
        "x" * 300: ("File name too long", "give another one"),
        "~nosuchuser/x.txt": ("~nosuchuser", "give another one"),
        "nul\0byte.txt": ("null byte",),
        "hf:~nosuchuser/x": ("~nosuchuser",),
        "demo:train": ("demo:heldout",),
        "demo:": ("demo:heldout",),
        "hf:": ("hf:NAME[:CONFIG][:SPLIT]",),
        "hf::train": ("hf:NAME[:CONFIG][:SPLIT]",),
        "hf:a:b:c:d": ("hf:NAME[:CONFIG][:SPLIT]",),
        "hf:/no/such/folder": ("neither a folder here nor a name on the hub",),
        "hf:what is this": ("neither a folder here",),
        "hf:a.csv": ("without hf:",),
    }.items():
        with refused(*parts):
            sources.parse_source(text)


def write_parquet(path: Path, **columns: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


DAMAGED: dict[str, tuple[str, Callable[[Path], Any], tuple[str, ...]]] = {
    "bad json": ("a.jsonl", lambda p: p.write_text('{"text": "a"}\n\n{"text": \n'), ("line 3 is not JSON",)),
    "nested json": ("a.jsonl", lambda p: p.write_text("[" * 100_000), ("line 1 is not JSON",)),
    "json list": ("a.jsonl", lambda p: p.write_text('["a"]'), ("line 1 is a JSON list", "expected an object")),
    "no field": ("a.jsonl", lambda p: p.write_text('{"body": 1, "id": 2}'), ("no field text", "body, id")),
    "no string": ("a.jsonl", lambda p: p.write_text('{"text": 5}'), ("line 1", "holds a int")),
    "jsonl bytes": ("a.jsonl", lambda p: p.write_bytes(b'{"text": "a"}\n{"text": "\xff"}'), ("UTF-8", "line 2")),
    "txt bytes": ("a.txt", lambda p: p.write_bytes(b"a\nb\n\xff\xfe"), ("UTF-8", "line 3", "iconv")),
    "txt cut": ("a.txt", lambda p: p.write_bytes("a\nä".encode()[:-1]), ("UTF-8", "line 2")),
    "no parquet": ("a.parquet", lambda p: p.write_text("x" * 100), ("cannot be read as Parquet",)),
    "no column": (
        "a.parquet",
        lambda p: write_parquet(p, body=["a"], id=[1]),
        ("no field text or messages", "body, id"),
    ),
    "no strings": ("a.parquet", lambda p: write_parquet(p, text=[[1]]), ("holds a list", "expected a string")),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(case: str, tmp_path: Path) -> None:
    name, write, parts = DAMAGED[case]
    write(tmp_path / name)
    with refused(str(tmp_path / name), *parts):
        texts(str(tmp_path / name))


def test_cut_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, text=["word " * 100] * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with refused("cannot be read as Parquet"):
        texts(str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    path = text_file(tmp_path / "a.txt")
    path.chmod(0)
    with refused("cannot read", "permissions"):
        texts(str(path))


@given(st.lists(st.text(max_size=9), max_size=30), st.integers(0, 5), st.integers(1, 40), st.integers(1, 200))
def test_shuffling_loses_nothing(documents: list[str], seed: int, most: int, chars: int) -> None:
    once, again = (list(sources.shuffled(documents, seed, most, chars)) for _ in range(2))
    assert once == again and sorted(once) == sorted(documents)


def test_shuffling_reads_no_further_than_its_buffer() -> None:
    numbers = iter(range(1000))
    list(islice(sources.shuffled(map(str, numbers), 0, 10, 10**6), 3))
    assert next(numbers) == 13


# --- datasets of the hub, offline ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:own/name", ("own/name", None, None)),
        ("hf:name:test", ("name", None, "test")),
        ("hf:name:en", ("name", "en", None)),
        ("hf:name:en:test", ("name", "en", "test")),
        ("hf:name::all", ("name", None, "all")),
    ],
)
def test_hub_specs(text: str, expected: tuple[str | None, ...]) -> None:
    source = sources.parse_source(text)
    assert isinstance(source, sources.HubDataset)
    assert (source.name, source.config, source.split) == expected


def test_hub_fingerprints_need_no_network() -> None:
    specs = ["hf:a", "hf:a:train", "hf:a::train", "hf:a:test", "hf:a:en", "hf:b"]
    found = [
        source.fingerprint for source in map(sources.parse_source, specs) if isinstance(source, sources.TextSource)
    ]
    assert found[0] == found[1] == found[2] and len(set(found)) == 4


@pytest.fixture
def dataset_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for split, word in (("train", "mill"), ("test", "road")):
        rows = (json.dumps({"text": f"{word} {i}", "id": i}) for i in range(30))
        (folder / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def test_local_dataset_folder(dataset_folder: Path) -> None:
    train, test = texts(f"hf:{dataset_folder}"), texts(f"hf:{dataset_folder}:test")
    assert sorted(train) == sorted(f"mill {i}" for i in range(30)) and train != sorted(train)
    assert sorted(test) == sorted(f"road {i}" for i in range(30))


def test_fingerprint_of_a_folder_is_of_its_content(dataset_folder: Path) -> None:
    def fingerprint(folder: Path) -> str:
        source = sources.parse_source(f"hf:{folder}")
        assert isinstance(source, sources.HubDataset)
        return source.fingerprint

    before = fingerprint(dataset_folder)
    moved = dataset_folder.rename(dataset_folder.with_name("moved"))
    assert fingerprint(moved) == before
    (moved / "test.jsonl").write_text('{"text": "new"}')
    assert fingerprint(moved) != before


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_dict({"text": ["a", "b"]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(tmp_path / "several")
    assert sorted(texts(f"hf:{tmp_path}/one")) == sorted(texts(f"hf:{tmp_path}/several")) == ["a", "b"]
    assert texts(f"hf:{tmp_path}/several:test") == ["a"]
    with refused("no split dev", "['train', 'test']"):
        texts(f"hf:{tmp_path}/several:dev")
    with refused("save_to_disk"):
        texts(f"hf:{tmp_path}/one:test")


def test_wrong_config_split_or_field_of_a_dataset(dataset_folder: Path, tmp_path: Path) -> None:
    with refused("Bad split: dev", "['train', 'test']", "hf:NAME[:CONFIG][:SPLIT]"):
        texts(f"hf:{dataset_folder}:dev")
    with refused("configuration english", "not found"):
        texts(f"hf:{dataset_folder}:english")
    (tmp_path / "nothing").mkdir()
    with refused("cannot read", "data files"):
        texts(f"hf:{tmp_path / 'nothing'}")
    (tmp_path / "nothing" / "train.jsonl").write_text('{"body": "a"}')
    with refused("no field text", "body"):
        texts(f"hf:{tmp_path / 'nothing'}")


def test_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    code = (
        "import sys; from icsearch.calibration.sources import parse_source\n"
        "from icsearch.core.errors import CalibrationError\n"
        "try: next(parse_source('hf:nobody/nothing:en:test').documents(0))\n"
        "except CalibrationError as error: print(error, file=sys.stderr)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stderr.count("\n") == 1 and ran.stdout == ""
    for part in ("nobody/nothing", "configuration en", "split test", "network", "hf:/path/to/folder"):
        assert part in ran.stderr


# --- saving, loading, caching --------------------------------------------------------------------------------


def test_saved_is_loaded(tokenizer: Any, tmp_path: Path) -> None:
    built = build("demo", tokenizer)
    storing.save(built, tmp_path / "deep" / "down")
    loaded = storing.load(tmp_path / "deep" / "down")
    assert (loaded.input_ids == built.input_ids).all() and loaded.fingerprint == built.fingerprint
    assert loaded.manifest == built.manifest
    assert sorted(path.name for path in (tmp_path / "deep" / "down").iterdir()) == [
        "calibration.json",
        "calibration.safetensors",
    ]


def own_tokens(directory: Path, **tensors: Any) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "calibration.safetensors")
    return directory


def test_own_tokens(tmp_path: Path) -> None:
    ids = np.arange(24, dtype=np.int64).reshape(3, 8)
    mask = np.zeros((3, 8), dtype=np.bool_)
    mask[:, 0], mask[0, 1:], mask[1, 4], mask[2, 5:7] = True, True, True, True
    loaded, hit = obtain(str(own_tokens(tmp_path / "own", input_ids=ids, loss_mask=mask)), None, tmp_path / "cache")
    assert hit and not (tmp_path / "cache").exists()
    assert loaded.counted_tokens() == [7, 1, 2] and loaded.manifest["counted_tokens"] == 10
    assert loaded.manifest["source"] == str(tmp_path / "own")
    assert (
        loaded.fingerprint
        != batches.Calibration(ids).fingerprint
        != batches.Calibration(ids.reshape(2, 12)).fingerprint
    )


def test_own_tokens_are_refused_where_other_sizes_are_asked_for(tmp_path: Path) -> None:
    own = own_tokens(tmp_path / "own", input_ids=np.arange(24, dtype=np.int64).reshape(3, 8))
    assert obtain(str(own), None, tmp_path, seq_len=8, num_sequences=3)[1]
    with refused("seq_len 8", "--seq-len asks for 16", "leave --seq-len out"):
        obtain(str(own), None, tmp_path, seq_len=16)
    with refused("num_sequences 3", "--num-sequences asks for 2", "leave --num-sequences out"):
        obtain(str(own), None, tmp_path, num_sequences=2)
    with refused("--seq-len asks for 0"):
        obtain(str(own), None, tmp_path, seq_len=0)


def test_own_tokens_are_copied_where_that_is_asked_for(tmp_path: Path) -> None:
    ids = np.arange(24, dtype=np.int64).reshape(3, 8)
    own, copy = own_tokens(tmp_path / "own", input_ids=ids, loss_mask=ids % 2 == 0), tmp_path / "copy"
    assert not obtain(str(own), None, copy, copy_ready=True)[1]
    copied = storing.load(copy)
    assert copied.fingerprint == storing.load(own).fingerprint
    assert json.loads((copy / "calibration.json").read_text())["source"] == str(own)
    assert obtain(str(own), None, copy, copy_ready=True)[1]
    assert obtain(str(own), None, tmp_path / "x" / ".." / "own", copy_ready=True)[1]
    assert [path.name for path in own.iterdir()] == ["calibration.safetensors"]
    other = own_tokens(tmp_path / "other", input_ids=ids + 1)
    with refused("holds other tokens", "--fresh"):
        obtain(str(other), None, copy, copy_ready=True)
    assert not obtain(str(other), None, copy, copy_ready=True, rebuild=True)[1]
    assert (storing.load(copy).input_ids == ids + 1).all()


def test_own_tokens_with_a_description(tmp_path: Path) -> None:
    ids = np.zeros((2, 4), dtype=np.int64)
    directory = own_tokens(tmp_path, input_ids=ids)
    manifest = {"format": "icsearch.calibration/1", "source": "my notes", "fingerprint": None}
    (directory / "calibration.json").write_text(json.dumps(manifest))
    loaded = storing.load(directory)
    assert loaded.manifest["source"] == "my notes" and loaded.manifest["fingerprint"] == loaded.fingerprint
    (directory / "calibration.json").write_text(json.dumps({**manifest, "seq_len": 5}))
    with refused("seq_len 4", "says 5"):
        storing.load(directory)
    (directory / "calibration.json").write_text('{"format": "icsearch.calibration/2"}')
    with refused("icsearch.calibration/2", "icsearch.calibration/1", "delete it"):
        storing.load(directory)


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({"tokens": np.zeros((2, 4), np.int64)}, ("no input_ids", "tokens")),
        ({"input_ids": np.zeros((2, 4), np.int32)}, ("int32 [2, 4]", "expected int64")),
        ({"input_ids": np.zeros(4, np.int64)}, ("int64 [4]", "[sequences, length]")),
        ({"input_ids": np.zeros((0, 4), np.int64)}, ("empty",)),
        ({"input_ids": np.zeros((2, 4), np.int64), "loss_mask": np.ones((2, 4), np.int64)}, ("loss_mask is int64",)),
        ({"input_ids": np.zeros((2, 4), np.int64), "loss_mask": np.ones((2, 3), np.bool_)}, ("expected bool [2, 4]",)),
    ],
)
def test_tokens_of_another_kind(tensors: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    with refused(*parts):
        storing.load(own_tokens(tmp_path, **tensors))


def test_cache_is_used_again(tokenizer: Any, tmp_path: Path) -> None:
    text = text_file(tmp_path / "a.txt")
    first, hit = obtain(str(text), tokenizer, tmp_path / "cache")
    assert not hit
    moved = text.rename(tmp_path / "b.txt")  # the same bytes elsewhere, the same tokenizer made again
    second, hit = obtain(str(moved), make_tokenizer(), tmp_path / "cache")
    assert hit and second.fingerprint == first.fingerprint
    third, hit = obtain(str(tmp_path / "cache"), tokenizer, tmp_path / "unused")
    assert hit and third.fingerprint == first.fingerprint


def test_another_key_is_refused_and_rebuilt_with_consent(tokenizer: Any, tmp_path: Path) -> None:
    text, cache = text_file(tmp_path / "a.txt"), tmp_path / "cache"
    before, _ = obtain(str(text), tokenizer, cache)
    with refused("seq_len (there 32, asked for 16)", "num_sequences (there 4, asked for 5)", "seed", "--fresh"):
        obtain(str(text), tokenizer, cache, seq_len=16, num_sequences=5, seed=1)
    with refused("tokenizer_fingerprint"):
        obtain(str(text), make_tokenizer(text="quite other words quite"), cache)
    with refused("corpus_version (there None"):
        obtain("demo", tokenizer, cache)
    text.write_text(text.read_text() + " More.")
    with refused("source_fingerprint"):
        obtain(str(text), tokenizer, cache)
    assert storing.load(cache).fingerprint == before.fingerprint
    after, hit = obtain(str(text), tokenizer, cache, seed=1, rebuild=True)
    assert not hit and storing.load(cache).fingerprint == after.fingerprint != before.fingerprint


def test_new_corpus_version_is_another_key(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    obtain("demo", tokenizer, tmp_path)
    monkeypatch.setattr(corpus, "CORPUS_VERSION", "next")
    with refused("source_fingerprint", "corpus_version", "asked for next"):
        obtain("demo", tokenizer, tmp_path)


def test_own_tokens_are_not_overwritten(tokenizer: Any, tmp_path: Path) -> None:
    own_tokens(tmp_path, input_ids=np.zeros((2, 4), dtype=np.int64))
    with refused("did not build", "as SOURCE", "--fresh"):
        obtain("demo", tokenizer, tmp_path)
    assert not obtain("demo", tokenizer, tmp_path, rebuild=True)[1]


def test_failed_rebuild_leaves_the_cache(tokenizer: Any, tmp_path: Path) -> None:
    text, cache = text_file(tmp_path / "a.txt"), tmp_path / "cache"
    obtain(str(text), tokenizer, cache)
    with refused("too little text"):
        obtain(str(text), tokenizer, cache, num_sequences=10_000, rebuild=True)
    assert obtain(str(text), tokenizer, cache)[1]


@pytest.mark.parametrize("cut", [0, 4, 100, -8])
def test_cut_tokens_are_made_again(tokenizer: Any, tmp_path: Path, cut: int) -> None:
    """Where the manifest says that they were the same: own tokens, and those of other options, are not overwritten."""
    whole, _ = obtain("demo", tokenizer, tmp_path)
    path = tmp_path / "calibration.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    with refused("is damaged or cannot be read", "delete it if icsearch made it"):
        obtain("demo", tokenizer, tmp_path, seed=1)
    assert path.read_bytes() == data[:cut]
    again, hit = obtain("demo", tokenizer, tmp_path)
    assert not hit and again.fingerprint == whole.fingerprint
    assert path.read_bytes() == data
    assert obtain("demo", tokenizer, tmp_path)[1]


def test_a_cut_manifest_is_made_again(tokenizer: Any, tmp_path: Path) -> None:
    obtain("demo", tokenizer, tmp_path)
    manifest = tmp_path / "calibration.json"
    whole = manifest.read_text()
    manifest.write_text(whole[:50])
    with refused("calibration.json is not JSON", "delete it"):
        obtain("demo", tokenizer, tmp_path, seed=1)
    assert not obtain("demo", tokenizer, tmp_path)[1]
    assert manifest.read_text() == whole


def test_a_manifest_of_another_version_is_left_alone(tokenizer: Any, tmp_path: Path) -> None:
    obtain("demo", tokenizer, tmp_path)
    manifest = tmp_path / "calibration.json"
    manifest.write_text(manifest.read_text().replace("icsearch.calibration/1", "icsearch.calibration/2"))
    (tmp_path / "calibration.safetensors").write_bytes(b"other")
    for _ in range(2):
        with refused("calibration"):
            obtain("demo", tokenizer, tmp_path)
    assert "icsearch.calibration/2" in manifest.read_text()


def test_changed_tokens_and_a_broken_manifest_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    obtain("demo", tokenizer, tmp_path)
    path, manifest = tmp_path / "calibration.safetensors", tmp_path / "calibration.json"
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    with refused("damaged", "fingerprint", "delete both files"):
        obtain("demo", tokenizer, tmp_path)
    manifest.write_text(manifest.read_text()[:50])
    with refused("calibration.json is not JSON", "delete it"):
        obtain("demo", tokenizer, tmp_path)
    manifest.write_text("[" * 100_000)
    with refused("calibration.json is nested too deeply", "delete it"):
        obtain("demo", tokenizer, tmp_path)
    manifest.unlink()
    manifest.mkdir()
    with refused("cannot read", "calibration.json", "delete it"):
        obtain("demo", tokenizer, tmp_path)
    assert path.read_bytes() == bytes(data)


def test_killed_between_the_two_files_is_built_again(tokenizer: Any, tmp_path: Path) -> None:
    built, _ = obtain("demo", tokenizer, tmp_path)
    (tmp_path / "calibration.safetensors").unlink()
    again, hit = obtain("demo", tokenizer, tmp_path)
    assert not hit and again.fingerprint == built.fingerprint


def test_disk_that_refuses(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused("cannot write", "another place"):
        obtain("demo", tokenizer, tmp_path / "file" / "cache")


def test_tokens_of_another_tokenizer_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    obtain("demo", tokenizer, tmp_path / "a")
    other = make_tokenizer(text="quite other words quite")
    with refused("another tokenizer", "calibration.json"):
        obtain(str(tmp_path / "a"), other, tmp_path / "unused")
    assert obtain(str(tmp_path / "a"), None, tmp_path / "unused")[1]
    (tmp_path / "a" / "calibration.json").unlink()
    assert obtain(str(tmp_path / "a"), other, tmp_path / "unused")[1]


# --- tokenizer fingerprint -----------------------------------------------------------------------------------


def test_tokenizer_fingerprint_is_of_what_decides_the_tokens(tmp_path: Path) -> None:
    plain = make_tokenizer()
    before = batches.tokenizer_fingerprint(plain)
    plain(["a", "b c"], padding=False, truncation=True, max_length=5)
    assert batches.tokenizer_fingerprint(plain) == before == batches.tokenizer_fingerprint(make_tokenizer())
    others = [make_tokenizer(bos=True), make_tokenizer(eos=False), make_tokenizer(text="other other")]
    assert len({before, *map(batches.tokenizer_fingerprint, others)}) == 4
    plain.save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoTokenizer\n"
        "from icsearch.calibration.batches import tokenizer_fingerprint as of\n"
        "print(of(AutoTokenizer.from_pretrained(sys.argv[1])))"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == before


def test_fingerprint_of_a_slow_tokenizer() -> None:
    class Slow:
        eos_token_id = 0

        def __init__(self, vocabulary: str) -> None:
            self.vocabulary = vocabulary

        def get_vocab(self) -> dict[str, int]:
            return {letter: index for index, letter in enumerate(self.vocabulary)}

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [self.vocabulary.find(letter) for letter in text]}

    assert batches.tokenizer_fingerprint(Slow("abc")) == batches.tokenizer_fingerprint(Slow("abc"))
    assert batches.tokenizer_fingerprint(Slow("abc")) != batches.tokenizer_fingerprint(Slow("acb"))


def test_a_length_that_cannot_be_searched_leaves_nothing_behind(tokenizer: Any, tmp_path: Path) -> None:
    with refused("not longer than the model's index_topk of 4"):
        obtain("demo", tokenizer, tmp_path, seq_len=4)
    assert list(tmp_path.iterdir()) == []


# --- checks before a search ----------------------------------------------------------------------------------


def check(
    ids: Any, mask: Any = None, vocab_size: int = 100, index_topk: int = 4, max_positions: int | None = 64
) -> None:
    batches.check(batches.Calibration(ids, mask), batches.Limits(vocab_size, index_topk, max_positions))


def test_checks_before_a_search() -> None:
    ids = np.arange(24, dtype=np.int64).reshape(3, 8)
    check(ids)
    check(ids, max_positions=None)
    check(ids, index_topk=7, vocab_size=24, max_positions=8)
    with refused("sequences of 8 tokens", "index_topk of 8", "--seq-len 32"):
        check(ids, index_topk=8)
    with refused("longer than the model's 7 positions", "--seq-len 7"):
        check(ids, max_positions=7)
    with refused("4 token ids", "vocabulary of 20", "first one 20 at sequence 2, position 4"):
        check(ids, vocab_size=20)
    with refused("1 token ids", "first one -1 at sequence 0, position 0"):
        check(ids - 1)
    with refused("int32"):
        check(ids.astype(np.int32))
    with refused("empty"):
        check(ids[:0])


def test_a_mask_that_counts_nothing() -> None:
    ids = np.arange(24, dtype=np.int64).reshape(3, 8)
    mask = np.ones((3, 8), dtype=np.bool_)
    check(ids, mask)
    mask[1, 1:] = False
    with refused("no token of sequence 1", "position 0"):
        check(ids, mask)


def test_heavy_libraries_stay_out() -> None:
    code = (
        "import sys, icsearch.calibration\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
