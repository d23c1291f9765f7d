"""Lengths, distances and metric names as people write them.

Lengths are tokens; ``k`` and ``m`` are binary (``16k`` = 16384), as everywhere in a recipe. Relative forms: ``4x`` is
four times the training context, ``8w`` eight times the sliding window. A metric name is ``<task>@<length>`` with an
optional needle distance: ``niah.single@16k``, ``niah.single@1k:512`` (the needle 512 tokens before the question).
"""

import re
from dataclasses import dataclass

from pretrain.errors import RecipeError

_SUFFIX = {"": 1, "k": 1 << 10, "m": 1 << 20}
_LENGTH = re.compile(r"(\d+)([kmxw]?)", re.IGNORECASE)

TASK_OF_METRIC = {
    "niah.single": "niah_single",
    "niah.multikey": "niah_multikey",
    "niah.multiquery": "niah_multiquery",
    "niah.variable_tracking": "variable_tracking",
    "niah.copy": "copy",
}


def parse_length(text: str | int, *, context: int | None = None, window: int | None = None) -> int:
    """Tokens meant by ``text``: ``4096``, ``4k``, ``16m``, ``4x`` (times ``context``) or ``8w`` (times ``window``).

    Raises RecipeError for anything else, for zero, and for a relative form whose base is not known.
    """
    match = _LENGTH.fullmatch(str(text).strip())
    if match is None or int(match[1]) == 0:
        raise RecipeError(
            f"{text!r} is not a length: write tokens such as 4096, 4k, 16m (binary), or 4x for 4 training contexts"
        )
    number, suffix = int(match[1]), match[2].lower()
    if suffix in _SUFFIX:
        return number * _SUFFIX[suffix]
    base = context if suffix == "x" else window
    if base is None:
        what = "training context" if suffix == "x" else "sliding window"
        raise RecipeError(
            f"{text!r} counts in multiples of the {what}, which is not known here: give the length in tokens"
        )
    return number * base


def parse_lengths(text: str, *, context: int | None = None, window: int | None = None) -> list[int]:
    """Comma-separated lengths, ascending, without doubles."""
    parts = [part for part in text.replace(" ", ",").split(",") if part]
    if not parts:
        raise RecipeError("no lengths given: write for example --lengths 4k,64k")
    return sorted({parse_length(part, context=context, window=window) for part in parts})


def format_length(tokens: int) -> str:
    """Shortest exact form: 16384 -> ``16k``, 1048576 -> ``1m``, 1000 -> ``1000``."""
    for suffix in ("m", "k"):
        if tokens and tokens % _SUFFIX[suffix] == 0:
            return f"{tokens // _SUFFIX[suffix]}{suffix}"
    return str(tokens)


@dataclass(frozen=True)
class ProbeMetric:
    """A retrieval metric named in a recipe: the task, the sample length and, optionally, the needle's distance
    (tokens).
    """

    task: str
    length: int
    distance: int | None = None


def parse_metric(name: str) -> ProbeMetric:
    """``niah.single@16k`` or ``niah.single@1k:512`` -> ProbeMetric; RecipeError names the known metrics otherwise."""
    task, at, where = name.strip().partition("@")
    if not at or task not in TASK_OF_METRIC:
        known = ", ".join(f"{metric}@LENGTH" for metric in TASK_OF_METRIC)
        raise RecipeError(
            f"unknown retrieval metric {name!r}: known are {known} (append :DISTANCE to fix the needle's distance)"
        )
    length, colon, distance = where.partition(":")
    metric = ProbeMetric(TASK_OF_METRIC[task], parse_length(length), parse_length(distance) if colon else None)
    if metric.distance is not None and metric.task != "niah_single":
        raise RecipeError(f"{name!r}: only niah.single takes a needle distance")
    return metric
