"""One new token against the ring buffer of its sliding window: blocks of slots in parallel, then one sum."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hsa_kernels.triton import decode_kernels as kernels
from hsa_kernels.triton import interpreter
from hsa_kernels.triton.attention import precision

_BLOCK = 64


def supports(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None when the kernels take this case, else the reason why not."""
    size = q.shape[-1]
    if size < 16 or size & (size - 1):
        return f"head size {size} (a power of two from 16 on)"
    if not q.dtype == k.dtype == v.dtype or (q.dtype == torch.bfloat16 and interpreter.enabled()):
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype} of q, k, v (all the same; bfloat16 on a GPU only)"
    if q.dtype == torch.float64:
        return "float64"
    return None


def window_decode(q: Tensor, k: Tensor, v: Tensor, filled: Tensor, scale: float) -> Tensor:
    """Shapes in `ops.window_decode`."""
    batch, heads_q, dim = q.shape
    heads, size = k.shape[1], k.shape[2]
    ratio = heads_q // heads
    splits = triton.cdiv(size, _BLOCK)
    parts = torch.empty(batch * heads, splits, ratio, dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(2, batch * heads, splits, ratio, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads_q, dim, dtype=q.dtype, device=q.device)
    kernels.ring_kernel[(splits, batch * heads)](
        q, k, v, filled, parts, stats[0], stats[1], scale, size, splits, *q.stride(), *k.stride(), *v.stride(),
        HEADS=heads, R=ratio, RP=max(16, triton.next_power_of_2(ratio)), D=dim, BLOCK=_BLOCK,
        PRECISION=precision(q.dtype),
    )  # fmt: skip
    kernels.ring_sum_kernel[(ratio, batch * heads)](
        parts, stats[0], stats[1], out, splits, R=ratio, D=dim, SPLITS=triton.next_power_of_2(splits)
    )
    return out
