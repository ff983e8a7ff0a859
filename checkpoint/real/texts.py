"""Real text that any machine gets from pinned packages: documentation, code, news, and documents that look back.

    python checkpoint/real/texts.py --out runs/real/texts

writes one .jsonl file (field `text`) a kind; the same bytes wherever the packages and Python have the same versions.
Nothing of it is kept in the repository. No file or article gives text to two kinds.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from icsearch.calibration.batches import build
from icsearch.calibration.sources import parse_source
from icsearch.core.errors import IcsearchError, ModelError

TRAIN = ("torch", "transformers", "numpy", "pandas")  # docstrings that the indexers are trained on
DOCS = ("scipy", "sympy")  # docstrings that patterns are searched on
HELDOUT = ("matplotlib", "networkx")  # docstrings for measuring
CODE = ("datasets", "accelerate", "rich", "typer", "huggingface_hub")  # source files, for measuring
NEWS = "gensim/test/test_data/lee_background.cor"  # 300 articles of the Australian Broadcasting Corporation, one a line
MIN_CHARS = 1500  # a document shorter than that has little past
RECALL_ARTICLES = 100  # the last ones are told in reports and asked for again, the others stand as they are
RECALL_CHARS = 2100  # of a document that looks back: under 512 tokens
ASKED = 0.6  # the share of a document's reports that are asked for


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModelError(f"the package {name} is not installed, whose text is needed: pip install 'icsearch[real]'")
    return Path(spec.origin).parent


def source_files(package: str) -> Iterator[tuple[Path, str]]:
    """Every .py file of a package and its text, sorted by path; tests and generated files are left out."""
    folder = package_folder(package)
    for path in sorted(folder.rglob("*.py")):
        if not {"tests", "testing", "test", "_vendor"} & set(path.relative_to(folder).parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if "automatically generated" not in text[:1000]:
                yield path.relative_to(folder.parent), text


def documentation(package: str, seen: set[str]) -> Iterator[str]:
    """A document a file: its docstrings, each under the name that it documents; none that was `seen` before."""
    for path, text in source_files(package):
        try:
            tree = ast.parse(text)
        except SyntaxError:  # a template, or written for another Python
            continue
        parts = []
        for name, docstring in docstrings(tree, path.with_suffix("").as_posix().replace("/", ".")):
            if len(docstring) > 80 and docstring not in seen:
                seen.add(docstring)
                parts.append(f"{name}\n\n{docstring}")
        if sum(map(len, parts)) >= MIN_CHARS:
            yield "\n\n\n".join(parts)


def docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module, class or function and of all inside it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if docstring := ast.get_docstring(node):
            yield name, docstring
        for child in node.body:
            inner = getattr(child, "name", None)
            if inner:
                yield from docstrings(child, f"{name}.{inner}")


def topics() -> Iterator[str]:
    """The language reference of Python as `help()` shows it."""
    from pydoc_data.topics import topics as pages

    return (page for _, page in sorted(pages.items()) if len(page) >= MIN_CHARS)


def code(package: str) -> Iterator[str]:
    return (text for _, text in source_files(package) if len(text) >= MIN_CHARS)


def news() -> list[str]:
    """Articles, one a line of the file."""
    package, _, inner = NEWS.partition("/")
    path = package_folder(package) / inner
    if not path.is_file():
        raise ModelError(
            f"no file {path}: expected the articles that gensim brings along; pip install 'icsearch[real]'"
        )
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 400]


def recall(articles: list[str], count: int, rng: random.Random) -> Iterator[str]:
    """Documents whose later part asks for earlier ones: numbered reports, and then most of them told once more."""
    leads = [" ".join(re.split(r"(?<=[.!?])\s+", article)[:2]) for article in articles]
    for _ in range(count):
        numbers, reports, chars = iter(rng.sample(range(100, 1000), len(leads))), [], 0
        for lead in rng.sample(leads, len(leads)):
            chars += int((1 + ASKED) * (len(lead) + 30))
            if chars > RECALL_CHARS:
                break
            reports.append((next(numbers), lead))
        told = [f"Report {number}\n{lead}" for number, lead in reports]
        asked = rng.sample(reports, int(ASKED * len(reports)))
        again = [f"What did report {number} say? It said:\n{lead}" for number, lead in asked]
        yield "\n\n".join([*told, *again]) + "\n"


def kinds() -> dict[str, list[str]]:
    """All text, by kind; a document is text of one file or article."""
    seen: set[str] = set()
    found = {
        "docs-train": [*topics(), *(text for package in TRAIN for text in documentation(package, seen))],
        "docs": [text for package in DOCS for text in documentation(package, seen)],
        "docs-heldout": [text for package in HELDOUT for text in documentation(package, seen)],
        "code": [text for package in CODE for text in code(package)],
    }
    articles = news()
    found["prose"] = articles[:-RECALL_ARTICLES]
    found["recall"] = list(recall(articles[-RECALL_ARTICLES:], 96, random.Random(0)))
    return found


def sequences_of(path: Path, tokenizer: Any, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """So many sequences of a file's text, packed as `icsearch calibrate` does."""
    key = {"seed": seed, "seq_len": length, "num_sequences": count}
    return build(parse_source(str(path)), tokenizer, key, vocab_size=len(tokenizer)).input_ids.tolist()


def run_script(work: Callable[[], object]) -> None:
    """Do the work of one of the scripts here; bad input is one line and exit status 2."""
    try:
        work()
    except IcsearchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a directory for one .jsonl file a kind")
    out = parser.parse_args().out
    run_script(lambda: write(out))


def write(out: Path) -> None:
    found = kinds()
    out.mkdir(parents=True, exist_ok=True)
    for kind, documents in found.items():
        (out / f"{kind}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        print(f"{kind}: {len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} million characters")


if __name__ == "__main__":
    main()
