"""Host side of the attention kernels: choice of loop order, memory of the passes, launches."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from hsa_kernels.index import Pairs, Union, build_pairs, build_union, pair_buffer_size, pairs_from
from hsa_kernels.triton import attention_kernels as kernels
from hsa_kernels.triton import hopper, interpreter
from hsa_kernels.triton.overlap import OverlapMonitor

# Union order needs enough query heads per key/value head, and neighbours that share chunks: above this many entries in
# the union of 64 rows per chosen chunk the chunk order is faster (measurements in docs/kernels.md).
_UNION_RATIO = 8
_UNION_OVERLAP = 2.6
# The same for dq in union order; dk and dv take the chunk order always.
_TWO_PASS_OVERLAP = 1.75
# In chunk order the overlap is measured once in so many calls.
_MEASURE_EVERY = 64
_monitors: defaultdict[tuple[object, ...], OverlapMonitor] = defaultdict(OverlapMonitor)
# Working set of a segment of queries in the L2 cache: q, do in bfloat16 and dq in fp32, 8 bytes an element. With few
# query heads a smaller one is faster: the gathered rows are short.
_SEGMENT_BYTES = 32 << 20
_SEGMENT_BYTES_FEW_HEADS = 16 << 20
# Rows of one work item at most.
_PART_ROWS = 8192
# fp32 sums of o or dq that one pass over the queries may hold.
_PASS_BYTES = 1 << 30


@dataclass(frozen=True)
class Tiling:
    """Launch parameters of one kernel: rows of a tile (tokens x query heads), warps, pipeline stages."""

    rows: int
    warps: int
    stages: int


def union_tile(ratio: int) -> int:
    """Tokens of a union tile: 64 rows for the matrix units, at most 16 tokens (the union grows faster than it pays)."""
    return max(1, min(16, 64 // ratio))


def supports(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, indices: Tensor, chunk_size: int) -> str | None:
    """None when the kernels take this case, else the reason why not."""
    dim, ratio = q.shape[-1], q.shape[2] // k.shape[2]
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype} of q, k, v (bfloat16, float16 or float32, all the same)"
    if weights.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"weights of {weights.dtype} (bfloat16, float16 or float32)"
    if q.dtype == torch.bfloat16 and interpreter.enabled():
        return "bfloat16 under Triton's interpreter"
    if dim not in (16, 32, 64, 128):
        return f"head size {dim} (16, 32, 64 or 128)"
    if chunk_size not in (16, 32, 64, 128):
        return f"chunk size {chunk_size} (16, 32, 64 or 128)"
    if ratio not in (1, 2, 4, 8, 16, 32):
        return f"{ratio} query heads per key/value head (1, 2, 4, 8, 16 or 32)"
    if not 1 <= indices.shape[-1] <= 1024:
        return f"{indices.shape[-1]} chunks per token (1 to 1024)"
    if q.dtype == torch.float32 and chunk_size * dim > 8192:
        return f"float32 chunks of {chunk_size} x {dim} (the tiles exceed the shared memory)"
    if q.numel() == 0 or k.numel() == 0:
        return "empty input"
    return None


def precision(dtype: torch.dtype) -> str:
    """fp32 products from three TF32 ones: relative error 1e-6 on the matrix units."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _union_tiling(q: Tensor, chunk_size: int, backward: bool) -> Tiling:
    if q.dtype == torch.float32:
        return Tiling(64, 4, 1)
    # Chunk ids are loads in front of loads: only from 5 stages on are keys and values fetched a whole entry ahead,
    # in three buffers. Two programs per multiprocessor still fit in forward, not in backward.
    return Tiling(64, 4, 5 if not backward and chunk_size * q.shape[-1] <= 8192 else 2)


def _chunk_tiling(q: Tensor, chunk_size: int, backward: bool, with_dq: bool) -> Tiling:
    if q.dtype == torch.float32:
        return Tiling(32, 4, 1)
    if chunk_size > 64:
        return Tiling(64, 8, 1)
    # Two small programs per multiprocessor hide each other's waits better than one large or deeply pipelined one;
    # without dq there is shared memory left for a second stage.
    return Tiling(64, 4, 2 if backward and not with_dq else 1)


def forward_union(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    idx: Tensor,
    chunk_size: int,
    scale: float,
    monitor: OverlapMonitor | None = None,
) -> Tensor:
    """o by union tiles: no atomics, no buffer but the union lists. The monitor is told the size of the unions."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    union = _launch_union(q, k, v, w, idx, q, out, w, chunk_size, scale, backward=False)
    if monitor is not None:
        monitor.record(union.count, idx.shape[3], union.tile)
    return out


def _launch_union(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    idx: Tensor,
    grad: Tensor,
    out: Tensor,
    dw: Tensor,
    chunk_size: int,
    scale: float,
    *,
    backward: bool,
) -> Union:
    """Fills out (o or dq) and dw; returns the union lists."""
    batch, length, heads_q, dim = q.shape
    heads = k.shape[2]
    ratio = heads_q // heads
    chunks, tile = k.shape[1] // chunk_size, union_tile(ratio)
    if hopper.supports(q, k, idx.shape[3], chunk_size):
        streaming = hopper.union_tiling(ratio, idx.shape[3], backward)
        union = build_union(idx, chunks, tile * streaming.groups)
        hopper.launch(q, k, v, w, grad, out, dw, union, chunk_size, scale, backward=backward, tiling=streaming)
        return union
    union = build_union(idx, chunks, tile)
    tiling = _union_tiling(q, chunk_size, backward)
    kernels.union_attention_kernel[(union.count.numel(),)](
        q, k, v, w, grad, out, dw, union.chunks, union.slots, union.count, scale, length,
        *q.stride(), *k.stride(), *v.stride(), *w.stride(), *grad.stride(), *out.stride(), *dw.stride(),
        HEADS=heads, R=ratio, T=union.tile, TOPK=idx.shape[3], S=chunk_size, D=dim, BACKWARD=backward,
        PRECISION=precision(q.dtype), num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return union


@dataclass(frozen=True)
class Bins:
    """How pairs are grouped: queries of a segment, pairs of a work item at most."""

    segment: int
    part: int


def _segment(ratio: int, dim: int, chunks: int, top_k: int) -> int:
    """Queries of a segment: one working set of the L2 cache, more for long inputs, so that bins hold whole tiles.

    Heads follow each other, so the rows of one key/value head make the working set.
    """
    size = _SEGMENT_BYTES if ratio >= _UNION_RATIO else _SEGMENT_BYTES_FEW_HEADS
    return max(size // (ratio * dim * 8), chunks * 16 // top_k)


def _segment_without_dq(ratio: int, dim: int, chunks: int, top_k: int, length: int) -> int:
    """The same for dk and dv alone: 4 bytes an element, and 128 pairs in a bin.

    Where that takes more than twice the working set there are no segments: reading q and do from memory again costs
    less than adding dk and dv to memory often (1M tokens: 188 ms against 242 with segments of 8192).
    """
    cached = _SEGMENT_BYTES // (ratio * dim * 4)
    wanted = chunks * 128 // top_k
    return max(cached, wanted) if wanted <= 2 * cached else length


def _shared_bins(q: Tensor, heads: int, idx_shape: torch.Size, chunks: int) -> Bins | None:
    """Bins that forward and backward have in common: head ratios that always take the chunk order, in one pass."""
    ratio = q.shape[2] // heads
    if ratio >= _UNION_RATIO or q.dtype == torch.float32 or len(_query_passes(q)) > 1:
        return None
    return Bins(_segment(ratio, q.shape[3], chunks, idx_shape[3]), max(1, _PART_ROWS // ratio))


def lists_size(q: Tensor, k: Tensor, idx: Tensor, chunk_size: int) -> int:
    """int32 elements of the lists that forward hands to backward, from shapes only; 0 where it hands none."""
    chunks = k.shape[1] // chunk_size
    bins = _shared_bins(q, k.shape[2], idx.shape, chunks)
    if bins is None or torch.are_deterministic_algorithms_enabled():
        return 0
    return pair_buffer_size(idx.shape, chunks, segment=bins.segment, part=bins.part)


def _launch_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    pairs: Pairs,
    grad: Tensor,
    out: Tensor,
    dw: Tensor,
    dk: Tensor | None,
    dv: Tensor | None,
    chunk_size: int,
    scale: float,
    *,
    with_dq: bool,
    parts: bool,
) -> None:
    """One pass over the queries of q. dk, dv: fp32 sums to add to, or with parts the results themselves."""
    batch, length, heads_q, dim = q.shape
    heads = k.shape[2]
    ratio, chunks, top_k = heads_q // heads, k.shape[1] // chunk_size, w.shape[3]
    backward = dk is not None
    # With dq and many query heads the Triton kernel is as fast.
    gather = not parts and not (with_dq and ratio >= _UNION_RATIO) and hopper.supports_gather(q, k, chunk_size)
    if dk is not None and dv is not None and gather:
        hopper.launch_gather(q, k, v, w, pairs, grad, out, dw, dk, dv, chunk_size, scale, with_dq=with_dq)
        return
    tiling = _chunk_tiling(q, chunk_size, backward, with_dq)
    tile = max(1, tiling.rows // ratio)
    if parts:
        dk_to, dv_to = (
            torch.empty(pairs.max_items, chunk_size, dim, dtype=torch.float32, device=q.device) for _ in "kv"
        )
    else:
        dk_to, dv_to = (dk, dv) if dk is not None and dv is not None else (out, out)
    kernels.chunk_attention_kernel[(pairs.max_items,)](
        q, k, v, w, grad, out, dw, dk_to, dv_to,
        pairs.order, pairs.start, pairs.item_bin, pairs.item_first, pairs.item_start[-1:],
        scale, length, chunks, pairs.segments,
        *q.stride(), *k.stride(), *v.stride(), *w.stride(), *grad.stride(), *dw.stride(),
        HEADS=heads, R=ratio, T=tile, TOPK=top_k, S=chunk_size, D=dim, PART=pairs.part, BACKWARD=backward,
        WITH_DQ=with_dq, PARTS=parts, PRECISION=precision(q.dtype),
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    if parts and dk is not None and dv is not None:
        for source, target in ((dk_to, dk), (dv_to, dv)):
            kernels.sum_parts_kernel[(chunks, batch * heads)](
                source, target, pairs.item_start, chunks, *target.stride(), HEADS=heads, S=chunk_size, D=dim
            )


def _query_passes(q: Tensor) -> list[slice]:
    """Ranges of queries whose fp32 sums of o or dq may be held at a time."""
    batch, length, heads, dim = q.shape
    step = max(2048, _PASS_BYTES // (batch * heads * dim * 4) // 2048 * 2048)
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]


def forward_chunks(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, idx: Tensor, chunk_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """o by chunks: full matrix tiles at any head ratio, sums in fp32 by atomic adds (not bit-equal between runs).

    Also returns the pair lists for backward, (0,) int32 where it has others.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    ratio, chunks = q.shape[2] // k.shape[2], k.shape[1] // chunk_size
    bins = Bins(_segment(ratio, q.shape[3], chunks, idx.shape[3]), max(1, _PART_ROWS // ratio))
    keep = lists_size(q, k, idx, chunk_size) > 0
    lists = idx.new_empty(0)
    for part in _query_passes(q):
        ids = idx[:, part].contiguous()
        pairs = build_pairs(ids, chunks, segment=bins.segment, part=bins.part, stable=False)
        total = torch.zeros(q[:, part].shape, dtype=torch.float32, device=q.device)
        _launch_chunks(
            q[:, part], k, v, w[:, part], pairs, q[:, part], total, w[:, part], None, None, chunk_size, scale,
            with_dq=False, parts=False,
        )  # fmt: skip
        out[:, part] = total
        if keep:
            lists = pairs.buffer
    return out, lists


def forget_overlap() -> None:
    """Forget all measured overlaps: the next call of every shape starts in union order."""
    _monitors.clear()


def forward(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, idx: Tensor, chunk_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """o by the loop order that suits the head ratio and the overlap of selections (rule in docs/kernels.md), and the
    work lists that backward can use again: int32, `lists_size` elements."""
    args = (q, k, v, w, idx, chunk_size, scale)
    ratio, top_k = q.shape[2] // k.shape[2], idx.shape[3]
    none = idx.new_empty(0)
    if torch.are_deterministic_algorithms_enabled():
        return forward_union(*args), none
    if ratio < _UNION_RATIO:
        return forward_chunks(*args)
    monitor = _monitors[(q.device, ratio, top_k, idx.shape[1])]
    overlap = monitor.overlap(union_tile(ratio))
    if overlap is None or overlap <= _UNION_OVERLAP:
        return forward_union(*args, monitor=monitor), none
    if monitor.wants_measurement(_MEASURE_EVERY):
        tile = union_tile(ratio)
        monitor.record(build_union(idx, k.shape[1] // chunk_size, tile).count, top_k, tile)
    return forward_chunks(*args)[0], none


def backward(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, idx: Tensor, grad: Tensor, lists: Tensor, chunk_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dw by the loop order that suits the head ratio and the overlap of selections."""
    args = (q, k, v, w, idx, grad, chunk_size, scale)
    if torch.are_deterministic_algorithms_enabled():
        return backward_form(*args, one_pass=False, deterministic=True)
    if q.dtype == torch.float32:  # tiles of one pass do not fit the shared memory
        return backward_form(*args, one_pass=False, deterministic=False)
    ratio = q.shape[2] // k.shape[2]
    if ratio < _UNION_RATIO:
        return backward_form(*args, one_pass=True, deterministic=False, lists=lists)
    overlap = _monitors[(q.device, ratio, idx.shape[3], idx.shape[1])].overlap(union_tile(ratio))
    one_pass = overlap is None or overlap > _TWO_PASS_OVERLAP
    return backward_form(*args, one_pass=one_pass, deterministic=False)


def backward_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    idx: Tensor,
    grad: Tensor,
    chunk_size: int,
    scale: float,
    *,
    one_pass: bool,
    deterministic: bool,
    lists: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dw.

    one_pass: everything in chunk order, dq by atomic adds; lists: those of forward. Otherwise dq and dw in union order,
    dk and dv in chunk order. deterministic takes the second form, with dk and dv summed in a fixed order.
    """
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Columns of -1 are never visited.
    dw = torch.zeros_like(w, memory_format=torch.contiguous_format)
    args = (chunk_size, scale)
    batch, keys, heads, dim = k.shape
    chunks, length = keys // chunk_size, q.shape[1]
    ratio, top_k = q.shape[2] // heads, idx.shape[3]
    part = max(1, _PART_ROWS // ratio)
    if not one_pass:
        _launch_union(q, k, v, w, idx, grad, dq, dw, *args, backward=True)
    if deterministic:
        dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        pairs = build_pairs(idx, chunks, segment=length, part=part * 8, stable=True)
        _launch_chunks(q, k, v, w, pairs, grad, dq, dw, dk, dv, *args, with_dq=False, parts=True)
        return dq, dk, dv, dw
    dk32, dv32 = (torch.zeros(batch, heads, keys, dim, dtype=torch.float32, device=q.device) for _ in "kv")
    if one_pass:
        segment = _segment(ratio, dim, chunks, top_k)
        bins = _shared_bins(q, heads, idx.shape, chunks)
        for queries in _query_passes(q):
            if bins is not None and lists is not None and lists.numel() > 0:
                pairs = pairs_from(lists, idx.shape, chunks, segment=bins.segment, part=bins.part)
            else:
                pairs = build_pairs(idx[:, queries].contiguous(), chunks, segment=segment, part=part, stable=False)
            inputs = (q[:, queries], k, v, w[:, queries], pairs, grad[:, queries])
            total = torch.zeros(q[:, queries].shape, dtype=torch.float32, device=q.device)
            _launch_chunks(*inputs, total, dw[:, queries], dk32, dv32, *args, with_dq=True, parts=False)
            dq[:, queries] = total
    else:
        segment = _segment_without_dq(ratio, dim, chunks, top_k, length)
        pairs = build_pairs(idx, chunks, segment=segment, part=part, stable=False)
        _launch_chunks(q, k, v, w, pairs, grad, dq, dw, dk32, dv32, *args, with_dq=False, parts=False)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    return dq, dk.copy_(dk32.transpose(1, 2)), dv.copy_(dv32.transpose(1, 2)), dw
