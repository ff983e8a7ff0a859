"""Where calibration text comes from: SOURCE as typed on the command line, read as a stream of documents.

    demo, demo:heldout            the built-in corpus (no file, no download)
    FILE.txt                      one document per file, unless lines ``<|endoftext|>`` separate several
    FILE.jsonl, FILE.parquet      one document per line or row: a field or column of it (see calibration/fields.py)
    hf:NAME[:CONFIG][:SPLIT]      a dataset of the hub or a local folder, through `datasets`, streamed
    DIRECTORY                     ready tokens: calibration.safetensors (see calibration/cache.py)

Why a .txt file is one document: a search for layers that can share their selection needs far dependencies,
and splitting at blank lines would cut every text into paragraphs. Form feeds are page breaks in text taken
from PDFs, and ``---`` is a rule in Markdown, so neither separates documents; a line that holds nothing but
``<|endoftext|>`` never stands in a text by accident.

Files are read as streams, so a source may be larger than memory. This module imports neither torch nor
`datasets` by itself. JSON lines are read with the standard library and Parquet with pyarrow, which give the
line number of a mistake and read the one column that is needed.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from icsearch.calibration import corpus
from icsearch.calibration.fields import TEXT_FIELD, Render, document_of, field_of
from icsearch.core.errors import CalibrationError
from icsearch.core.files import typed_path
from icsearch.core.text import first_line

TOKENS_FILE = "calibration.safetensors"
MANIFEST_FILE = "calibration.json"
SEPARATOR = "<|endoftext|>"
EXPECTED = "demo, a .txt, .jsonl or .parquet file, hf:NAME[:CONFIG][:SPLIT], or a directory with " + TOKENS_FILE

# About a million tokens, longer than any sequence: what is longer is read as several documents, so that one huge
# file neither fills the memory nor is tokenised whole for a few sequences from its beginning.
MAX_DOCUMENT_CHARS = 4_000_000

# A source that fits into the buffer is shuffled whole, a larger one through it. A stream from the hub gets a
# smaller one, as all of it has to be downloaded before the first document is used.
FILE_BUFFER = (100_000, 64_000_000)
HUB_BUFFER = (1_000, 16_000_000)

# A lone second part of an hf: spec is a split when it is one of these names, and a configuration otherwise.
SPLIT_NAMES = ("train", "validation", "valid", "dev", "test")

CHUNK_BYTES = 1 << 20


@dataclass
class TextSource(ABC):
    """Text to be tokenised. `text` is the SOURCE as typed; `revision` is known once a hub dataset was opened.

    `field` is the one of rows that was asked for, and `render` what chats go through, where that is known.
    """

    text: str
    corpus_version: str | None = None
    revision: str | None = None
    field: str | None = None
    render: Render | None = None

    @property
    def chosen_field(self) -> str | None:
        """The field of rows that is read; None where there are no rows."""
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of what the text is, not of where it lies; the same content gives the same cache key."""

    @abstractmethod
    def documents(self, seed: int) -> Iterator[str]:
        """Non-blank documents in an order that `seed` decides; read only as far as the caller goes on."""


@dataclass
class ReadyTokens:
    """A directory that holds tokens already: nothing to tokenise or to shuffle."""

    text: str
    directory: Path


Source = TextSource | ReadyTokens


def parse_source(text: str, field: str | None = None) -> Source:
    """The source that `text` names, checked as far as possible without reading it; `field`: what of its rows to read.

    Raises CalibrationError for what is none: a missing or empty file, an unknown extension, a directory
    without tokens, an hf: spec without a name, a field of what has no rows.
    """
    source = _parsed(text)
    if field is not None:
        if not isinstance(source, JsonLines | Parquet | HubDataset):
            raise CalibrationError(f"--field {field} is of rows, and {text} has none: leave it out")
        source.field = field
    return source


def _parsed(text: str) -> Source:
    if text == "demo" or text.startswith("demo:"):
        split = text.partition(":")[2] or "calibration"
        if text == "demo:" or split not in ("calibration", "heldout"):
            raise CalibrationError(f"no built-in corpus {text!r}: expected demo, demo:calibration or demo:heldout")
        return BuiltIn(text=text, corpus_version=corpus.CORPUS_VERSION, split=split)
    if text.startswith("hf:"):
        return _parse_hub(text)
    path = typed_path(text, CalibrationError)
    with _file_errors(path):
        if path.is_dir():
            if (path / TOKENS_FILE).is_file():
                return ReadyTokens(text, path)
            if (path / MANIFEST_FILE).is_file():
                raise CalibrationError(
                    f"{path} is unfinished, it has no {TOKENS_FILE}: run icsearch calibrate there again"
                )
            raise CalibrationError(
                f"directory {path} has no {TOKENS_FILE}: expected {EXPECTED} (a dataset folder: hf:{text})"
            )
        if not path.exists():
            raise CalibrationError(f"no file {text}: expected {EXPECTED}")
        kind = FILE_KINDS.get(path.suffix.lower())
        if kind is None:
            raise CalibrationError(
                f"{text} has the extension {path.suffix or '(none)'}: expected .txt, .jsonl or .parquet"
            )
        if not path.is_file():
            raise CalibrationError(f"{text} is no regular file: expected {EXPECTED}")
        if path.stat().st_size == 0:
            raise CalibrationError(f"{text} is empty: expected text in it")
        return kind(text=text, path=path)


def _parse_hub(text: str) -> TextSource:
    name, config, split = hub_parts(text)
    if not name.strip() or text.count(":") > 3:
        raise CalibrationError(
            f"{text!r} is not a dataset: expected hf:NAME[:CONFIG][:SPLIT], such as hf:wikitext:train"
        )
    path = typed_path(name, CalibrationError)
    if path.is_file():
        raise CalibrationError(f"{name} is a file, hf: expects a dataset name or a folder: give the file without hf:")
    if not path.is_dir() and re.fullmatch(r"[\w.-]*\w[\w.-]*(/[\w.-]*\w[\w.-]*)?", name) is None:
        raise CalibrationError(
            f"{text!r}: {name!r} is neither a folder here nor a name on the hub: expected NAME or OWNER/NAME"
        )
    return HubDataset(text=text, name=name, config=config, split=split)


def hub_parts(text: str) -> tuple[str, str | None, str | None]:
    """NAME, CONFIG and SPLIT of hf:NAME[:CONFIG][:SPLIT], as typed; None for those that it does not say."""
    name, *rest = text.removeprefix("hf:").split(":")
    if len(rest) == 1 and rest[0] in SPLIT_NAMES:
        rest = ["", *rest]
    config, split = (*rest, "", "")[:2]
    return name, config or None, split or None


@dataclass
class BuiltIn(TextSource):
    """The built-in corpus, an endless stream that the seed starts."""

    split: str = "calibration"

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"demo:{self.split}:{corpus.CORPUS_VERSION}".encode()).hexdigest()

    def documents(self, seed: int) -> Iterator[str]:
        return iter(corpus.documents(self.split, seed))


@dataclass
class FileSource(TextSource):
    """A local file. The fingerprint is of its bytes: a copy elsewhere is the same source."""

    path: Path = Path()

    @cached_property
    def fingerprint(self) -> str:
        with _file_errors(self.path), self.path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def documents(self, seed: int) -> Iterator[str]:
        return shuffled(usable(self.read()), seed, *FILE_BUFFER)

    @abstractmethod
    def read(self) -> Iterator[str]:
        """Documents in the order of the file."""


@dataclass
class TextFile(FileSource):
    """A .txt file: one document, or several separated by lines that hold ``<|endoftext|>`` alone."""

    def read(self) -> Iterator[str]:
        lines: list[str] = []
        chars, number = 0, 1
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        with _file_errors(self.path), self.path.open("rb") as file:
            while raw := file.readline(CHUNK_BYTES):  # a line, or a piece of a very long one
                line = _decoded(decoder, raw, self.path, number).replace("\r\n", "\n")
                number += raw.endswith(b"\n")
                if line.strip() == SEPARATOR or chars + len(line) > MAX_DOCUMENT_CHARS:
                    yield "".join(lines)
                    lines, chars = [], 0
                if line.strip() != SEPARATOR:
                    lines.append(line)
                    chars += len(line)
        _decoded(decoder, b"", self.path, number, final=True)
        yield "".join(lines)


@dataclass
class JsonLines(FileSource):
    """A .jsonl file: one JSON object per line; blank lines are skipped."""

    @cached_property
    def chosen_field(self) -> str:
        """By the first line where none was asked for."""
        return next((field_of(row, where, self.field) for row, where in self._rows()), TEXT_FIELD)

    def read(self) -> Iterator[str]:
        for row, where in self._rows():
            name = field_of(row, where, self.chosen_field)
            # An escape such as \ud800 alone is half a character, which no tokenizer takes.
            text = document_of(row[name], f"{where}: field {name}", self.render)
            yield text.encode("utf-8", "replace").decode("utf-8")

    def _rows(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Objects, and where each is."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        with _file_errors(self.path), self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = _decoded(decoder, raw, self.path, number, final=raw[-1:] != b"\n")
                if not line.strip():
                    continue
                where = f"{self.path}, line {number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise CalibrationError(
                        f"{where} is not JSON ({error}): expected one JSON object per line"
                    ) from None
                if not isinstance(row, dict):
                    raise CalibrationError(f"{where} is a JSON {type(row).__name__}: expected an object")
                yield row, where


@dataclass
class Parquet(FileSource):
    """A .parquet file: one of its columns, and no other is read."""

    @cached_property
    def chosen_field(self) -> str:
        """By its columns where none was asked for."""
        with self._opened() as file:
            return field_of(file.schema_arrow.names, str(self.path), self.field)

    def read(self) -> Iterator[str]:
        name = self.chosen_field
        with self._opened() as file:
            for batch in file.iter_batches(batch_size=256, columns=[name]):
                for value in batch.column(0).to_pylist():
                    yield document_of(value, f"{self.path}: column {name}", self.render)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                yield file
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            raise CalibrationError(
                f"{self.path} cannot be read as Parquet ({first_line(error)}): expected a whole .parquet file"
            ) from None


FILE_KINDS: dict[str, type[FileSource]] = {".txt": TextFile, ".jsonl": JsonLines, ".parquet": Parquet}


@dataclass
class HubDataset(TextSource):
    """A dataset of the hub, or a local dataset folder (also one written by `save_to_disk`), read as a stream."""

    name: str = ""
    config: str | None = None
    split: str | None = None

    @property
    def _split(self) -> str:
        return self.split or "train"

    @property
    def chosen_field(self) -> str:
        """As asked for: to look for one would take the network."""
        return self.field or TEXT_FIELD

    @property
    def folder(self) -> Path | None:
        path = typed_path(self.name, CalibrationError)
        return path if path.is_dir() else None

    @cached_property
    def fingerprint(self) -> str:
        """Of name, configuration and split, so that a cache is found again without a network.

        The hub's revision goes into the manifest instead. A folder is taken by the names, sizes, beginnings
        and ends of its files: enough to see a change, without reading all of a large one.
        """
        content = self.name
        if self.folder:
            digest = hashlib.sha256()
            for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
                size = path.stat().st_size
                digest.update(json.dumps([path.relative_to(self.folder).as_posix(), size]).encode())
                with _file_errors(path), path.open("rb") as file:
                    digest.update(file.read(CHUNK_BYTES))
                    file.seek(max(0, size - CHUNK_BYTES))
                    digest.update(file.read(CHUNK_BYTES))
            content = digest.hexdigest()
        spec = json.dumps(["hf", content, self.config, self._split])
        return hashlib.sha256(spec.encode()).hexdigest()

    def documents(self, seed: int) -> Iterator[str]:
        return shuffled(usable(self._texts()), seed, *HUB_BUFFER)

    def _texts(self) -> Iterator[str]:
        for row in self._rows():
            name = field_of(row, self.text, self.chosen_field)
            yield document_of(row[name], f"{self.text}: field {name}", self.render)

    def _rows(self) -> Iterator[dict[str, Any]]:
        # Whatever `datasets`, the hub client or a file format raises here is about the source, so it is said in
        # one line; the cause stays attached for --debug.
        with _quiet("datasets", "huggingface_hub"):
            try:
                yield from self._open()
            except Exception as error:
                tried = f"dataset {self.name}, configuration {self.config or '(default)'}, split {self._split}"
                advice = "check the spec hf:NAME[:CONFIG][:SPLIT]"
                if isinstance(error, OSError) and not self.folder:
                    advice = (
                        "check the name and the network, or download it elsewhere and give hf:/path/to/folder or a "
                        ".jsonl or .parquet file"
                    )
                raise CalibrationError(
                    f"cannot read {self.text} (tried {tried}): {first_line(error).rstrip('.')}; {advice}"
                ) from error

    def _open(self) -> Iterable[dict[str, Any]]:
        import datasets

        folder = self.folder
        if folder is not None and any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            # What save_to_disk wrote holds either one unnamed split or a dictionary of them.
            saved: Any = datasets.load_from_disk(str(folder))
            available = list(saved) if isinstance(saved, dict) else []
            if self.config or (self.split and not available):
                raise ValueError("the folder was written by save_to_disk and has no such configuration or split")
            if available and self._split not in available:
                raise ValueError(f"no split {self._split}, available splits: {available}")
            chosen: Iterable[dict[str, Any]] = saved[self._split] if available else saved
            return chosen
        builder = datasets.load_dataset_builder(str(folder or self.name), name=self.config)
        self.revision = None if folder else builder.hash
        stream: Iterable[dict[str, Any]] = builder.as_streaming_dataset(split=self._split)
        return stream


def shuffled(documents: Iterable[str], seed: int, max_documents: int, max_chars: int) -> Iterator[str]:
    """Documents in a random order, through a buffer that holds at most so many documents and characters.

    All of them are shuffled together where they fit; the reader is never further ahead than the buffer is large.
    """
    rng = random.Random(seed)
    buffer: list[str] = []
    chars = 0
    for document in documents:
        while buffer and (len(buffer) >= max_documents or chars + len(document) > max_chars):
            chosen = rng.randrange(len(buffer))
            buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
            chars -= len(buffer[-1])
            yield buffer.pop()
        buffer.append(document)
        chars += len(document)
    rng.shuffle(buffer)
    yield from buffer


def usable(documents: Iterable[str]) -> Iterator[str]:
    """Without blank documents, and with those above MAX_DOCUMENT_CHARS cut into several."""
    for document in documents:
        for start in range(0, len(document), MAX_DOCUMENT_CHARS):
            piece = document[start : start + MAX_DOCUMENT_CHARS]
            if piece.strip():
                yield piece


def _decoded(decoder: codecs.IncrementalDecoder, raw: bytes, path: Path, line: int, final: bool = False) -> str:
    try:
        return decoder.decode(raw, final)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (line {line}: {error.reason}): convert it, for example with "
            f"iconv -f LATIN1 -t UTF-8"
        ) from None


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CalibrationError(
            f"cannot read {path}: {error.strerror or error}; check the path and its permissions"
        ) from None


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keep the libraries' own complaints off the terminal: an error is raised once, and said once."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
