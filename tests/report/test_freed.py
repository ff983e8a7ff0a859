"""What serving frees, in words: patterns that free the same together, with the engines where that is so."""

from __future__ import annotations

from typing import Any

from icsearch.report.eval_view import EvalView
from icsearch.report.sentences import memory_sentences


def view(model_type: str, **saved: dict[str, Any]) -> EvalView:
    costs = [{"name": name, "rows": [], "saved": bytes_saved} for name, bytes_saved in saved.items()]
    return EvalView("", {"cost_rows": costs, "model": {"model_type": model_type}}, (), ())


SIX = {"index_keys": 57 * 132, "per_token": 78 * (1152 + 132), "index_weights": 1_068_000_000}


def test_what_is_freed_and_where() -> None:
    (both, engines) = memory_sentences(view("glm_moe_dsa", a=SIX, b=SIX))
    assert both == (
        "Served, “a” and “b” free 7.5 kB of the 100.2 kB that a token takes in the cache (8.1% more tokens in the same "
        "memory), and 1.1 GB of indexer weights."
    )
    assert engines.startswith("That is so in engines that build no indexer for an S layer: transformers, vLLM from ")
    (alone, unknown) = memory_sentences(view("axk2", a=SIX))
    assert alone.startswith("Served, “a” frees 7.5 kB") and "none is known to, for axk2" in unknown


def test_nothing_freed_says_nothing() -> None:
    """All F, and evaluations that were saved before this was counted."""
    assert memory_sentences(view("glm_moe_dsa", a={**SIX, "index_keys": 0})) == []
    assert memory_sentences(view("glm_moe_dsa", a={})) == []
