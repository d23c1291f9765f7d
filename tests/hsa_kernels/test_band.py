"""The sliding-window kernels under Triton's interpreter, in a process of their own, against the reference."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = [  # batch, queries, keys, window, offset, documents, query heads, key/value heads, head size
    (2, 100, 100, 17, 0, True, 4, 2, 16),
    (1, 70, 133, 40, 63, False, 2, 2, 16),
    (2, 130, 130, 64, 0, False, 2, 1, 16),
    (1, 50, 50, 200, 0, True, 2, 2, 32),
    (1, 1, 90, 33, 89, False, 4, 2, 16),
    (1, 33, 80, 10, 20, True, 2, 1, 16),
]
SCRIPT = """
import sys, torch
from hsa_kernels import reference
from hsa_kernels.triton import band
for batch, length, keys, window, offset, documents, heads, groups, dim in eval(sys.argv[1]):
    torch.manual_seed(length)
    q, k, v = (torch.randn(n, batch, h, dim).transpose(0, 1).requires_grad_() for n, h in
               ((length, heads), (keys, groups), (keys, groups)))
    assert band.supports(q, k, v) is None
    assert "dtypes" in band.supports(q, k.double(), v)
    assert "contiguous" in band.supports(torch.cat((q, q), -1)[..., ::2], k, v)
    docs = (torch.arange(keys) // 23).expand(batch, -1) if documents else None
    got = band.window_attention(q, k, v, window, docs, offset, None)
    want = reference.sliding_window_attention(q, k, v, window=window, documents=docs, key_offset=offset)
    grad = torch.randn_like(got)
    pairs = [(got, want), *zip(torch.autograd.grad(got, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad))]
    for a, b in pairs:
        assert (a - b).norm() < 2e-6 * b.norm(), (length, float((a - b).norm() / b.norm()))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_equal_to_the_reference_with_all_gradients():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", SCRIPT, repr(CASES)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
