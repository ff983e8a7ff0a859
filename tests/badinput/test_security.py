"""Files from elsewhere are data: nothing in them is run, and no name in them is opened that is not theirs to name."""

from __future__ import annotations

import ast
import json
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bad_input import Place, Row
from icsearch.cli import app

TOP = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("icsearch", "checkpoint", "benchmarks") for path in (TOP / folder).rglob("*.py"))

# What runs code that lies in a file, or can be made to.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "xmlrpc"}
CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
CALLS |= {"tempfile.mktemp", "torch.load", "torch.jit.load", "pandas.read_pickle", "runpy.run_path"}
ARRAYS = {"np.load", "numpy.load"}


def dangers(source: str) -> Iterator[str]:
    """What a source would run of a file that it reads, by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (found & CALLS) or ({node.module} if node.module.split(".")[0] in MODULES else ())
        elif isinstance(node, ast.Call):
            yield from _in_call(ast.unparse(node.func), {one.arg: one.value for one in node.keywords if one.arg})


def _in_call(name: str, keywords: dict[str, ast.expr]) -> Iterator[str]:
    values = {key: value.value for key, value in keywords.items() if isinstance(value, ast.Constant)}
    if name in CALLS:
        yield name
    if name in ARRAYS and values.get("allow_pickle") is not False:
        yield f"{name} without allow_pickle=False"
    if values.get("allow_pickle"):
        yield f"{name} with allow_pickle"
    if values.get("shell"):
        yield f"{name} with a shell"
    if values.get("trust_remote_code"):
        yield f"{name} with code of the checkpoint"
    if name.split(".")[-1] in ("broadcast_object_list", "all_gather_object", "gather_object", "send_object_list"):
        yield name  # which pickle what they send


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(TOP)))
def test_sources_run_nothing_that_they_read(path: Path) -> None:
    assert list(dangers(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.hashing",
        "from torch import load",
        "def f():\n    import torch\n    return torch.load('x')",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=wanted)",
        "eval(text)",
        "exec(text)",
        "yaml.load(file)",
        "subprocess.run(text, shell=True)",
        "AutoConfig.from_pretrained(name, trust_remote_code=True)",
        "dist.broadcast_object_list(found)",
    ],
)
def test_the_search_for_dangers_finds_them(source: str) -> None:
    assert list(dangers(source))


def test_what_looks_like_a_danger_is_none() -> None:
    harmless = "np.load(path, allow_pickle=False); model.eval(); re.compile(x); AutoConfig.f(x, trust_remote_code=y)"
    assert list(dangers(harmless)) == []


# --- pickles ---


class Bomb:
    """Whoever unpickles it makes a directory."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_the_bomb_goes_off_where_it_is_loaded(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").is_dir()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_not_loaded(place: Place, capfd: pytest.CaptureFixture[str], name: str) -> None:
    model = place.checkpoint(without="model.safetensors")
    (model / name).write_bytes(pickle.dumps(Bomb(place.root / "mark")))
    place.refuses(Row(lambda p: p.greedy(model=model), f"found only {name}", "convert"), capfd)


def test_pickles_beside_the_weights_are_not_loaded(place: Place) -> None:
    """Files of any name that a library may take for its own."""
    model = place.checkpoint()
    bomb = pickle.dumps(Bomb(place.root / "mark"))
    names = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "vocab.pkl", "merges.pkl")
    for name in names:
        (model / name).write_bytes(bomb)
    (model / "pytorch_model.bin.index.json").write_text('{"weight_map": {"lm_head.weight": "pytorch_model.bin"}}')
    assert app._run([str(word) for word in place.calibrate("demo", model=model)], debug=True) == 0
    words = [str(word) for word in place.greedy("--num-shared", 1, model=model)]
    words[words.index("out")] = "run"
    assert app._run(words, debug=True) == 0
    assert not (place.root / "mark").exists()


def test_a_similarity_of_objects_is_not_loaded(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("similarity.npz", "similarity.json"):
        (place.root / name).write_bytes((place.good.baseline / name).read_bytes())
    bombs = np.full((6, 6), Bomb(place.root / "mark"), dtype=object)
    np.savez(place.root / "similarity.npz", cosine=bombs, overlap=bombs)
    row = Row(lambda p: p.baseline("--similarity", "similarity.npz"), "cannot use similarity.npz", "leave --similarity")
    place.refuses(row, capfd)
    (place.root / "similarity.npz").write_bytes(pickle.dumps(Bomb(place.root / "mark")))
    place.refuses(row, capfd)


def test_tokens_that_are_a_pickle_are_not_loaded(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.file("tokens/calibration.safetensors", pickle.dumps(Bomb(place.root / "mark")))
    place.refuses(
        Row(lambda p: p.greedy(tokens="tokens"), "damaged or cannot be read", "bring the tokens again"), capfd
    )


def test_a_folder_of_pickles_is_no_dataset(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("train.pkl", "data.pickle", "train-00000.bin"):
        place.file(f"texts/{name}", pickle.dumps(Bomb(place.root / "mark")))
    place.file("texts/texts.py", f"import os; os.mkdir({str(place.root / 'mark')!r})")
    place.refuses(Row(lambda p: p.calibrate("hf:texts"), "cannot read hf:texts", "check the spec"), capfd)


# --- code that a checkpoint brings along ---


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_is_not_run(place: Place, capfd: pytest.CaptureFixture[str], where: str) -> None:
    model = place.checkpoint()
    (model / "own.py").write_text(f"import os\nos.mkdir({str(place.root / 'mark')!r})\n")
    document = json.loads((model / where).read_text())
    of = {"config.json": {"AutoConfig": "own.A", "AutoModelForCausalLM": "own.A"}}
    changed = {
        "model_type": "own",
        "tokenizer_class": "Own",
        "auto_map": of.get(where, {"AutoTokenizer": ["own.A", None]}),
    }
    (model / where).write_text(json.dumps({**document, **changed}))
    place.refuses(Row(lambda p: p.calibrate("demo", model=model), "cannot", ""), capfd)


# --- names that lead elsewhere ---


class Opened:
    """The paths that Python opens while `watching`; an audit hook cannot be taken away again, so there is one."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.watching = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.watching and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            self.paths.append(os.fsdecode(arguments[0]))


@pytest.fixture(scope="module")
def opened() -> Opened:
    return Opened()


def test_files_named_in_a_run_are_not_opened(place: Place, opened: Opened) -> None:
    """A journal, a pattern and an evaluation say where model and texts lay: that is told, and not looked up."""
    secret = place.file("secret.txt", "not yours")
    names = {"name_or_path": str(secret), "source": str(secret)}
    run, evaluation = place.run(), place.root / "evaluated"
    evaluation.mkdir()
    for path, out in ((run / "pattern.json", run), (place.good.evaluation / "eval.json", evaluation)):
        document = json.loads(path.read_text())
        for part in ("model", "calibration"):
            document[part] |= names
        (out / path.name).write_text(json.dumps(document))
    journal = (run / "journal.jsonl").read_text().splitlines(keepends=True)
    start = json.loads(journal[0])
    for part in ("model", "calibration"):
        start[part] |= names
    (run / "journal.jsonl").write_text("".join([json.dumps(start) + "\n", *journal[1:]]))
    opened.watching = True
    try:
        for words in (place.report(run, evaluation), place.export(run), place.greedy("--num-shared", 3)):
            given = [str(run) if word == "out" else str(word) for word in words]
            assert app._run(given, debug=True) == 0
    finally:
        opened.watching = False
    assert opened.paths  # the hook does hear
    assert not [path for path in opened.paths if "secret" in path]


MARKUP = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


def test_markup_in_a_run_is_text_in_its_report(place: Place) -> None:
    run = place.run()
    journal = (run / "journal.jsonl").read_text().splitlines(keepends=True)
    start = json.loads(journal[0])
    start["model"] |= {"name_or_path": MARKUP, "model_type": MARKUP}
    start["calibration"]["source"] = MARKUP
    start["environment"] = {MARKUP: MARKUP}
    note = {"event": "note", "text": MARKUP}
    (run / "journal.jsonl").write_text("".join([json.dumps(start) + "\n", json.dumps(note) + "\n", *journal[1:]]))
    evaluation = place.root / "evaluated"
    evaluation.mkdir()
    document = json.loads((place.good.evaluation / "eval.json").read_text())
    document["model"]["name_or_path"] = document["rows"][1]["name"] = document["rows"][1]["verdict"] = MARKUP
    document["gaps"] = []
    (evaluation / "eval.json").write_text(json.dumps(document))
    assert app._run([str(word) for word in place.report(run, evaluation)], debug=True) == 0
    page = (place.root / "page.html").read_text()
    assert "alert(1)" in page  # it is shown
    assert "<script>alert" not in page and "<img src=x" not in page
