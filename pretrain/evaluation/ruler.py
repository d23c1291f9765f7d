"""RULER's tasks by length: one needle, many keys, a haystack of needles, 2 of 6 needles, several values of one key,
variable tracking, frequent and common words, questions about documents; and copy.

They share the runner of the needle map; what is built is documented in `data_pipeline.synthetic`. Needles lie at
random places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.config import TASKS, TRAINING_ONLY
from pretrain.errors import RecipeError
from pretrain.evaluation import ruler_tasks
from pretrain.evaluation.decoding import Engine
from pretrain.evaluation.haystack import Haystack
from pretrain.evaluation.retrieval import TOKEN_BUDGET, Progress, TaskResult, run_task

SHARED = tuple(task for task in TASKS if task not in TRAINING_ONLY)
"""Tasks of which many samples can share one text."""
ASKED = (*SHARED, *(task for task in ruler_tasks.TASKS if task != "qa"))
"""Tasks that evaluation asks by default; "qa" as well where it is given documents."""

# the paper's form of MQ-NIAH
TASK_OPTIONS: dict[str, dict[str, float]] = {"niah_multiquery": {"keys": 6, "queries": 2}}


@dataclass
class RulerResult:
    """One `TaskResult` per task, all with the same lengths, samples and seed."""

    tasks: dict[str, TaskResult]

    def to_json(self) -> dict:
        """Plain JSON, by task."""
        return {"tasks": {name: result.to_json() for name, result in self.tasks.items()}}


def parse_tasks(text: str | None, *, documents: bool = False, shared: bool = False) -> list[str]:
    """Comma-separated task names (None = all); RecipeError names the known ones.

    documents: there are some for "qa". shared: only tasks whose samples share texts.
    """
    known = SHARED if shared else (*ASKED, "qa") if documents else ASKED
    names = list(dict.fromkeys(text.replace(" ", ",").split(","))) if text else list(known)
    names = [name for name in names if name]
    for name in names:
        if name not in known:
            where = " with --haystacks" if shared and name in (*ASKED, "qa") else ""
            more = " (and qa, with --qa FILE)" if not documents else ""
            raise RecipeError(f"unknown task {name!r}{where}: known are {', '.join(known)}{more}")
    return names


def run_ruler(
    engine: Engine,
    tokenizer,
    haystack: np.ndarray | Haystack,
    *,
    tasks: Sequence[str] = SHARED,
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

    ``options`` (digits, keys, queries, hops, copy_random; documents for "qa") go to `build_sample`; TASK_OPTIONS win
    over them.
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
