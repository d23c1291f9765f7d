"""metrics.jsonl and evaluations.jsonl: every step once and in order, whatever happens."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import metrics_log
from pretrain.errors import RunDirError
from pretrain.metrics_log import EvaluationLog, MetricsLog, last_record, offset_after, read, read_from


def record(step: int, **extra) -> dict:
    return {
        "step": step,
        "stage": "warmup",
        "tokens": step * 1024,
        "loss": 1 / (step + 2),
        "grad_norm": math.pi * step,
        "lr": 1e-3 / 3,
        "step_seconds": 0.1,
        "data_wait_seconds": 0.0,
        **extra,
    }


def fill(path, steps: int, resume: int = 0) -> None:
    log = MetricsLog(path, resume)
    for step in range(resume + 1, steps + 1):
        log.append(record(step))
    log.close()


def steps_of(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_floats_keep_every_digit_and_non_finite_is_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    awkward = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan]
    for step, loss in enumerate(awkward, 1):
        log.append(record(step, loss=loss, extra={"load": [loss]}))
    lines = path.read_text().splitlines()
    values = [json.loads(line, parse_constant=pytest.fail)["loss"] for line in lines]
    assert values == [*awkward[:3], "inf", "-inf", "nan"]
    back = [found["loss"] for found in read(path)]
    assert back[:5] == awkward[:5] and math.isnan(back[5])


def test_every_step_once_in_order(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(record(1))
    for wrong in (1, 3, 0):
        with pytest.raises(AssertionError):
            log.append(record(wrong))
    incomplete = record(2)
    del incomplete["lr"]
    with pytest.raises(AssertionError, match="lr"):
        log.append(incomplete)
    log.append(record(2, extra=1))
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2]


@pytest.mark.parametrize("tail", [b"", b'{"step": 11, "sta', b"\x00\x00"])
def test_resume_drops_what_will_be_done_again(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    fill(path, 10)
    kept = path.read_bytes().splitlines(keepends=True)[:7]
    with open(path, "ab") as file:
        file.write(tail)
    log = MetricsLog(path, 7)
    assert path.read_bytes() == b"".join(kept)
    log.append(record(8))
    assert steps_of(path) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_restart_without_a_checkpoint_begins_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, 4)
    MetricsLog(path, 0).append(record(1))
    assert steps_of(path) == [1]


def test_a_damaged_line_in_what_is_kept_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, 5)
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = "garbage\n"
    path.write_text("".join(lines))
    with pytest.raises(RunDirError, match=r"metrics\.jsonl is damaged at line 3"):
        MetricsLog(path, 5)
    with pytest.raises(RunDirError, match="garbage"):
        list(read(path))
    assert MetricsLog(path, 2).last_step == 2  # damage after the checkpoint does not matter


def test_lost_lines_are_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, 3)
    with pytest.warns(UserWarning, match="ends at step 3, the checkpoint is of step 5"):
        log = MetricsLog(path, 5)
    log.append(record(6))


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(record(1))
    whole = path.read_bytes()
    write = os.write

    def nearly_full(fd, data):
        if len(data) > 40:
            return write(fd, data[:40])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics_log.os, "write", lambda fd, data: nearly_full(fd, data[:45] if len(data) > 45 else b""))
    with pytest.raises(OSError, match="No space left"):
        for _ in range(100):
            log.append(record(2))
    monkeypatch.undo()
    assert path.read_bytes() == whole
    log.append(record(2))
    assert steps_of(path) == [1, 2]


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.integers(0, 3), max_size=30),
    padding=st.integers(0, 80),
    torn=st.sampled_from(["", '{"step": 999', '{"step": 999}']),
)
def test_bisection_finds_every_step(tmp_path_factory, gaps, padding, torn):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    steps, step = [], 1
    for gap in gaps:
        step += gap
        steps.append(step)
    lines = [json.dumps({"step": s, "x": "y" * (padding * s % 97)}) + "\n" for s in steps]
    path.write_text("".join(lines) + torn)
    for after in range(step + 3):
        assert [found["step"] for found in read(path, after)] == [s for s in steps if s > after]
        wanted = sum(len(line) for line, s in zip(lines, steps, strict=True) if s <= after)
        assert offset_after(path, after) == wanted
    last = last_record(path)
    assert (last["step"] if last else None) == (steps[-1] if steps else None)


def test_reading_follows_a_growing_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert list(read(path)) == [] and last_record(path) is None and offset_after(path, 3) == 0
    fill(path, 2)
    found = list(read_from(path, 0))
    end = found[-1][1]
    with open(path, "a") as file:
        file.write('{"step": 3')
    assert list(read_from(path, end)) == []
    with open(path, "a") as file:
        file.write("}\n")
    assert [r["step"] for r, _ in read_from(path, end)] == [3]
    assert last_record(path)["step"] == 3


def test_last_record_of_a_long_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(record(1, text="x" * 300_000))
    log.append(record(2, text="y" * 300_000))
    assert last_record(path)["step"] == 2


WRITER = """
import sys
from pretrain.metrics_log import MetricsLog
path, resume = sys.argv[1], int(sys.argv[2])
log = MetricsLog(path, resume)
print("go", flush=True)
step = resume
while step < 100000:
    step += 1
    log.append(dict(step=step, stage="s", tokens=step, loss=1 / step, grad_norm=1.0, lr=1.0, step_seconds=1.0,
                    data_wait_seconds=0.0, padding="x" * 2000))
"""


def test_sigkill_at_any_moment(tmp_path):
    path, resume, rng = tmp_path / "metrics.jsonl", 0, random.Random(7)
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(resume)], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(rng.uniform(0.02, 0.2))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        last = last_record(path)["step"]
        resume = rng.randint(last // 2, last)  # the checkpoint is some steps behind
        log = MetricsLog(path, resume)
        log.close()
        found = list(read(path))
        assert [r["step"] for r in found] == list(range(1, resume + 1))
        assert all(r["loss"] == 1 / r["step"] for r in found)


def test_evaluations_once_per_step_and_name(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    log = EvaluationLog(path)
    log.append({"step": 0, "name": "ppl", "value": 9.0})
    log.append({"step": 5, "name": "ppl", "value": 3.0})
    log.append({"step": 5, "name": "niah", "value": 0.5})
    log.append({"step": 8, "name": "niah", "value": 0.9})
    log.close()
    log = EvaluationLog(path, 5)
    log.append({"step": 5, "name": "niah", "value": 0.5})  # evaluated again right after the restart
    log.append({"step": 8, "name": "niah", "value": 0.9})
    assert [(r["step"], r["name"]) for r in read(path, -1)] == [(0, "ppl"), (5, "ppl"), (5, "niah"), (8, "niah")]
    with pytest.raises(AssertionError):
        log.append({"step": 7, "name": "late"})
