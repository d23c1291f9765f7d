"""The RULER-style tasks by length: many keys, 2 of 6 needles, variable tracking, copy.

They share the runner of the needle map; what is built is documented in `data_pipeline.synthetic`. Needles lie at
random places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.config import TASKS, TRAINING_ONLY
from pretrain.errors import RecipeError
from pretrain.evaluation.decoding import Engine
from pretrain.evaluation.haystack import Haystack
from pretrain.evaluation.retrieval import TOKEN_BUDGET, Progress, TaskResult, run_task

ASKED = tuple(task for task in TASKS if task not in TRAINING_ONLY)
"""Tasks that evaluation knows."""

# the paper's form of MQ-NIAH
TASK_OPTIONS: dict[str, dict[str, float]] = {"niah_multiquery": {"keys": 6, "queries": 2}}


@dataclass
class RulerResult:
    """One `TaskResult` per task, all with the same lengths, samples and seed."""

    tasks: dict[str, TaskResult]

    def to_json(self) -> dict:
        """Plain JSON, by task."""
        return {"tasks": {name: result.to_json() for name, result in self.tasks.items()}}


def parse_tasks(text: str | None) -> list[str]:
    """Comma-separated task names (None = all); RecipeError names the known ones."""
    names = list(dict.fromkeys(text.replace(" ", ",").split(","))) if text else list(ASKED)
    names = [name for name in names if name]
    for name in names:
        if name not in ASKED:
            raise RecipeError(f"unknown task {name!r}: known are {', '.join(ASKED)}")
    return names


def run_ruler(
    engine: Engine,
    tokenizer,
    haystack: np.ndarray | Haystack,
    *,
    tasks: Sequence[str] = ASKED,
    lengths: Sequence[int],
    samples: int = 50,
    seed: int = 0,
    chunk_size: int = 1,
    templates: str = "train",
    options: Mapping[str, Any] | None = None,
    batch: int = 16,
    token_budget: int = TOKEN_BUDGET,
    progress: Progress | None = None,
) -> RulerResult:
    """Every task at every length, needles at random depths, exact match of the generated answer.

    ``options`` (digits, keys, queries, hops, copy_random) go to `build_sample`; TASK_OPTIONS win over them.
    """
    hay = haystack if isinstance(haystack, Haystack) else Haystack(haystack)
    results = {
        task: run_task(
            engine,
            tokenizer,
            hay,
            task=task,
            lengths=lengths,
            samples=samples,
            seed=seed,
            chunk_size=chunk_size,
            templates=templates,
            options={**(options or {}), **TASK_OPTIONS.get(task, {})},
            batch=batch,
            token_budget=token_budget,
            progress=progress,
        )
        for task in tasks
    }
    return RulerResult(results)
