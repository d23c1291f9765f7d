"""The decode step: choose chunks for one new token and attend to them, in a fixed number of launches."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from hsa_kernels.triton import decode_kernels as kernels
from hsa_kernels.triton import interpreter
from hsa_kernels.triton.attention import precision

_CAPACITY = 512
_GROUP = 64


def supports(q: Tensor, k: Tensor, v: Tensor, q_select: Tensor, top_k: int, chunk_size: int) -> str | None:
    """None when the kernels take this case, else the reason why not."""
    for name, size in (("head size", q.shape[-1]), ("retrieval size", q_select.shape[-1])):
        if size < 16 or size & (size - 1):
            return f"{name} {size} (a power of two from 16 on)"
    if chunk_size < 16 or chunk_size & (chunk_size - 1):
        return f"chunk size {chunk_size} (a power of two from 16 on)"
    if not q.dtype == k.dtype == v.dtype or (q.dtype == torch.bfloat16 and interpreter.enabled()):
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype} of q, k, v (all the same; bfloat16 on a GPU only)"
    if top_k > 256:
        return f"top_k {top_k} (1 to 256)"
    if q.dtype == torch.float64 or k.dtype == torch.float64:
        return "float64"
    return None


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_select: Tensor,
    landmarks: Tensor,
    visible: Tensor,
    *,
    top_k: int,
    chunk_size: int,
    scale: float,
) -> Tensor:
    """Shapes in `ops.hsa_decode`. Nothing here depends on a value on the device, so a CUDA graph can hold it."""
    batch, heads_q, dim = q.shape
    heads = k.shape[2]
    capacity, heads_r, dim_r = landmarks.shape[1], landmarks.shape[2], landmarks.shape[3]
    device, rows = q.device, batch * heads_r
    padded = triton.next_power_of_2(top_k)
    # Wider groups for very long contexts: one program finds the bound among all of them.
    group = _GROUP
    while triton.cdiv(capacity, group) > 8192:
        group *= 2
    groups = triton.cdiv(capacity, group)
    block = group
    ratio = heads_q // heads

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    scores, maxima = scratch(rows, capacity), scratch(rows, groups, dtype=torch.int32)
    count, bound = scratch(rows, dtype=torch.int32), scratch(rows, dtype=torch.int32)
    cand_id, cand_score = scratch(rows, _CAPACITY, dtype=torch.int32), scratch(rows, _CAPACITY)
    ids, weights = scratch(rows, padded, dtype=torch.int32), scratch(rows, padded)
    parts = scratch(batch * heads, padded, ratio, dim)
    out = torch.empty(batch, heads_q, dim, dtype=q.dtype, device=device)
    kernels.scan_kernel[(triton.cdiv(capacity, block), rows)](
        q_select, landmarks, visible, scores, maxima, count, 1.0 / math.sqrt(dim_r), capacity, groups,
        *q_select.stride(), *landmarks.stride(), HEADS=heads_r, DR=dim_r, BLOCK=block, GROUP=group,
    )  # fmt: skip
    kernels.bound_kernel[(rows,)](
        maxima, bound, groups, TOPK=top_k, GROUPS=triton.next_power_of_2(groups), num_warps=8 if groups > 1024 else 4
    )
    kernels.collect_kernel[(triton.cdiv(capacity, 2048), rows)](
        scores, visible, bound, count, cand_id, cand_score, capacity, HEADS=heads_r, CAP=_CAPACITY, BLOCK=2048
    )
    kernels.pick_kernel[(rows,)](
        scores, visible, count, cand_id, cand_score, ids, weights, capacity,
        HEADS=heads_r, TOPK=top_k, KP=padded, CAP=_CAPACITY, BLOCK=2048,
    )  # fmt: skip
    kernels.attend_kernel[(padded, batch * heads)](
        q, k, v, ids, weights, parts, scale, *q.stride(), *k.stride(), *v.stride(),
        HEADS=heads, SELECT_HEADS=heads_r, R=ratio, RP=max(16, triton.next_power_of_2(ratio)),
        S=chunk_size, D=dim, KP=padded, PRECISION=precision(q.dtype),
    )  # fmt: skip
    kernels.gather_parts_kernel[(ratio, batch * heads)](parts, out, R=ratio, D=dim, KP=padded)
    return out
