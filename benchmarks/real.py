"""The real language model: every run and every table of docs/real-model.md, each by one command that is printed.

Usage: python benchmarks/real.py [STEP …] [--out runs/real] [--processes 2]

Steps, in this order, by default all of them:
    search      fisher (by loss, and by KL), exact greedy, greedy in two stages, the similarity DP (with Kascade's
                score), on documentation
    measure     what each finds, on documentation of other packages, code, news, and documents that look back
    stability   fisher on other documentation, on code and on news, and what the pattern of one costs on another
    far         fisher on documents that look back, on all their tokens and on far tokens alone, and what that buys
    passkey     a number told once, asked for at several distances, by generation
    tables      all of that as Markdown, and summary.json

A run that is finished is not made again: what was stopped goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import icsearch
from icsearch.core.jsonfile import write_object
from icsearch.core.pattern import num_full, parse_retention
from icsearch.report import numbers
from icsearch.report.eval_view import EvalRow, EvalView, view_eval
from icsearch.runs.evaluation import load_eval
from icsearch.runs.record import RunRecord, load_run
from stability import kendall_tau

BUDGETS = ("1/2", "1/3", "1/4", "1/8")
LENGTH, SEQUENCES = 512, 8
# What is measured on: its file, and how many sequences.
KINDS = {"documentation": ("docs-heldout", 16), "code": ("code", 8), "news": ("prose", 8)}
LOOKING_BACK = {"looking back": "all", "far tokens": "far"}  # searched on, and which tokens count
OTHERS = {"other documentation": ("docs", 1), "code": ("code", 1), "news": ("prose", 1)}  # searched on, and its seed
DISTANCES, KEYS = (100, 300, 800), 10
STEPS = ("search", "measure", "stability", "far", "passkey", "tables")


class Runs:
    """Where runs are, and how each of them is made."""

    def __init__(self, out: Path, processes: int) -> None:
        self.out, self.processes = out, processes
        self.model = out / "checkpoint"

    def make(self, command: str, name: str, source: Path | str, *more: object) -> Path:
        """Run a command into `out`/name, by several processes where it can, and say how it is called."""
        alone = command == "calibrate"
        words = [command, self.model, *(() if alone else ("--calibration",)), source, *more, "--out", self.out / name]
        print(f"icsearch {' '.join(map(str, words))}", flush=True)
        launcher, threads = [], []
        if self.processes > 1 and not alone:
            launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.processes)]
            threads = ["--threads", "1"]
        subprocess.run([sys.executable, *launcher, "-m", "icsearch", *map(str, words), *threads], check=True)
        return self.out / name

    def text(self, name: str) -> Path:
        return self.out / "texts" / f"{name}.jsonl"

    def search(self) -> None:
        size = ("--seq-len", LENGTH, "--num-sequences", SEQUENCES)
        docs = self.text("docs")
        table = self.make("fisher", "fisher-1-4", docs, *size, "--retention", "1/4") / "fisher.npz"
        self.make("greedy", "greedy", docs, *size, "--retention", "1/8")
        similarity = self.out / "dp-1-4" / "similarity.npz"
        self.make("dp-baseline", "dp-1-4", docs, *size, "--retention", "1/4", "--table", table)
        for budget in ("1/8", "1/2", "1/3"):
            again = ("--similarity", similarity)
            self.make("dp-baseline", f"dp-{_named(budget)}", docs, *size, "--retention", budget, *again)
        for budget in ("1/8", "1/2", "1/3"):
            self.make("fisher", f"fisher-{_named(budget)}", docs, *size, "--retention", budget, "--table", table)
        for budget in BUDGETS:
            by_kl = ("--retention", budget, "--table", table, "--objective", "kl")
            self.make("fisher", f"fisher-kl-{_named(budget)}", docs, *size, *by_kl)
        self.make("greedy", "staged", docs, *size, "--retention", "1/8", "--stages", 2)

    def patterns(self) -> dict[str, str]:
        """Every pattern that was found, by name: method and budget."""
        found = {}
        for budget in BUDGETS:
            if (run := self._finished(f"dp-{_named(budget)}")) is not None:
                found[f"similarity DP {budget}"] = run.pattern.letters
                found[f"Kascade's score {budget}"] = run.compared["kascade"]["pattern"]
            for method in ("greedy", "staged"):
                if (run := self._finished(method)) is not None:
                    found[f"{method} {budget}"] = _at(run, budget)
            if (run := self._finished(f"fisher-{_named(budget)}")) is not None:
                found[f"fisher {budget}"] = run.pattern.letters
            if (run := self._finished(f"fisher-kl-{_named(budget)}")) is not None:
                found[f"fisher by KL {budget}"] = run.pattern.letters
        return found

    def of_text(self, names: Iterable[str]) -> dict[str, str]:
        """What fisher at 1/4 finds on documentation, and on these texts."""
        places = {"documentation": "fisher-1-4"} | {name: f"fisher-on-{_named(name)}" for name in names}
        runs = {name: run for name, place in places.items() if (run := self._finished(place)) is not None}
        return {f"fisher on {name} 1/4": run.pattern.letters for name, run in runs.items()}

    def _finished(self, name: str) -> RunRecord | None:
        return load_run(self.out / name) if (self.out / name / "pattern.json").exists() else None

    def eval(self, name: str, kind: str, patterns: Mapping[str, str], *budgets: str) -> None:
        """Measure patterns, and uniform ones of these budgets, on held-out text: of one of KINDS, or looking back."""
        specs = [*(f"uniform:{budget}" for budget in budgets), *dict.fromkeys(patterns.values())]
        words = [word for spec in specs for word in ("--pattern", spec)]
        if kind in KINDS:
            text, sequences = KINDS[kind]
            size = ("--seq-len", LENGTH, "--num-sequences", sequences, "--seed", 2)
            self.make("eval", f"{name}-{_named(kind)}", self.text(text), *size, *words)
        else:
            self.make("eval", f"{name}-{_named(kind)}", self.looking_back("batches-heldout", 2), *words)

    def measure(self) -> None:
        for kind in (*KINDS, "looking back"):
            self.eval("eval", kind, self.patterns(), *BUDGETS)

    def stability(self) -> None:
        for name, (text, seed) in OTHERS.items():
            size = ("--seq-len", LENGTH, "--num-sequences", SEQUENCES, "--seed", seed)
            self.make("fisher", f"fisher-on-{_named(name)}", self.text(text), *size, "--retention", "1/4")
        for kind in KINDS:
            self.eval("eval-of-texts", kind, self.of_text(OTHERS))

    def looking_back(self, name: str, seed: int, count: str = "far") -> Path:
        """Batches of documents that look back, in which far tokens count or all."""
        size = ("--seq-len", LENGTH, "--num-sequences", SEQUENCES, "--seed", seed)
        return self.make("calibrate", name, self.text("recall"), *size, "--count", count)

    def far(self) -> None:
        for name, count in LOOKING_BACK.items():
            batches = self.looking_back(f"batches-{count}", 1, count)
            self.make("fisher", f"fisher-on-{_named(name)}", batches, "--retention", "1/4")
        self.eval("eval-of-texts", "looking back", self.of_text(LOOKING_BACK))

    def passkey(self) -> None:
        """Digits told once in news, and asked for so many tokens later; greedy decoding."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model)
        found = self.patterns()
        asked = {"all F": "full"} | {f"uniform {budget}": f"uniform:{budget}" for budget in ("1/4", "1/8")}
        asked |= {name: spec for name, spec in found.items() if name.endswith(("1/4", "1/8"))}
        prompts = {distance: list(_prompts(tokenizer, self.text("prose"), distance)) for distance in DISTANCES}
        path = self.out / "passkey.json"
        rows: dict[str, dict[str, int]] = json.loads(path.read_text()) if path.exists() else {}
        for name, spec in asked.items():
            if name in rows:
                continue
            model = icsearch.load(str(self.model), spec)
            rows[name] = {
                str(distance): sum(_answers(model, tokenizer, prompt, key) for prompt, key in pairs)
                for distance, pairs in prompts.items()
            }
            print(name, rows[name], flush=True)
            write_object(path, rows)

    # --- what came out ------------------------------------------------------------------------------------------------

    def tables(self) -> None:
        summary: dict[str, Any] = {}
        evaluations = {
            path.name.removeprefix("eval-"): view_eval(load_eval(path / "eval.json"))
            for path in sorted(self.out.glob("eval-*"))
            if (path / "eval.json").exists()
        }
        found = self.patterns() | self.of_text((*OTHERS, *LOOKING_BACK))
        names = {letters: ", ".join(name for name in found if found[name] == letters) for letters in found.values()}
        for kind, view in evaluations.items():
            print(f"\n### {kind} (all F {numbers.loss(view.baseline.loss)})\n")
            print("| F | pattern | letters | loss above all F | KL | gap closed |\n|---|---|---|---|---|---|")
            for row in view.rows:
                if not row.is_baseline:
                    print(f"| {' | '.join(_cells(view, row, names))} |")
        places = {"documentation": "fisher-1-4"} | {name: f"fisher-on-{_named(name)}" for name in OTHERS}
        runs = {name: run for name, place in places.items() if (run := self._finished(place)) is not None}
        summary["kendall"] = {
            f"{one}, {two}": _tau(_flips(first), _flips(second))
            for (one, first), (two, second) in itertools.combinations(runs.items(), 2)
        }
        files = {name: self.out / name / "pattern.json" for name in ("fisher-1-4", "fisher-1-8", "greedy", "staged")}
        summary["cost"] = {name: json.loads(file.read_text())["cost"] for name, file in files.items() if file.exists()}
        print("\n" + json.dumps(summary, indent=1))
        write_object(self.out / "summary.json", summary)


def _named(text: str) -> str:
    return text.replace("/", "-").replace(" ", "-")


def _at(record: RunRecord, budget: str) -> str:
    """The pattern of a greedy run with as many F layers as a budget keeps."""
    kept = num_full(parse_retention(budget), len(record.start_pattern))
    return next(step.pattern for step in record.steps() if step.pattern.count("F") == kept)


def _flips(record: RunRecord) -> dict[int, float]:
    """The measured loss of every single flip."""
    start = record.start_pattern
    flips = {layer: start.flip(layer).letters for layer in range(1, len(start))}
    known = {
        layer: letters for layer, letters in flips.items() if len(record.nll.get(letters, {})) == len(record.tokens)
    }
    return {layer: record.loss(letters) for layer, letters in known.items()}


def _tau(first: dict[int, float], second: dict[int, float]) -> float:
    layers = sorted(first.keys() & second.keys())
    return round(kendall_tau([first[layer] for layer in layers], [second[layer] for layer in layers]), 3)


def _cells(view: EvalView, row: EvalRow, names: dict[str, str]) -> Iterator[str]:
    gap = view.gap_of(row)
    yield str(row.full)
    yield names.get(row.pattern.letters, row.name)
    yield f"`{row.pattern.letters}`"
    yield numbers.difference(row.difference)
    yield numbers.compact(row.kl.delta)
    yield "" if gap is None or gap.closed is None else numbers.share(gap.closed)


def _prompts(tokenizer: Any, prose: Path, distance: int) -> Iterator[tuple[str, str]]:
    """KEYS prompts: a key, so many tokens of news, the question; the answer is the next word."""
    chance = random.Random(distance)
    articles = [json.loads(line)["text"] for line in prose.read_text().splitlines()]
    for _ in range(KEYS):
        key = str(chance.randrange(10_000, 100_000))
        filler = tokenizer(" ".join(chance.sample(articles, 12)))["input_ids"][:distance]
        told = f"The pass key is {key}. Remember it. {key} is the pass key.\n\n"
        yield told + tokenizer.decode(filler) + "\n\nWhat is the pass key? The pass key is", key


@torch.inference_mode()
def _answers(model: Any, tokenizer: Any, prompt: str, key: str) -> bool:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    written = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return key in tokenizer.decode(written[0, ids.shape[1] :]).replace(" ", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[*STEPS, []], metavar="STEP")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    runs = Runs(arguments.out, arguments.processes)
    for step in arguments.steps or STEPS:
        getattr(runs, step)()


if __name__ == "__main__":
    main()
