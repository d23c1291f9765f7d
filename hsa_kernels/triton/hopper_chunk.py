"""Backward in chunk order for Hopper GPUs: four warps gather, two warp groups compute.

A program owns one work item: a chunk and pairs that chose it. The gathering warps fill a ring of buffers with 64 rows
of q and do each, tile after tile; the two groups take turns and add to dk and dv in registers of their own. While a
group is between its products the matrix units work for the other, and its last two products of a tile run beside the
first two of its next. Same results as `chunk_attention_kernel` up to the order of sums.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

_STEP = gl.constexpr(16)  # rows that the gathering warps address at a time: more would cost registers


@gluon.jit
def _copy_rows(ring, at, t, row, stride_l, stride_h, R: gl.constexpr, D: gl.constexpr, wide: gl.constexpr):
    d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    async_copy.async_copy_global_to_shared(
        ring, at + t[:, None] * stride_l + (row % R).to(gl.int64)[:, None] * stride_h + d[None, :]
    )


@gluon.jit
def _gather(args, R: gl.constexpr, T: gl.constexpr, TOPK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """The gathering warps. Rows past the end repeat the last pair: their weight is 0."""
    q_at, g_at, order_at, stride_ql, stride_qh, stride_gl, stride_gh, first, end, q_ring, do_ring, full, empty = args
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, wide)
    steps: gl.constexpr = T * R // _STEP
    row = gl.arange(0, _STEP, layout=rows)
    tiles = gl.cdiv(end - first, T)
    for n in range(0, tiles):
        stage = n % STAGES
        start = first + n * T
        mbarrier.wait(empty.index(stage), ((n // STAGES) & 1) ^ 1)
        for j in gl.static_range(steps):
            here = row + j * _STEP
            pair = gl.load(order_at + gl.minimum(start + here // R, end - 1))
            t = (pair // TOPK).to(gl.int64)
            _copy_rows(q_ring.index(stage).slice(j * _STEP, _STEP), q_at, t, here, stride_ql, stride_qh, R, D, wide)
            _copy_rows(do_ring.index(stage).slice(j * _STEP, _STEP), g_at, t, here, stride_gl, stride_gh, R, D, wide)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def _compute(
    args,
    GROUP: gl.constexpr, R: gl.constexpr, T: gl.constexpr, TOPK: gl.constexpr, S: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, WITH_DQ: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """One of two warp groups: every other tile."""
    pointers, strides, place, scale, rings = args
    w_at, dw_at, dq_at, dk_at, dv_at, order_at = pointers
    stride_wl, stride_wk, stride_dl, stride_dk = strides
    first, end = place
    k, v, q_ring, do_ring, turned, full, empty = rings
    rows: gl.constexpr = T * R
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dtype: gl.constexpr = k.dtype
    row = gl.arange(0, rows, layout=gl.SliceLayout(1, scores))
    to_log2 = scale * 1.4426950408889634
    zero = gl.zeros([rows, S], gl.float32, layout=scores)
    dk = warpgroup_mma_init(gl.zeros([S, D], gl.float32, layout=sums))
    dv = warpgroup_mma_init(gl.zeros([S, D], gl.float32, layout=sums))
    p_tile = turned.index(2 * GROUP)
    ds_tile = turned.index(2 * GROUP + 1)
    tiles = gl.cdiv(end - first, T)
    # Pairs are fetched two tiles ahead and weights one: no load waits for another.
    at = first + GROUP * T + row // R
    pair = gl.load(order_at + gl.minimum(at, end - 1))
    ahead = gl.load(order_at + gl.minimum(at + 2 * T, end - 1))
    w_first = w_at + (pair // TOPK).to(gl.int64) * stride_wl + (pair % TOPK) * stride_wk
    weight = gl.load(w_first, mask=at < end, other=0.0)
    for n in range(GROUP, tiles, 2):
        stage = n % STAGES
        at = first + n * T + row // R
        further = gl.load(order_at + gl.minimum(at + 4 * T, end - 1))
        next_at = w_at + (ahead // TOPK).to(gl.int64) * stride_wl + (ahead % TOPK) * stride_wk
        next_weight = gl.load(next_at, mask=at + 2 * T < end, other=0.0)
        mbarrier.wait(full.index(stage), (n // STAGES) & 1)
        fence_async_shared()
        q = q_ring.index(stage)
        do = do_ring.index(stage)
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
        # The products of the last tile are done: its buffers are free.
        dv, dk = warpgroup_mma_wait(2, deps=[dv, dk])
        if n > GROUP:
            mbarrier.arrive(empty.index((n - 2) % STAGES), count=1)
        s = warpgroup_mma_wait(1, deps=[s])
        s = s * to_log2
        p = gl.exp2(s - gl.max(s, 1)[:, None])
        total = gl.sum(p, 1)
        share = weight.to(gl.float32) / total
        p_tile.store((p * share[:, None]).to(dtype))
        dp = warpgroup_mma_wait(0, deps=[dp])
        delta = gl.sum(p * dp, 1) / total
        # In this order p * share need not stay in registers.
        ds = (p * ((dp - delta[:, None]) * share[:, None])).to(dtype)
        ds_tile.store(ds)
        fence_async_shared()
        gl.thread_barrier()
        dv = warpgroup_mma(p_tile.permute((1, 0)), do, dv, is_async=True)
        dk = warpgroup_mma(ds_tile.permute((1, 0)), q, dk, is_async=True)
        if WITH_DQ:
            # Half of the columns at a time: the sums of dk and dv leave few registers.
            half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
            left = gl.convert_layout(ds, gl.DotOperandLayout(0, half, 2))
            flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
            dw = gl.convert_layout(gl.sum(gl.reshape(delta, (T, R)), 1), flat)
            mine = first + n * T + gl.arange(0, T, layout=flat)
            own = gl.load(order_at + gl.minimum(mine, end - 1))
            own_at = dw_at + (own // TOPK).to(gl.int64) * stride_dl + (own % TOPK) * stride_dk
            gl.store(own_at, dw.to(dw_at.dtype.element_ty), mask=mine < end)
            wide: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
            r = gl.arange(0, rows, layout=gl.SliceLayout(1, wide))
            d = gl.arange(0, 64, layout=gl.SliceLayout(0, wide))
            place_r = first + n * T + r // R
            t = (gl.load(order_at + gl.minimum(place_r, end - 1)) // TOPK).to(gl.int64)
            target = dq_at + t[:, None] * (HEADS * R * D) + ((r % R) * D)[:, None] + d[None, :]
            inside = (place_r < end)[:, None] & (d >= 0)[None, :]
            for j in gl.static_range(D // 64):
                nothing = gl.zeros([rows, 64], gl.float32, layout=half)
                k_half = k.slice(j * 64, 64, dim=1)
                dq = warpgroup_mma(left, k_half, nothing, use_acc=False, is_async=True)
                dq = warpgroup_mma_wait(0, deps=[dq])
                gl.atomic_add(target + j * 64, gl.convert_layout(dq * scale, wide), mask=inside, sem="relaxed")
        ahead = further
        weight = next_weight
    dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
    if tiles > GROUP:
        key = gl.arange(0, S, layout=gl.SliceLayout(1, sums))
        d = gl.arange(0, D, layout=gl.SliceLayout(0, sums))
        inner = key[:, None] * D + d[None, :]
        gl.atomic_add(dk_at + inner, dk * scale, sem="relaxed")
        gl.atomic_add(dv_at + inner, dv, sem="relaxed")


@gluon.jit(do_not_specialize=["length", "chunks", "segments"])
def gather_backward_kernel(
    Q, K, V, W, DO,
    DQ,  # (B, L, Hq, D) fp32, zeroed
    DW,
    DK, DV,  # (B, Hkv, C * S, D) fp32, zeroed
    ORDER, START, ITEM_BIN, ITEM_FIRST, ITEM_COUNT,
    scale, length, chunks, segments,
    stride_qb, stride_ql, stride_qh,
    stride_kb, stride_kl, stride_kh,
    stride_vb, stride_vl, stride_vh,
    stride_wb, stride_wl, stride_wh, stride_wk,
    stride_gb, stride_gl, stride_gh,  # DO
    stride_db, stride_dl, stride_dh, stride_dk,  # DW
    HEADS: gl.constexpr,
    R: gl.constexpr, T: gl.constexpr, TOPK: gl.constexpr, S: gl.constexpr, D: gl.constexpr, PART: gl.constexpr,
    STAGES: gl.constexpr, WITH_DQ: gl.constexpr, REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    item = gl.program_id(0)
    if item >= gl.load(ITEM_COUNT):
        return
    bin_id = gl.load(ITEM_BIN + item)
    first = gl.load(ITEM_FIRST + item)
    end = gl.minimum(gl.load(START + bin_id + 1), first + PART)
    chunk = (bin_id % chunks).to(gl.int64)
    bh = (bin_id // chunks // segments).to(gl.int64)
    b = bh // HEADS
    h = bh % HEADS
    dtype: gl.constexpr = Q.dtype.element_ty
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([S, D], dtype)
    turned_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([T * R, S], dtype)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    key = chunk * S + gl.arange(0, S, layout=gl.SliceLayout(1, wide))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    k_rows = gl.load(K + b * stride_kb + h * stride_kh + key[:, None] * stride_kl + d[None, :])
    v_rows = gl.load(V + b * stride_vb + h * stride_vh + key[:, None] * stride_vl + d[None, :])
    k = gl.allocate_shared_memory(dtype, [S, D], tile, k_rows)
    v = gl.allocate_shared_memory(dtype, [S, D], tile, v_rows)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, T * R, D], tile)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, T * R, D], tile)
    turned = gl.allocate_shared_memory(dtype, [4, T * R, S], turned_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=128)  # every gathering thread
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    head = h * R
    q_at = Q + b * stride_qb + head * stride_qh
    g_at = DO + b * stride_gb + head * stride_gh
    w_at = W + b * stride_wb + h * stride_wh
    dw_at = DW + b * stride_db + h * stride_dh
    dq_at = DQ + (b * length * (HEADS * R) + head) * D
    base = (bh * chunks + chunk) * (S * D)
    pointers = (w_at, dw_at, dq_at, DK + base, DV + base, ORDER)
    strides = (stride_wl, stride_wk, stride_dl, stride_dk)
    place = (first, end)
    rings = (k, v, q_ring, do_ring, turned, full, empty)
    args = (pointers, strides, place, scale, rings)
    gather = (
        q_at, g_at, ORDER, stride_ql, stride_qh, stride_gl, stride_gh, first, end, q_ring, do_ring, full, empty
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_compute, (args, 0, R, T, TOPK, S, D, STAGES, WITH_DQ, HEADS)),
            (_compute, (args, 1, R, T, TOPK, S, D, STAGES, WITH_DQ, HEADS)),
            (_gather, (gather, R, T, TOPK, D, STAGES)),
        ],
        [4, 4],
        [REGISTERS, GATHER_REGISTERS],
    )
