"""Sliding-window attention without gradients, for prefill."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from hsa_kernels.triton import window_kernels as kernels
from hsa_kernels.triton.attention import precision

# H200, 131,072 tokens, window 512, heads of 64, 8 on 8: 0.57 ms (blocks of 128 queries 0.60 to 0.82, FlashAttention
# 1.71). Heads of 128, 16 on 4, 65,536 tokens, window 4096: 5.1 ms (others 5.4 to 8.1, FlashAttention 7.6).
_SMALL = {"M": 64, "N": 64, "num_warps": 4, "num_stages": 3}
_LARGE = {"M": 128, "N": 64, "num_warps": 8, "num_stages": 3}


def window_forward(
    q: Tensor, k: Tensor, v: Tensor, window: int, key_offset: int, scale: float | None, **blocks: int
) -> Tensor:
    """Shapes and rule in `reference.sliding_window_attention`, without documents; head sizes are powers of two.
    blocks: sizes M of the blocks of queries and N of keys, num_warps, num_stages, in place of those chosen.
    """
    batch, length, heads, dim = q.shape
    out = torch.empty(batch, length, heads, dim, dtype=q.dtype, device=q.device)
    chosen = {**(_SMALL if dim <= 64 else _LARGE), **blocks}
    grid = (triton.cdiv(length, chosen["M"]), batch * heads)
    kernels.window_kernel[grid](
        q, k, v, out, (dim**-0.5 if scale is None else scale) / math.log(2), length, k.shape[1], window, key_offset,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        HEADS=heads, RATIO=heads // k.shape[2], D=dim, PRECISION=precision(q.dtype), **chosen,
    )  # fmt: skip
    return out
