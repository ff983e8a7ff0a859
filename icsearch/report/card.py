"""A section for a model card: what shares its indexer, what that costs, and how to serve it. From saved JSON alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from icsearch.report import numbers
from icsearch.report.card_metadata import card_model, card_yaml, dataset_of, hub_id, last_part
from icsearch.report.card_serving import serving
from icsearch.report.eval_view import EvalRow, EvalView
from icsearch.report.sentences import headline
from icsearch.report.view import RunView
from icsearch.runs import results
from icsearch.runs.results import split_notes


def render_card(runs: Sequence[RunView], evaluations: Sequence[EvalView]) -> str:
    """Markdown with the metadata in front. Searches first, evaluations behind them."""
    sections = [*(_run_section(view) for view in runs), *(_eval_section(view) for view in evaluations)]
    return f"---\n{card_yaml(runs, evaluations)}\n---\n\n{_lead(runs, evaluations)}\n\n" + "\n\n".join(sections) + "\n"


def _lead(runs: Sequence[RunView], evaluations: Sequence[EvalView]) -> str:
    model = card_model(runs, evaluations)
    name = hub_id(model)
    link = f"[{name}](https://huggingface.co/{name})" if name else f"`{last_part(model)}`"
    return (
        "# Shared indexers\n\n"
        f"Patterns for {link}: a layer marked F runs its indexer, one marked S reuses the selection of the nearest F "
        "layer before it (IndexCache, arXiv 2603.12201). Losses are those of the whole model in nats per token, ± one "
        "standard error paired over sequences, measured with icsearch."
    )


def _run_section(view: RunView) -> str:
    rows = [("the model as it is", view.points[0].full, view.points[0].loss, "")]
    rows.append(("searched", view.final.full, view.final.loss, numbers.difference(view.final.difference)))
    rows += [
        (one.label, len(one.pattern.full_layers), one.loss, numbers.difference(one.difference))
        for one in view.references
    ]
    found = view.start["calibration"]
    source = dataset_of(found, str(view.start["model"].get("name_or_path")))["dataset_name"]
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
            f"In-sample: measured on the {found.get('num_sequences')} x {found.get('seq_len')} tokens of {source} that "
            "were searched on.",
            *serving(results.pattern_file(view.record)),
            _provenance(view),
        ]
    )


def _cautions(notes: Sequence[str]) -> list[str]:
    """One line beside the results where guessing has a lower loss than the model."""
    return [f"**Caution**: {caution}." for caution in split_notes(notes)[0]]


def _provenance(view: RunView) -> str:
    start, options = view.start, view.start["options"]
    environment = start.get("environment") or {}
    facts = {
        "method": f"{options['method']}, {options.get('strategy')}, by {options.get('objective')}",
        "layers": f"{len(view.layer_indices)} with an indexer, of {start['decoder_layers']}",
        "checkpoint": _checkpoint(start["model"]),
        "calibration": f"fingerprint {str(start['calibration'].get('fingerprint'))[:16]}",
        "computed in": f"{options.get('dtype')} on {options.get('device')}, torch {environment.get('torch')}, "
        f"transformers {environment.get('transformers')}, icsearch {start['icsearch_version']}",
    }
    return _table(("searched with", ""), facts.items())


def _checkpoint(model: Mapping[str, Any]) -> str:
    """Its type and what tells it from others: the hub's commit, and the fingerprint of its files."""
    commit = f"revision {model['revision'][:16]}, " if model.get("revision") else ""
    return f"{model.get('model_type')}, {commit}fingerprint {str(model.get('fingerprint'))[:16]}"


def _eval_section(view: EvalView) -> str:
    found = view.document.get("calibration") or {}
    source = dataset_of(found, view.model_name)["dataset_name"]
    columns = ("pattern", "F layers", "loss", "above the model as it is", "perplexity", "KL", "top-1 agreement")
    tasks = [column for column in view.task_columns if column[1] == "generated"]
    return "\n\n".join(
        [
            "## Evaluation",
            f"On {found.get('num_sequences')} x {found.get('seq_len')} tokens of {source}"
            + ("; rows marked in-sample were searched on some of them." if _in_sample(view) else "."),
            *_cautions(view.document.get("notes") or ()),
            _table(
                (*columns, *(f"{kind.replace('_', ' ')}" for kind, _ in tasks)),
                (_eval_cells(row, tasks) for row in view.rows),
            ),
            "\n".join(f"- {row.name}: `{row.pattern}`: {row.verdict}" for row in view.rows if not row.is_baseline),
        ]
    )


def _in_sample(view: EvalView) -> bool:
    return any(row.in_sample for row in view.rows)


def _eval_cells(row: EvalRow, tasks: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    accuracies = [row.tasks.get(column) for column in tasks]
    return (
        row.name + (" (in-sample)" if row.in_sample else "") + (" (of another model)" if row.foreign else ""),
        str(row.full),
        numbers.loss(row.loss),
        "" if row.is_baseline else numbers.difference(row.difference),
        f"{row.perplexity:.4g}",
        "" if row.is_baseline else numbers.with_error(row.kl.delta, row.kl.std_err, sign=False),
        numbers.percent(row.top1_agreement),
        *("" if accuracy is None else numbers.percent(accuracy.share) for accuracy in accuracies),
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
