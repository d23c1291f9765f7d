"""Kernels that turn selected chunk ids into work lists: the union of a tile's chunks, and pairs sorted by chunk.

Pair: one (token, column) of the selection, stored as token * K + column.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _write_union(
    key, none, CHUNKS, SLOTS, COUNT, pid, K: tl.constexpr, KP: tl.constexpr, T: tl.constexpr, TP: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Entries of sorted keys (chunk * SPAN + ...) * TP * KP + token * KP + column: one for every key // (TP * KP)."""
    i = tl.arange(0, TP * KP)
    group = key // (TP * KP)
    real = key != none
    first = real & ((i == 0) | (group != tl.gather(group, tl.maximum(i - 1, 0), 0)))
    entry = tl.cumsum(first.to(tl.int32), 0) - 1
    base = pid * (T * K) + entry
    tl.store(CHUNKS + base, (group // SPAN).to(tl.int32), mask=first)
    slot = (key % KP).to(SLOTS.dtype.element_ty)
    tl.store(SLOTS + base * T + ((key // KP) % TP).to(tl.int32), slot, mask=real)
    tl.store(COUNT + pid, tl.sum(first.to(tl.int32), 0))


@triton.jit(do_not_specialize=["length", "chunks"])
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
    TP: tl.constexpr,  # T rounded up to a power of two
    SHORT: tl.constexpr,  # chunks * TP * KP < 2**31: keys of 32 bits
):
    """The sorted union of the chunks of T neighbouring tokens. A chunk that one token lists twice gets two entries."""
    tiles = tl.cdiv(length, T)
    pid = tl.program_id(0).to(tl.int64)
    bh = pid // tiles
    tile = pid % tiles
    b = bh // H
    h = bh % H
    i = tl.arange(0, TP * KP)
    token = i // KP
    column = i % KP
    t = tile * T + token
    row = IDX + ((b * length + t) * H + h) * K
    inside = (token < T) & (t < length) & (column < K)
    chunk = tl.load(row + column, mask=inside, other=-1)
    valid = inside & (chunk >= 0) & (chunk < chunks)
    none: tl.constexpr = 0x7FFFFFFF if SHORT else 0x7FFFFFFFFFFFFFFF
    wide = chunk if SHORT else chunk.to(tl.int64)
    key = tl.sort(tl.where(valid, (wide * TP + token) * KP + column, none))
    before = tl.gather(key, tl.maximum(i - 1, 0), 0)
    twice = (key != none) & (i > 0) & (key // KP == before // KP)
    if tl.max(twice.to(tl.int32), 0) == 0:
        _write_union(key, none, CHUNKS, SLOTS, COUNT, pid, K, KP, T, TP, 1)
    else:
        occurrence = tl.zeros([TP * KP], dtype=tl.int32)
        for other in range(0, K - 1):
            same = tl.load(row + other, mask=inside, other=-2) == chunk
            occurrence += (same & (other < column)).to(tl.int32)
        largest: tl.constexpr = 0x7FFFFFFFFFFFFFFF
        numbered = ((chunk.to(tl.int64) * KP + occurrence) * TP + token) * KP + column
        numbered = tl.sort(tl.where(valid, numbered, largest))
        _write_union(numbered, largest, CHUNKS, SLOTS, COUNT, pid, K, KP, T, TP, KP)


@triton.jit
def _bins(
    IDX, length, chunks, segment, segments,
    H: tl.constexpr, K: tl.constexpr, HKP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS tokens x H * K pairs: offset in IDX, bin ((b * H + h) * segments + t // segment) * chunks + chunk,
    validity and the pair's number."""
    b = tl.program_id(1)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, HKP)
    at = (b.to(tl.int64) * length + t)[:, None] * (H * K) + c[None, :]
    chunk = tl.load(IDX + at, mask=(t < length)[:, None] & (c < H * K)[None, :], other=-1)
    bin_id = ((b * H + c // K) * segments)[None, :] + (t // segment)[:, None]
    pair = t[:, None] * K + (c % K)[None, :]
    return at, bin_id * chunks + chunk, (chunk >= 0) & (chunk < chunks), pair


@triton.jit(do_not_specialize=["length", "chunks", "segment", "segments"])
def count_kernel(
    IDX,
    COUNT,  # (bins,) int32, zeroed
    RANK,  # like IDX: how many pairs of the same bin came before
    length, chunks, segment, segments,
    H: tl.constexpr, K: tl.constexpr, HKP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Histogram of pairs over bins; a pair's place in its bin is the count that it found."""
    at, where, valid, _ = _bins(IDX, length, chunks, segment, segments, H, K, HKP, ROWS)
    rank = tl.atomic_add(COUNT + where, 1, mask=valid, sem="relaxed")
    tl.store(RANK + at, rank, mask=valid)


@triton.jit(do_not_specialize=["length", "chunks", "segment", "segments"])
def fill_kernel(
    IDX, START, RANK, ORDER, length, chunks, segment, segments,
    H: tl.constexpr, K: tl.constexpr, HKP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Pairs grouped by bin, in any order within one."""
    at, where, valid, pair = _bins(IDX, length, chunks, segment, segments, H, K, HKP, ROWS)
    position = tl.load(START + where, mask=valid, other=0) + tl.load(RANK + at, mask=valid, other=0)
    tl.store(ORDER + position, pair, mask=valid)


@triton.jit(do_not_specialize=["bins"])
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
