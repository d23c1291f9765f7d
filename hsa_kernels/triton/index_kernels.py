"""Kernels that turn selected chunk ids into work lists: the union of a tile's chunks, and pairs sorted by chunk.

Pair: one (token, column) of the selection, stored as token * K + column.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def union_kernel(
    IDX,  # (B, L, H, K) int32 contiguous
    CHUNKS,  # (B * H * tiles, T * K) int32: chunk of every union entry
    SLOTS,  # (B * H * tiles, T * K, T) int8 or int16, prefilled with -1: the token's column of that entry
    COUNT,  # (B * H * tiles,) int32: entries
    length,
    chunks,
    H: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,  # K rounded up to a power of two
    T: tl.constexpr,
):
    """The sorted union of the chunks of T neighbouring tokens. A chunk that one token lists twice gets two entries."""
    tiles = tl.cdiv(length, T)
    pid = tl.program_id(0).to(tl.int64)
    bh = pid // tiles
    tile = pid % tiles
    b = bh // H
    h = bh % H
    i = tl.arange(0, T * KP)
    token = i // KP
    column = i % KP
    t = tile * T + token
    row = IDX + ((b * length + t) * H + h) * K
    inside = (t < length) & (column < K)
    chunk = tl.load(row + column, mask=inside, other=-1)
    occurrence = tl.zeros([T * KP], dtype=tl.int32)
    for other in range(0, K - 1):
        same = tl.load(row + other, mask=inside, other=-2) == chunk
        occurrence += (same & (other < column)).to(tl.int32)
    valid = inside & (chunk >= 0) & (chunk < chunks)
    none: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    key = ((chunk.to(tl.int64) * KP + occurrence) * T + token) * KP + column
    key = tl.sort(tl.where(valid, key, none))
    group = key // (T * KP)
    before = tl.gather(group, tl.maximum(i - 1, 0), 0)
    real = key != none
    first = real & ((i == 0) | (group != before))
    entry = tl.cumsum(first.to(tl.int32), 0) - 1
    base = pid * (T * K) + entry
    tl.store(CHUNKS + base, (group // KP).to(tl.int32), mask=first)
    slot = (key % KP).to(SLOTS.dtype.element_ty)
    tl.store(SLOTS + base * T + (key // KP) % T, slot, mask=real)
    tl.store(COUNT + pid, tl.sum(first.to(tl.int32), 0))


@triton.jit
def _bins(IDX, i, total, length, chunks, segment, segments, H: tl.constexpr, K: tl.constexpr):
    """Bin ((b * H + h) * segments + t // segment) * chunks + chunk of flat pairs i, whether valid, and the pair."""
    chunk = tl.load(IDX + i, mask=i < total, other=-1)
    column = i % K
    h = (i // K) % H
    t = (i // (K * H)) % length
    b = i // (K * H) // length
    where = ((b * H + h) * segments + t // segment) * chunks + chunk
    return where, (chunk >= 0) & (chunk < chunks), (t * K + column).to(tl.int32)


@triton.jit
def count_kernel(
    IDX, COUNT, total, length, chunks, segment, segments, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    """Histogram of pairs over bins."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    where, valid, _ = _bins(IDX, i, total, length, chunks, segment, segments, H, K)
    tl.atomic_add(COUNT + where, 1, mask=valid, sem="relaxed")


@triton.jit
def fill_kernel(
    IDX, CURSOR, ORDER, total, length, chunks, segment, segments, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    """Pairs grouped by bin, in any order within one. CURSOR starts as every bin's first position."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    where, valid, pair = _bins(IDX, i, total, length, chunks, segment, segments, H, K)
    position = tl.atomic_add(CURSOR + where, 1, mask=valid, sem="relaxed")
    tl.store(ORDER + position, pair, mask=valid)


@triton.jit
def items_kernel(START, ITEM_START, ITEM_BIN, ITEM_FIRST, bins, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Work items: a bin's pairs in parts of at most PART, so that no hot chunk makes one program long."""
    bin_id = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = bin_id < bins
    start = tl.load(START + bin_id, mask=inside, other=0)
    item = tl.load(ITEM_START + bin_id, mask=inside, other=0)
    parts = tl.load(ITEM_START + bin_id + 1, mask=inside, other=0) - item
    for part in range(0, tl.max(parts, 0)):
        tl.store(ITEM_BIN + item + part, bin_id, mask=inside & (part < parts))
        tl.store(ITEM_FIRST + item + part, start + part * PART, mask=inside & (part < parts))
