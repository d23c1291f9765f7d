"""Exact top-k of landmark scores without an L x C matrix.

Pass 1 keeps the running maximum of every residue class of chunk ids (id mod BN): BN distinct scores, so the K-th
largest of them is a lower bound of the K-th largest score. Pass 2 computes the scores again and appends those that
reach the bound; about 1.4 K of them do. The last kernel takes the exact K best of the candidates. Candidates are
appended in ascending id, so nothing is ever sorted.

Scores are compared as order-preserving integers; the K-th largest is built bit by bit from counts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def order(score):
    """float32 -> int32 with the same order; -0.0 equals 0.0; never the lowest integer for a finite score."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _kth_largest(key, TOPK: tl.constexpr, LAST_BIT: tl.constexpr):
    """Per row: the largest x with at least TOPK keys >= x, to the resolution of LAST_BIT; the lowest int if none."""
    enough = tl.sum((key >= 0).to(tl.int32), 1) >= TOPK
    x = tl.where(enough, 0, -2147483648)
    for i in range(0, 31 - LAST_BIT):
        step = x + (1 << (30 - i))
        enough = tl.sum((key >= step[:, None]).to(tl.int32), 1) >= TOPK
        x = tl.where(enough, step, x)
    return x


@triton.jit
def _scores(
    q, q_at, lm_at, column, chunks, stride_lc, stride_qd, stride_ld, scale,
    BM: tl.constexpr, BN: tl.constexpr, DR: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BM, BN) scores of one tile of landmarks. q is the whole query tile when DR == BD."""
    rows = lm_at + column[:, None].to(tl.int64) * stride_lc
    inside = (column < chunks)[:, None]
    if DR == BD:
        acc = tl.dot(q, tl.trans(tl.load(rows, mask=inside, other=0.0)), input_precision=PRECISION)
    else:
        acc = tl.zeros([BM, BN], dtype=tl.float32)
        for d in range(0, DR, BD):
            lm = tl.load(rows + d * stride_ld, mask=inside, other=0.0)
            acc = tl.dot(tl.load(q_at + d * stride_qd), tl.trans(lm), acc, input_precision=PRECISION)
    return acc * scale


@triton.jit
def fall(score, decay, back, per_reach):
    """Scores less decay * ln(back / reach) where a chunk lies further back than reach chunks."""
    return score - decay * tl.log(tl.maximum(back.to(tl.float32) * per_reach, 1.0))


@triton.jit
def _visible(column, last, document, CHUNK_DOCS, chunks, DOCUMENTS: tl.constexpr):
    seen = column[None, :] < last[:, None]
    if DOCUMENTS:
        owner = tl.load(CHUNK_DOCS + column, mask=column < chunks, other=-1)
        seen = seen & (owner[None, :] == document[:, None])
    return seen


@triton.jit
def candidates_kernel(
    Q, LM, FALLS, DOCS, CHUNK_DOCS,
    CAND_ID, CAND_SCORE,  # (B * H, length, CAP)
    CAND_COUNT,  # (B * H, length)
    scale, per_reach, length, chunks, offset, exclude, keys,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_lb, stride_lc, stride_lh, stride_ld,
    stride_fb, stride_fl, stride_fh,  # FALLS
    HEADS: tl.constexpr, S: tl.constexpr, DR: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TOPK: tl.constexpr, CAP: tl.constexpr,
    DECAY: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b = bh // HEADS
    h = bh % HEADS
    # The longest rows first: the last programs to start are then the short ones.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    t = block * BM + tl.arange(0, BM)
    row_in = t < length
    safe_t = tl.minimum(t, length - 1)
    position = offset + safe_t
    last = tl.minimum(position // S, chunks)
    if exclude > 0:
        last = tl.minimum(last, tl.where(position >= exclude, (position - exclude) // S + 1, 0))
    last = tl.where(row_in, last, 0)
    d = tl.arange(0, BD)
    q_at = Q + b * stride_qb + h * stride_qh + safe_t[:, None].to(tl.int64) * stride_ql + d[None, :] * stride_qd
    lm_at = LM + b * stride_lb + h * stride_lh + d[None, :] * stride_ld
    q = tl.load(q_at)
    docs_at = CHUNK_DOCS + b * chunks
    now = (position // S)[:, None]
    decay = tl.zeros([BM, 1], dtype=tl.float32)
    if DECAY:
        falls_at = FALLS + b * stride_fb + h * stride_fh + safe_t[:, None].to(tl.int64) * stride_fl
        decay = tl.load(falls_at).to(tl.float32)
    document = last
    if DOCUMENTS:
        document = tl.load(DOCS + b * keys + position)
    end = tl.max(last, 0)
    column = tl.arange(0, BN)
    best = tl.full([BM, BN], -2147483648, dtype=tl.int32)
    for start in range(0, end, BN):
        at = start + column
        s = _scores(q, q_at, lm_at, at, chunks, stride_lc, stride_qd, stride_ld, scale, BM, BN, DR, BD, PRECISION)
        if DECAY:
            s = fall(s, decay, now - at[None, :], per_reach)
        seen = _visible(at, last, document, docs_at, chunks, DOCUMENTS)
        best = tl.maximum(best, tl.where(seen, order(s), -2147483648))
    # A bound needs no low bits.
    bound = _kth_largest(best, TOPK, 8)
    rows = bh * length + safe_t
    out_id = CAND_ID + rows * CAP
    out_score = CAND_SCORE + rows * CAP
    count = tl.zeros([BM], dtype=tl.int32)
    for start in range(0, end, BN):
        at = start + column
        s = _scores(q, q_at, lm_at, at, chunks, stride_lc, stride_qd, stride_ld, scale, BM, BN, DR, BD, PRECISION)
        if DECAY:
            s = fall(s, decay, now - at[None, :], per_reach)
        seen = _visible(at, last, document, docs_at, chunks, DOCUMENTS)
        take = (seen & (order(s) >= bound[:, None])).to(tl.int32)
        place = count[:, None] + tl.cumsum(take, 1) - 1
        write = (take > 0) & (place < CAP) & row_in[:, None]
        tl.store(out_id[:, None] + place, tl.broadcast_to(at[None, :], [BM, BN]), mask=write)
        tl.store(out_score[:, None] + place, s, mask=write)
        count += tl.sum(take, 1)
    if tl.max(count, 0) > CAP:
        # The bound was too low for some row (periodic scores, many ties): find the exact K-th score by counting.
        exact = tl.full([BM], -2147483648, dtype=tl.int32)
        for i in range(0, 32):
            step = tl.where(i == 0, tl.zeros([BM], dtype=tl.int32), exact + (1 << tl.maximum(31 - i, 0)))
            above = tl.zeros([BM], dtype=tl.int32)
            for start in range(0, end, BN):
                at = start + column
                s = _scores(q, q_at, lm_at, at, chunks, stride_lc, stride_qd, stride_ld, scale, BM, BN, DR, BD,
                            PRECISION)  # fmt: skip
                if DECAY:
                    s = fall(s, decay, now - at[None, :], per_reach)
                seen = _visible(at, last, document, docs_at, chunks, DOCUMENTS)
                above += tl.sum((seen & (order(s) >= step[:, None])).to(tl.int32), 1)
            exact = tl.where(above >= TOPK, step, exact)
        count = tl.zeros([BM], dtype=tl.int32)
        ties = tl.zeros([BM], dtype=tl.int32)
        for start in range(0, end, BN):
            at = start + column
            s = _scores(q, q_at, lm_at, at, chunks, stride_lc, stride_qd, stride_ld, scale, BM, BN, DR, BD, PRECISION)
            if DECAY:
                s = fall(s, decay, now - at[None, :], per_reach)
            seen = _visible(at, last, document, docs_at, chunks, DOCUMENTS)
            tie = (seen & (order(s) == exact[:, None])).to(tl.int32)
            early = ties[:, None] + tl.cumsum(tie, 1) <= TOPK
            take = ((seen & (order(s) > exact[:, None])) | ((tie > 0) & early)).to(tl.int32)
            place = count[:, None] + tl.cumsum(take, 1) - 1
            write = (take > 0) & (place < CAP) & row_in[:, None]
            tl.store(out_id[:, None] + place, tl.broadcast_to(at[None, :], [BM, BN]), mask=write)
            tl.store(out_score[:, None] + place, s, mask=write)
            count += tl.sum(take, 1)
            ties += tl.sum(tie, 1)
    tl.store(CAND_COUNT + rows, count, mask=row_in)


@triton.jit
def exact_bar(key, real, TOPK: tl.constexpr, BITS: tl.constexpr = 32):
    """Per row: the TOPK-th largest real key, or the smallest one where there are no more than TOPK.

    With fewer BITS the result is a lower bound of it. Starts at the smallest key and adds bits: the candidates' span
    needs fewer of them than a whole float has.
    """
    low = tl.min(tl.where(real, key, 0x7FFFFFFF), 1)
    high = tl.max(tl.where(real, key, -2147483648), 1)
    span = tl.maximum(high.to(tl.int64) - low.to(tl.int64), 0)
    # Exponent of the span as a float; rounding can only make it one bit longer.
    bits = (tl.max(span, 0).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    for i in range(0, tl.minimum(tl.maximum(bits, 0), BITS)):
        step = low.to(tl.int64) + (tl.full([1], 1, dtype=tl.int64) << (bits - 1 - i))
        step = tl.minimum(step, 0x7FFFFFFF).to(tl.int32)
        enough = tl.sum((real & (key >= step[:, None])).to(tl.int32), 1) >= TOPK
        low = tl.where(enough, step, low)
    return low


@triton.jit
def _choose(
    CAND_ID, CAND_SCORE, IDS, SCORES, rows, count, out, inside, lowest,
    BM: tl.constexpr, TOPK: tl.constexpr, KP: tl.constexpr, CAP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    j = tl.arange(0, WIDTH)
    real = j[None, :] < count[:, None]
    ids = tl.load(CAND_ID + rows[:, None] * CAP + j[None, :], mask=real, other=0)
    score = tl.load(CAND_SCORE + rows[:, None] * CAP + j[None, :], mask=real, other=0.0)
    key = order(score)
    bar = exact_bar(key, real, TOPK)
    above = (real & (key > bar[:, None])).to(tl.int32)
    tie = (real & (key == bar[:, None])).to(tl.int32)
    room = TOPK - tl.sum(above, 1)
    keep = above + tie * (tl.cumsum(tie, 1) <= room[:, None]).to(tl.int32)
    place = tl.cumsum(keep, 1) - 1
    write = (keep > 0) & inside[:, None]
    tl.store(IDS + out[:, None] + place, ids, mask=write)
    tl.store(SCORES + out[:, None] + place, score, mask=write)
    column = tl.arange(0, KP)
    empty = (column[None, :] >= tl.sum(keep, 1)[:, None]) & (column[None, :] < TOPK) & inside[:, None]
    tl.store(IDS + out[:, None] + column[None, :], tl.full([BM, KP], -1, dtype=tl.int32), mask=empty)
    tl.store(SCORES + out[:, None] + column[None, :], tl.full([BM, KP], 0.0, dtype=tl.float32) + lowest, mask=empty)


@triton.jit
def choose_kernel(
    CAND_ID, CAND_SCORE, CAND_COUNT,
    IDS, SCORES,  # (B, length, H, TOPK) contiguous
    lowest, length,
    HEADS: tl.constexpr, BM: tl.constexpr, TOPK: tl.constexpr, KP: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The exact TOPK best of every row's candidates, lower ids first among equals, in ascending id."""
    bh = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = t < length
    rows = bh * length + tl.minimum(t, length - 1)
    count = tl.load(CAND_COUNT + rows, mask=inside, other=0)
    out = ((bh // HEADS * length + t) * HEADS + bh % HEADS) * TOPK
    # Nearly all rows have fewer candidates than half the capacity.
    if tl.max(count, 0) <= CAP // 2:
        _choose(CAND_ID, CAND_SCORE, IDS, SCORES, rows, count, out, inside, lowest, BM, TOPK, KP, CAP, CAP // 2)
    else:
        _choose(CAND_ID, CAND_SCORE, IDS, SCORES, rows, count, out, inside, lowest, BM, TOPK, KP, CAP, CAP)
