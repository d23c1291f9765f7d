"""Host side of the streaming union kernel: when it runs, its launch parameters, its launch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hsa_kernels.index import Union
from hsa_kernels.triton import interpreter


@dataclass(frozen=True)
class Tiling:
    """Groups of 64 rows, buffers of keys and values, registers of a thread, whether q is kept in registers."""

    groups: int
    stages: int
    registers: int
    q_in_registers: bool


FORWARD = Tiling(groups=2, stages=5, registers=232, q_in_registers=True)
BACKWARD = Tiling(groups=2, stages=5, registers=232, q_in_registers=True)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


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
        and _is_hopper(q.device)
    )


def launch(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, grad: Tensor, out: Tensor, dw: Tensor, union: Union,
    chunk_size: int, scale: float, *, backward: bool, tiling: Tiling,
) -> None:  # fmt: skip
    """Fill out (o or dq) and dw from the union of tiles of groups * 64 / ratio tokens."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from hsa_kernels.triton.stream_kernels import stream_attention_kernel

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
