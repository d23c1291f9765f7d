"""The kernel tests in a process of their own, for sessions that imported Triton before the interpreter was chosen."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_kernel_tests_pass_in_their_own_process(kernels_run_here):
    if kernels_run_here:
        return  # this process runs them itself
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(folder / name) for name in ("test_triton.py", "test_bench_kernels.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=folder.parents[1], env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
