"""The searches that are compared, each run in a process of its own: what `search.py` starts as its children."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from measuring import Json, Peak

STOCK = "stock"
PLAIN: dict[str, Json] = {
    "sweep-reference": {"kernels": "reference", "keep": False},
    "sweep": {"kernels": "blockwise", "keep": False},
    "exact": {},
}


@dataclass(frozen=True)
class Variant:
    """One way to search with icsearch. `keep`: whether states are kept between steps."""

    name: str
    kernels: str = "blockwise"
    keep: bool = True
    objective: str = "lm-loss"

    @property
    def by_loss(self) -> bool:
        return self.objective == "lm-loss"


def parse_variant(text: str) -> Variant:
    """Such as `sweep`, `exact`, `exact:kl`."""
    base, _, objective = text.partition(":")
    if base not in PLAIN:
        raise SystemExit(f"unknown variant {base!r}: give {STOCK} or {', '.join(PLAIN)}")
    if objective not in ("", "kl"):
        raise SystemExit(f"unknown objective {objective!r} of {text!r}: give kl")
    return Variant(text, **PLAIN[base], objective=objective or "lm-loss")


def run(spec: Json) -> Json:
    """What a child does: a search of ours, a stock search or its timing, or stock losses of given patterns."""
    import torch

    torch.set_num_threads(spec["threads"])
    return {"ours": run_ours, "stock": run_stock, "judge": run_judge}[spec["what"]](spec)


def run_ours(spec: Json) -> Json:
    """One search by the product's own `greedy`. Times and memory are taken from the loaded model on."""
    from icsearch.commands import greedy
    from icsearch.commands.progress import Quiet
    from icsearch.commands.requests import CalibrationRequest, GreedyRequest
    from icsearch.runs.record import JOURNAL_NAME
    from icsearch.runs.results import cost

    variant = Variant(**spec["variant"])
    out, loading = Path(spec["out"]), Loading()
    request = GreedyRequest(
        CalibrationRequest(spec["model"], spec["tokens"]),
        out=out,
        device="cpu",
        batch_size=spec["batch_size"],
        threads=spec["threads"],
        fresh=True,
        kernels=variant.kernels,
        num_shared=spec["flips"],
        objective=variant.objective,
    )
    with loading.watched(), contextlib.nullcontext() if variant.keep else nothing_kept():
        record = greedy.greedy(request, Quiet())
    ended = time.perf_counter()
    events = [json.loads(line) for line in (out / JOURNAL_NAME).read_text().splitlines()]
    committed = [commit.pattern for commit in record.commits]
    references = references_of(events, record.start["decoder_layers"], len(record.tokens))
    return {
        "seconds": ended - loading.ended,
        "load_seconds": loading.ended - loading.began,
        **loading.peak.numbers(),
        "layers": [commit.layer for commit in record.commits],
        "patterns": committed,
        "sums": {letters: record.nll.sums(letters) for letters in [record.start_pattern.letters, *committed]},
        "count": sum(record.tokens),
        **{name: value for name, value in cost(record).items() if name != "seconds"},
        **references,
    }


def references_of(events: Sequence[Json], layers: int, sequences: int) -> Json:
    """What the uniform patterns take that are scored for the report: step 0 but for one pass of the start pattern.

    Their seconds are that share of step 0's, by layer runs.
    """
    scored = [event for event in events if event["event"] == "losses" and event["step"] == 0]
    evaluations = sum(event["layer_sequences"] for event in scored) / sequences
    share = 1 - layers / evaluations
    return {
        "reference_layer_evaluations": evaluations - layers,
        "reference_seconds": share * sum(event["seconds"] for event in scored),
    }


class Loading:
    """When the product began, and when it had the model in memory; the memory peak from there on."""

    def __init__(self) -> None:
        self.began = self.ended = time.perf_counter()
        self.peak = Peak()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        from icsearch.commands import scoring

        load = scoring.load

        def watched_load(*args: Any, **kwargs: Any) -> Any:
            loaded = load(*args, **kwargs)
            self.peak.start()
            self.ended = time.perf_counter()
            return loaded

        self.began = time.perf_counter()
        with mock.patch.object(scoring, "load", watched_load):
            yield


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Within it, searches keep no states between steps: every sweep starts at the embedding."""
    from icsearch.planning import memory

    def nothing(keeping: Any, *_: Any) -> Any:
        return memory.Kept(replace(keeping, stride=0), 0, 0)

    with mock.patch.object(memory, "plan_kept", nothing):
        yield


def run_stock(spec: Json) -> Json:
    """The stock naive search whole, or with `candidates`, that many timed forwards and an estimate."""
    import stock

    started = time.perf_counter()
    tokens = stock.read_tokens(Path(spec["tokens"]), spec["batch_size"])
    model = stock.StockModel(Path(spec["model"]), spec.get("earliest", False))
    loaded = time.perf_counter()
    stock.warm_up(model, tokens)
    peak = Peak().start()
    measure = _whole if spec["candidates"] is None else _timed
    return {"load_seconds": loaded - started, **measure(model, tokens, spec), **peak.numbers(), "count": tokens.count}


def _whole(model: Any, tokens: Any, spec: Json) -> Json:
    import stock

    step_seconds = [0.0] * spec["flips"]

    def timed(letters: str) -> list[float]:
        started = time.perf_counter()
        sums = stock.score(model, letters, tokens)
        step_seconds[letters.count("S") - 1] += time.perf_counter() - started
        return sums

    found = stock.greedy(timed, len(model.roles), spec["flips"], tokens.count)
    committed = {letters: found.sums[letters] for letters in found.patterns}
    seconds = {"seconds": sum(step_seconds), "step_seconds": step_seconds, "estimated": False}
    return {**seconds, "layers": found.layers, "patterns": found.patterns, "sums": committed}


def _timed(model: Any, tokens: Any, spec: Json) -> Json:
    import statistics

    import stock

    layers, flips, batches = len(model.roles), spec["flips"], len(tokens.batches)
    full, shared = "F" * layers, "F" * (layers - flips) + "S" * flips
    seconds = stock.time_forwards(model, tokens, [full, shared], max(1, spec["candidates"] // 2))
    middle = {letters: statistics.median(times) for letters, times in seconds.items()}
    found = {"full": middle[full], "shared": middle[shared], "shared_full": layers - flips}
    estimate = stock.estimate_seconds(layers, flips, batches, **found)
    return {"seconds": estimate, "estimated": True, "forwards": found, "batches": batches, "forward_seconds": seconds}


def run_judge(spec: Json) -> Json:
    """Stock losses of given patterns, with ties by our rule or as they come."""
    import stock

    tokens = stock.read_tokens(Path(spec["tokens"]), spec["batch_size"])
    model = stock.StockModel(Path(spec["model"]), spec["earliest"])
    return {"sums": {letters: stock.score(model, letters, tokens) for letters in spec["patterns"]}}


def describe(variant: Variant) -> Json:
    return asdict(variant)
