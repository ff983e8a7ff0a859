"""lm-evaluation-harness on a model with a pattern applied, generation and KV cache included (icsearch[lm-eval])."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icsearch.errors import IcsearchError
from icsearch.model import DsaModel
from icsearch.pattern import Pattern


def lm_eval_results(
    dsa: DsaModel, tokenizer: Any, patterns: Sequence[Pattern], tasks: Sequence[str]
) -> list[dict[str, Any]]:
    """The harness's metrics for each pattern; `tasks` are its names, or task files (.yaml)."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise IcsearchError(
            f"--lm-eval needs lm-evaluation-harness ({error}): pip install 'icsearch[lm-eval]'"
        ) from None
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    names = [Path(task).stem if Path(task) in files else task for task in tasks]
    results = []
    for pattern in patterns:
        with dsa.running(pattern):
            harness = HFLM(pretrained=dsa.model, tokenizer=tokenizer, batch_size=1)
            found = lm_eval.simple_evaluate(harness, tasks=names, task_manager=manager, bootstrap_iters=0)
        results.append({"pattern": pattern.letters, "results": found["results"]})
    return results
