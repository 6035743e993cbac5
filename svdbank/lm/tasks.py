"""Tasks of lm-eval, through its library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svdbank.core.errors import MissingExtraError, OptionError
from svdbank.core.specs import Struct
from svdbank.lm.adapters import acting
from svdbank.lm.scores import BASE


class TaskScore(Struct, frozen=True):
    """One metric of an lm-eval task."""

    adapter: str
    task: str
    metric: str
    value: float
    error: float | None


def task_scores(
    model: Any,
    tokenizer: Any,
    stacks: Mapping[str, Sequence[str]],
    tasks: Sequence[str],
    limit: int | None,
    folder: str | Path | None,
    batch_size: int,
) -> list[TaskScore]:
    """lm-eval's own figures of each task, for the base and every adapter."""
    lm_eval = import_lm_eval()
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder) if folder is not None else None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise OptionError(f"lm-eval knows no task {', '.join(map(repr, unknown))}", hint="lm-eval ls tasks lists them")
    found = []
    for name in (BASE, *stacks):
        with acting(model, stacks.get(name, ())):
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            results = lm_eval.simple_evaluate(
                wrapped, tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
            )["results"]
        for task, values in results.items():
            for key, value in values.items():
                metric, _, kind = key.partition(",")
                if isinstance(value, int | float) and not metric.endswith("_stderr") and kind:
                    error = values.get(f"{metric}_stderr,{kind}")
                    number = float(error) if isinstance(error, int | float) else None
                    found.append(TaskScore(name, task, metric, float(value), number))
    return found


def import_lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError as cause:
        raise MissingExtraError(
            "tasks need the package 'lm-eval', which is not installed", hint="pip install 'svdbank[eval]'"
        ) from cause
    return lm_eval
