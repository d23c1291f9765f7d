"""Union order for Hopper GPUs: groups of tokens share one stream of chunks.

A program holds G warp groups of 64 rows (T tokens x R query heads) and one warp that fetches the sorted union of all
their chunks into a ring of buffers with the copy engine. A group computes the entries that one of its own tokens chose
and passes over the others, so products cost what a union of T tokens costs and reads of keys and values what one of
G * T tokens costs. Same results as `union_attention_kernel`, bits included in every run: nothing is added atomically.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _fetch(args, S: gl.constexpr, STAGES: gl.constexpr):
    """The copying warp: keys and values of every entry of the union, as buffers come free."""
    k_desc, v_desc, chunks_at, count, row, column, k_ring, v_ring, full, empty = args
    following = gl.load(chunks_at)
    for entry in range(0, count):
        chunk = following
        following = gl.load(chunks_at + gl.minimum(entry + 1, count - 1))
        stage = entry % STAGES
        mbarrier.wait(empty.index(stage), ((entry // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), 2 * k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [row + chunk * S, column], full.index(stage), k_ring.index(stage))
        tma.async_copy_global_to_shared(v_desc, [row + chunk * S, column], full.index(stage), v_ring.index(stage))


@gluon.jit
def _weight(w_at, word, shift, stride_wk, BITS: gl.constexpr):
    """Weight of every row for one union entry, 0 where the row's token did not choose it."""
    none: gl.constexpr = (1 << BITS) - 1
    slot = ((word >> shift) & none).to(gl.int32)
    return gl.load(w_at + slot * stride_wk, mask=slot != none, other=0.0).to(gl.float32)


@gluon.jit
def _attend(
    args,
    GROUP: gl.constexpr, G: gl.constexpr, R: gl.constexpr, T: gl.constexpr, S: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, BITS: gl.constexpr, BACKWARD: gl.constexpr, Q_IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One warp group: its T tokens' share of every entry; o or dq stays in registers."""
    tensors, strides, place, rings, scale = args
    q_at, g_at, o_at, w_at, d_at, words_at = tensors
    stride_ql, stride_qh, stride_gl, stride_gh, stride_ol, stride_oh = strides[:6]
    stride_wl, stride_wk, stride_dl, stride_dk = strides[6:]
    count, length, first, head = place
    first = first + GROUP * T
    k_ring, v_ring, full, empty, q_tile, do_tile = rings
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    r = gl.arange(0, T * R, layout=gl.SliceLayout(1, wide))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    t = first + r // R
    inside = (t < length)[:, None] & (d >= 0)[None, :]
    t = t.to(gl.int64)
    at = t[:, None] * stride_ql + (head + r % R)[:, None] * stride_qh + d[None, :]
    q = gl.load(q_at + at, mask=inside, other=0.0)
    if Q_IN_REGISTERS:
        q_side = gl.convert_layout(q, gl.DotOperandLayout(0, scores, 2))
    else:
        q_tile.index(GROUP).store(q)
        q_side = q_tile.index(GROUP)
    if BACKWARD:
        at = t[:, None] * stride_gl + (head + r % R)[:, None] * stride_gh + d[None, :]
        do_tile.index(GROUP).store(gl.load(g_at + at, mask=inside, other=0.0))
    fence_async_shared()
    gl.thread_barrier()

    row = gl.arange(0, T * R, layout=gl.SliceLayout(1, scores))
    row_t = first + row // R
    shift = ((row // R) * BITS).to(words_at.dtype.element_ty)
    w_at = w_at + row_t.to(gl.int64) * stride_wl
    to_log2 = scale * 1.4426950408889634
    acc = gl.zeros([T * R, D], gl.float32, layout=sums)
    words_at = words_at + GROUP
    last = count - 1
    # Slots are fetched two entries ahead and weights one: no load waits for another.
    word = gl.load(words_at)
    if count == 0:
        word = word | -1
    ahead = gl.load(words_at + gl.minimum(1, gl.maximum(last, 0)) * G)
    weight = _weight(w_at, word, shift, stride_wk, BITS)
    for entry in range(0, count):
        stage = entry % STAGES
        further = gl.load(words_at + gl.minimum(entry + 2, last) * G)
        next_weight = _weight(w_at, ahead, shift, stride_wk, BITS)
        # Also for entries that are passed over: a group may not free a buffer before it was filled.
        mbarrier.wait(full.index(stage), (entry // STAGES) & 1)
        if word != -1:
            k = k_ring.index(stage)
            v = v_ring.index(stage)
            zero = gl.zeros([T * R, S], gl.float32, layout=scores)
            s = warpgroup_mma(q_side, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            if BACKWARD:
                dp = warpgroup_mma(do_tile.index(GROUP), v.permute((1, 0)), zero, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
            else:
                s = warpgroup_mma_wait(0, deps=[s])
            s = s * to_log2
            p = gl.exp2(s - gl.max(s, 1)[:, None])
            total = gl.sum(p, 1)
            if BACKWARD:
                dp = warpgroup_mma_wait(0, deps=[dp])
                delta = gl.sum(p * dp, 1) / total
                flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
                dw = gl.convert_layout(gl.sum(gl.reshape(delta, (T, R)), 1), flat)
                token = gl.arange(0, T, layout=flat)
                slot = (word >> (token * BITS).to(words_at.dtype.element_ty)) & ((1 << BITS) - 1)
                slot = slot.to(gl.int32)
                dw_at = d_at + (first + token).to(gl.int64) * stride_dl + slot * stride_dk
                gl.store(dw_at, dw.to(d_at.dtype.element_ty), mask=slot != ((1 << BITS) - 1))
                ds = p * ((dp - delta[:, None]) * (weight / total)[:, None])
                left = gl.convert_layout(ds.to(q_at.dtype.element_ty), gl.DotOperandLayout(0, sums, 2))
                acc = warpgroup_mma(left, k, acc, is_async=True)
            else:
                pw = p * (weight / total)[:, None]
                left = gl.convert_layout(pw.to(q_at.dtype.element_ty), gl.DotOperandLayout(0, sums, 2))
                acc = warpgroup_mma(left, v, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(stage), count=1)
        word = ahead
        ahead = further
        weight = next_weight
    if BACKWARD:
        acc = acc * scale
    r = gl.arange(0, T * R, layout=gl.SliceLayout(1, sums))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, sums))
    t = first + r // R
    inside = (t < length)[:, None] & (d >= 0)[None, :]
    at = t.to(gl.int64)[:, None] * stride_ol + (head + r % R)[:, None] * stride_oh + d[None, :]
    gl.store(o_at + at, acc.to(o_at.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["length", "keys"])
def stream_attention_kernel(
    Q, k_desc, v_desc, W, DO,
    OUT,  # o forward, dq backward; like Q
    DW,
    CHUNKS, WORDS, COUNT,
    scale, length, keys,
    stride_qb, stride_ql, stride_qh,
    stride_wb, stride_wl, stride_wh, stride_wk,
    stride_gb, stride_gl, stride_gh,  # DO
    stride_ob, stride_ol, stride_oh,
    stride_db, stride_dl, stride_dh, stride_dk,  # DW
    HEADS: gl.constexpr,  # key/value heads
    R: gl.constexpr, T: gl.constexpr, G: gl.constexpr, TOPK: gl.constexpr, S: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, BITS: gl.constexpr, BACKWARD: gl.constexpr, Q_IN_REGISTERS: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """k_desc, v_desc: (B * keys, Hkv * D) in blocks of (S, D). WORDS: the T slots of a group in one integer."""
    tiles = gl.cdiv(length, G * T)
    # The last tokens see most chunks: they go first.
    pid = gl.num_programs(0) - 1 - gl.program_id(0)
    pid = pid.to(gl.int64)
    bh = (pid // tiles).to(gl.int32)
    b = bh // HEADS
    h = bh % HEADS
    first = (pid % tiles).to(gl.int32) * (G * T)
    count = gl.load(COUNT + pid)
    chunks_at = CHUNKS + pid * (G * T * TOPK)
    words_at = WORDS + pid * (G * T * TOPK) * G
    b64 = b.to(gl.int64)
    q_at = Q + b64 * stride_qb
    g_at = DO + b64 * stride_gb
    o_at = OUT + b64 * stride_ob
    w_at = W + b64 * stride_wb + h * stride_wh
    d_at = DW + b64 * stride_db + h * stride_dh
    dtype: gl.constexpr = Q.dtype.element_ty
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, S, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, S, D], v_desc.layout)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([T * R, D], dtype)
    tiles_q: gl.constexpr = 1 if Q_IN_REGISTERS else G
    tiles_do: gl.constexpr = G if BACKWARD else 1
    rows_q: gl.constexpr = 8 if Q_IN_REGISTERS else T * R
    rows_do: gl.constexpr = T * R if BACKWARD else 8
    q_tile = gl.allocate_shared_memory(dtype, [tiles_q, rows_q, D], q_layout)
    do_tile = gl.allocate_shared_memory(dtype, [tiles_do, rows_do, D], q_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=G)
    fence_async_shared()
    tensors = (q_at, g_at, o_at, w_at, d_at, words_at)
    strides = (
        stride_ql, stride_qh, stride_gl, stride_gh, stride_ol, stride_oh, stride_wl, stride_wk, stride_dl, stride_dk
    )  # fmt: skip
    place = (count, length, first, h * R)
    rings = (k_ring, v_ring, full, empty, q_tile, do_tile)
    fetch = (k_desc, v_desc, chunks_at, count, b * keys, h * D, k_ring, v_ring, full, empty)
    args = (tensors, strides, place, rings, scale)
    if G == 2:
        gl.warp_specialize(
            [
                (_attend, (args, 0, G, R, T, S, D, STAGES, BITS, BACKWARD, Q_IN_REGISTERS)),
                (_attend, (args, 1, G, R, T, S, D, STAGES, BITS, BACKWARD, Q_IN_REGISTERS)),
                (_fetch, (fetch, S, STAGES)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (args, 0, G, R, T, S, D, STAGES, BITS, BACKWARD, Q_IN_REGISTERS)),
                (_attend, (args, 1, G, R, T, S, D, STAGES, BITS, BACKWARD, Q_IN_REGISTERS)),
                (_attend, (args, 2, G, R, T, S, D, STAGES, BITS, BACKWARD, Q_IN_REGISTERS)),
                (_fetch, (fetch, S, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
