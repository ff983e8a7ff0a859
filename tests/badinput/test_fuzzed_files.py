"""Readers of every format on files that are a little broken: a valid result or an IcsearchError, and nothing else."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bad_input import Good
from eval_fixtures import MadeUpEval, eval_events, made_up_document
from icsearch.calibration.batches import Limits, check, tokenizer_fingerprint
from icsearch.calibration.cache import load
from icsearch.core.jsonfile import strict
from icsearch.core.pattern_file import load_pattern_file
from icsearch.engines.export import export
from icsearch.engines.table import ENGINES
from icsearch.model import layout
from icsearch.model.checkpoint import open_checkpoint
from icsearch.model.loading import load_tokenizer
from icsearch.model.shards import Shards
from icsearch.planning.modelfile import open_model_file
from icsearch.report.write import write_report
from icsearch.runs.evaluation import EvalRecord, load_eval
from icsearch.runs.journal import Journal
from icsearch.runs.record import load_run
from icsearch.runs.similarity_file import read_similarity
from mutations import damaged, documents, few, few_pages, many, reads_or_refuses, texts
from run_fixtures import MadeUpRun, events

RUN = MadeUpRun(num_layers=6, num_shared=3, num_sequences=3)
EVALUATION = MadeUpEval(num_sequences=3)
MANY = pytest.param(many, id="many", marks=pytest.mark.slow)
SETTINGS = [pytest.param(few, id="few"), MANY]
PAGES = [pytest.param(few_pages, id="few"), MANY]

Fuzzed = Callable[[Any], None]


def fuzz(how: Any, strategy: st.SearchStrategy[Any], use: Fuzzed) -> None:
    """Try a function on what a strategy makes; both kinds of outcome must come up, or nothing is tested."""

    @how
    @given(strategy)
    def attempt(made: Any) -> None:
        use(made)

    attempt()


class Outcomes:
    """Counts what readers did, so that a fuzzer that never gets past the first check is seen."""

    def __init__(self) -> None:
        self.taken = self.refused = 0

    def of(self, read: Callable[[], object]) -> None:
        if reads_or_refuses(read):
            self.taken += 1
        else:
            self.refused += 1

    def check(self) -> None:
        assert self.taken and self.refused, (self.taken, self.refused)


@pytest.fixture
def outcomes() -> Outcomes:
    return Outcomes()


@pytest.mark.parametrize("how", SETTINGS)
def test_pattern_files(how: Any, good: Good, tmp_path: Path, outcomes: Outcomes) -> None:
    path = tmp_path / "pattern.json"

    def use(content: bytes) -> None:
        path.write_bytes(content)
        outcomes.of(lambda: read_pattern(path))

    fuzz(how, texts(json.loads((good.greedy / "pattern.json").read_text())), use)
    outcomes.check()


def read_pattern(path: Path) -> None:
    file = load_pattern_file(path)
    json.dumps(file.to_json())
    for engine in ENGINES:
        reads_or_refuses(lambda engine=engine: export(file, engine))  # type: ignore[misc]


@pytest.mark.parametrize("how", PAGES)
def test_journals(how: Any, tmp_path: Path, outcomes: Outcomes) -> None:
    """Read, and shown on a page."""
    (tmp_path / "run").mkdir()

    def use(content: bytes) -> None:
        (tmp_path / "run" / "journal.jsonl").write_bytes(content)
        outcomes.of(lambda: load_run(tmp_path / "run"))
        outcomes.of(lambda: write_report([tmp_path / "run"], tmp_path / "page.html"))

    fuzz(how, journals(events(RUN)), use)
    outcomes.check()


def journals(valid: list[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    whole = lines(valid)
    return st.one_of(documents(valid).map(lines), damaged(whole))


def lines(found: Any) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in found)


@pytest.mark.parametrize("how", SETTINGS)
def test_journals_of_evaluations(how: Any, tmp_path: Path, outcomes: Outcomes) -> None:
    """Replayed into the rows of eval.json."""
    path = tmp_path / "journal.jsonl"
    first, *rest = eval_events(EVALUATION)

    def read() -> None:
        if Journal(path).exists():  # else no evaluation was begun
            json.dumps(strict(EvalRecord.replay(Journal(path).events()).to_json()), allow_nan=False)

    def use(content: bytes) -> None:
        path.write_bytes(content)
        outcomes.of(read)

    fuzz(how, journals([{**first, "format": "icsearch.journal/1"}, *rest]), use)
    outcomes.check()


@pytest.mark.parametrize("how", PAGES)
def test_evaluations(how: Any, tmp_path: Path, outcomes: Outcomes) -> None:
    """Read, and shown on a page."""
    path = tmp_path / "evaluated" / "eval.json"
    path.parent.mkdir()
    valid = json.loads(json.dumps(made_up_document(EVALUATION)))

    def use(content: bytes) -> None:
        path.write_bytes(content)
        outcomes.of(lambda: load_eval(path))
        outcomes.of(lambda: write_report([path.parent], tmp_path / "page.html"))

    fuzz(how, texts(valid), use)
    outcomes.check()


# --- calibrations ---


@pytest.fixture(scope="module")
def described(good: Good, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens and their manifest."""
    from icsearch.calibration.cache import save

    directory = tmp_path_factory.mktemp("tokens")
    save(load(good.tokens), directory)
    return directory


def read_calibration(directory: Path) -> None:
    found = load(directory)
    check(found, Limits(2**62, 8, 512))
    assert found.input_ids.dtype == np.int64 and found.counted().shape == found.input_ids.shape
    json.dumps(found.manifest)


@pytest.mark.parametrize("how", SETTINGS)
def test_manifests(how: Any, described: Path, tmp_path: Path, outcomes: Outcomes) -> None:
    copy = Path(shutil.copytree(described, tmp_path / "copy"))

    def use(content: bytes) -> None:
        (copy / "calibration.json").write_bytes(content)
        outcomes.of(lambda: read_calibration(copy))

    fuzz(how, texts(json.loads((described / "calibration.json").read_text())), use)
    outcomes.check()


@pytest.mark.parametrize("how", SETTINGS)
def test_tokens(how: Any, good: Good, tmp_path: Path, outcomes: Outcomes) -> None:
    path = tmp_path / "calibration.safetensors"

    def use(content: bytes) -> None:
        path.write_bytes(content)
        outcomes.of(lambda: read_calibration(tmp_path))

    fuzz(how, shards((good.tokens / "calibration.safetensors").read_bytes()), use)
    outcomes.check()


# --- checkpoints ---


def shards(whole: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with another header of the right length, or other bytes."""
    size = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]

    def with_header(found: Any) -> bytes:
        text = json.dumps(found).encode()
        return len(text).to_bytes(8, "little") + text + data

    return st.one_of(
        documents(header).map(with_header), damaged(whole), damaged(whole[: 8 + size]).map(lambda b: b + data)
    )


@pytest.mark.parametrize("how", SETTINGS)
def test_shards(how: Any, good: Good, tmp_path: Path, outcomes: Outcomes) -> None:
    """Opened, and every tensor read."""
    model = Path(shutil.copytree(good.checkpoint, tmp_path / "model"))
    path = model / "model.safetensors"

    def read() -> None:
        found = Shards(open_checkpoint(str(model)).shards)
        assert all(stored[:].numel() == math.prod(stored.get_shape()) for stored in found.values())

    def use(content: bytes) -> None:
        path.write_bytes(content)
        outcomes.of(read)

    fuzz(how, shards(path.read_bytes()), use)
    outcomes.check()


@pytest.mark.parametrize("how", SETTINGS)
def test_indices(how: Any, good: Good, tmp_path: Path, outcomes: Outcomes) -> None:
    """The file that says which shard holds what; no shard outside of the directory is ever named."""
    model = Path(shutil.copytree(good.checkpoint, tmp_path / "model"))
    path = model / "model.safetensors.index.json"
    size = int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little")
    names = json.loads((model / "model.safetensors").read_bytes()[8 : 8 + size])
    known = sorted(names.keys() - {"__metadata__"})[:6]

    def read() -> None:
        assert {shard.parent for shard in open_checkpoint(str(model)).shards} == {model}

    def use(content: bytes) -> None:
        path.write_bytes(content)
        outcomes.of(read)

    fuzz(how, texts({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(known, "model.safetensors")}), use)
    outcomes.check()


SHARING = (
    {"indexer_types": ["full", "full", "shared", "full", "shared", "shared"]},
    {"index_topk_pattern": "FFSFSS"},
    {"index_topk_freq": 4, "index_skip_topk_offset": 2},
)


@st.composite
def configs(draw: st.DrawFn, valid: dict[str, Any]) -> bytes:
    """A config.json with one of the ways in which engines read a pattern; changed there, or anywhere."""
    shared = draw(st.sampled_from(SHARING))
    plain = {key: value for key, value in valid.items() if not key.startswith(("indexer_types", "index_topk_p"))}
    if draw(st.booleans()):
        return json.dumps({**plain, **draw(documents(shared))}).encode()
    return draw(texts({**plain, **shared}))


@pytest.mark.parametrize("how", SETTINGS)
def test_configs_to_plan_for(how: Any, good: Good, tmp_path: Path, outcomes: Outcomes) -> None:
    path = tmp_path / "config.json"

    def read() -> None:
        found = open_model_file(str(path))
        assert found.num_parameters > 0 and math.isfinite(found.stored_model_bytes)

    def use(content: bytes) -> None:
        path.write_bytes(content)
        outcomes.of(read)

    fuzz(how, configs(json.loads((good.checkpoint / "config.json").read_text())), use)
    outcomes.check()


@pytest.mark.slow
@pytest.mark.parametrize("how", [few, many], ids=["few", "many"])
def test_configs_to_build(how: Any, good: Good, tmp_path: Path, outcomes: Outcomes) -> None:
    """transformers makes a model of it, without memory."""
    model = Path(shutil.copytree(good.checkpoint, tmp_path / "model"))

    def use(content: bytes) -> None:
        (model / "config.json").write_bytes(content)
        outcomes.of(lambda: layout.inspect(open_checkpoint(str(model))))

    fuzz(how, configs(json.loads((good.checkpoint / "config.json").read_text())), use)
    outcomes.check()


@pytest.mark.slow
@pytest.mark.parametrize("how", [few, many], ids=["few", "many"])
def test_tokenizers(how: Any, good: Good, tmp_path: Path, outcomes: Outcomes) -> None:
    model = Path(shutil.copytree(good.checkpoint, tmp_path / "model"))
    path = model / "tokenizer.json"

    def read() -> None:
        tokenizer = load_tokenizer(open_checkpoint(str(model)))
        assert tokenizer_fingerprint(tokenizer)

    def use(content: bytes) -> None:
        path.write_bytes(content)
        outcomes.of(read)

    document = json.loads(path.read_text())
    few_words = dict(list(document["model"]["vocab"].items())[:12])  # else nearly every change is of a word
    small = {**document, "model": {**document["model"], "vocab": few_words, "merges": []}}
    fuzz(how, texts(small), use)
    outcomes.check()


# --- similarities ---


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("part", ["similarity.npz", "similarity.json"])
def test_similarities(how: Any, part: str, good: Good, tmp_path: Path, outcomes: Outcomes) -> None:
    for name in ("similarity.npz", "similarity.json"):
        shutil.copy(good.baseline / name, tmp_path / name)
    start = Journal(good.baseline / "journal.jsonl").events()[0]

    def use(content: bytes) -> None:
        (tmp_path / part).write_bytes(content)
        outcomes.of(lambda: read_similarity(tmp_path / "similarity.npz", start))

    whole = (tmp_path / part).read_bytes()
    fuzz(how, damaged(whole) if part.endswith("npz") else texts(json.loads(whole)), use)
    outcomes.check()
