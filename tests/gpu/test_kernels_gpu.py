"""What only a GPU can show: bfloat16, real sizes, 64-bit offsets, capture and compilation, no host synchronisation."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hsa_kernels import hsa_attention, hsa_decode, reference, select_chunks, selection_weights, sliding_window_attention
from hsa_kernels.triton import attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def relative(got, want):
    assert torch.isfinite(got).all()
    scale = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / scale if scale > 0 else got.double().norm().item()


def tolerance(dtype):
    return 1e-5 if dtype == torch.float32 else 3e-3


def normal(*shape, dtype=torch.bfloat16, seed=0):
    g = torch.Generator(device="cuda").manual_seed(seed + sum(shape))
    return torch.randn(shape, device="cuda", generator=g).to(dtype).requires_grad_()


def causal_ids(batch, length, heads, top_k, size, kind="random", seed=0):
    g = torch.Generator(device="cuda").manual_seed(seed)
    visible = (torch.arange(length, device="cuda") // size).view(1, -1, 1, 1)
    if kind == "hot":
        ids = torch.zeros(batch, length, heads, top_k, device="cuda")
    elif kind == "clustered":
        ids = visible - 1 - torch.arange(top_k, device="cuda").expand(batch, length, heads, top_k)
    else:
        ids = torch.floor(torch.rand(batch, length, heads, top_k, device="cuda", generator=g) * visible)
    ids = torch.where((ids >= 0) & (ids < visible), ids, -1.0).int()
    return ids.masked_fill(torch.rand(ids.shape, device="cuda", generator=g) < 0.1, -1)


def check_attention(q, k, v, w, ids, size, dtype):
    inputs = [q, k, v, w]
    out = hsa_attention(*inputs, ids, chunk_size=size, backend="triton")
    g = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, g)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = reference.hsa_attention(*exact, ids, chunk_size=size)
    assert relative(out, want) <= tolerance(dtype)
    for name, a, b in zip("qkvw", grads, torch.autograd.grad(want, exact, g.double()), strict=True):
        assert relative(a, b) <= tolerance(dtype), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "length", "heads_q", "heads_kv", "size", "dim", "top_k"),
    [
        (1, 1000, 16, 1, 64, 128, 16),
        (2, 777, 8, 1, 64, 128, 7),
        (1, 513, 8, 2, 64, 64, 8),
        (2, 300, 4, 2, 32, 128, 5),
        (1, 641, 4, 4, 64, 64, 9),
        (1, 900, 32, 1, 128, 64, 3),
        (1, 2100, 16, 1, 32, 64, 64),
        (1, 700, 16, 1, 16, 64, 256),
        (1, 400, 16, 1, 16, 64, 512),
        (1, 900, 16, 2, 32, 64, 200),
        (1, 130, 2, 1, 64, 128, 1),
    ],
)
def test_attention(dtype, batch, length, heads_q, heads_kv, size, dim, top_k):
    chunks = -(-length // size)
    q = normal(batch, length, heads_q, dim, dtype=dtype)
    k, v = (normal(batch, chunks * size, heads_kv, dim, dtype=dtype, seed=s) for s in (1, 2))
    ids = causal_ids(batch, length, heads_kv, top_k, size)
    w = torch.rand(ids.shape, device="cuda").requires_grad_()
    check_attention(q, k, v, w, ids, size, dtype)


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize(
    ("batch", "length", "heads_q", "heads_kv", "size", "dim", "top_k", "dtype"),
    [
        (1, 1000, 16, 1, 64, 128, 16, torch.bfloat16),
        (2, 777, 32, 2, 64, 128, 24, torch.bfloat16),
        (2, 513, 8, 1, 64, 64, 8, torch.float16),
        (1, 700, 32, 1, 32, 128, 12, torch.bfloat16),
        (1, 900, 16, 1, 32, 64, 200, torch.bfloat16),
        (1, 600, 8, 2, 64, 128, 9, torch.bfloat16),
        (2, 500, 3, 3, 64, 64, 6, torch.float16),
        (1, 400, 4, 2, 128, 128, 3, torch.bfloat16),
        (1, 200, 16, 1, 64, 128, 2, torch.bfloat16),
    ],
)
def test_both_orders_in_forward_and_backward(
    monkeypatch, one_pass, batch, length, heads_q, heads_kv, size, dim, top_k, dtype
):
    """Whatever the overlap would choose, with lists of many segments and items."""
    monkeypatch.setattr(attention, "_SEGMENT_BYTES", 100 * 8 * dim * heads_q // heads_kv)
    monkeypatch.setattr(attention, "_SEGMENT_BYTES_FEW_HEADS", 100 * 8 * dim * heads_q // heads_kv)
    monkeypatch.setattr(attention, "_PART_ROWS", 24 * heads_q // heads_kv)
    chunks = -(-length // size)
    q = normal(batch, length, heads_q, dim, dtype=dtype)
    k, v = (normal(batch, chunks * size, heads_kv, dim, dtype=dtype, seed=s) for s in (1, 2))
    ids = causal_ids(batch, length, heads_kv, top_k, size)
    ids[:, :, :, -1] = ids[:, :, :, 0]  # a chunk that is listed twice
    w = torch.rand(ids.shape, device="cuda").requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, w)]
    want = reference.hsa_attention(*exact, ids, chunk_size=size)
    g = torch.randn_like(q)
    grads = torch.autograd.grad(want, exact, g.double())
    args = (*(x.detach() for x in (q, k, v, w)), ids)
    assert relative(attention.forward_union(*args, size, dim**-0.5), want) <= 3e-3
    assert relative(attention.forward_chunks(*args, size, dim**-0.5)[0], want) <= 3e-3
    got = attention.backward_form(*args, g, size, dim**-0.5, one_pass=one_pass, deterministic=False)
    for name, a, b in zip("qkvw", got, grads, strict=True):
        assert relative(a, b) <= 3e-3, name


def test_what_the_kernels_cannot_do_is_announced():
    q, k, v = (normal(1, 64, 2, 16, seed=s) for s in range(3))
    ids = causal_ids(1, 64, 2, 2, 8)
    with pytest.warns(UserWarning, match="slowly for long inputs: the kernels do not support chunk size 8"):
        hsa_attention(q, k, v, torch.rand(ids.shape, device="cuda"), ids, chunk_size=8)


@pytest.mark.parametrize("kind", ["hot", "clustered"])
@pytest.mark.parametrize("heads_kv", [1, 8])
def test_adversarial_selections(kind, heads_kv):
    length, top_k = 4096, 16
    q, k, v = (normal(1, length, h, 64, seed=h) for h in (16, heads_kv, heads_kv))
    ids = causal_ids(1, length, heads_kv, top_k, 64, kind)
    check_attention(q, k, v, torch.rand(ids.shape, device="cuda").requires_grad_(), ids, 64, torch.bfloat16)


@pytest.mark.parametrize("heads_kv", [1, 4])
def test_deterministic_mode(heads_kv):
    length = 4096
    q, k, v = (normal(1, length, h, 64, seed=h) for h in (16, heads_kv, heads_kv))
    ids = causal_ids(1, length, heads_kv, 16, 64)
    w = torch.rand(ids.shape, device="cuda").requires_grad_()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = []
        for _ in range(3):
            out = hsa_attention(q, k, v, w, ids)
            runs.append([out, *torch.autograd.grad(out, (q, k, v, w), torch.ones_like(out))])
        check_attention(q, k, v, w, ids, 64, torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_a_million_tokens_with_offsets_beyond_31_bits():
    """q and o pass 2**31 elements. The cotangent is zero outside sampled tokens, so the oracle needs only those."""
    length, size, top_k = (1 << 20) + 4096, 64, 64
    q = normal(1, length, 16, 128)
    k, v = (normal(1, length, 1, 128, seed=s) for s in (1, 2))
    assert q.numel() > 2**31
    ids = causal_ids(1, length, 1, top_k, size)
    w = torch.rand(ids.shape, device="cuda").requires_grad_()
    inputs = [q, k, v, w]
    out = hsa_attention(*inputs, ids, chunk_size=size, backend="triton")
    rows = torch.cat([torch.randint(length, (60,)), torch.tensor([0, 63, 64, length - 1])]).unique().cuda()
    g = torch.zeros_like(out)
    g[:, rows] = torch.randn_like(out[:, rows])
    grads = torch.autograd.grad(out, inputs, g)
    exact = [x.detach().double().requires_grad_() for x in (q[:, rows], k, v, w[:, rows])]
    want = reference.hsa_attention(*exact, ids[:, rows], chunk_size=size)
    assert relative(out[:, rows], want) <= 3e-3
    for name, a, b in zip("qkvw", grads, torch.autograd.grad(want, exact, g[:, rows].double()), strict=True):
        assert relative(a[:, rows] if name in "qw" else a, b) <= 3e-3, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "dim", "top_k", "documents"), [(2, 128, 16, False), (1, 1024, 64, True)])
def test_selection(dtype, heads, dim, top_k, documents):
    length, size = 8192, 16
    q, lm = normal(1, length, heads, dim, dtype=dtype), normal(1, length // size, heads, dim, dtype=dtype, seed=1)
    docs = (torch.arange(length, device="cuda") // 3072).int()[None] if documents else None
    kwargs = {"top_k": top_k, "chunk_size": size, "documents": docs, "exclude_window": 64}
    ids, scores = select_chunks(q, lm, backend="triton", **kwargs)
    want_ids, want = select_chunks(q.detach().double(), lm.detach().double(), backend="reference", **kwargs)
    # Sums in another order may swap two nearly equal scores: the chosen scores agree, ids almost always.
    assert torch.equal(ids >= 0, want_ids >= 0)
    real = ids >= 0
    got, want = (x.double().masked_fill(~real, 0.0).sort(-1)[0] for x in (scores, want))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (ids == want_ids).float().mean() > 0.999
    w = selection_weights(scores, ids)
    cot = torch.randn_like(w)
    grads = torch.autograd.grad((w * cot).sum(), (q, lm))
    q64, lm64 = (x.detach().double().requires_grad_() for x in (q, lm))
    dense = torch.einsum("blhd,bchd->blhc", q64, lm64) * dim**-0.5
    exact = selection_weights(torch.gather(dense, -1, ids.long().clamp(min=0)), ids)
    for a, b in zip(grads, torch.autograd.grad((exact * cot.double()).sum(), (q64, lm64)), strict=True):
        assert relative(a, b) <= tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("length", "keys", "window", "documents"), [(1000, 1000, 100, True), (300, 812, 512, False), (600, 600, 600, False)]
)
def test_window(dtype, length, keys, window, documents):
    q = normal(2, length, 8, 64, dtype=dtype)
    k, v = (normal(2, keys, 2, 64, dtype=dtype, seed=s) for s in (1, 2))
    docs = (torch.arange(keys, device="cuda") // 130).int().expand(2, -1) if documents else None
    kwargs = {"window": window, "documents": docs, "key_offset": keys - length}
    out = sliding_window_attention(q, k, v, backend="triton", **kwargs)
    g = torch.randn_like(out)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = reference.sliding_window_attention(*exact, **kwargs)
    # bfloat16: the kernels are torch's, whose P and dS round once more than ours.
    tol = 1e-5 if dtype == torch.float32 else 5e-3
    assert relative(out, want) <= tol
    grads = torch.autograd.grad(out, (q, k, v), g)
    for a, b in zip(grads, torch.autograd.grad(want, exact, g.double()), strict=True):
        assert relative(a, b) <= tol


def layer(q, k, v, q_select, landmarks):
    ids, scores = select_chunks(q_select, landmarks, top_k=8, backend="triton")
    return hsa_attention(q, k, v, selection_weights(scores, ids), ids, backend="triton")


def layer_inputs(heads, length=1024):
    return [
        normal(1, length, 16, 64),
        normal(1, length, heads, 64, seed=1),
        normal(1, length, heads, 64, seed=2),
        normal(1, length, heads, 64, seed=3),
        normal(1, length // 64, heads, 64, seed=4),
    ]


@pytest.mark.parametrize("heads", [1, 4])
def test_compiles_and_captures_without_host_synchronisation(heads):
    """A training step through both operators; with 4 key/value heads backward takes the lists of forward."""
    inputs = layer_inputs(heads)
    want = layer(*inputs)
    g = torch.ones_like(want)
    want_grads = torch.autograd.grad(want, inputs, g)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = layer(*inputs)
        torch.autograd.grad(again, inputs, g)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(again, want)
    out = torch.compile(layer, fullgraph=True)(*inputs)
    torch.testing.assert_close(out, want, rtol=2e-2, atol=1e-2)
    for a, b in zip(torch.autograd.grad(out, inputs, g), want_grads, strict=True):
        assert relative(a, b) <= 3e-3
    # Leaves of their own: where those above accumulate is bound to the stream they were first used on.
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(layer(*inputs), inputs, g)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        out = layer(*inputs)
        grads = torch.autograd.grad(out, inputs, g)
    with torch.no_grad():
        inputs[0].copy_(inputs[0].roll(1, 1))
    graph.replay()
    torch.cuda.synchronize()
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    moved = layer(*inputs)
    torch.testing.assert_close(out, moved, rtol=2e-2, atol=1e-2)
    for a, b in zip(grads, torch.autograd.grad(moved, inputs, g), strict=True):
        assert relative(a, b) <= 3e-3
    assert any(not torch.equal(a, b) for a, b in zip(grads, want_grads, strict=True))


def test_decode_in_a_graph_follows_the_context():
    chunks = 1 << 15
    q, q_select, lm = normal(1, 16, 128), normal(1, 1, 128), normal(1, chunks, 1, 128, seed=1)
    k, v = (normal(1, chunks * 64, 1, 128, seed=s) for s in (1, 2))
    visible = torch.tensor([chunks // 2], dtype=torch.int32, device="cuda")
    args = (q, k, v, q_select, lm, visible)
    with torch.no_grad():
        hsa_decode(*args, top_k=64, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = hsa_decode(*args, top_k=64, backend="triton")
        for n in (chunks // 2, chunks, 3, 0):
            visible.fill_(n)
            graph.replay()
            exact = hsa_decode(*(x.double() for x in args[:-1]), visible, top_k=64, backend="reference")
            assert relative(out, exact) <= 3e-3
