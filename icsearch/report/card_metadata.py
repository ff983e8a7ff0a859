"""The metadata of a model card as the hub reads it: base model, tags, and results as `model-index`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from icsearch.calibration.sources import hub_parts
from icsearch.report.eval_view import EvalRow, EvalView
from icsearch.report.view import Point, RunView

TAGS = ("icsearch", "indexcache", "deepseek-sparse-attention")
_NAME = r"[\w-][\w.-]*"
_MODEL, _DATASET = re.compile(rf"{_NAME}/{_NAME}"), re.compile(rf"({_NAME}/)?{_NAME}")


def card_yaml(runs: Sequence[RunView], evaluations: Sequence[EvalView]) -> str:
    """The YAML of a card, written by huggingface_hub, so that it is what the hub accepts.

    `base_model` is there where the hub delivered the checkpoint: a path says nothing to others.
    """
    from huggingface_hub import ModelCardData

    model = card_model(runs, evaluations)
    results = [result for view in evaluations for result in _eval_results(view)]
    results += [result for view in runs for result in _run_results(view)]
    card = ModelCardData(
        base_model=hub_id(model),
        library_name="transformers",
        tags=list(TAGS),
        model_name=f"{last_part(model)} with shared indexers",
        eval_results=results,
    )
    return str(card.to_yaml(line_break="\n")).rstrip()


def card_model(runs: Sequence[RunView], evaluations: Sequence[EvalView]) -> Mapping[str, Any]:
    """The checkpoint of a card, as a run or an evaluation names it: one by which the hub delivered it, if any did."""
    models = [*(view.document.get("model") or {} for view in evaluations), *(view.start["model"] for view in runs)]
    return next(filter(hub_id, models), models[0])


def hub_id(model: Mapping[str, Any]) -> str | None:
    """The model's name on the hub; None for a path, and where nothing says that the hub delivered it.

    What a name was when the run was made cannot be told from the name, nor from the place where the card is made.
    """
    name = str(model.get("name_or_path"))
    return name if model.get("revision") and _MODEL.fullmatch(name) else None


def last_part(model: Mapping[str, Any]) -> str:
    """The model's name without the directories in front of it."""
    return Path(model.get("name_or_path") or "").name or "model"


def dataset_of(calibration: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The fields of a result that say what was measured on; of a path, its last part alone.

    A dataset is named as the hub's where the hub delivered it: hf:NAME can be a folder too. Tokens that somebody
    brought along say no source, and the journal has the model's name there.
    """
    source = calibration.get("source")
    if source is not None and source.partition(":")[0] == "demo":
        return {"dataset_type": "custom", "dataset_name": f"icsearch's {source} texts"}
    if source is None or source == model:
        return {"dataset_type": "custom", "dataset_name": "own tokens"}
    name, config, split = hub_parts(source)
    if not (source.startswith("hf:") and calibration.get("source_revision") and _DATASET.fullmatch(name)):
        return {"dataset_type": "custom", "dataset_name": Path(source).name}
    return {"dataset_type": name, "dataset_name": name, "dataset_config": config, "dataset_split": split}


def _eval_results(view: EvalView) -> Iterator[Any]:
    calibration = view.document.get("calibration") or {}
    dataset = dataset_of(calibration, view.model_name)
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
    dataset = dataset_of(view.start["calibration"], str(view.start["model"].get("name_or_path")))
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
