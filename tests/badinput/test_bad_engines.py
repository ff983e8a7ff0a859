"""What engines read that cannot be imported, and copies of checkpoints that cannot be written: one line each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given

from bad_input import Place, Row, Words
from icsearch.core.errors import IcsearchError
from icsearch.engines.read import import_pattern
from icsearch.model.config import Backbone
from mutations import few, texts, within

SIX = ("--engine", "vllm", "--layers", 6)
WORDS = ("--engine", "transformers", "--layers", 6)
IMPORTS: dict[str, tuple[Callable[[Place], Words], str]] = {
    "nothing": (lambda p: ("nowhere.json", *SIX), "nowhere.json"),
    "no name": (lambda p: ("", *SIX), ""),
    "a long name": (lambda p: ("x" * 300, *SIX), "File name too long"),
    "an empty directory": (lambda p: (p.file("d/x").parent, *SIX), "d"),
    "a cut config": (lambda p: (p.file("config.json", '{"model'),), "is not JSON"),
    "a list": (lambda p: (p.file("config.json", "[]"), *SIX), "holds a list"),
    "no UTF-8": (lambda p: (p.file("config.json", b"\xff"), *SIX), "is not JSON"),
    "cut overrides": (lambda p: ('{"index_topk_pattern": "FF', *SIX), "is not JSON"),
    "overrides said twice": (lambda p: ('{"index_topk_freq": 4, "index_topk_freq": 2}', *SIX), "twice"),
    "another length": (lambda p: ('{"indexer_types": ["full"]}', *WORDS), ""),
    "other letters": (lambda p: ('{"index_topk_pattern": "FXFFFF"}', *SIX), "X"),
    "a first S": (lambda p: ('{"use_index_cache": true, "index_topk_pattern": "SFFFFF"}', *SIX), ""),
    "other types": (lambda p: ('{"indexer_types": ["F", "S", "F", "F", "F", "F"]}', *WORDS), "indexer_types"),
    "types of numbers": (lambda p: ('{"indexer_types": 6}', *WORDS), "indexer_types"),
    "a frequency of text": (lambda p: ("freq:four", *SIX), "freq:four"),
    "a frequency of 0": (lambda p: ("freq:0", *SIX), ""),
    "a frequency without end": (lambda p: ("freq:" + "9" * 400, *SIX), ""),
    "an offset of -1": (lambda p: ("freq:4,offset:-1", *SIX), ""),
    "an engine of nobody": (lambda p: ("freq:4", "--layers", 6, "--engine", "tgi"), "'tgi'"),
    "no layers": (lambda p: ("freq:4", "--layers", 0), "--layers"),
    "layers without end": (lambda p: ("freq:4", "--layers", 10**9), "--layers"),
    "no engine": (lambda p: ("freq:4", "--layers", 6), "none is named: give --engine NAME"),
    "two engines": (lambda p: ("megatron:freq:4", *SIX), "give one of them"),
    "a command line": (lambda p: ("vllm serve M --port 80", *SIX), "a command line is not read here: give"),
    "no model": (lambda p: ("freq:4", "--engine", "vllm"), "give --layers N"),
    "two models": (lambda p: ("freq:4", *SIX, "--model-config", p.good.checkpoint / "config.json"), "give one of them"),
    "a model that is not there": (lambda p: ("freq:4", "--model-config", "nowhere.json"), "nowhere.json"),
    "a quote that is left open": (lambda p: ("--hf-overrides '{\"a\": 1}", *SIX), ""),
    "no GGUF": (lambda p: (p.file("model.gguf", b"GGUX" + bytes(99)), *SIX), "model.gguf"),
    "a cut GGUF": (lambda p: (p.file("model.gguf", b"GGUF\x03\0\0\0" + bytes(3)), *SIX), "model.gguf"),
    "its own file": (lambda p: (p.good.greedy / "pattern.json", *SIX), "as it is"),
    "a place that is taken": (lambda p: ("freq:4", *SIX, "--out", p.file("d/x").parent), "d"),
    "a place in no directory": (lambda p: ("freq:4", *SIX, "--out", "nowhere/pattern.json"), "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPORTS)
def test_imports(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, found = IMPORTS[case]
    place.refuses(Row(lambda p: ("import", *make(p)), found, ""), capfd)


def copying(*more: object, out: object = "copy") -> Callable[[Place], Words]:
    return lambda p: ("export", p.good.greedy, "--checkpoint", out, "--model", p.good.checkpoint, *more)


def of(model: Callable[[Place], Path]) -> Callable[[Place], Words]:
    """A copy of another checkpoint."""
    return lambda p: ("export", p.good.greedy, "--checkpoint", "copy", "--model", model(p))


def inside(place: Place) -> Words:
    model = place.checkpoint()
    return ("export", place.good.greedy, "--checkpoint", model / "copy", "--model", model, "--other-weights")


def cut(place: Place) -> Path:
    model = place.checkpoint()
    return place.changed(model / "model.safetensors", lambda content: content[:-1]).parent


def pipe(place: Place) -> Path:
    import os

    model = place.checkpoint(without="model.safetensors")
    os.mkfifo(model / "model.safetensors")
    return model


COPIES: dict[str, tuple[Callable[[Place], Words], str]] = {
    "of other weights": (of(lambda p: p.config(rms_norm_eps=1e-6)), "other weights"),
    "of another depth": (of(lambda p: p.config(num_hidden_layers=5, indexer_types=None)), "decoder layers"),
    "of another kind": (of(lambda p: p.config(model_type="deepseek_v32")), "deepseek_v32"),
    "of a cut checkpoint": (of(cut), "is truncated or damaged"),
    "of a pipe": (of(pipe), "is no file"),
    "of nothing": (of(lambda p: p.root / "nowhere"), "no checkpoint at"),
    "in a file's place": (lambda p: copying(out=p.file("taken", "x"))(p), "taken"),
    "in a place with files": (lambda p: copying(out=p.file("taken/x", "x").parent)(p), "is not empty"),
    "within itself": (inside, "lies inside of the checkpoint"),
    "in a long name": (copying(out="x" * 300), "File name too long"),
    "where nobody may write": (copying(out="/proc/icsearch/copy"), "/proc/icsearch"),
    "of a retention not reached": (copying("--retention", "1/6"), "holds 3 to 6 of 6"),
    "for an engine as well": (copying("--engine", "vllm"), "--engine and --checkpoint both say"),
    "of a pattern that is damaged": (
        lambda p: ("export", p.pattern(steps=3), "--checkpoint", "copy", "--model", p.good.checkpoint), "steps is 3"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COPIES)
def test_copies(place: Place, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, found = COPIES[case]
    place.refuses(Row(make, found, ""), capfd)


def test_a_copy_of_what_is_gone(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """A pattern that names its checkpoint by a path that is gone asks for --model."""
    gone = shutil.copytree(place.good.checkpoint, place.root / "gone")
    file = place.pattern(model={**json.loads((place.good.greedy / "pattern.json").read_text())["model"],
                                "name_or_path": str(gone)})  # fmt: skip
    shutil.rmtree(gone)
    place.refuses(Row(lambda p: ("export", file, "--checkpoint", "copy"), "no checkpoint at", ""), capfd)


OVERRIDES = {
    "use_index_cache": True,
    "index_topk_pattern": "FFSFSS",
    "index_topk_freq": 4,
    "index_skip_topk_offset": 2,
    "indexer_types": ["full", "full", "shared", "full", "shared", "shared"],
}


@few
@given(texts(OVERRIDES))
def test_overrides_are_read_or_refused(content: bytes) -> None:
    for engine in ("vllm", "sglang", "transformers"):
        with within(20):
            try:
                found = import_pattern(content.decode(errors="surrogateescape"), engine, Backbone.alike(6))
                assert len(found.pattern) == 6
            except IcsearchError as error:
                assert str(error)
