"""RUN/metrics.jsonl and RUN/evaluations.jsonl: append-only logs of the training, exact across kills and restarts.

``metrics.jsonl`` has one object per step, in order, none twice. It is what counts: the tracking store is filled from it
(tracking.py), and so are status and ETA. A line is written with one system call at the end of its step, so a SIGKILL
loses at most the step that was not finished; a resumed run first drops the steps after its checkpoint, which it will do
again, and a torn last line.

Floats keep all their digits (``repr``). JSON has no NaN or infinity: they are written as the strings ``"nan"``,
``"inf"`` and ``"-inf"``, which ``float()`` reads, and which the readers here turn back into floats.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.errors import RunDirError

REQUIRED = ("step", "stage", "tokens", "loss", "grad_norm", "lr", "step_seconds", "data_wait_seconds")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class JsonlLog:
    """An append-only file of JSON objects with an integer ``step`` that never goes down.

    Args:
        path: the file; made when it is absent.
        resume_step: the step of the checkpoint that training goes on from (0: from the start). Everything after it is
            cut off, together with a torn last line, by one truncation.

    Raises:
        RunDirError: the part that is to be kept is damaged; names file and line.
    """

    _one_per_step = False

    def __init__(self, path: str | os.PathLike[str], resume_step: int = 0) -> None:
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            self.last_step, end = self._keep(resume_step)
            if os.fstat(self._fd).st_size != end:
                os.ftruncate(self._fd, end)
                os.fsync(self._fd)
        except BaseException:
            os.close(self._fd)
            raise

    def _keep(self, resume_step: int) -> tuple[int, int]:
        """Last step to keep (0: none) and the byte where it ends."""
        last, end = 0, 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") or (self._one_per_step and last >= resume_step):
                    break  # what follows is dropped whatever it holds
                record = _parse(line, self.path, number)
                if record["step"] > resume_step:
                    break
                self._kept(record)
                last, end = record["step"], end + len(line)
        return last, end

    def _kept(self, record: dict[str, Any]) -> None:
        """Told each object that survives a resume."""

    def append(self, record: dict[str, Any]) -> None:
        """Write one object and hand it to the operating system before returning; ``time`` (Unix seconds) is added.

        A write that fails (disk full) leaves the file as it was and raises OSError.
        """
        assert record["step"] >= self.last_step, f"step {record['step']} after step {self.last_step} in {self.path}"
        record = {**record, "time": record.get("time", round(time.time(), 3))}
        line = (json.dumps(_strict(record), allow_nan=False) + "\n").encode()
        size = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, line)
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError:
            os.ftruncate(self._fd, size)
            raise
        self.last_step = record["step"]

    def sync(self) -> None:
        """Force the file to the disk; call it before a checkpoint is published, so that no power cut parts the two."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class MetricsLog(JsonlLog):
    """``metrics.jsonl``: exactly one object for each step, with at least the keys of ``REQUIRED``.

    ``tokens`` counts from the start of the run; ``*_seconds`` are wall seconds; extras may follow.
    """

    _one_per_step = True

    def __init__(self, path: str | os.PathLike[str], resume_step: int = 0) -> None:
        super().__init__(path, resume_step)
        if self.last_step < resume_step:
            warnings.warn(
                f"{self.path} ends at step {self.last_step}, the checkpoint is of step {resume_step}: "
                "the steps between are lost from the log",
                stacklevel=2,
            )
            self.last_step = resume_step

    def append(self, record: dict[str, Any]) -> None:
        """Write the step after the last one. ``AssertionError`` when a key is missing or the step is another."""
        missing = [key for key in REQUIRED if key not in record]
        assert not missing, f"metrics of step {record.get('step')} lack {missing}"
        assert record["step"] == self.last_step + 1, f"step {record['step']} follows {self.last_step} in {self.path}"
        super().append(record)


class EvaluationLog(JsonlLog):
    """``evaluations.jsonl``: any number of objects per step, each ``name`` (default ``evaluation``) once per step."""

    def __init__(self, path: str | os.PathLike[str], resume_step: int = 0) -> None:
        self._known: set[str] = set()  # names written at the last step
        self._known_step = 0
        super().__init__(path, resume_step)

    def _kept(self, record: dict[str, Any]) -> None:
        if record["step"] != self._known_step:
            self._known_step, self._known = record["step"], set()
        self._known.add(record.get("name", "evaluation"))

    def append(self, record: dict[str, Any]) -> None:
        """Write the object, unless this step has one of that name: a resumed run may evaluate its first step again."""
        if record["step"] == self._known_step and record.get("name", "evaluation") in self._known:
            return
        super().append(record)
        self._kept(record)


def read(path: str | os.PathLike[str], after: int = 0) -> Iterator[dict[str, Any]]:
    """The objects with ``step > after``, in order; works while another process appends (a torn last line is left out).

    Raises:
        RunDirError: a whole line is not a JSON object with a step.
    """
    for record, _ in read_from(path, offset_after(path, after)):
        yield record


def read_from(path: str | os.PathLike[str], offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Objects from byte ``offset`` (a line's start) on, each with the byte where its line ends; none without a file."""
    try:
        file = open(path, "rb")  # noqa: SIM115  (closed by the with below)
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield _loose(_parse(line, Path(path))), offset


def offset_after(path: str | os.PathLike[str], step: int) -> int:
    """Byte where the first line of a step greater than ``step`` starts, by bisection (no line, no file: the end, 0)."""
    if step <= 0:
        return 0
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return 0
    with file:
        low, high = 0, file.seek(0, os.SEEK_END)  # the answer is a line start in [low, high]
        while low < high:
            middle = (low + high) // 2
            file.seek(low if middle == low else middle - 1)
            start = low if middle == low else middle - 1 + len(file.readline())  # first line start >= middle
            line = file.readline() if start < high else b""
            if not line.endswith(b"\n") or _parse(line, Path(path))["step"] > step:
                if middle == low:
                    return low
                high = middle
            else:
                low = start + len(line)
        return low


def last_record(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The last whole object of the file, or ``None``."""
    block = 1 << 16
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return None
    with file:
        end = file.seek(0, os.SEEK_END)
        start, tail = end, b""
        while start > 0:
            start = max(0, start - block)
            file.seek(start)
            tail = file.read(end - start)
            whole = tail[: tail.rfind(b"\n") + 1].rstrip(b"\n")
            if b"\n" in whole or (start == 0 and whole):
                line = whole.rsplit(b"\n", 1)[-1]
                return _loose(_parse(line, Path(path)))
            block *= 2
    return None


def _parse(line: bytes, path: Path, number: int | None = None) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if type(record["step"]) is int:
            return record
        reason = "its step is no integer"
    except (ValueError, KeyError, TypeError):
        reason = "not a JSON object with a step"
    where = f"line {number}" if number else f"a line ({line[:60]!r})"
    raise RunDirError(f"{path} is damaged at {where}: {reason}; mend that line, or move the file away")


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    return value


def _loose(record: dict[str, Any]) -> dict[str, Any]:
    for key, value in record.items():
        if isinstance(value, str) and key not in ("stage", "name"):
            record[key] = _NON_FINITE.get(value, value)
    return record
