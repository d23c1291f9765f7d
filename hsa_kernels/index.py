"""Work lists for the two loop orders, built on the device from the selected chunk ids, without host synchronisation.

`build_union`: for tiles of T neighbouring tokens, the sorted union of their chunks and each token's column in it.
`build_pairs`: pairs (token, column) grouped by segment of queries and chunk, cut into work items (a CSR list).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from hsa_kernels.triton import index_kernels


@dataclass
class Union:
    """chunks (B*H*tiles, T*K) int32; slots (B*H*tiles, T*K, T) int8 or int16, -1 = not chosen; count (B*H*tiles,)."""

    tile: int
    chunks: Tensor
    slots: Tensor
    count: Tensor


@dataclass
class Pairs:
    """order: pairs token * K + column grouped by bin; start (bins + 1,); items of at most `part` pairs of one bin.

    A bin is ((b * H + h) * segments + token // segment) * chunks + chunk. item_start (bins + 1,) numbers the items of
    every bin; item_bin and item_first have room for max_items, the true number is item_start[-1].
    """

    segments: int
    part: int
    max_items: int
    order: Tensor
    start: Tensor
    item_start: Tensor
    item_bin: Tensor
    item_first: Tensor


def build_union(indices: Tensor, chunks: int, tile: int) -> Union:
    """indices (B, L, H, K) int32 contiguous, ids outside 0..chunks-1 ignored; tile a power of two."""
    batch, length, heads, top_k = indices.shape
    tiles = batch * heads * triton.cdiv(length, tile)
    padded = triton.next_power_of_2(top_k)
    device = indices.device
    out = Union(
        tile,
        torch.empty(tiles, tile * top_k, dtype=torch.int32, device=device),
        torch.full((tiles, tile * top_k, tile), -1, dtype=torch.int8 if top_k <= 128 else torch.int16, device=device),
        torch.empty(tiles, dtype=torch.int32, device=device),
    )
    index_kernels.union_kernel[(tiles,)](
        indices,
        out.chunks,
        out.slots,
        out.count,
        length,
        chunks,
        H=heads,
        K=top_k,
        KP=padded,
        T=tile,
        num_warps=min(8, max(1, tile * padded // 128)),
    )
    return out


def build_pairs(indices: Tensor, chunks: int, *, segment: int, part: int, stable: bool) -> Pairs:
    """indices (B, L, H, K) int32 contiguous. stable: pairs inside a bin in ascending order, so equal in every run."""
    batch, length, heads, top_k = indices.shape
    total = indices.numel()
    if length * top_k >= 2**31:
        raise ValueError(f"{length} tokens x {top_k} chunks do not fit 32-bit pair numbers: split the queries")
    segments = triton.cdiv(length, segment)
    bins = batch * heads * segments * chunks
    device = indices.device
    shape = (total, length, chunks, segment, segments)
    block = 1024
    grid = (triton.cdiv(total, block),)
    counts = torch.zeros(bins, dtype=torch.int32, device=device)
    index_kernels.count_kernel[grid](indices, counts, *shape, H=heads, K=top_k, BLOCK=block)
    start = _starts(counts)
    order = torch.empty(total, dtype=torch.int32, device=device)
    if stable:
        order.copy_(_stable_order(indices, chunks, segment, segments, bins))
    else:
        cursor = start[:-1].clone()
        index_kernels.fill_kernel[grid](indices, cursor, order, *shape, H=heads, K=top_k, BLOCK=block)
    item_start = _starts((counts + (part - 1)) // part)
    max_items = min(bins, total) + total // part
    item_bin = torch.empty(max_items, dtype=torch.int32, device=device)
    item_first = torch.empty(max_items, dtype=torch.int32, device=device)
    index_kernels.items_kernel[(triton.cdiv(bins, 256),)](
        start, item_start, item_bin, item_first, bins, PART=part, BLOCK=256
    )
    return Pairs(segments, part, max_items, order, start, item_start, item_bin, item_first)


def _starts(counts: Tensor) -> Tensor:
    """(n,) counts -> (n + 1,) int32 first positions."""
    out = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=out[1:])
    return out


def _stable_order(indices: Tensor, chunks: int, segment: int, segments: int, bins: int) -> Tensor:
    """Pair numbers sorted by bin, ties in ascending order; pairs without a chunk come last."""
    batch, length, heads, top_k = indices.shape
    t = torch.arange(length, dtype=torch.int32, device=indices.device).view(1, -1, 1, 1)
    bh = torch.arange(batch * heads, dtype=torch.int32, device=indices.device).view(batch, 1, heads, 1)
    where = (bh * segments + t // segment) * chunks + indices
    where = torch.where((indices >= 0) & (indices < chunks), where, bins)
    by_head = where.transpose(1, 2).reshape(-1)
    position = torch.sort(by_head, stable=True)[1]
    return (position % (length * top_k)).to(torch.int32)
