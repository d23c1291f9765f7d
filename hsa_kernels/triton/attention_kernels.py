"""The two loop orders of hierarchical sparse attention.

union: a tile of T neighbouring tokens x R query heads walks the union of its chunks; o and dq stay in registers.
chunk: a chunk gathers the pairs that chose it; dk and dv stay in registers, o and dq are added to fp32 buffers.

A chunk is one whole softmax, so P is final after one tile: weight and normaliser fold into it, nothing is rescaled or
merged, and rowsum(P * dP) is both the softmax correction and the gradient of the weight.

Matrices: rows are (token, head) pairs, M of them; S keys per chunk; D head size. All offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _softmax(s, to_log2, FOLD: tl.constexpr):
    """Rows of exp(scale * (s - max)) and their sums; to_log2 = scale / ln 2 >= 0.

    FOLD turns scaling into one multiply-add per element. It pays in chunk order; in union order it costs registers
    (172 instead of 157) and time (17.4 ms instead of 15.4, H100, 128K tokens).
    """
    if FOLD:
        p = tl.exp2(s * to_log2 - (tl.max(s, 1) * to_log2)[:, None])
    else:
        s = s * to_log2
        p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p, tl.sum(p, 1)


@triton.jit
def _union_slots(SLOTS, entry, count, token, inside, T: tl.constexpr):
    """Column of every row's token for one union entry, -1 where it did not choose it."""
    return tl.load(SLOTS + entry * T + token, mask=inside & (entry < count), other=-1).to(tl.int32)


@triton.jit
def _union_weights(W, slot, stride_wk):
    """Weight of every row for one union entry, 0 where the row's token did not choose it."""
    return tl.load(W + slot * stride_wk, mask=slot >= 0, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length"])
def union_attention_kernel(
    Q, K, V, W, DO,
    OUT,  # o forward, dq backward; like Q
    DW,
    CHUNKS, SLOTS, COUNT,
    scale, length,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_kl, stride_kh, stride_kd,
    stride_vb, stride_vl, stride_vh, stride_vd,
    stride_wb, stride_wl, stride_wh, stride_wk,
    stride_gb, stride_gl, stride_gh, stride_gd,  # DO
    stride_ob, stride_ol, stride_oh, stride_od,
    stride_db, stride_dl, stride_dh, stride_dk,  # DW
    HEADS: tl.constexpr,  # key/value heads
    R: tl.constexpr, T: tl.constexpr, TOPK: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, T)
    # Tiles of one head follow each other, so that programs in flight share their chunks in the caches.
    pid = tl.program_id(0).to(tl.int64)
    bh = pid // tiles
    b = bh // HEADS
    h = bh % HEADS
    row = tl.arange(0, T * R)
    token = row // R
    t = (pid % tiles) * T + token
    head = h * R + row % R
    d = tl.arange(0, D)
    key = tl.arange(0, S)
    inside = t < length
    q_at = Q + b * stride_qb + t[:, None] * stride_ql + head[:, None] * stride_qh + d[None, :] * stride_qd
    q = tl.load(q_at, mask=inside[:, None], other=0.0)
    if BACKWARD:
        g_at = DO + b * stride_gb + t[:, None] * stride_gl + head[:, None] * stride_gh + d[None, :] * stride_gd
        do = tl.load(g_at, mask=inside[:, None], other=0.0)
        dw_token = tl.arange(0, T)
        dw_t = (pid % tiles) * T + dw_token
        dw_at = DW + b * stride_db + dw_t * stride_dl + h * stride_dh
    k_at = K + b * stride_kb + h * stride_kh + key[:, None] * stride_kl + d[None, :] * stride_kd
    v_at = V + b * stride_vb + h * stride_vh + key[:, None] * stride_vl + d[None, :] * stride_vd
    w_at = W + b * stride_wb + t * stride_wl + h * stride_wh
    chunks_at = CHUNKS + pid * (T * TOPK)
    slots_at = SLOTS + pid * (T * TOPK) * T
    count = tl.load(COUNT + pid)
    to_log2 = scale * 1.4426950408889634
    acc = tl.zeros([T * R, D], dtype=tl.float32)
    # The weight, behind two dependent loads, is fetched one entry ahead.
    weight = _union_weights(w_at, _union_slots(slots_at, 0, count, token, inside, T), stride_wk)
    for entry in range(0, count):
        chunk = tl.load(chunks_at + entry).to(tl.int64)
        k = tl.load(k_at + chunk * S * stride_kl)
        v = tl.load(v_at + chunk * S * stride_vl)
        next_weight = _union_weights(w_at, _union_slots(slots_at, entry + 1, count, token, inside, T), stride_wk)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p, total = _softmax(s, to_log2, False)
        pw = p * (weight / total)[:, None]
        if BACKWARD:
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            delta = tl.sum(p * dp, 1) / total
            mine = tl.load(slots_at + entry * T + dw_token).to(tl.int32)
            dw = tl.sum(tl.reshape(delta, (T, R)), 1)
            tl.store(dw_at + mine * stride_dk, dw.to(DW.dtype.element_ty), mask=mine >= 0)
            ds = pw * (dp - delta[:, None])
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(pw.to(v.dtype), v, acc, input_precision=PRECISION)
        weight = next_weight
    if BACKWARD:
        acc *= scale
    o_at = OUT + b * stride_ob + t[:, None] * stride_ol + head[:, None] * stride_oh + d[None, :] * stride_od
    tl.store(o_at, acc.to(OUT.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["length", "chunks", "segments"])
def chunk_attention_kernel(
    Q, K, V, W, DO,
    OUT,  # o or dq: (B, L, Hq, D) fp32, zeroed
    DW,
    DK, DV,  # (B, Hkv, C * S, D) fp32, zeroed; or (items, S, D) fp32 parts
    ORDER, START, ITEM_BIN, ITEM_FIRST, ITEM_COUNT,
    scale, length, chunks, segments,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_kl, stride_kh, stride_kd,
    stride_vb, stride_vl, stride_vh, stride_vd,
    stride_wb, stride_wl, stride_wh, stride_wk,
    stride_gb, stride_gl, stride_gh, stride_gd,  # DO
    stride_db, stride_dl, stride_dh, stride_dk,  # DW
    HEADS: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, TOPK: tl.constexpr, S: tl.constexpr, D: tl.constexpr, PART: tl.constexpr,
    BACKWARD: tl.constexpr,
    WITH_DQ: tl.constexpr,  # one pass: dq and dw as well
    PARTS: tl.constexpr,  # dk and dv of every item go to its own place, for a sum in fixed order
    PRECISION: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    if item < tl.load(ITEM_COUNT):
        bin_id = tl.load(ITEM_BIN + item)
        first = tl.load(ITEM_FIRST + item)
        end = tl.minimum(tl.load(START + bin_id + 1), first + PART)
        chunk = (bin_id % chunks).to(tl.int64)
        bh = (bin_id // chunks // segments).to(tl.int64)
        b = bh // HEADS
        h = bh % HEADS
        row = tl.arange(0, T * R)
        head = h * R + row % R
        d = tl.arange(0, D)
        key = chunk * S + tl.arange(0, S)
        k = tl.load(K + b * stride_kb + h * stride_kh + key[:, None] * stride_kl + d[None, :] * stride_kd)
        v = tl.load(V + b * stride_vb + h * stride_vh + key[:, None] * stride_vl + d[None, :] * stride_vd)
        q_at = Q + b * stride_qb + head[:, None] * stride_qh + d[None, :] * stride_qd
        g_at = DO + b * stride_gb + head[:, None] * stride_gh + d[None, :] * stride_gd
        o_at = OUT + (b * length * HEADS * R + head[:, None]) * D + d[None, :]
        w_at = W + b * stride_wb + h * stride_wh
        dw_at = DW + b * stride_db + h * stride_dh
        to_log2 = scale * 1.4426950408889634
        if BACKWARD:
            dk = tl.zeros([S, D], dtype=tl.float32)
            dv = tl.zeros([S, D], dtype=tl.float32)
        # Forward has registers left to fetch pairs one tile ahead.
        if not BACKWARD:
            following = tl.load(ORDER + first + row // R, mask=first + row // R < end, other=0)
        for i in range(first, end, T):
            at = i + row // R
            inside = at < end
            if BACKWARD:
                pair = tl.load(ORDER + at, mask=inside, other=0)
            else:
                pair = following
                following = tl.load(ORDER + at + T, mask=at + T < end, other=0)
            t = (pair // TOPK).to(tl.int64)
            q = tl.load(q_at + t[:, None] * stride_ql, mask=inside[:, None], other=0.0)
            weight = tl.load(w_at + t * stride_wl + (pair % TOPK) * stride_wk, mask=inside, other=0.0).to(tl.float32)
            if BACKWARD:
                do = tl.load(g_at + t[:, None] * stride_gl, mask=inside[:, None], other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p, total = _softmax(s, to_log2, True)
            pw = p * (weight / total)[:, None]
            if BACKWARD:
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                delta = tl.sum(p * dp, 1) / total
                dv = tl.dot(tl.trans(pw.to(do.dtype)), do, dv, input_precision=PRECISION)
                ds = (pw * (dp - delta[:, None])).to(q.dtype)
                dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
                if WITH_DQ:
                    mine = i + tl.arange(0, T)
                    own = tl.load(ORDER + mine, mask=mine < end, other=0)
                    dw = tl.sum(tl.reshape(delta, (T, R)), 1)
                    place = dw_at + (own // TOPK).to(tl.int64) * stride_dl + (own % TOPK) * stride_dk
                    tl.store(place, dw.to(DW.dtype.element_ty), mask=mine < end)
                    dq = tl.dot(ds, k, input_precision=PRECISION) * scale
                    tl.atomic_add(o_at + t[:, None] * (HEADS * R * D), dq, mask=inside[:, None], sem="relaxed")
            else:
                o = tl.dot(pw.to(v.dtype), v, input_precision=PRECISION)
                tl.atomic_add(o_at + t[:, None] * (HEADS * R * D), o, mask=inside[:, None], sem="relaxed")
        if BACKWARD:
            dk *= scale
            inner = tl.arange(0, S)[:, None] * D + d[None, :]
            if PARTS:
                tl.store(DK + item.to(tl.int64) * S * D + inner, dk)
                tl.store(DV + item.to(tl.int64) * S * D + inner, dv)
            else:
                base = (bh * chunks + chunk) * S * D
                tl.atomic_add(DK + base + inner, dk, sem="relaxed")
                tl.atomic_add(DV + base + inner, dv, sem="relaxed")


@triton.jit
def sum_parts_kernel(
    PARTS, OUT, ITEM_START, chunks,
    stride_ob, stride_ol, stride_oh, stride_od,
    HEADS: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sum every chunk's parts in ascending order: dk or dv with the same bits in every run. One segment only."""
    chunk = tl.program_id(0).to(tl.int64)
    bh = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, S)[:, None] * D + tl.arange(0, D)[None, :]
    first = tl.load(ITEM_START + bh * chunks + chunk)
    last = tl.load(ITEM_START + bh * chunks + chunk + 1)
    total = tl.zeros([S, D], dtype=tl.float32)
    source = PARTS + first.to(tl.int64) * S * D + at
    for _ in range(first, last):
        total += tl.load(source)
        source += S * D
    key = chunk * S + tl.arange(0, S)
    out = OUT + (bh // HEADS) * stride_ob + (bh % HEADS) * stride_oh
    out = out + key[:, None] * stride_ol + tl.arange(0, D)[None, :] * stride_od
    tl.store(out, total.to(OUT.dtype.element_ty))
