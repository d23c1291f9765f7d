"""Sliding-window attention on CUDA by well-kept kernels, chosen by measurement (docs/kernels.md, "Window").

Short windows in half precision without documents: torch's FlashAttention, or a Triton kernel where no gradient is
wanted. All others: FlexAttention over a band of blocks, whose lists are arithmetic, compiled for the shape. A window
that covers everything: torch's fused causal attention. Nothing of size L x L is ever made.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# FlexAttention's block of queries and of keys.
_BLOCK = 128
_SHORTEST = 128
# FlexAttention's blocks are coarse for short windows. H100, 128K tokens, forward and backward, FlashAttention against
# FlexAttention: 10.1 and 11.7 ms at 512, 50.2 and 42.8 ms at 4096.
_FLASH_WINDOW = 1024
# Largest head size of the forward kernel: its blocks must fit into the registers.
_FORWARD_SIZE = 128
# Longer inputs go in segments: the block lists of FlexAttention are quadratic in the number of blocks.
_SEGMENT = 1 << 17


def supports(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None when this module takes the case, else the reason why not."""
    if q.device.type != "cuda":
        return f"tensors on {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not q.dtype == k.dtype == v.dtype:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype} of q, k, v (bfloat16, float16 or float32, all the same)"
    if q.shape[-1] not in (16, 32, 64, 128, 256):
        return f"head size {q.shape[-1]} (16, 32, 64, 128 or 256)"
    if q.shape[1] < _SHORTEST:
        return f"{q.shape[1]} queries (from {_SHORTEST} on: a compilation for every length of a decode step costs more)"
    return None


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None, key_offset: int, scale: float | None
) -> Tensor:
    """Shapes and rule in `reference.sliding_window_attention`."""
    if documents is None and q.dtype != torch.float32 and window <= min(_FLASH_WINDOW, key_offset + q.shape[1] - 1):
        learnt = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        kernel = flash_window if learnt or q.shape[-1] > _FORWARD_SIZE else forward_window
        return kernel(q, k, v, window, key_offset, scale)
    return flex_window(q, k, v, window, documents, key_offset, scale)


def flash_window(q: Tensor, k: Tensor, v: Tensor, window: int, key_offset: int, scale: float | None) -> Tensor:
    """torch's FlashAttention with a window. Its last query meets its last key, so keys behind the queries go first."""
    stop = key_offset + q.shape[1]
    start = max(0, key_offset - window + 1)
    k, v = k[:, start:stop], v[:, start:stop]
    sizes = (q.shape[1], k.shape[1])
    return torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, *sizes, 0.0, True, False, scale=scale, window_size_left=window - 1, window_size_right=0
    )[0]


def forward_window(q: Tensor, k: Tensor, v: Tensor, window: int, key_offset: int, scale: float | None) -> Tensor:
    """Our kernel, for what nobody learns from."""
    from hsa_kernels.triton.window_forward import window_forward

    return window_forward(q, k, v, window, key_offset, scale)


def flex_window(
    q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None, key_offset: int, scale: float | None
) -> Tensor:
    """FlexAttention, or torch's fused causal attention where the window covers all."""
    length = q.shape[1]
    if length > _SEGMENT and window < length:
        parts = [
            flex_window(q[:, i : i + _SEGMENT], k, v, window, documents, key_offset + i, scale)
            for i in range(0, length, _SEGMENT)
        ]
        return torch.cat(parts, 1)
    # Keys out of reach go first: then the offset takes few values while streaming, and block lists are found again.
    start, stop = max(0, key_offset - window + 1), key_offset + length
    k, v, key_offset = k[:, start:stop], v[:, start:stop], key_offset - start
    documents = documents if documents is None else documents[:, start:stop]
    keys = k.shape[1]
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[2] != k.shape[2]
    if window >= length and length == keys and documents is None and q.dtype != torch.float32:
        out = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, scale=scale, enable_gqa=gqa)
        return out.transpose(1, 2).contiguous()

    # Queries and keys of no document behind the last one, so that few lengths are compiled; each sees itself.
    extra = _rounded(length) - length
    if extra:
        qh, kh, vh = (F.pad(x, (0, 0, 0, extra)) for x in (qh, kh, vh))
        documents = documents if documents is None else F.pad(documents, (0, extra), value=-1)
        keys += extra
    # Tensors, not numbers: a number would be a constant of the compiled kernel, compiled anew for every window.
    reach, shift = _numbers(window, key_offset, q.device)
    if documents is None:

        def mask_mod(b, h, i, j):
            p = i + shift
            return (j <= p) & (j > p - reach)

    else:
        docs = documents

        def mask_mod(b, h, i, j):
            p = i + shift
            return (j <= p) & (j > p - reach) & (docs[b, p] == docs[b, j])

    queries = length + extra
    lists = _band(queries, keys, window, key_offset, documents is None, q.device)
    mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=_BLOCK, mask_mod=mask_mod, seq_lengths=(queries, keys))
    # Shapes, dtypes and with or without documents are specialisations; the default limit of 8 is soon reached.
    with torch._dynamo.config.patch(recompile_limit=256):
        out = _compiled()(qh, kh, vh, block_mask=mask, scale=scale, enable_gqa=gqa)
    return out[:, :, :length].transpose(1, 2).contiguous()


def _rounded(length: int) -> int:
    """The length rounded up to two binary digits after the first: at most four lengths from 2^n to 2^(n + 1), 128 the
    least.
    """
    step = 1 << max(0, length.bit_length() - 3)
    return max(_SHORTEST, -(-length // step) * step)


@functools.cache
def _compiled():
    # For each shape by itself: what torch compiles for unknown lengths is several times slower (forward of 64K tokens,
    # 8 heads of 64, window 512, H100: 3.9 ms a layer).
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=256)
def _numbers(window: int, offset: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both as int32 scalars on the device."""
    both = torch.tensor([window, offset], dtype=torch.int32, device=device)
    return both[0], both[1]


@functools.lru_cache(maxsize=64)
def _band(
    length: int, keys: int, window: int, offset: int, skip_mask: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Partial and full key blocks of every query block: (numbers, ids) twice; full ones only where skip_mask."""
    rows, columns = -(-length // _BLOCK), -(-keys // _BLOCK)
    first = torch.arange(rows, device=device) * _BLOCK + offset  # position of a block's first query
    last = torch.clamp(first + _BLOCK - 1, max=offset + length - 1)
    column = torch.arange(columns, device=device)
    low, high = torch.clamp(first - window + 1, min=0) // _BLOCK, last // _BLOCK
    touched = (column >= low[:, None]) & (column <= high[:, None])
    if not skip_mask:
        return (*_ordered(touched), None, None)
    whole = (column * _BLOCK + _BLOCK - 1 <= first[:, None]) & (column * _BLOCK > (last - window)[:, None])
    return (*_ordered(touched & ~whole), *_ordered(touched & whole))


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Row lists of a block matrix as FlexAttention wants them: numbers (1, 1, rows), ids (1, 1, rows, columns)."""
    ids = torch.argsort(dense.int(), dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32)[None, None], ids.int()[None, None].contiguous()
