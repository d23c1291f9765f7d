"""The CUDA window's mask and block lists, checked on the CPU through FlexAttention's plain form."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from hsa_kernels import reference, window


@pytest.mark.parametrize(
    ("window_size", "dtype", "documents", "kernel", "without_gradients"),
    [
        (512, torch.bfloat16, False, "flash_window", "forward_window"),
        (4096, torch.bfloat16, False, "flex_window", "flex_window"),
        (512, torch.bfloat16, True, "flex_window", "flex_window"),
        (512, torch.float32, False, "flex_window", "flex_window"),
        (600, torch.bfloat16, False, "flex_window", "flex_window"),  # covers all: plain causal attention
    ],
)
def test_the_faster_kernel_is_chosen(monkeypatch, window_size, dtype, documents, kernel, without_gradients):
    used = []
    for name in ("flash_window", "flex_window", "forward_window"):
        monkeypatch.setattr(window, name, lambda q, *_, _n=name: used.append(_n) or q)
    x = torch.zeros(1, 600, 1, 16, dtype=dtype)
    docs = torch.zeros(1, 600, dtype=torch.int32) if documents else None
    for learnt in ((True, False, False), (False, False, True)):
        window.window_attention(*(x.clone().requires_grad_(y) for y in learnt), window_size, docs, 0, None)
    window.window_attention(x, x, x, window_size, docs, 0, None)
    with torch.no_grad():
        window.window_attention(*(x.clone().requires_grad_() for _ in "qkv"), window_size, docs, 0, None)
    assert used == [kernel, kernel, without_gradients, without_gradients]


def test_heads_too_large_for_the_forward_kernel_go_to_flash_attention(monkeypatch):
    used = []
    monkeypatch.setattr(window, "flash_window", lambda *_: used.append("flash_window"))
    x = torch.zeros(1, 600, 1, 256, dtype=torch.bfloat16)
    window.window_attention(x, x, x, 512, None, 0, None)
    assert used == ["flash_window"]


# FlexAttention says that its plain form is slow; here that is the point.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("length", "keys", "size", "offset"),
    [(300, 300, 40, 0), (200, 712, 512, 512), (130, 400, 1, 250), (150, 600, 64, 400), (256, 256, 256, 0)],
)
def test_band_of_blocks_covers_what_is_seen_and_nothing_more(monkeypatch, documents, length, keys, size, offset):
    monkeypatch.setattr(window, "_compiled", lambda: flex_attention)
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, length, 4, 16, generator=g)
    k, v = (torch.randn(2, keys, 2, 16, generator=g) for _ in "kv")
    docs = (torch.arange(keys) // 90).int().expand(2, -1) if documents else None
    got = window.flex_window(q, k, v, size, docs, offset, None)
    want = reference.sliding_window_attention(q, k, v, window=size, documents=docs, key_offset=offset)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(window, "_SEGMENT", 128)
    got = window.flex_window(q, k, v, size, docs, offset, None)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    assert window._rounded(length) in (128, 160, 192, 224, 256, 320) and window._rounded(4096) == 4096
    numbers, ids, full_numbers, full_ids = window._band(length, keys, size, offset, True, torch.device("cpu"))
    p, j = torch.arange(length)[:, None] + offset, torch.arange(keys)
    seen = (j <= p) & (j > p - size)
    for row in range(numbers.shape[2]):
        block = seen[row * 128 : (row + 1) * 128]
        some = {c for c in range(ids.shape[3]) if block[:, c * 128 : (c + 1) * 128].any()}
        partial = set(ids[0, 0, row, : numbers[0, 0, row]].tolist())
        full = set(full_ids[0, 0, row, : full_numbers[0, 0, row]].tolist())
        assert some == partial | full and not partial & full
        assert all(block[:, c * 128 : (c + 1) * 128].all() for c in full)
