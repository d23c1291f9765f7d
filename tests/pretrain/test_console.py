"""The console: dense plain lines, and a bar on a terminal that leaves the lines whole."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from pretrain.console import Console, short_count, short_time
from pretrain.hardware import peak_flops, peak_flops_by_name


def record(step: int, **changes) -> dict:
    base = {
        "step": step,
        "stage": "warmup",
        "tokens": step * 4096,
        "loss": 5.0 / step,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "step_seconds": 0.5,
        "data_wait_seconds": 0.002,
    }
    return base | changes


def printed(**options) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(100, lines=out, bar=io.StringIO(), **options), out


def test_one_dense_line_per_step():
    console, out = printed(peak_flops=1e12)
    console.stage("warmup", 0, 3, {"context": 512, "top-k": "full", "lr": 1e-3}, flops_per_token=1e7)
    console.step(record(1))
    console.step(record(2))
    banner, details, first, second = out.getvalue().splitlines()
    assert banner.strip("=") == " stage 1/3: warmup " and len(banner) == 100
    assert details == "  context 512  top-k full  lr 0.001"
    assert first == (
        "warmup      1/100  loss 5.0000  grad  0.5000  lr 1.00e-03  8.19k tok/s  MFU  8.2%  wait  0.4%  ETA 50s"
    )
    assert second.startswith("warmup      2/100  loss 2.5000") and second.endswith("wait  0.4%  ETA 49s")


def test_without_a_known_peak_there_is_no_mfu():
    console, out = printed()
    console.stage("warmup", 0, 1, {}, flops_per_token=1e7)
    console.step(record(1))
    assert "MFU" not in out.getvalue()


def test_a_step_on_a_gpu_says_what_it_holds():
    console, out = printed()
    console.step({**record(1), "gpu_memory_gib": 15.625})
    assert " tok/s  15.6 GiB  wait " in out.getvalue()


def test_a_resumed_run_counts_the_tokens_of_its_own_steps():
    console, out = printed(step=40, tokens=40 * 4096)
    console.step(record(41))
    assert "8.19k tok/s" in out.getvalue() and "ETA 30s" in out.getvalue()


def test_values_that_are_not_finite_are_printed():
    console, out = printed()
    console.step(record(1, loss=float("nan"), grad_norm=float("inf")))
    assert "loss nan" in out.getvalue() and "grad     inf" in out.getvalue()


def test_other_ranks_are_silent():
    console, out = printed(is_writer=False)
    console.stage("warmup", 0, 1, {})
    console.step(record(1))
    console.say("x")
    console.close()
    assert out.getvalue() == ""


IN_TERMINAL = """
from pretrain.console import Console
console = Console(30)
console.stage("warmup", 0, 1, {"context": 512})
for step in range(1, 31):
    console.step(dict(step=step, stage="warmup", tokens=step, loss=1.0, grad_norm=1.0, lr=1.0, step_seconds=1.0,
                      data_wait_seconds=0.0))
    if step == 10:
        console.say("a warning from a thread")
console.close()
print("the end")
"""


def test_on_a_terminal_the_bar_leaves_the_lines_whole():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", IN_TERMINAL], stdout=theirs, stderr=theirs)
    os.close(theirs)
    raw = b""
    try:
        while chunk := os.read(ours, 65536):
            raw += chunk
    except OSError:  # Linux ends a pseudo terminal with EIO
        pass
    assert child.wait() == 0
    os.close(ours)
    text = raw.decode()
    assert re.search(r"warmup: +\d+%\|", text), "no bar"
    # what stays on the screen: a carriage return goes back, what follows replaces
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    steps = [line for line in lines if re.match(r"warmup +\d+/30  loss 1.0000  .*ETA", line)]
    assert len(steps) == 30
    assert "a warning from a thread" in lines and "the end" in lines


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (8.25, "8.25"), (812, "812"), (999.7, "1k"), (4210, "4.21k"), (1_130_000, "1.13M"), (2.5e12, "2.5T")],
)
def test_short_count(value, text):
    assert short_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (18420, "5h07m"), (187200, "2d04h"), (float("inf"), "?")],
)
def test_short_time(seconds, text):
    assert short_time(seconds) == text


def test_peaks():
    assert peak_flops("cpu", "fp32") is None
    assert peak_flops_by_name("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops_by_name("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops_by_name("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops_by_name("NVIDIA A100-SXM4-80GB", "fp32", tf32=True) == 156e12
    assert peak_flops_by_name("NVIDIA GeForce GTX 1080", "bf16") is None
