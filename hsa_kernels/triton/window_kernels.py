"""Kernels of sliding-window attention: one query block against its band of keys, and the other way round.

Legend: query i sits at key position p = offset + i and sees keys p - window + 1 .. p, of its own document. H query
heads, R of them per key/value head. Lengths, window and offset are plain arguments: nothing is compiled anew when they
change.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SIZES = ["length", "keys", "window", "offset", "doc_stride"]


@triton.jit
def _seen(p, j, docs_p, docs, valid, window, DOCUMENTS: tl.constexpr):
    """Which keys j (1, n) the positions p (m, 1) see."""
    seen = (j <= p) & (j > p - window) & valid
    if DOCUMENTS:
        seen = seen & (docs_p == docs)
    return seen


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    q, k, v, docs, out, lse, scale, length, keys, window, offset, doc_stride,
    qb, ql, qh, kb, kl, kh, vb, vl, vh, ob, ol, oh,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BM
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    rows = first + tl.arange(0, BM)
    dims = tl.arange(0, D)
    p = offset + rows
    inside = rows < length
    x = tl.load(q + b * qb + h * qh + rows[:, None] * ql + dims[None], mask=inside[:, None], other=0.0)
    docs_p = tl.zeros([BM], tl.int32)
    if DOCUMENTS:
        docs_p = tl.load(docs + b * doc_stride + p, mask=inside, other=-1)
    best = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    low = tl.maximum(offset + first - window + 1, 0) // BN * BN
    high = tl.minimum(offset + tl.minimum(first + BM, length), keys)
    kp = k + b * kb + (h // R) * kh
    vp = v + b * vb + (h // R) * vh
    for start in range(low, high, BN):
        j = start + tl.arange(0, BN)
        valid = j < keys
        kt = tl.load(kp + j[None] * kl + dims[:, None], mask=valid[None], other=0.0)
        s = tl.dot(x, kt, input_precision=PRECISION) * (scale * 1.4426950408889634)
        docs_j = docs_p
        if DOCUMENTS:
            docs_j = tl.load(docs + b * doc_stride + j, mask=valid, other=-2)
            seen = _seen(p[:, None], j[None], docs_p[:, None], docs_j[None], valid[None], window, True)
        else:
            seen = _seen(p[:, None], j[None], p[:, None], j[None], valid[None], window, False)
        s = tl.where(seen, s, -float("inf"))
        new = tl.maximum(best, tl.max(s, 1))
        safe = tl.where(new == -float("inf"), 0.0, new)
        e = tl.exp2(s - safe[:, None])
        fade = tl.exp2(best - safe)
        total = total * fade + tl.sum(e, 1)
        vt = tl.load(vp + j[:, None] * vl + dims[None], mask=valid[:, None], other=0.0)
        acc = acc * fade[:, None] + tl.dot(e.to(vt.dtype), vt, input_precision=PRECISION)
        best = new
    total = tl.where(total == 0.0, 1.0, total)
    o = acc / total[:, None]
    tl.store(out + b * ob + h * oh + rows[:, None] * ol + dims[None], o.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + tl.program_id(1).to(tl.int64) * length + rows, best + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def query_gradient_kernel(
    q, k, v, docs, out, grad, lse, delta, dq, scale, length, keys, window, offset, doc_stride,
    qb, ql, qh, kb, kl, kh, vb, vl, vh, ob, ol, oh, gb, gl, gh, db, dl, dh,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and delta = sum(out * grad) per row for the other kernel."""
    first = tl.program_id(0) * BM
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    rows = first + tl.arange(0, BM)
    dims = tl.arange(0, D)
    p = offset + rows
    inside = rows < length
    x = tl.load(q + b * qb + h * qh + rows[:, None] * ql + dims[None], mask=inside[:, None], other=0.0)
    o = tl.load(out + b * ob + h * oh + rows[:, None] * ol + dims[None], mask=inside[:, None], other=0.0)
    g = tl.load(grad + b * gb + h * gh + rows[:, None] * gl + dims[None], mask=inside[:, None], other=0.0)
    d = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    at = tl.program_id(1).to(tl.int64) * length + rows
    tl.store(delta + at, d, mask=inside)
    norm = tl.load(lse + at, mask=inside, other=0.0)
    docs_p = tl.zeros([BM], tl.int32)
    if DOCUMENTS:
        docs_p = tl.load(docs + b * doc_stride + p, mask=inside, other=-1)
    acc = tl.zeros([BM, D], tl.float32)
    low = tl.maximum(offset + first - window + 1, 0) // BN * BN
    high = tl.minimum(offset + tl.minimum(first + BM, length), keys)
    kp = k + b * kb + (h // R) * kh
    vp = v + b * vb + (h // R) * vh
    for start in range(low, high, BN):
        j = start + tl.arange(0, BN)
        valid = j < keys
        kt = tl.load(kp + j[:, None] * kl + dims[None], mask=valid[:, None], other=0.0)
        s = tl.dot(x, tl.trans(kt), input_precision=PRECISION) * (scale * 1.4426950408889634)
        if DOCUMENTS:
            docs_j = tl.load(docs + b * doc_stride + j, mask=valid, other=-2)
            seen = _seen(p[:, None], j[None], docs_p[:, None], docs_j[None], valid[None], window, True)
        else:
            seen = _seen(p[:, None], j[None], p[:, None], j[None], valid[None], window, False)
        e = tl.where(seen, tl.exp2(s - norm[:, None]), 0.0)
        vt = tl.load(vp + j[None] * vl + dims[:, None], mask=valid[None], other=0.0)
        ds = e * (tl.dot(g, vt, input_precision=PRECISION) - d[:, None])
        acc += tl.dot(ds.to(kt.dtype), kt, input_precision=PRECISION)
    acc = acc * scale
    tl.store(dq + b * db + h * dh + rows[:, None] * dl + dims[None], acc.to(dq.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=_SIZES)
def key_gradient_kernel(
    q, k, v, docs, grad, lse, delta, dk, dv, scale, length, keys, window, offset, doc_stride,
    qb, ql, qh, kb, kl, kh, vb, vl, vh, gb, gl, gh, xb, xl, xh, yb, yl, yh,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key block, over all query heads that read it."""
    begin = tl.program_id(0) * BN
    groups: tl.constexpr = H // R
    b = (tl.program_id(1) // groups).to(tl.int64)
    g = tl.program_id(1) % groups
    j = begin + tl.arange(0, BN)
    dims = tl.arange(0, D)
    valid = j < keys
    kt = tl.load(k + b * kb + g * kh + j[:, None] * kl + dims[None], mask=valid[:, None], other=0.0)
    vt = tl.load(v + b * vb + g * vh + j[:, None] * vl + dims[None], mask=valid[:, None], other=0.0)
    docs_j = tl.zeros([BN], tl.int32)
    if DOCUMENTS:
        docs_j = tl.load(docs + b * doc_stride + j, mask=valid, other=-2)
    acc_k = tl.zeros([BN, D], tl.float32)
    acc_v = tl.zeros([BN, D], tl.float32)
    low = tl.maximum(begin - offset, 0) // BM * BM
    high = tl.minimum(begin + BN - 1 + window - offset, length)
    for r in range(R):
        h = g * R + r
        line = (b * H + h) * length
        for start in range(low, high, BM):
            rows = start + tl.arange(0, BM)
            inside = rows < length
            p = offset + rows
            x = tl.load(q + b * qb + h * qh + rows[:, None] * ql + dims[None], mask=inside[:, None], other=0.0)
            y = tl.load(grad + b * gb + h * gh + rows[:, None] * gl + dims[None], mask=inside[:, None], other=0.0)
            norm = tl.load(lse + line + rows, mask=inside, other=0.0)
            d = tl.load(delta + line + rows, mask=inside, other=0.0)
            s = tl.dot(kt, tl.trans(x), input_precision=PRECISION) * (scale * 1.4426950408889634)  # (BN, BM)
            if DOCUMENTS:
                docs_p = tl.load(docs + b * doc_stride + p, mask=inside, other=-1)
                seen = _seen(p[None], j[:, None], docs_p[None], docs_j[:, None], inside[None], window, True)
            else:
                seen = _seen(p[None], j[:, None], p[None], j[:, None], inside[None], window, False)
            e = tl.where(seen, tl.exp2(s - norm[None]), 0.0)
            acc_v += tl.dot(e.to(y.dtype), y, input_precision=PRECISION)
            ds = e * (tl.dot(vt, tl.trans(y), input_precision=PRECISION) - d[None])
            acc_k += tl.dot(ds.to(x.dtype), x, input_precision=PRECISION)
    acc_k = acc_k * scale
    tl.store(dk + b * xb + g * xh + j[:, None] * xl + dims[None], acc_k.to(dk.dtype.element_ty), mask=valid[:, None])
    tl.store(dv + b * yb + g * yh + j[:, None] * yl + dims[None], acc_v.to(dv.dtype.element_ty), mask=valid[:, None])
