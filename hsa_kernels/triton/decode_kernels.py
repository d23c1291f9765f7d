"""One new token over millions of chunks: scan the landmarks, choose, attend. Five launches, all sizes on the device.

The number of visible chunks is read from device memory, so a captured CUDA graph serves a growing context.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hsa_kernels.triton.select_kernels import exact_bar, fall, order


@triton.jit
def scan_kernel(
    Q, LM, FALLS, VISIBLE, SCORES, MAXIMA, COUNT,
    scale, per_reach, capacity, groups,
    stride_qb, stride_qh, stride_qd,
    stride_lb, stride_lc, stride_lh, stride_ld,
    stride_fb, stride_fh,  # FALLS
    DECAY: tl.constexpr,
    HEADS: tl.constexpr, DR: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Scores (B * H, capacity) of all visible landmarks and the maximum of every GROUP of them."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // HEADS
    h = bh % HEADS
    pid = tl.program_id(0)
    if pid == 0:
        tl.store(COUNT + bh, 0)
    visible = tl.load(VISIBLE + b)
    chunk = pid * BLOCK + tl.arange(0, BLOCK)
    seen = chunk < visible
    row = LM + b * stride_lb + h * stride_lh + chunk[:, None].to(tl.int64) * stride_lc
    score = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.static_range(0, DR, BD):  # a whole row of a long landmark does not fit the registers
        d = start + tl.arange(0, BD)
        q = tl.load(Q + b * stride_qb + h * stride_qh + d * stride_qd).to(tl.float32)
        lm = tl.load(row + d[None, :] * stride_ld, mask=seen[:, None], other=0.0).to(tl.float32)
        score += tl.sum(lm * q[None, :], 1)
    score = score * scale
    if DECAY:
        decay = tl.load(FALLS + b * stride_fb + h * stride_fh).to(tl.float32)
        score = fall(score, decay, visible - chunk, per_reach)
    tl.store(SCORES + bh * capacity + chunk, score, mask=seen)
    key = tl.where(seen, order(score), -2147483648)
    best = tl.max(tl.reshape(key, (BLOCK // GROUP, GROUP)), 1)
    group = pid * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    tl.store(MAXIMA + bh * groups + group, best, mask=group < groups)


@triton.jit
def bound_kernel(MAXIMA, BOUND, groups, TOPK: tl.constexpr, GROUPS: tl.constexpr):
    """BOUND (B * H,): the TOPK-th largest group maximum, a lower bound of the TOPK-th largest score."""
    bh = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, GROUPS)[None, :]
    key = tl.load(MAXIMA + bh * groups + j, mask=j < groups, other=-2147483648)
    real = key != -2147483648
    bar = exact_bar(key, real, TOPK, 12)
    # Fewer groups than TOPK bound nothing.
    bar = tl.where(tl.sum(real.to(tl.int32), 1) >= TOPK, bar, -2147483648)
    tl.store(BOUND + bh + tl.arange(0, 1), bar)


@triton.jit
def collect_kernel(
    SCORES, VISIBLE, BOUND, COUNT, CAND_ID, CAND_SCORE, capacity,
    HEADS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Append every score that reaches the bound to the head's candidates, in no fixed order."""
    bh = tl.program_id(1).to(tl.int64)
    visible = tl.load(VISIBLE + bh // HEADS)
    chunk = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = chunk < visible
    score = tl.load(SCORES + bh * capacity + chunk, mask=seen, other=0.0)
    take = (seen & (order(score) >= tl.load(BOUND + bh))).to(tl.int32)
    n = tl.sum(take, 0)
    if n > 0:
        place = tl.atomic_add(COUNT + bh, n, sem="relaxed") + tl.cumsum(take, 0) - 1
        write = (take > 0) & (place < CAP)
        tl.store(CAND_ID + bh * CAP + place, chunk, mask=write)
        tl.store(CAND_SCORE + bh * CAP + place, score, mask=write)


@triton.jit
def _pick(CAND_ID, CAND_SCORE, IDS, WEIGHTS, count, TOPK: tl.constexpr, WIDTH: tl.constexpr):
    """Write the exact TOPK best of count <= WIDTH candidates in ascending id; returns how many there are."""
    none: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    slot = tl.arange(0, WIDTH)
    real = slot < count
    ids = tl.load(CAND_ID + slot, mask=real, other=0)
    key = order(tl.load(CAND_SCORE + slot, mask=real, other=0.0))
    bar = tl.sum(exact_bar(key[None, :], real[None, :], TOPK), 0)
    room = TOPK - tl.sum((real & (key > bar)).to(tl.int32), 0)
    # Ascending by id first, for ties and for the order of the output.
    packed = tl.sort(tl.where(real & (key >= bar), (ids.to(tl.int64) << 32) | slot, none))
    held = packed != none
    score = tl.load(CAND_SCORE + (packed & 0xFFFFFFFF).to(tl.int32), mask=held, other=0.0)
    tie = (held & (order(score) == bar)).to(tl.int32)
    keep = held & ((tie == 0) | (tl.cumsum(tie, 0) <= room))
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(IDS + place, (packed >> 32).to(tl.int32), mask=keep)
    tl.store(WEIGHTS + place, score, mask=keep)
    return tl.sum(keep.to(tl.int32), 0)


@triton.jit
def pick_kernel(
    SCORES, VISIBLE, COUNT, CAND_ID, CAND_SCORE, IDS, WEIGHTS, capacity,
    HEADS: tl.constexpr, TOPK: tl.constexpr, KP: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The exact TOPK best candidates in ascending id, -1 last, and the softmax of their scores (B * H, KP)."""
    bh = tl.program_id(0).to(tl.int64)
    count = tl.load(COUNT + bh)
    ids_at, scores_at = CAND_ID + bh * CAP, CAND_SCORE + bh * CAP
    out_ids, out = IDS + bh * KP, WEIGHTS + bh * KP
    total = 0
    if count <= CAP // 4:
        total = _pick(ids_at, scores_at, out_ids, out, count, TOPK, CAP // 4)
    elif count <= CAP:
        total = _pick(ids_at, scores_at, out_ids, out, count, TOPK, CAP)
    else:
        # Too many ties for the buffer: the exact bar by counting over all scores, then one pass in ascending id.
        visible = tl.load(VISIBLE + bh // HEADS)
        column = tl.arange(0, BLOCK)
        bar = -2147483648
        for i in range(0, 32):
            step = tl.where(i == 0, 0, bar + (1 << tl.maximum(31 - i, 0)))
            above_count = 0
            for start in range(0, visible, BLOCK):
                seen = start + column < visible
                score = tl.load(SCORES + bh * capacity + start + column, mask=seen, other=0.0)
                above_count += tl.sum((seen & (order(score) >= step)).to(tl.int32), 0)
            bar = tl.where(above_count >= TOPK, step, bar)
        above_count = 0
        for start in range(0, visible, BLOCK):
            seen = start + column < visible
            score = tl.load(SCORES + bh * capacity + start + column, mask=seen, other=0.0)
            above_count += tl.sum((seen & (order(score) > bar)).to(tl.int32), 0)
        ties = 0
        for start in range(0, visible, BLOCK):
            seen = start + column < visible
            score = tl.load(SCORES + bh * capacity + start + column, mask=seen, other=0.0)
            tie = (seen & (order(score) == bar)).to(tl.int32)
            early = ties + tl.cumsum(tie, 0) <= TOPK - above_count
            keep = ((seen & (order(score) > bar)) | ((tie > 0) & early)).to(tl.int32)
            place = total + tl.cumsum(keep, 0) - 1
            tl.store(IDS + bh * KP + place, start + column, mask=keep > 0)
            tl.store(WEIGHTS + bh * KP + place, score, mask=keep > 0)
            total += tl.sum(keep, 0)
            ties += tl.sum(tie, 0)
    tl.debug_barrier()
    k = tl.arange(0, KP)
    chosen = k < total
    score = tl.load(WEIGHTS + bh * KP + k, mask=chosen, other=-3.0e38)
    e = tl.where(chosen, tl.exp(score - tl.max(score, 0)), 0.0)
    norm = tl.sum(e, 0)
    tl.debug_barrier()
    tl.store(WEIGHTS + bh * KP + k, e / tl.where(norm > 0, norm, 1.0))
    tl.store(IDS + bh * KP + k, tl.full([KP], -1, dtype=tl.int32), mask=~chosen)


@triton.jit
def attend_kernel(
    Q, K, V, IDS, WEIGHTS, PARTS, scale,
    stride_qb, stride_qh, stride_qd,
    stride_kb, stride_kl, stride_kh, stride_kd,
    stride_vb, stride_vl, stride_vh, stride_vd,
    HEADS: tl.constexpr, SELECT_HEADS: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, S: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PARTS (B * Hkv, KP, R, D): weighted attention of every query head of the group inside one chosen chunk."""
    slot = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // HEADS
    h = bh % HEADS
    source = b * SELECT_HEADS + h * SELECT_HEADS // HEADS
    chunk = tl.load(IDS + source * KP + slot).to(tl.int64)
    d = tl.arange(0, D)
    r = tl.arange(0, RP)
    there = (r < R)[:, None]
    out = PARTS + ((bh * KP + slot) * R + r[:, None]) * D + d[None, :]
    if chunk >= 0:
        weight = tl.load(WEIGHTS + source * KP + slot)
        key = chunk * S + tl.arange(0, S)
        k = tl.load(K + b * stride_kb + h * stride_kh + key[:, None] * stride_kl + d[None, :] * stride_kd)
        v = tl.load(V + b * stride_vb + h * stride_vh + key[:, None] * stride_vl + d[None, :] * stride_vd)
        q_at = Q + b * stride_qb + (h * R + r[:, None]) * stride_qh + d[None, :] * stride_qd
        s = tl.dot(tl.load(q_at, mask=there, other=0.0), tl.trans(k), input_precision=PRECISION) * scale
        p = tl.exp(s - tl.max(s, 1)[:, None])
        p = p * (weight / tl.sum(p, 1))[:, None]
        tl.store(out, tl.dot(p.to(v.dtype), v, input_precision=PRECISION), mask=there)
    else:
        tl.store(out, tl.zeros([RP, D], dtype=tl.float32), mask=there)


@triton.jit
def gather_parts_kernel(PARTS, OUT, R: tl.constexpr, D: tl.constexpr, KP: tl.constexpr):
    """OUT (B * Hkv, R, D): the sum over the chosen chunks, in fixed order."""
    r = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    k = tl.arange(0, KP)
    part = tl.load(PARTS + ((bh * KP + k[:, None]) * R + r) * D + d[None, :])
    tl.store(OUT + (bh * R + r) * D + d, tl.sum(part, 0).to(OUT.dtype.element_ty))


@triton.jit
def ring_kernel(
    Q, K, V, FILLED, PARTS, TOP, TOTAL, scale, size, splits,
    stride_qb, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd,
    HEADS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """PARTS (B * Hkv, splits, R, D), TOP and TOTAL (B * Hkv, splits, R): one block of slots, its maximum, its sum."""
    split = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // HEADS
    h = bh % HEADS
    filled = tl.minimum(tl.load(FILLED + b), size)
    slot = split * BLOCK + tl.arange(0, BLOCK)
    seen = slot < filled
    d = tl.arange(0, D)
    r = tl.arange(0, RP)
    there = r < R
    k_at = K + b * stride_kb + h * stride_kh + slot[:, None].to(tl.int64) * stride_kl + d[None, :] * stride_kd
    v_at = V + b * stride_vb + h * stride_vh + slot[:, None].to(tl.int64) * stride_vl + d[None, :] * stride_vd
    k = tl.load(k_at, mask=seen[:, None], other=0.0)
    v = tl.load(v_at, mask=seen[:, None], other=0.0)
    q_at = Q + b * stride_qb + (h * R + r[:, None]) * stride_qh + d[None, :] * stride_qd
    q = tl.load(q_at, mask=there[:, None], other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    s = tl.where(seen[None, :], s, -1.0e30)
    top = tl.max(s, 1)
    p = tl.where(seen[None, :], tl.exp(s - top[:, None]), 0.0)
    at = (bh * splits + split) * R + r
    tl.store(TOP + at, top, mask=there)
    tl.store(TOTAL + at, tl.sum(p, 1), mask=there)
    out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    tl.store(PARTS + at[:, None] * D + d[None, :], out, mask=there[:, None])


@triton.jit
def ring_sum_kernel(PARTS, TOP, TOTAL, OUT, splits, R: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr):
    """OUT (B * Hkv, R, D): the blocks put together, in fixed order."""
    r = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    n = tl.arange(0, SPLITS)
    real = n < splits
    at = (bh * splits + n) * R + r
    top = tl.load(TOP + at, mask=real, other=-1.0e30)
    share = tl.where(real, tl.exp(top - tl.max(top, 0)), 0.0)
    total = tl.sum(tl.load(TOTAL + at, mask=real, other=0.0) * share, 0)
    part = tl.load(PARTS + at[:, None] * D + d[None, :], mask=real[:, None], other=0.0)
    tl.store(OUT + (bh * R + r) * D + d, (tl.sum(part * share[:, None], 0) / total).to(OUT.dtype.element_ty))
