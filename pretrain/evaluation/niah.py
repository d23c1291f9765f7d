"""Needle in a haystack: the depth x length map, and the cheap probe used while training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pretrain.evaluation.decoding import Engine
from pretrain.evaluation.haystack import Haystack
from pretrain.evaluation.retrieval import TOKEN_BUDGET, Progress, TaskResult, depth_grid, run_task
from pretrain.evaluation.tally import Tally, total
from pretrain.evaluation.units import ProbeMetric, parse_metric

NiahResult = TaskResult


def run_niah(
    engine: Engine,
    tokenizer,
    haystack: np.ndarray | Haystack,
    *,
    task: str = "niah_single",
    lengths: Sequence[int],
    depths: int | Sequence[float] = 5,
    distances: Sequence[int] = (),
    samples: int = 20,
    seed: int = 0,
    chunk_size: int = 1,
    templates: str = "train",
    options: Mapping[str, Any] | None = None,
    batch: int = 16,
    token_budget: int = TOKEN_BUDGET,
    progress: Progress | None = None,
) -> NiahResult:
    """Exact match of the needle's value, by length x depth (``depths``: a number of even steps, or the depths
    themselves).

    ``distances`` replaces the depths: exactly that many tokens of text between needle and question. See
    `pretrain.evaluation.retrieval.run_task` for the rest.
    """
    return run_task(
        engine,
        tokenizer,
        haystack,
        task=task,
        lengths=lengths,
        depths=depth_grid(depths) if isinstance(depths, int) else depths,
        distances=distances,
        samples=samples,
        seed=seed,
        chunk_size=chunk_size,
        templates=templates,
        options=options,
        batch=batch,
        token_budget=token_budget,
        progress=progress,
    )


def needle_accuracy(
    engine: Engine,
    tokenizer,
    haystack: np.ndarray | Haystack,
    metric: str | ProbeMetric,
    *,
    samples: int = 32,
    seed: int = 0,
    chunk_size: int = 1,
    templates: str = "train",
    options: Mapping[str, Any] | None = None,
    batch: int = 32,
    token_budget: int = TOKEN_BUDGET,
) -> Tally:
    """The value of a retrieval metric named in a recipe (``niah.single@16k``), for probes and stage exits.

    The same greedy generation and exact match as `run_niah`, one length, ``samples`` needles at evenly spread depths
    (or all at the metric's distance); no files, no pictures. `Tally.accuracy` is the value, `Tally.interval` its
    uncertainty. The same ``seed`` asks the same questions again, so a curve over training compares like with like.
    """
    probe = parse_metric(metric) if isinstance(metric, str) else metric
    spread = probe.distance is None and probe.task != "copy"
    result = run_task(
        engine,
        tokenizer,
        haystack,
        task=probe.task,
        lengths=[probe.length],
        depths=[(i + 0.5) / samples for i in range(samples)] if spread else [None],
        distances=() if probe.distance is None else [probe.distance],
        samples=1 if spread else samples,
        seed=seed,
        chunk_size=chunk_size,
        templates=templates,
        options=options,
        batch=batch,
        token_budget=token_budget,
    )
    return total(cell.tally for cell in result.cells)
