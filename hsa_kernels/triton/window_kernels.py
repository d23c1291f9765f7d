"""Sliding-window attention, forward: a program per block of queries and head walks the window's blocks of keys."""

from __future__ import annotations

import triton
import triton.language as tl

_MASKED = tl.constexpr(-1.0e30)  # finite: a block in which a row sees nothing must not give inf - inf


@triton.jit
def _step(
    q, k, v, kn, kd, vn, vd, top, total, acc, position, column, keys, window, scale,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: running maximum `top`, sum `total` and output `acc` of a block of queries. `position` and
    `column` are the key positions of the queries and of the block's keys; MASK: not every query sees all of them.
    """
    feature = tl.arange(0, q.shape[1])
    if MASK:
        there = (column >= 0) & (column < keys)
        block_k = tl.load(k + column[None, :] * kn + feature[:, None] * kd, mask=there[None, :], other=0.0)
        block_v = tl.load(v + column[:, None] * vn + feature[None, :] * vd, mask=there[:, None], other=0.0)
    else:
        block_k = tl.load(k + column[None, :] * kn + feature[:, None] * kd)
        block_v = tl.load(v + column[:, None] * vn + feature[None, :] * vd)
    score = tl.dot(q, block_k, input_precision=PRECISION) * scale
    if MASK:
        seen = (column[None, :] <= position[:, None]) & (column[None, :] > position[:, None] - window)
        score = tl.where(seen & (column[None, :] >= 0), score, _MASKED)
    new_top = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weight, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weight.to(block_v.dtype), block_v, acc, input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def window_kernel(
    q, k, v, out, scale, length, keys, window, offset,
    qb, qn, qh, qd, kb, kn, kh, kd, vb, vn, vh, vd, ob, on, oh, od,
    HEADS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of M queries, B * HEADS). scale: softmax scale times log2(e). Blocks of N keys are counted from the
    first query's position, so that the diagonal never cuts through more blocks than it must.
    """
    first = tl.program_id(0) * M
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    q += batch * qb + head * qh
    k += batch * kb + head // RATIO * kh
    v += batch * vb + head // RATIO * vh
    out += batch * ob + head * oh
    row, feature = first + tl.arange(0, M), tl.arange(0, D)
    row64 = row.to(tl.int64)
    block_q = tl.load(q + row64[:, None] * qn + feature[None, :] * qd, mask=row[:, None] < length, other=0.0)
    position = row + offset
    least = first + offset  # position of the first query
    before = tl.cdiv(window - 1, N)  # blocks in front of it that may be seen
    start = least - before * N
    begin = tl.where(start < 0, -start // N, 0)
    whole_from = tl.maximum(tl.cdiv(tl.maximum(least + M - window, 0) - start, N), begin)
    whole_to = tl.maximum(before, whole_from)  # blocks before the first query's own are seen to their end
    end = before + tl.cdiv(M, N)
    whole_from = tl.minimum(whole_from, end)
    whole_to = tl.minimum(whole_to, end)

    top = tl.full([M], _MASKED, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for i in range(begin, whole_from):
        column = (start + i * N + tl.arange(0, N)).to(tl.int64)
        top, total, acc = _step(
            block_q, k, v, kn, kd, vn, vd, top, total, acc, position, column, keys, window, scale, True, PRECISION
        )
    for i in range(whole_from, whole_to):
        column = (start + i * N + tl.arange(0, N)).to(tl.int64)
        top, total, acc = _step(
            block_q, k, v, kn, kd, vn, vd, top, total, acc, position, column, keys, window, scale, False, PRECISION
        )
    for i in range(whole_to, end):
        column = (start + i * N + tl.arange(0, N)).to(tl.int64)
        top, total, acc = _step(
            block_q, k, v, kn, kd, vn, vd, top, total, acc, position, column, keys, window, scale, True, PRECISION
        )
    acc = acc / total[:, None]
    tl.store(
        out + row64[:, None] * on + feature[None, :] * od, acc.to(out.dtype.element_ty), mask=row[:, None] < length
    )
