"""Host side of the sliding-window kernels.

FlexAttention compiles a kernel per shape, or one for all shapes that is several times slower (forward of 64K tokens, 8
heads of 64, window 512, H100: 3.9 ms). These take lengths, window and offset as arguments.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from hsa_kernels.triton import interpreter
from hsa_kernels.triton import window_kernels as kernels
from hsa_kernels.triton.attention import precision

if interpreter.enabled():
    interpreter.repair()


def supports(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None when the kernels take this case, else the reason why not."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not q.dtype == k.dtype == v.dtype:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype} (bfloat16, float16 or float32, all the same)"
    if q.dtype == torch.bfloat16 and interpreter.enabled():
        return "bfloat16 under Triton's interpreter"
    if q.shape[-1] not in (16, 32, 64, 128):
        return f"head size {q.shape[-1]} (16, 32, 64 or 128)"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "heads that are not contiguous"
    return None


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None, key_offset: int, scale: float | None
) -> Tensor:
    """Shapes and rule in `reference.sliding_window_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    docs = None if documents is None else documents.to(torch.int32).contiguous()
    return _Band.apply(q, k, v, docs, window, key_offset, scale)


def _common(q: Tensor, k: Tensor, docs: Tensor | None, rows: int, columns: int) -> dict[str, Any]:
    return {
        "H": q.shape[2],
        "R": q.shape[2] // k.shape[2],
        "D": q.shape[3],
        "BM": rows,
        "BN": columns,
        "DOCUMENTS": docs is not None,
        "PRECISION": precision(q.dtype),
    }


def _tile(q: Tensor) -> tuple[int, int]:
    """Rows and columns of a tile: fp32 tiles of three products each are kept small."""
    return (32, 32) if q.dtype == torch.float32 else (64, 64)


class _Band(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, docs, window, offset, scale):
        batch, length, heads, _ = q.shape
        keys = k.shape[1]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(batch * heads, length, dtype=torch.float32, device=q.device)
        rows, columns = _tile(q)
        rows = rows if q.dtype == torch.float32 or window < 256 else 128
        sizes = (length, keys, window, offset, keys)
        if length:
            kernels.forward_kernel[(triton.cdiv(length, rows), batch * heads)](
                q, k, v, q if docs is None else docs, out, lse, scale, *sizes,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
                **_common(q, k, docs, rows, columns), num_warps=4, num_stages=3,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, docs, out, lse)
        ctx.rule = (window, offset, scale)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, docs, out, lse = ctx.saved_tensors
        window, offset, scale = ctx.rule
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        batch, length, heads, _ = q.shape
        keys, groups = k.shape[1], k.shape[2]
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        delta = torch.empty_like(lse)
        rows, columns = _tile(q)
        sizes = (length, keys, window, offset, keys)
        options = {**_common(q, k, docs, rows, columns), "num_warps": 4, "num_stages": 2}
        docs = q if docs is None else docs
        kernels.query_gradient_kernel[(triton.cdiv(length, rows), batch * heads)](
            q, k, v, docs, out, grad, lse, delta, dq, scale, *sizes,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *grad.stride()[:3], *dq.stride()[:3],
            **options,
        )  # fmt: skip
        kernels.key_gradient_kernel[(triton.cdiv(keys, columns), batch * groups)](
            q, k, v, docs, grad, lse, delta, dk, dv, scale, *sizes,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            **options,
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None
