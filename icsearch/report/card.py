"""A section for a model card, from saved JSON alone: the hub's metadata, what shares its indexer, what that costs, and
how to serve it.

It names the engines known to share in models of its type, and no others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from icsearch.calibration.sources import hub_parts
from icsearch.core.pattern_file import PatternFile
from icsearch.engines.export import exports_of_type
from icsearch.report import numbers
from icsearch.report.eval_view import EvalView
from icsearch.report.sentences import ENGINES_SHOWN, IN_SAMPLE, headline, memory_sentences, no_engine
from icsearch.report.view import RunView
from icsearch.runs import results
from icsearch.runs.results import split_notes

TAGS = ("icsearch", "indexcache", "deepseek-sparse-attention")
_NAME = r"[\w-][\w.-]*"
_MODEL, _DATASET = re.compile(rf"{_NAME}/{_NAME}"), re.compile(rf"({_NAME}/)?{_NAME}")


def render_card(runs: Sequence[RunView], evaluations: Sequence[EvalView]) -> str:
    """Markdown with the metadata in front. Searches first, evaluations behind them."""
    from huggingface_hub import ModelCardData

    models = [*(view.document.get("model") or {} for view in evaluations), *(view.start["model"] for view in runs)]
    model: Mapping[str, Any] = next(filter(hub_id, models), models[0])  # one by which the hub delivered it, if any did
    name, title = hub_id(model), Path(model.get("name_or_path") or "").name or "model"
    # Written by huggingface_hub, so that it is what the hub accepts. `base_model` is there where the hub delivered the
    # checkpoint: a path says nothing to others.
    metadata = ModelCardData(
        base_model=name,
        library_name="transformers",
        tags=list(TAGS),
        model_name=f"{title} with shared indexers",
        eval_results=[*_results(runs, evaluations)],
    )
    yaml = str(metadata.to_yaml(line_break="\n")).rstrip()
    link = f"[{name}](https://huggingface.co/{name})" if name else f"`{title}`"
    lead = (
        "# Shared indexers\n\n"
        f"Patterns for {link}: a layer marked F runs its indexer, one marked S reuses the selection of the nearest F "
        "layer before it (IndexCache, arXiv 2603.12201). Losses are those of the whole model in nats per token, ± one "
        "standard error paired over sequences, measured with icsearch."
    )
    sections = [*(_run_section(view) for view in runs), *(_eval_section(view) for view in evaluations)]
    return "\n\n".join([f"---\n{yaml}\n---", lead, *sections]) + "\n"


def _run_section(view: RunView) -> str:
    rows = [("the model as it is", view.points[0].full, view.points[0].loss, "")]
    rows.append(("searched", view.final.full, view.final.loss, numbers.difference(view.final.difference)))
    rows += [
        (reference.label, reference.full, reference.loss, numbers.difference(reference.difference))
        for reference in view.references
    ]
    start, options, model, batches = view.start, view.start["options"], view.start["model"], view.start["calibration"]
    source = dataset_of(batches, view.model_name)["dataset_name"]
    environment = start.get("environment") or {}
    commit = f"revision {model['revision'][:16]}, " if model.get("revision") else ""  # the hub's
    facts = {
        "method": f"{options['method']}, {options.get('strategy')}, by {options.get('objective')}",
        "layers": f"{len(start['layer_indices'])} with an indexer, of {start['decoder_layers']}",
        "checkpoint": f"{model.get('model_type')}, {commit}fingerprint {str(model.get('fingerprint'))[:16]}",
        "calibration": f"fingerprint {str(batches.get('fingerprint'))[:16]}",
        "computed in": f"{options.get('dtype')} on {options.get('device')}, torch {environment.get('torch')}, "
        f"transformers {environment.get('transformers')}, icsearch {start['icsearch_version']}",
    }
    return "\n\n".join(
        [
            f"## {view.final.full} of {view.num_layers} layers keep their indexer",
            headline(view),
            *_cautions(view.record.notes),
            f"```\n{view.final.pattern}\n```",
            _table(
                ("pattern", "F layers", "loss", "above the model as it is"),
                ((name, str(full), numbers.loss(loss), cost) for name, full, loss, cost in rows),
            ),
            f"In-sample: measured on the {batches.get('num_sequences')} x {batches.get('seq_len')} tokens of {source} "
            f"that were searched on{_counting(view)}.",
            *serving(results.pattern_file(view.record)),
            _table(("searched with", ""), facts.items()),
        ]
    )


def _counting(view: RunView | EvalView) -> str:
    """Which tokens count, where it is not all of them."""
    return f", of which {view.counted_name} count" if view.counted_name else ""


def _cautions(notes: Sequence[str]) -> list[str]:
    """One line beside the results where guessing has a lower loss than the model."""
    return [f"**Caution**: {caution}." for caution in split_notes(notes)[0]]


def _eval_section(view: EvalView) -> str:
    batches = view.document.get("calibration") or {}
    source = dataset_of(batches, view.model_name)["dataset_name"]
    in_sample = any(row.in_sample for row in view.rows)
    columns = ("pattern", "F layers", "loss", "above the model as it is", "perplexity", "KL", "top-1 agreement")
    of_all = ("all tokens, above the model as it is",) if view.counted_name else ()
    tasks = [column for column in view.task_columns if column[1] == "generated"]
    rows = []
    for row in view.rows:
        marks = (f" ({IN_SAMPLE})" if row.in_sample else "") + (" (of another model)" if row.foreign else "")
        compared = [
            "" if row.is_baseline else numbers.difference(row.difference),
            f"{row.perplexity:.4g}",
            "" if row.is_baseline else numbers.difference(row.kl, sign=False),
            numbers.percent(row.top1_agreement),
        ]
        if row.all_tokens is not None:
            compared.append("" if row.is_baseline else numbers.difference(row.all_tokens.difference))
        accuracies = [numbers.percent(row.tasks[column].share) if column in row.tasks else "" for column in tasks]
        rows.append([row.name + marks, str(row.full), numbers.loss(row.loss), *compared, *accuracies])
    return "\n\n".join(
        [
            "## Evaluation",
            f"On {batches.get('num_sequences')} x {batches.get('seq_len')} tokens of {source}{_counting(view)}"
            + (f"; rows marked {IN_SAMPLE} were searched on some of them." if in_sample else "."),
            *_cautions(view.document.get("notes") or ()),
            _table(
                (*columns, *of_all, *(f"{kind.replace('_', ' ')}" for kind, _ in tasks)),
                rows,
            ),
            "\n".join(f"- {row.name}: `{row.pattern}`: {row.verdict}" for row in view.rows if not row.is_baseline),
            *([" ".join(memory)] if (memory := memory_sentences(view)) else []),
        ]
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# --- the hub's metadata -----------------------------------------------------------------------------------------------


def hub_id(model: Mapping[str, Any]) -> str | None:
    """The model's name on the hub; None for a path, and where nothing says that the hub delivered it.

    What a name was when the run was made cannot be told from the name, nor from the place where the card is made.
    """
    name = str(model.get("name_or_path"))
    return name if model.get("revision") and _MODEL.fullmatch(name) else None


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


def _results(runs: Sequence[RunView], evaluations: Sequence[EvalView]) -> Iterator[Any]:
    """Every finite number of the evaluations, then of the searches, said to be in-sample: they were chosen by."""
    from huggingface_hub import EvalResult

    told: list[tuple[dict[str, float], str, dict[str, Any]]] = []
    for view in evaluations:
        dataset = dataset_of(view.document.get("calibration") or {}, view.model_name)
        for row in view.rows:
            metrics = {"loss": row.loss, "perplexity": row.perplexity}
            if not row.is_baseline:
                metrics |= {"kl_divergence": row.kl.delta, "top1_agreement": row.top1_agreement}
            told.append((metrics, _label(row.name, row.full, view, row.in_sample), dataset))
    for run in runs:
        dataset = dataset_of(run.start["calibration"], run.model_name)
        for name, point in (("baseline", run.points[0]), ("searched", run.final)):
            label = _label(name, point.full, run, in_sample=True)
            told.append(({"loss": point.loss}, label, dataset))
    for metrics, label, dataset in told:
        for metric, value in metrics.items():
            if math.isfinite(value):
                name = f"{metric.replace('_', ' ')} ({label})"
                yield EvalResult(
                    task_type="text-generation", metric_type=metric, metric_value=value, metric_name=name, **dataset
                )


def _label(name: str, full: int, view: RunView | EvalView, in_sample: bool) -> str:
    parts = (name, f"{full} of {view.num_layers} indexers", IN_SAMPLE if in_sample else "", view.counted_name)
    return ", ".join(part for part in parts if part)


# --- how to serve it --------------------------------------------------------------------------------------------------


def serving(file: PatternFile) -> list[str]:
    """Paragraphs of Markdown: what the first engines are given, with their warnings, and which others there are.

    Where no engine is known, one sentence that says so and names the way in Python. Raises ExportError for a run whose
    pattern does not fit its own model.
    """
    exports, _ = exports_of_type(file)
    if not exports:
        return [no_engine(file.model.get("model_type"))]
    others = ", ".join(f"{other.title} (`{other.engine}`)" for other in exports[ENGINES_SHOWN:])
    also = f"Also known to take it: {others}; `icsearch export pattern.json --engine NAME` says how."
    told = []
    for served in exports[:ENGINES_SHOWN]:
        told.append(f"With {served.title}, {served.how}:\n\n```\n{served.text}\n```")
        if served.warnings:
            told.append(f"Warnings of `icsearch export pattern.json --engine {served.engine}`:")
            told.append("\n".join(f"- {warning}" for warning in served.warnings))
    return [*told, *([also] if others else [])]
