"""The metadata of a model card as the hub reads it: base model, tags, and results as `model-index`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from icsearch.report.eval_view import EvalRow, EvalView
from icsearch.report.view import Point, RunView

TAGS = ("icsearch", "indexcache", "deepseek-sparse-attention")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def card_yaml(runs: Sequence[RunView], evaluations: Sequence[EvalView]) -> str:
    """The YAML of a card, written by huggingface_hub, so that it is what the hub accepts.

    `base_model` is there where the checkpoint was named by its hub id: a path says nothing to others.
    """
    from huggingface_hub import ModelCardData

    name = model_name(runs, evaluations)
    results = [result for view in evaluations for result in _eval_results(view)]
    results += [result for view in runs for result in _run_results(view)]
    card = ModelCardData(
        base_model=name if is_hub_id(name) else None,
        library_name="transformers",
        tags=list(TAGS),
        model_name=f"{Path(name).name} with shared indexers",
        eval_results=results,
    )
    return str(card.to_yaml(line_break="\n")).rstrip()


def model_name(runs: Sequence[RunView], evaluations: Sequence[EvalView]) -> str:
    """What the model was called when it was searched or evaluated."""
    models = [*(view.document.get("model") for view in evaluations), *(view.start["model"] for view in runs)]
    return str((models[0] or {}).get("name_or_path") or "model")


def is_hub_id(name: str) -> bool:
    """Whether a model's name is that of a repository of the hub, and not a path on this machine."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def dataset_of(source: str | None, model: str) -> dict[str, Any]:
    """The fields of a result that say what was measured on; of a path, its last part alone.

    Tokens that somebody brought along say no source, and the journal has the model's name there.
    """
    if source is not None and source.partition(":")[0] == "demo":
        return {"dataset_type": "custom", "dataset_name": f"icsearch's {source} texts"}
    if source is None or source == model:
        return {"dataset_type": "custom", "dataset_name": "own tokens"}
    scheme, *parts = source.split(":")
    if scheme != "hf" or not parts or not _HUB_ID.fullmatch(parts[0]) or Path(parts[0]).exists():
        return {"dataset_type": "custom", "dataset_name": Path(source).name}
    names = ("dataset_config", "dataset_split")
    return {"dataset_type": parts[0], "dataset_name": parts[0], **dict(zip(names, parts[1:], strict=False))}


def _eval_results(view: EvalView) -> Iterator[Any]:
    calibration = view.document.get("calibration") or {}
    dataset = dataset_of(calibration.get("source"), view.model_name)
    for row in view.rows:
        yield from _results(_row_metrics(row), _row_label(row, view.num_layers), dataset)


def _row_metrics(row: EvalRow) -> dict[str, float]:
    metrics = {"loss": row.loss, "perplexity": row.perplexity}
    if not row.is_baseline:
        metrics |= {"kl_divergence": row.kl.delta, "top1_agreement": row.top1_agreement}
    return metrics


def _row_label(row: EvalRow, num_layers: int) -> str:
    return f"{row.name}, {row.full} of {num_layers} indexers" + (", in-sample" if row.in_sample else "")


def _run_results(view: RunView) -> Iterator[Any]:
    """The losses of a search, said to be in-sample: they were chosen by."""
    dataset = dataset_of(view.start["calibration"].get("source"), str(view.start["model"].get("name_or_path")))
    points: dict[str, Point] = {"baseline": view.points[0], "searched": view.final}
    for name, point in points.items():
        label = f"{name}, {point.full} of {view.num_layers} indexers, in-sample"
        yield from _results({"loss": point.loss}, label, dataset)


def _results(metrics: dict[str, float], label: str, dataset: dict[str, Any]) -> Iterator[Any]:
    from huggingface_hub import EvalResult

    for metric, value in metrics.items():
        if math.isfinite(value):
            name = f"{metric.replace('_', ' ')} ({label})"
            yield EvalResult(
                task_type="text-generation", metric_type=metric, metric_value=value, metric_name=name, **dataset
            )
