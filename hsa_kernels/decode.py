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


def supports_select(q_select: Tensor, landmarks: Tensor, top_k: int) -> str | None:
    """None when the selection kernels take this case, else the reason why not."""
    size = q_select.shape[-1]
    if size < 16 or size & (size - 1):
        return f"retrieval size {size} (a power of two from 16 on)"
    if top_k > 256:
        return f"top_k {top_k} (1 to 256)"
    if torch.float64 in (q_select.dtype, landmarks.dtype):
        return "float64"
    if torch.bfloat16 in (q_select.dtype, landmarks.dtype) and interpreter.enabled():
        return "bfloat16 under Triton's interpreter"
    return None


def supports_attend(q: Tensor, k: Tensor, v: Tensor, columns: int, chunk_size: int) -> str | None:
    """None when the attention kernel takes this case, else the reason why not."""
    for name, size in (("head size", q.shape[-1]), ("chunk size", chunk_size)):
        if size < 16 or size & (size - 1):
            return f"{name} {size} (a power of two from 16 on)"
    if columns > 256 or columns & (columns - 1):
        return f"{columns} chunks per token (a power of two up to 256)"
    if not q.dtype == k.dtype == v.dtype or (q.dtype == torch.bfloat16 and interpreter.enabled()):
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype} of q, k, v (all the same; bfloat16 on a GPU only)"
    if q.dtype == torch.float64:
        return "float64"
    return None


def select(
    q_select: Tensor,
    landmarks: Tensor,
    visible: Tensor,
    *,
    top_k: int,
    decay: Tensor | None,
    reach: float,
) -> tuple[Tensor, Tensor]:
    """Ids (B, Hr, KP) int32 and weights (B, Hr, KP) float32, KP the power of two from top_k on; -1 and 0 behind the
    chosen ones.

    Shapes in `ops.hsa_decode_select`. Nothing here depends on a value on the device, so a CUDA graph can hold it.
    """
    batch, heads, dim = q_select.shape
    capacity = landmarks.shape[1]
    device, rows = q_select.device, batch * heads
    padded = triton.next_power_of_2(top_k)
    # Wider groups for very long contexts: one program finds the bound among all of them.
    group = _GROUP
    while triton.cdiv(capacity, group) > 8192:
        group *= 2
    groups = triton.cdiv(capacity, group)
    block = group

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    scores, maxima = scratch(rows, capacity), scratch(rows, groups, dtype=torch.int32)
    count, bound = scratch(rows, dtype=torch.int32), scratch(rows, dtype=torch.int32)
    cand_id, cand_score = scratch(rows, _CAPACITY, dtype=torch.int32), scratch(rows, _CAPACITY)
    ids, weights = scratch(batch, heads, padded, dtype=torch.int32), scratch(batch, heads, padded)
    falls = q_select if decay is None else decay
    kernels.scan_kernel[(triton.cdiv(capacity, block), rows)](
        q_select, landmarks, falls, visible, scores, maxima, count,
        1.0 / math.sqrt(dim), 1.0 / reach, capacity, groups,
        *q_select.stride(), *landmarks.stride(), *falls.stride()[:2],
        DECAY=decay is not None, HEADS=heads, DR=dim, BD=min(dim, 128), BLOCK=block, GROUP=group,
    )  # fmt: skip
    kernels.bound_kernel[(rows,)](
        maxima, bound, groups, TOPK=top_k, GROUPS=triton.next_power_of_2(groups), num_warps=8 if groups > 1024 else 4
    )
    kernels.collect_kernel[(triton.cdiv(capacity, 2048), rows)](
        scores, visible, bound, count, cand_id, cand_score, capacity, HEADS=heads, CAP=_CAPACITY, BLOCK=2048
    )
    kernels.pick_kernel[(rows,)](
        scores, visible, count, cand_id, cand_score, ids, weights, capacity,
        HEADS=heads, TOPK=top_k, KP=padded, CAP=_CAPACITY, BLOCK=2048,
    )  # fmt: skip
    return ids, weights


def attend(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, ids: Tensor, *, chunk_size: int, scale: float) -> Tensor:
    """(B, Hq, D); shapes in `ops.hsa_decode_attend`. The number of columns must be a power of two."""
    batch, heads_q, dim = q.shape
    heads, padded = k.shape[2], ids.shape[2]
    ratio = heads_q // heads
    parts = torch.empty(batch * heads, padded, ratio, dim, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads_q, dim, dtype=q.dtype, device=q.device)
    kernels.attend_kernel[(padded, batch * heads)](
        q, k, v, ids.contiguous(), weights.contiguous(), parts, scale, *q.stride(), *k.stride(), *v.stride(),
        HEADS=heads, SELECT_HEADS=ids.shape[1], R=ratio, RP=max(16, triton.next_power_of_2(ratio)),
        S=chunk_size, D=dim, KP=padded, PRECISION=precision(q.dtype),
    )  # fmt: skip
    kernels.gather_parts_kernel[(ratio, batch * heads)](parts, out, R=ratio, D=dim, KP=padded)
    return out
