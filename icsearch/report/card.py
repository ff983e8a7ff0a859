"""A section for a model card: what shares its indexer, what that costs, and how to serve it. From saved JSON alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from icsearch.engines.export import export
from icsearch.errors import IcsearchError
from icsearch.report import numbers
from icsearch.report.card_metadata import card_yaml, dataset_of, is_hub_id, model_name
from icsearch.report.eval_view import EvalRow, EvalView
from icsearch.report.view import RunView, headline
from icsearch.runs import results

_ENGINES = ("vllm", "sglang")  # those that take a flag; the others are told by icsearch export


def render_card(runs: Sequence[RunView], evaluations: Sequence[EvalView]) -> str:
    """Markdown with the metadata in front. Searches first, evaluations behind them."""
    sections = [*(_run_section(view) for view in runs), *(_eval_section(view) for view in evaluations)]
    return f"---\n{card_yaml(runs, evaluations)}\n---\n\n{_lead(runs, evaluations)}\n\n" + "\n\n".join(sections) + "\n"


def _lead(runs: Sequence[RunView], evaluations: Sequence[EvalView]) -> str:
    name = model_name(runs, evaluations)
    link = f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else f"`{name.rstrip('/').split('/')[-1]}`"
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
    source = dataset_of(found.get("source"), str(view.start["model"].get("name_or_path")))["dataset_name"]
    return "\n\n".join(
        [
            f"## {view.final.full} of {view.num_layers} layers keep their indexer",
            headline(view),
            f"```\n{view.final.pattern}\n```",
            _table(
                ("pattern", "F layers", "loss", "above the model as it is"),
                ((name, str(full), numbers.loss(loss), cost) for name, full, loss, cost in rows),
            ),
            f"In-sample: measured on the {found.get('num_sequences')} x {found.get('seq_len')} tokens of {source} that "
            "were searched on.",
            *_serving(view),
            _provenance(view),
        ]
    )


def _serving(view: RunView) -> list[str]:
    """The flags of engines that take the pattern of this checkpoint."""
    flags = []
    for engine in _ENGINES:
        try:
            found = export(results.pattern_file(view.record), engine)
        except IcsearchError:  # this engine cannot be told of this pattern: icsearch export says why
            continue
        flags.append(f"With {found.title}:\n\n```\n{found.text}\n```")
    return flags


def _provenance(view: RunView) -> str:
    start, options = view.start, view.start["options"]
    environment = start.get("environment") or {}
    facts = {
        "method": f"{options['method']}, {options.get('strategy')}, by {options.get('objective')}",
        "layers": f"{len(view.layer_indices)} with an indexer, of {start['decoder_layers']}",
        "checkpoint": f"{start['model'].get('model_type')}, fingerprint {str(start['model'].get('fingerprint'))[:16]}",
        "calibration": f"fingerprint {str(start['calibration'].get('fingerprint'))[:16]}",
        "computed in": f"{options.get('dtype')} on {options.get('device')}, torch {environment.get('torch')}, "
        f"transformers {environment.get('transformers')}, icsearch {start['icsearch_version']}",
    }
    return _table(("searched with", ""), facts.items())


def _eval_section(view: EvalView) -> str:
    found = view.document.get("calibration") or {}
    source = dataset_of(found.get("source"), view.model_name)["dataset_name"]
    columns = ("pattern", "F layers", "loss", "above the model as it is", "perplexity", "KL", "top-1 agreement")
    tasks = [column for column in view.task_columns if column[1] == "generated"]
    return "\n\n".join(
        [
            "## Evaluation",
            f"On {found.get('num_sequences')} x {found.get('seq_len')} tokens of {source}"
            + ("; rows marked in-sample were searched on some of them." if _in_sample(view) else "."),
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
