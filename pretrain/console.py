"""What people see while it trains: one dense line per step, a banner per stage, a progress bar on a terminal.

Lines go to stdout, whole and in order; only rank 0 prints. The bar lives below the lines on stderr, when both are
terminals; where they are not (a file, Slurm, CI) there are plain lines only.
"""

from __future__ import annotations

import math
import statistics
import sys
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

_ETA_STEPS = 32  # the remaining time follows the median of so many last steps


class Console:
    """Printer of one training.

    Args:
        total_steps: planned steps of the whole run.
        is_writer: false on all ranks but 0; then nothing is printed.
        step: steps done already (the checkpoint that the run goes on from), and ``tokens`` with them.
        peak_flops: FLOP/s of all devices together, ``None`` where unknown: no MFU is shown.
        lines, bar: streams, stdout and stderr by default.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        is_writer: bool = True,
        step: int = 0,
        tokens: int = 0,
        peak_flops: float | None = None,
        lines: TextIO | None = None,
        bar: TextIO | None = None,
    ) -> None:
        self.is_writer = is_writer
        self.total_steps = total_steps
        self._tokens, self._peak_flops, self._flops_per_token = tokens, peak_flops, 0.0
        self._seconds: deque[float] = deque(maxlen=_ETA_STEPS)
        self._lines = lines or sys.stdout
        bar = bar or sys.stderr
        self._lock = threading.Lock()
        self._bar: tqdm | None = None
        if is_writer and self._lines.isatty() and bar.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=step,
                file=bar,
                leave=False,
                dynamic_ncols=True,
                smoothing=0.1,
                unit="step",
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
            )

    def stage(
        self, name: str, index: int, stages: int, details: Mapping[str, Any], flops_per_token: float = 0.0
    ) -> None:
        """Banner of a stage that begins or goes on: number ``index`` (from 0) of ``stages``.

        ``details`` (context, window, ...) are printed in the order given; ``flops_per_token``: FLOPs of training,
        forward and backward, for MFU.
        """
        self._flops_per_token = flops_per_token
        self._seconds.clear()  # a step of this stage takes another time
        title = f" stage {index + 1}/{stages}: {name} "
        self.say(f"{title:=^100}")
        self.say("  " + "  ".join(f"{key} {_plain(value)}" for key, value in details.items()))
        if self._bar is not None:
            self._bar.set_description(name)

    def step(self, record: Mapping[str, Any]) -> None:
        """Print the step that ``record`` (an object of metrics.jsonl) describes, and move the bar."""
        if not self.is_writer:
            return
        tokens, seconds = record["tokens"] - self._tokens, max(record["step_seconds"], 1e-9)
        self._tokens = record["tokens"]
        self._seconds.append(seconds)
        self.say(self.line(record, tokens))
        if self._bar is not None:
            with self._lock:
                self._bar.update(record["step"] - self._bar.n)

    def line(self, record: Mapping[str, Any], tokens: int) -> str:
        """The line of one step; ``tokens`` are those of this step alone."""
        seconds = max(record["step_seconds"], 1e-9)
        width = len(str(self.total_steps))
        parts = [
            f"{record['stage']:<9} {record['step']:>{width}}/{self.total_steps}",
            f"loss {record['loss']:.4f}",
            f"grad {_fixed(record['grad_norm'])}",
            f"lr {record['lr']:.2e}",
            f"{short_count(tokens / seconds):>5} tok/s",
        ]
        if self._peak_flops and self._flops_per_token:
            parts.append(f"MFU {100 * self._flops_per_token * tokens / seconds / self._peak_flops:4.1f}%")
        if "gpu_memory_gib" in record:
            parts.append(f"{record['gpu_memory_gib']:.1f} GiB")
        parts.append(f"wait {100 * record['data_wait_seconds'] / seconds:4.1f}%")
        if self._seconds:
            left = max(0, self.total_steps - record["step"]) * statistics.median(self._seconds)
            parts.append(f"ETA {short_time(left)}")
        return "  ".join(parts)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar. Safe from any thread."""
        if not self.is_writer:
            return
        with self._lock:
            if self._bar is not None:
                tqdm.write(text, file=self._lines)
            else:
                print(text, file=self._lines)
            self._lines.flush()

    def close(self) -> None:
        """Take the bar away; lines can still be printed."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None


def short_count(value: float) -> str:
    """Three digits and a decimal unit: ``812``, ``4.21k``, ``1.13M``."""
    units = ["T", "G", "M", "k", ""]
    while abs(value) >= 999.5 and len(units) > 1:
        value /= 1000.0
        units.pop()
    return (f"{value:.0f}" if value >= 99.95 else f"{value:.3g}") + units[-1]


def short_time(seconds: float) -> str:
    """``45s``, ``3m20s``, ``5h07m``, ``2d04h``; ``?`` when it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _fixed(value: float) -> str:
    """Seven characters, so that the columns stay in line."""
    return f"{value:7.4f}" if abs(value) < 10 else f"{value:7.2f}" if abs(value) < 9999 else f"{value:7.1e}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
