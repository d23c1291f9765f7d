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
    every bin; item_bin and item_first have room for max_items, the true number is item_start[-1]. All five are parts of
    one int32 buffer, whose size depends on shapes only: forward can hand it to backward.
    """

    segments: int
    part: int
    max_items: int
    buffer: Tensor
    order: Tensor
    start: Tensor
    item_start: Tensor
    item_bin: Tensor
    item_first: Tensor


def _pair_sizes(shape: torch.Size, chunks: int, segment: int, part: int) -> tuple[int, list[int]]:
    batch, length, heads, top_k = shape
    bins = batch * heads * (-(-length // segment)) * chunks
    total = batch * length * heads * top_k
    items = min(bins, total) + total // part
    # Offsets stay multiples of 4 elements (16 bytes), which wide loads want.
    return items, [-(-n // 4) * 4 for n in (total, bins + 1, bins + 1, items, items)]


def pair_buffer_size(shape: torch.Size, chunks: int, *, segment: int, part: int) -> int:
    """Elements of the buffer of `build_pairs` for indices of this shape (B, L, H, K)."""
    return sum(_pair_sizes(shape, chunks, segment, part)[1])


def pairs_from(buffer: Tensor, shape: torch.Size, chunks: int, *, segment: int, part: int) -> Pairs:
    """The lists in a buffer that `build_pairs` filled with the same arguments."""
    batch, length, heads, top_k = shape
    segments = -(-length // segment)
    bins, total = batch * heads * segments * chunks, batch * length * heads * top_k
    items, sizes = _pair_sizes(shape, chunks, segment, part)
    parts = buffer.split(sizes)
    lengths = (total, bins + 1, bins + 1, items, items)
    return Pairs(segments, part, items, buffer, *(x[:n] for x, n in zip(parts, lengths, strict=True)))


def build_union(indices: Tensor, chunks: int, tile: int) -> Union:
    """indices (B, L, H, K) int32 contiguous, ids outside 0..chunks-1 ignored; tile: tokens."""
    batch, length, heads, top_k = indices.shape
    tiles = batch * heads * triton.cdiv(length, tile)
    padded, wide = triton.next_power_of_2(top_k), triton.next_power_of_2(tile)
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
        TP=wide,
        SHORT=(chunks + 1) * wide * padded < 2**31,
        num_warps=min(8, max(1, wide * padded // 128)),
    )
    return out


def build_pairs(indices: Tensor, chunks: int, *, segment: int, part: int, stable: bool) -> Pairs:
    """indices (B, L, H, K) int32 contiguous. stable: pairs inside a bin in ascending order, so equal in every run."""
    batch, length, heads, top_k = indices.shape
    if length * top_k >= 2**31:
        raise ValueError(f"{length} tokens x {top_k} chunks do not fit 32-bit pair numbers: split the queries")
    device = indices.device
    sizes = {"segment": segment, "part": part}
    buffer = torch.empty(pair_buffer_size(indices.shape, chunks, **sizes), dtype=torch.int32, device=device)
    pairs = pairs_from(buffer, indices.shape, chunks, **sizes)
    bins = pairs.start.numel() - 1
    counts = torch.zeros(bins, dtype=torch.int32, device=device)
    rank = torch.empty_like(indices)
    width = triton.next_power_of_2(heads * top_k)
    rows = max(1, 2048 // width)
    shape = (length, chunks, segment, pairs.segments)
    tile = {"H": heads, "K": top_k, "HKP": width, "ROWS": rows, "num_warps": 8}
    grid = (triton.cdiv(length, rows), batch)
    index_kernels.count_kernel[grid](indices, counts, rank, *shape, **tile)
    _starts(counts, pairs.start)
    if stable:
        pairs.order.copy_(_stable_order(indices, chunks, segment, pairs.segments, bins))
    else:
        index_kernels.fill_kernel[grid](indices, pairs.start, rank, pairs.order, *shape, **tile)
    _starts((counts + (part - 1)) // part, pairs.item_start)
    index_kernels.items_kernel[(triton.cdiv(bins, 256),)](
        pairs.start, pairs.item_start, pairs.item_bin, pairs.item_first, bins, PART=part, BLOCK=256
    )
    return pairs


def _starts(counts: Tensor, out: Tensor) -> None:
    """(n,) counts -> (n + 1,) int32 first positions."""
    out[:1].zero_()
    torch.cumsum(counts, 0, dtype=torch.int32, out=out[1:])


def _stable_order(indices: Tensor, chunks: int, segment: int, segments: int, bins: int) -> Tensor:
    """Pair numbers sorted by bin, ties in ascending order; pairs without a chunk come last."""
    batch, length, heads, top_k = indices.shape
    t = torch.arange(length, dtype=torch.int32, device=indices.device).view(1, -1, 1, 1)
    bh = torch.arange(batch * heads, dtype=torch.int32, device=indices.device).view(batch, 1, heads, 1)
    where = (bh * segments + t // segment) * chunks + indices
    where = torch.where((indices >= 0) & (indices < chunks), where, bins)
    by_head = where.transpose(1, 2).reshape(-1)
    if bins < 2**15:  # half the passes of the radix sort
        by_head = by_head.to(torch.int16)
    position = torch.sort(by_head, stable=True)[1]
    return (position % (length * top_k)).to(torch.int32)
