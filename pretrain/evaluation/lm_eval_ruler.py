"""The data of lm-evaluation-harness's RULER tasks. Importing this needs the package lm-eval (extra `lm-eval`).

The harness makes 500 samples per task and length, one length after the other from one random state, and its limit then
keeps the first of all: the shortest length alone.
"""

from __future__ import annotations

import contextlib
import copy
import random
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

from pretrain.errors import RecipeError

_SAMPLES = 500  # the harness's number per length
# Its functions that make the samples of one length, whatever the module.
_MAKERS = ("generate_samples", "sys_vartrack_w_noise_random", "sys_word_pair_random", "sys_kwext")

Counts = dict[str, dict[int, int]]


@contextlib.contextmanager
def ruler_samples(limit: int | None) -> Iterator[Counts]:
    """RULER tasks loaded and run inside the block make and ask at most ``limit`` samples per length (None: 500).

    Every length of every task starts from the harness's seeds, so its samples depend on no other length, task or limit.
    Yields how many there are by task and length, known once the tasks are loaded.
    """
    counts: Counts = {}
    download, sample_size = ConfigurableTask.download, evaluator.get_sample_size

    def load(task: Any, *args: Any, **kwargs: Any) -> None:
        if not is_ruler(task):
            download(task, *args, **kwargs)
            return
        options = {**(task.config.metadata or {}), **(task.config.dataset_kwargs or {})}
        parts = samples_by_length(task.config.custom_dataset, options, limit)
        name = task.config.task
        counts[name] = {length: len(part) for length, part in parts.items()}
        parts = {length: part for length, part in parts.items() if len(part)}
        if not parts:
            raise RecipeError(f"{name} fits no sample into --lengths {', '.join(map(str, counts[name]))}")
        task.dataset = {"test": datasets.concatenate_datasets(list(parts.values()))}

    def size(task: Any, asked: float | None) -> int | None:
        return None if is_ruler(task) else sample_size(task, asked)

    with (
        unittest.mock.patch.object(ConfigurableTask, "download", load),
        unittest.mock.patch.object(evaluator, "get_sample_size", size),
    ):
        yield counts


def is_ruler(task: Any) -> bool:
    """Whether a function of the harness's RULER folder makes the task's data."""
    return getattr(task.config.custom_dataset, "__module__", "").startswith("lm_eval.tasks.ruler.")


def samples_by_length(make: Callable[..., Any], options: dict[str, Any], limit: int | None) -> dict[int, Any]:
    """The datasets that ``make``, a RULER task's function, gives for each of the lengths in ``options``, without
    samples that have no answer.
    """
    # The functions' module cannot be imported by name: the harness loads it from its file.
    names = make.__globals__
    most = min(limit or _SAMPLES, _SAMPLES)
    lengths = options.get("max_seq_lengths", names["DEFAULT_SEQ_LENGTHS"])
    makers = {name: _at_most(most, names[name]) for name in _MAKERS if name in names}
    parts = {}
    for length in lengths:
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        # ruler_cwe has a generator of its own, which is never advanced here.
        own = {"RNG": copy.deepcopy(names["RNG"])} if "RNG" in names else {}
        with unittest.mock.patch.dict(names, makers | own):
            part = make(**{**options, "max_seq_lengths": [length]})["test"]
        # ruler_cwe asks for no words where its shortest list is too long; the harness then divides by zero.
        parts[length] = part.select([row for row, answers in enumerate(part["outputs"]) if answers][:most])
    return parts


def scores_by_length(results: dict[str, Any], counts: Counts) -> dict[str, dict[str, Any]]:
    """For JSON: score and number of samples by task and length, out of the harness's results."""
    return {
        task: {
            str(length): {"score": results[task][f"{length},none"] if count else None, "samples": count}
            for length, count in lengths.items()
        }
        for task, lengths in counts.items()
    }


def _at_most(most: int, make: Callable[..., list[dict[str, Any]]]) -> Callable[..., list[dict[str, Any]]]:
    def limited(*args: Any, **options: Any) -> list[dict[str, Any]]:
        # ruler_qa_* shuffle in place the list of documents that all lengths share.
        options = {name: list(value) if isinstance(value, list) else value for name, value in options.items()}
        return make(*args, **options | {"num_samples": min(most, options.get("num_samples", _SAMPLES))})

    return limited
