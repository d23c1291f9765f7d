"""The oracle against an independent per-token loop, and its own promises: gradients, padding, documents, causality."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hsa_kernels import hsa_attention, ops, reference, select_chunks, selection_weights, sliding_window_attention


def loop_hsa(q: Tensor, k: Tensor, v: Tensor, w: Tensor, idx: Tensor, size: int, scale: float) -> Tensor:
    batch, length, heads, _ = q.shape
    ratio = heads // k.shape[2]
    rows = []
    for b in range(batch):
        for t in range(length):
            for h in range(heads):
                total = torch.zeros_like(q[b, t, h])
                for j in range(idx.shape[3]):
                    i = int(idx[b, t, h // ratio, j])
                    if i < 0:
                        continue
                    keys, values = (x[b, i * size : (i + 1) * size, h // ratio] for x in (k, v))
                    e = torch.exp(scale * (keys @ q[b, t, h]))
                    total = total + w[b, t, h // ratio, j] * (e / e.sum()) @ values
                rows.append(total)
    return torch.stack(rows).view(q.shape)


def loop_select(q, landmarks, top_k, size, offset, documents, exclude, noise):
    """Indices and scores of one call by plain Python sorting."""
    batch, length, heads, dim = q.shape
    ids = torch.full((batch, length, heads, top_k), -1)
    scores = torch.zeros(batch, length, heads, top_k, dtype=q.dtype)
    for b in range(batch):
        for t in range(length):
            for h in range(heads):
                p = offset + t
                found = []
                for i in range(landmarks.shape[1]):
                    tokens = range(i * size, (i + 1) * size)
                    if tokens[-1] >= p and not (i < p // size):
                        continue
                    if documents is not None and documents[b, i * size] != documents[b, p]:
                        continue
                    if exclude and all(p - exclude + 1 <= x <= p for x in tokens):
                        continue
                    s = float(q[b, t, h] @ landmarks[b, i, h]) / math.sqrt(dim)
                    extra = 0.0 if noise is None else float(noise[b, t, h, i])
                    found.append((-(s + extra), i, s))
                best = sorted(found)[:top_k]
                for j, (_, i, s) in enumerate(sorted(best, key=lambda x: x[1])):
                    ids[b, t, h, j], scores[b, t, h, j] = i, s
    return ids, scores


def loop_window(q, k, v, window, documents, offset, scale):
    batch, length, heads, _ = q.shape
    ratio = heads // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(batch):
        for t in range(length):
            p = offset + t
            seen = [x for x in range(max(0, p - window + 1), p + 1)]
            if documents is not None:
                seen = [x for x in seen if documents[b, x] == documents[b, p]]
            for h in range(heads):
                e = torch.exp(scale * (k[b, seen, h // ratio] @ q[b, t, h]))
                out[b, t, h] = (e / e.sum()) @ v[b, seen, h // ratio]
    return out


def make_hsa(batch, length, heads_q, heads_kv, chunks, size, dim, top_k, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, length, heads_q, dim, generator=g, dtype=torch.float64)
    k = torch.randn(batch, chunks * size, heads_kv, dim, generator=g, dtype=torch.float64)
    v = torch.randn(batch, chunks * size, heads_kv, dim, generator=g, dtype=torch.float64)
    w = torch.rand(batch, length, heads_kv, top_k, generator=g, dtype=torch.float64)
    idx = torch.randint(-1, chunks, (batch, length, heads_kv, top_k), generator=g, dtype=torch.int32)
    return q, k, v, w, idx


@pytest.mark.parametrize("ratio", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize(("chunks", "top_k"), [(5, 3), (40, 2), (1, 4)])
def test_hsa_equals_the_loop(ratio, chunks, top_k):
    # Random ids repeat within a row and hold -1 anywhere; 40 / 2 takes the gather form, the others the dense one.
    heads_kv = 2 if ratio <= 4 else 1
    q, k, v, w, idx = make_hsa(2, 7, heads_kv * ratio, heads_kv, chunks, 4, 8, top_k, seed=ratio)
    inputs = [x.requires_grad_() for x in (q, k, v, w)]
    got = hsa_attention(*inputs, idx, chunk_size=4)
    want = loop_hsa(*inputs, idx, 4, 8**-0.5)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, inputs, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("chunks", "top_k"), [(3, 2), (34, 2)])
def test_hsa_gradcheck(chunks, top_k):
    q, k, v, w, idx = make_hsa(1, 3, 2, 1, chunks, 2, 3, top_k)
    idx[0, 1] = -1  # a token without chunks
    idx[0, 2] = 1  # a repeated chunk
    inputs = [x.requires_grad_() for x in (q, k, v, w)]
    assert torch.autograd.gradcheck(lambda *x: hsa_attention(*x, idx, chunk_size=2, softmax_scale=0.7), inputs)


def test_hsa_forms_and_recompute_agree(monkeypatch):
    q, k, v, w, idx = make_hsa(2, 33, 4, 2, 9, 4, 8, 3)
    inputs = [x.requires_grad_() for x in (q, k, v, w)]
    results = []
    for reach, kept, block in [(100, 1 << 30, 1 << 25), (0, 1 << 30, 1 << 25), (100, 0, 1 << 12), (0, 0, 1 << 12)]:
        monkeypatch.setattr(reference, "_DENSE_REACH", reach)
        monkeypatch.setattr(reference, "_KEPT_BYTES", kept)
        monkeypatch.setattr(reference, "_BLOCK_BYTES", block)
        out = hsa_attention(*inputs, idx, chunk_size=4)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunks", [3, 40])
def test_hsa_without_chunks_is_zero_with_finite_gradients(chunks):
    q, k, v, w, idx = make_hsa(1, 5, 2, 1, chunks, 4, 4, 2)
    idx[:] = -1
    w[0, 0, 0, 0] = float("inf")  # the weight of a -1 column does not matter, whatever it holds
    inputs = [x.requires_grad_() for x in (q, k, v, w)]
    out = hsa_attention(*inputs, idx, chunk_size=4)
    assert torch.equal(out, torch.zeros_like(out))
    for g in torch.autograd.grad(out.sum(), inputs, allow_unused=True):
        assert g is None or torch.equal(g, torch.zeros_like(g))


@pytest.mark.parametrize(("chunks", "top_k"), [(6, 2), (40, 2)])
def test_hsa_never_touches_chunks_nobody_chose(chunks, top_k):
    q, k, v, w, idx = make_hsa(1, 5, 2, 1, chunks, 4, 4, top_k)
    idx[idx == 2] = 1
    k[:, 8:12], v[:, 8:12] = float("nan"), float("nan")
    inputs = [x.requires_grad_() for x in (q, k, v, w)]
    out = hsa_attention(*inputs, idx, chunk_size=4)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(torch.isfinite(x).all() for x in (out, *grads))


def test_few_tokens_of_a_long_memory_read_the_same_bits():
    """Without gradients only chosen chunks are copied; with them the whole memory is."""
    q, k, v, w, idx = make_hsa(2, 3, 4, 2, 200, 4, 8, 5)
    idx[0, 1, 0, 2:] = -1
    idx[1, 2] = -1
    idx[idx == 0] = 1
    k[:, :4] = float("nan")  # of chunk 0, which nobody chose
    assert idx.numel() < 200
    with torch.no_grad():
        got = hsa_attention(q, k, v, w, idx, chunk_size=4)
    assert torch.equal(got, hsa_attention(q, k, v, w, idx, chunk_size=4))
    torch.testing.assert_close(got, loop_hsa(q, k, v, w, idx, 4, 8**-0.5), rtol=1e-12, atol=1e-12)


def test_hsa_takes_non_contiguous_inputs_and_half_precision():
    q, k, v, w, idx = make_hsa(2, 6, 4, 2, 5, 4, 8, 3)
    odd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, w, idx)]
    assert not odd[0].is_contiguous()
    torch.testing.assert_close(hsa_attention(*odd, chunk_size=4), hsa_attention(q, k, v, w, idx, chunk_size=4))
    half = hsa_attention(*(x.bfloat16() for x in (q, k, v, w)), idx, chunk_size=4)
    assert half.dtype == torch.bfloat16
    exact = hsa_attention(*(x.bfloat16().double() for x in (q, k, v, w)), idx, chunk_size=4)
    torch.testing.assert_close(half.double(), exact, rtol=1e-2, atol=1e-2)


def packed(batch: int, length: int, size: int) -> Tensor:
    """Three documents of unequal length, each starting on a chunk boundary, another cut per sequence."""
    docs = torch.zeros(batch, length, dtype=torch.int32)
    for b in range(batch):
        docs[b, (2 + b) * size :] = 1
        docs[b, (5 + b) * size :] = 2
    return docs


@pytest.mark.parametrize("use_documents", [False, True])
@pytest.mark.parametrize("use_noise", [False, True])
@pytest.mark.parametrize(("length", "chunks", "top_k", "offset", "exclude"), [
    (37, 9, 3, 0, 0), (37, 9, 12, 0, 0), (11, 12, 2, 37, 0), (30, 8, 3, 0, 7), (31, 20, 4, 1, 8), (5, 1, 2, 3, 1),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_selection_equals_sorting(use_documents, use_noise, length, chunks, top_k, offset, exclude, dtype):
    size, heads, dim = 4, 2, 6
    g = torch.Generator().manual_seed(length + top_k)
    q = torch.randn(2, length, heads, dim, generator=g, dtype=torch.float64)
    landmarks = torch.randn(2, chunks, heads, dim, generator=g, dtype=torch.float64)
    noise = torch.randn(2, length, heads, chunks, generator=g, dtype=torch.float64) if use_noise else None
    docs = packed(2, offset + length, size) if use_documents else None
    ids, scores = select_chunks(
        q.to(dtype),
        landmarks.to(dtype),
        top_k=top_k,
        chunk_size=size,
        query_offset=offset,
        documents=docs,
        exclude_window=exclude,
        noise=noise,
    )
    want_ids, want_scores = loop_select(q, landmarks, top_k, size, offset, docs, exclude, noise)
    assert ids.dtype == torch.int32 and ids.shape == (2, length, heads, top_k)
    assert torch.equal(ids.long(), want_ids)
    scores = torch.where(ids >= 0, scores, torch.zeros_like(scores)).double()
    tol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(scores, want_scores, rtol=tol, atol=tol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_selection_breaks_ties_by_the_lower_id(dtype):
    q = torch.tensor([1.0, 0.0], dtype=dtype).view(1, 1, 1, 2)
    landmarks = torch.tensor([-0.0, 2.0, 0.0, 2.0, 2.0, 0.0], dtype=dtype).view(1, 6, 1, 1).expand(1, 6, 1, 2)
    for top_k, want in [(1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4])]:
        ids, _ = select_chunks(q, landmarks, top_k=top_k, chunk_size=1, query_offset=9)
        assert ids.flatten().tolist() == want


def test_selection_gradcheck_through_weights_and_noise_without_gradient():
    g = torch.Generator().manual_seed(3)
    q = torch.randn(1, 9, 2, 3, generator=g, dtype=torch.float64, requires_grad=True)
    landmarks = torch.randn(1, 4, 2, 3, generator=g, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(1, 9, 2, 4, generator=g, dtype=torch.float64, requires_grad=True)

    def weights(q, landmarks):
        ids, scores = select_chunks(q, landmarks, top_k=2, chunk_size=2, noise=noise)
        return selection_weights(scores, ids)

    assert torch.autograd.gradcheck(weights, (q, landmarks))
    w = weights(q, landmarks)
    # Tokens 0 and 1 see no completed chunk, 2 and 3 see one: weights 0 and (1, 0).
    assert torch.equal(w[0, :2], torch.zeros(2, 2, 2, dtype=w.dtype)) and torch.equal(
        w[0, 2, 0].detach(), w.new_tensor([1, 0])
    )
    assert noise.grad is None and not any(g is not None for g in torch.autograd.grad(w.sum(), noise, allow_unused=True))
    grads = torch.autograd.grad(weights(q, landmarks).square().sum(), (q, landmarks))
    assert all(torch.isfinite(x).all() for x in grads) and torch.equal(
        grads[0][:, :2], torch.zeros(1, 2, 2, 3).double()
    )


@pytest.mark.parametrize(("offset", "reach", "top_k"), [(0, 1.0, 3), (40, 2.5, 2), (40, 100.0, 4), (7, 0.5, 12)])
def test_scores_fall_with_the_distance(offset, reach, top_k):
    """Every score by hand, one token at a time; and its gradients, that of the decay included."""
    g = torch.Generator().manual_seed(top_k)
    size, length, chunks = 4, 13, 11
    q, landmarks = (torch.randn(2, n, 2, 3, generator=g, dtype=torch.float64) for n in (length, chunks))
    decay = torch.rand(2, length, 2, generator=g, dtype=torch.float64)
    kwargs = {"top_k": top_k, "chunk_size": size, "query_offset": offset, "reach": reach}
    ids, scores = select_chunks(q, landmarks, decay=decay, **kwargs)
    for b, t, h in itertools.product(range(2), range(length), range(2)):
        now = (offset + t) // size
        dense = {}
        for c in range(min(now, chunks)):
            fall = math.log((now - c) / reach) if now - c > reach else 0.0
            dense[c] = (q[b, t, h] @ landmarks[b, c, h]).item() / math.sqrt(3) - decay[b, t, h].item() * fall
        best = sorted(sorted(dense, key=lambda c: -dense[c])[:top_k])
        assert ids[b, t, h].tolist() == best + [-1] * (top_k - len(best))
        for place, c in enumerate(best):
            assert abs(scores[b, t, h, place].item() - dense[c]) < 1e-6
    wide = [x.requires_grad_() for x in (q, landmarks, decay)]

    def weights(q, landmarks, decay):
        ids, scores = select_chunks(q, landmarks, decay=decay, **kwargs)
        return selection_weights(scores, ids)

    assert torch.autograd.gradcheck(weights, wide)
    no = select_chunks(q, landmarks, decay=torch.zeros_like(decay), **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(no, select_chunks(q, landmarks, **kwargs), strict=True))
    with pytest.raises(ValueError, match="decay"):
        select_chunks(q, landmarks, decay=decay[..., 0], **kwargs)


def test_the_decode_step_falls_with_the_distance_as_any_token_does():
    g = torch.Generator().manual_seed(0)
    q, landmarks, decay = (torch.randn(2, *s, generator=g).abs() for s in ((1, 2, 8), (40, 2, 8), (1, 2)))
    visible = torch.tensor([40, 40], dtype=torch.int32)
    ids, weights = ops.hsa_decode_select(q[:, 0], landmarks, visible, top_k=5, decay=decay[:, 0], reach=3.0)
    want, scores = select_chunks(q, landmarks, top_k=5, chunk_size=4, query_offset=161, decay=decay, reach=3.0)
    assert torch.equal(ids, want[:, 0])
    torch.testing.assert_close(weights, selection_weights(scores, want)[:, 0])
    assert not torch.equal(ids, ops.hsa_decode_select(q[:, 0], landmarks, visible, top_k=5)[0])


def test_selection_without_any_chunk():
    q = torch.randn(1, 3, 1, 4, requires_grad=True)
    ids, scores = select_chunks(q, torch.randn(1, 0, 1, 4), top_k=2, chunk_size=4)
    assert ids.flatten().tolist() == [-1] * 6
    w = selection_weights(scores, ids)
    assert torch.equal(w, torch.zeros_like(w))
    w.sum().backward()


@pytest.mark.parametrize("use_documents", [False, True])
@pytest.mark.parametrize(("length", "keys", "offset", "window", "heads_q", "heads_kv"), [
    (23, 23, 0, 5, 4, 2), (23, 30, 7, 5, 4, 1), (23, 24, 1, 100, 2, 2), (40, 64, 20, 16, 6, 2), (9, 9, 0, 1, 2, 1),
    (1, 50, 49, 12, 2, 1), (281, 290, 9, 200, 2, 1),
])  # fmt: skip
def test_window_equals_the_loop(use_documents, length, keys, offset, window, heads_q, heads_kv):
    g = torch.Generator().manual_seed(length)
    q = torch.randn(2, length, heads_q, 8, generator=g, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, keys, heads_kv, 8, generator=g, dtype=torch.float64, requires_grad=True) for _ in "kv")
    docs = packed(2, keys, 3) if use_documents else None
    got = sliding_window_attention(q, k, v, window=window, documents=docs, key_offset=offset)
    want = loop_window(q, k, v, window, docs, offset, 8**-0.5)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    cot = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), cot), torch.autograd.grad(want, (q, k, v), cot), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_window_gradcheck_and_blocks(monkeypatch):
    g = torch.Generator().manual_seed(1)
    q = torch.randn(1, 35, 2, 2, generator=g, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 36, 1, 2, generator=g, dtype=torch.float64, requires_grad=True) for _ in "kv")

    def run(*x):
        return sliding_window_attention(*x, window=3, key_offset=1, softmax_scale=0.9)

    whole = run(q, k, v)
    monkeypatch.setattr(reference, "_KEPT_BYTES", 0)
    monkeypatch.setattr(reference, "_BLOCK_BYTES", 1)
    torch.testing.assert_close(run(q, k, v), whole)
    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("position", [0, 7, 8, 15, 16, 30])
def test_causality(position):
    """Keys, landmarks and hidden states change from `position` on: nothing before it may move, something after must."""
    size, length, dim = 4, 32, 8
    g = torch.Generator().manual_seed(0)

    def layer(x: Tensor) -> Tensor:
        landmarks = x.view(1, length // size, size, 1, dim).mean(2)
        ids, scores = select_chunks(x[:, :, None], landmarks, top_k=3, chunk_size=size)
        kv = x[:, :, None]
        out = hsa_attention(kv, kv, kv, selection_weights(scores, ids), ids, chunk_size=size)
        return (out + sliding_window_attention(kv, kv, kv, window=3))[:, :, 0]

    x = torch.randn(1, length, dim, generator=g, dtype=torch.float64)
    y = x.clone()
    y[:, position] += 1.0
    a, b = layer(x), layer(y)
    assert torch.equal(a[:, :position], b[:, :position])
    assert not torch.equal(a[:, position], b[:, position])
    later = (position // size + 1) * size + 3
    if later < length:
        assert (a[:, later:] != b[:, later:]).any()


def test_same_bits_again_with_several_threads():
    """index_add style backwards lose determinism with threads: this pins that ours does not."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = []
        for _ in range(2):
            g = torch.Generator().manual_seed(0)
            q = torch.randn(2, 300, 4, 16, generator=g, requires_grad=True)
            k, v = (torch.randn(2, 304, 2, 16, generator=g, requires_grad=True) for _ in "kv")
            landmarks = torch.randn(2, 38, 2, 16, generator=g, requires_grad=True)
            for top_k in (2, 40):
                ids, scores = select_chunks(q[:, :, :2], landmarks, top_k=top_k, chunk_size=8)
                out = hsa_attention(q, k, v, selection_weights(scores, ids), ids, chunk_size=8)
                out = out + sliding_window_attention(q, k, v, window=33)
                out.square().sum().backward()
            runs.append([out, q.grad, k.grad, v.grad, landmarks.grad])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    finally:
        torch.set_num_threads(before)


def test_wrong_shapes_are_named():
    q, k, v, w, idx = make_hsa(1, 4, 3, 2, 2, 4, 4, 1)
    with pytest.raises(ValueError, match="no multiple of 2 key/value heads"):
        hsa_attention(q, k, v, w, idx, chunk_size=4)
    q, k, v, w, idx = make_hsa(1, 4, 2, 2, 2, 4, 4, 1)
    with pytest.raises(ValueError, match="pad k and v"):
        hsa_attention(q, k[:, :7], v[:, :7], w, idx, chunk_size=4)
    with pytest.raises(ValueError, match="none of auto, reference, triton"):
        hsa_attention(q, k, v, w, idx, chunk_size=4, backend="cuda")
    with pytest.raises(ValueError, match="counts the token itself"):
        sliding_window_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="reach the last query position"):
        select_chunks(q, q, top_k=1, documents=torch.zeros(1, 3, dtype=torch.int32))
