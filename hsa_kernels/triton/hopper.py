"""Host side of the kernels for Hopper GPUs: when they run, their launch parameters, their launches."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from hsa_kernels.index import Pairs, Union
from hsa_kernels.triton import interpreter


@dataclass(frozen=True)
class Tiling:
    """Groups of 64 rows, buffers of keys and values, registers of a thread, whether q is kept in registers."""

    groups: int
    stages: int
    registers: int
    q_in_registers: bool


def union_tiling(ratio: int, top_k: int, backward: bool) -> Tiling:
    """Three groups share a stream where their registers suffice and the union of their tokens is not large to sort."""
    if backward or ratio < 16 or top_k > 128:
        return Tiling(groups=2, stages=4 if backward else 5, registers=232, q_in_registers=True)
    return Tiling(groups=3, stages=5, registers=160, q_in_registers=False)


# Gluon, the language of these kernels, changes between versions of Triton: elsewhere the Triton kernels run.
_TRITON_VERSIONS = ("3.6.",)


@functools.cache
def _runs_on(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9 and triton.__version__.startswith(_TRITON_VERSIONS)


def supports(q: Tensor, k: Tensor, top_k: int, chunk_size: int) -> bool:
    """Whether the streaming kernel takes this case; the Triton kernel takes all others."""
    ratio = q.shape[2] // k.shape[2]
    return (
        not interpreter.enabled()
        and q.dtype in (torch.bfloat16, torch.float16)
        and ratio in (8, 16, 32)
        and chunk_size in (32, 64)
        and q.shape[3] in (64, 128)
        # The slots of a group's tokens make one integer.
        and 64 // ratio * (8 if top_k <= 128 else 16) <= 64
        and _runs_on(q.device)
    )


def launch(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, grad: Tensor, out: Tensor, dw: Tensor, union: Union,
    chunk_size: int, scale: float, *, backward: bool, tiling: Tiling,
) -> None:  # fmt: skip
    """Fill out (o or dq) and dw from the union of tiles of groups * 64 / ratio tokens."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from hsa_kernels.triton.hopper_union import stream_attention_kernel

    batch, length, heads_q, dim = q.shape
    keys, heads = k.shape[1], k.shape[2]
    ratio = heads_q // heads
    tokens = 64 // ratio
    bits = 8 * union.slots.element_size()
    words = union.slots.view({16: torch.int16, 32: torch.int32, 64: torch.int64}[tokens * bits])
    dtype = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    block = [chunk_size, dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    k_tiles, v_tiles = (
        TensorDescriptor.from_tensor(x.contiguous().view(batch * keys, heads * dim), block, layout) for x in (k, v)
    )
    q, grad = (x if x.stride(3) == 1 else x.contiguous() for x in (q, grad))
    stream_attention_kernel[(union.count.numel(),)](
        q, k_tiles, v_tiles, w, grad, out, dw, union.chunks, words, union.count, scale, length, keys,
        *q.stride()[:3], *w.stride(), *grad.stride()[:3], *out.stride()[:3], *dw.stride(),
        HEADS=heads, R=ratio, T=tokens, G=tiling.groups, TOPK=union.chunks.shape[1] // union.tile, S=chunk_size,
        D=dim, STAGES=tiling.stages, BITS=bits, BACKWARD=backward, Q_IN_REGISTERS=tiling.q_in_registers,
        REGISTERS=tiling.registers, num_warps=4,
    )  # fmt: skip


def supports_gather(q: Tensor, k: Tensor, chunk_size: int) -> bool:
    """Whether the gathering backward kernel takes this case."""
    return (
        not interpreter.enabled()
        and q.dtype in (torch.bfloat16, torch.float16)
        and chunk_size == 64
        and q.shape[3] in (64, 128)
        and _runs_on(q.device)
    )


def launch_gather(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, pairs: Pairs, grad: Tensor, dq: Tensor, dw: Tensor, dk: Tensor,
    dv: Tensor, chunk_size: int, scale: float, *, with_dq: bool,
) -> None:  # fmt: skip
    """Add to dk, dv (B, Hkv, C * S, D) fp32 and, with_dq, to dq (B, L, Hq, D) fp32; dw is stored."""
    from hsa_kernels.triton.hopper_chunk import gather_backward_kernel

    length, heads_q, dim = q.shape[1:]
    heads = k.shape[2]
    ratio = heads_q // heads
    q, k, v, grad = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, grad))
    gather_backward_kernel[(pairs.max_items,)](
        q, k, v, w, grad, dq, dw, dk, dv,
        pairs.order, pairs.start, pairs.item_bin, pairs.item_first, pairs.item_start[-1:],
        scale, length, k.shape[1] // chunk_size, pairs.segments,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *w.stride(), *grad.stride()[:3], *dw.stride(),
        HEADS=heads, R=ratio, T=64 // ratio, TOPK=w.shape[3], S=chunk_size, D=dim, PART=pairs.part,
        STAGES=4, WITH_DQ=with_dq, REGISTERS=232, GATHER_REGISTERS=40, num_warps=4,
    )  # fmt: skip
