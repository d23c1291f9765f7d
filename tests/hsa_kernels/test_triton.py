"""The kernels against the oracle: on a GPU as they are, without one under Triton's interpreter (small sizes)."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import library

pytest.importorskip("triton")

from hsa_kernels import hsa_attention, hsa_decode, ops, reference, select_chunks, selection_weights
from hsa_kernels import index as work_lists
from hsa_kernels.ops import window_decode
from hsa_kernels.triton import attention, interpreter, register
from hsa_kernels.triton.window_forward import window_forward

DEVICE = "cpu" if interpreter.enabled() else "cuda"
# A GPU gets half precision as bfloat16; the interpreter has no bfloat16 products.
HALF = torch.float16 if interpreter.enabled() else torch.bfloat16


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory holds NaN (or nonsense ids), so that whatever is read must have been written."""
    real_empty, real_like = torch.empty, torch.empty_like

    def poison(x):
        return x.fill_(float("nan") if x.is_floating_point() else 1 << 30 if x.dtype == torch.int32 else 77)

    monkeypatch.setattr(torch, "empty", lambda *a, **kw: poison(real_empty(*a, **kw)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: poison(real_like(*a, **kw)))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    assert torch.isfinite(got).all()
    scale = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / scale if scale > 0 else got.double().norm().item()


def make(batch, length, heads, ratio, chunks, size, dim, top_k, dtype=torch.float32, pattern="random", seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, length, heads * ratio, dim, generator=g)
    k, v = (torch.randn(batch, chunks * size, heads, dim, generator=g) for _ in "kv")
    w = torch.rand(batch, length, heads, top_k, generator=g)
    idx = torch.randint(-1, chunks, (batch, length, heads, top_k), generator=g, dtype=torch.int32)
    if pattern == "hot":  # everybody chooses the same chunk, in every column
        idx.fill_(chunks - 1)
    if pattern == "none":
        idx.fill_(-1)
    idx[:, length // 2] = -1  # a token without chunks
    w[:, 0] = 0.0  # a token with weights of 0
    cot = torch.randn(batch, length, heads * ratio, dim, generator=g)
    tensors = [x.to(dtype).to(DEVICE) for x in (q, k, v)] + [w.to(DEVICE)]
    return tensors, idx.to(DEVICE), cot.to(dtype).to(DEVICE)


def oracle(tensors, idx, cot, size, scale):
    inputs = [x.double().requires_grad_() for x in tensors]
    out = reference.hsa_attention(*inputs, idx, chunk_size=size, softmax_scale=scale)
    if not out.requires_grad:
        return out, [torch.zeros_like(x) for x in inputs]
    return out.detach(), torch.autograd.grad(out, inputs, cot.double(), allow_unused=True, materialize_grads=True)


FORMS = {
    "one_pass": {"one_pass": True, "deterministic": False},
    "two_pass": {"one_pass": False, "deterministic": False},
    "deterministic": {"one_pass": False, "deterministic": True},
}

# batch, length, kv heads, ratio, chunks, chunk size, head size, top_k, dtype, pattern
CASES = [
    (2, 21, 2, 4, 4, 16, 16, 3, torch.float32, "random"),
    (1, 19, 1, 16, 3, 32, 32, 5, torch.float32, "random"),
    (1, 9, 2, 1, 5, 16, 16, 4, torch.float32, "random"),
    (2, 7, 1, 32, 2, 16, 32, 2, torch.float32, "random"),
    (1, 11, 1, 8, 3, 64, 64, 3, HALF, "random"),
    (1, 13, 1, 2, 2, 128, 16, 2, HALF, "random"),
    (1, 10, 1, 16, 2, 64, 128, 2, HALF, "random"),
    (1, 17, 1, 4, 3, 16, 16, 3, torch.float32, "hot"),
    (1, 9, 2, 8, 3, 16, 16, 2, torch.float32, "none"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(x).removeprefix("torch.") for x in c))
def test_attention_kernels_equal_the_oracle(case):
    *shape, dtype, pattern = case
    tensors, idx, cot = make(*shape, dtype=dtype, pattern=pattern)
    size = shape[5]
    scale = 0.3
    out, grads = oracle(tensors, idx, cot, size, scale)
    tol = 1e-5 if dtype == torch.float32 else 3e-3
    for form in (attention.forward_union, attention.forward_chunks):
        got = form(*tensors, idx, size, scale)
        assert relative(got[0] if isinstance(got, tuple) else got, out) <= tol, form.__name__
    for name, form in FORMS.items():
        got = attention.backward_form(*tensors, idx, cot, size, scale, **form)
        for label, a, b in zip("q k v w".split(), got, grads, strict=True):
            assert a.dtype == tensors["qkvw".index(label)].dtype
            assert relative(a, b) <= tol, (name, label)


def test_many_columns_and_long_bins_are_split():
    """K over 128 (16-bit slots), and bins longer than one work item."""
    tensors, idx, cot = make(1, 3, 1, 32, 3, 16, 16, 130)
    out, grads = oracle(tensors, idx, cot, 16, 1.0)
    assert relative(attention.forward_union(*tensors, idx, 16, 1.0), out) <= 1e-5
    pairs = work_lists.build_pairs(idx, 3, segment=2, part=32, stable=False)
    assert int(pairs.item_start[-1]) > 3 * pairs.segments  # 3 chunks, 3 segments: some bins have two parts
    got = attention.backward_form(*tensors, idx, cot, 16, 1.0, **FORMS["one_pass"])
    for a, b in zip(got, grads, strict=True):
        assert relative(a, b) <= 1e-5


def test_passes_over_the_queries_add_up(monkeypatch):
    monkeypatch.setattr(attention, "_PASS_BYTES", 0)
    tensors, idx, cot = make(1, 2065, 1, 1, 2, 16, 16, 1)
    out, grads = oracle(tensors, idx, cot, 16, 0.25)
    assert len(attention._query_passes(tensors[0])) == 2
    assert relative(attention.forward_chunks(*tensors, idx, 16, 0.25)[0], out) <= 1e-5
    got = attention.backward_form(*tensors, idx, cot, 16, 0.25, **FORMS["one_pass"])
    for a, b in zip(got, grads, strict=True):
        assert relative(a, b) <= 1e-5


def test_operator_takes_non_contiguous_inputs_and_gives_gradients():
    tensors, idx, cot = make(2, 12, 2, 4, 3, 16, 16, 3)
    want, grads = oracle(tensors, idx, cot, 16, 0.25)
    odd = [x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in tensors]
    ids = idx.transpose(1, 2).contiguous().transpose(1, 2)
    assert not odd[0].is_contiguous() and not ids.is_contiguous()
    out = hsa_attention(*odd, ids, chunk_size=16, backend="triton")
    assert relative(out.detach(), want) <= 1e-5
    for a, b in zip(
        torch.autograd.grad(out, odd, cot.transpose(0, 1).contiguous().transpose(0, 1)), grads, strict=True
    ):
        assert relative(a, b) <= 1e-5


def test_backward_takes_the_lists_of_forward(monkeypatch):
    """Head ratios below 8 in half precision: pairs are sorted once."""
    tensors, idx, cot = make(2, 12, 2, 2, 3, 16, 16, 3, dtype=HALF)
    _, grads = oracle(tensors, idx, cot, 16, 0.25)
    inputs = [x.requires_grad_() for x in tensors]
    out = hsa_attention(*inputs, idx, chunk_size=16, backend="triton")
    monkeypatch.setattr(attention, "build_pairs", None)
    for a, b in zip(torch.autograd.grad(out, inputs, cot), grads, strict=True):
        assert relative(a, b) <= 3e-3


def test_deterministic_mode_repeats_its_bits():
    tensors, idx, cot = make(1, 40, 2, 2, 3, 16, 16, 3, dtype=HALF)
    inputs = [x.requires_grad_() for x in tensors]
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            out = hsa_attention(*inputs, idx, chunk_size=16, backend="triton")
            runs.append([out, *torch.autograd.grad(out, inputs, cot)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("length", "heads", "dim", "chunks", "top_k", "size", "offset", "exclude", "documents", "kind"),
    [
        (40, 2, 16, 300, 5, 1, 280, 0, False, "normal"),
        (33, 1, 64, 60, 7, 4, 100, 9, True, "normal"),
        (20, 1, 16, 600, 64, 1, 590, 0, False, "equal"),
        (10, 1, 256, 150, 3, 2, 300, 0, False, "normal"),
        (12, 1, 16, 900, 64, 1, 899, 0, False, "periodic"),
        (5, 1, 16, 300, 100, 1, 298, 0, False, "normal"),
    ],
)
def test_selection_equals_the_oracle(length, heads, dim, chunks, top_k, size, offset, exclude, documents, kind):
    g = torch.Generator().manual_seed(chunks)
    # Small integers make every sum exact, so ids must agree to the last one, ties included.
    q, lm = (torch.randint(-9, 10, (2, n, heads, dim), generator=g).float() for n in (length, chunks))
    if kind == "equal":
        lm[:] = 1.0
    if kind == "periodic":  # high scores in few residue classes: the candidates overflow
        lm += 40.0 * (torch.arange(chunks) % 128 < 40).float().view(1, -1, 1, 1) * q[:, :1].sign()
        q = q[:, :1].expand(-1, length, -1, -1) + 0.0
    docs = (torch.arange(offset + length) // (size * 12)).int().expand(2, -1).to(DEVICE) if documents else None
    q, lm = q.to(DEVICE).requires_grad_(), lm.to(DEVICE).requires_grad_()
    kwargs = {"top_k": top_k, "chunk_size": size, "query_offset": offset, "exclude_window": exclude, "documents": docs}
    ids, scores = select_chunks(q, lm, backend="triton", **kwargs)
    want_ids, want = select_chunks(q, lm, backend="reference", **kwargs)
    assert ids.dtype == torch.int32 and torch.equal(ids, want_ids)
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-5)
    cot = torch.randn(scores.shape, generator=g).to(DEVICE)
    got = torch.autograd.grad((selection_weights(scores, ids) * cot).sum(), (q, lm))
    for a, b in zip(got, torch.autograd.grad((selection_weights(want, ids) * cot).sum(), (q, lm)), strict=True):
        assert relative(a, b) <= 1e-5


def test_selection_gradients_in_blocks(monkeypatch):
    """Every block stops at its last query's chunks."""
    monkeypatch.setattr(register.selection, "_LEAST_BLOCK", 7)
    g = torch.Generator().manual_seed(5)
    q, lm = (torch.randn(2, n, 2, 16, generator=g, device="cpu").to(DEVICE).requires_grad_() for n in (50, 30))
    kwargs = {"top_k": 3, "chunk_size": 2, "query_offset": 9}
    ids, scores = reference.select_chunks(q, lm, **kwargs)
    cot = torch.randn(scores.shape, generator=g).to(DEVICE)
    want = torch.autograd.grad(torch.where(ids < 0, 0, scores), (q, lm), cot)
    got = register.selection.select_backward(q, lm, ids, cot, chunk_size=2, query_offset=9)
    for ours, expected in zip(got, want, strict=True):
        assert relative(ours, expected) < 1e-5


@pytest.mark.parametrize("kind", ["prefix", "documents", "more than there are", "many", "noise", "excluded"])
def test_selection_by_blocks_equals_the_oracle(monkeypatch, kind):
    """All visible chunks, more than 128 of them, and noise; in blocks of a few queries."""
    monkeypatch.setattr(register.selection, "_BLOCK_BYTES", 16 * 300 * 16 * 7)
    g = torch.Generator().manual_seed(1)
    length, chunks, size, offset = 30, 300, 2, 560
    q, lm = (torch.randint(-3, 4, (2, n, 2, 16), generator=g).float().to(DEVICE) for n in (length, chunks))
    q, lm = q.requires_grad_(), lm.requires_grad_()
    kwargs = {"top_k": chunks, "chunk_size": size, "query_offset": offset}
    if kind == "documents":  # documents of 5 chunks; the first tokens see none
        kwargs["documents"] = (torch.arange(offset + length) // 10).int().expand(2, -1).to(DEVICE)
    if kind == "more than there are":
        kwargs["top_k"] = chunks + 9
    if kind == "many":
        kwargs["top_k"] = 200
    if kind == "noise":
        kwargs |= {"top_k": 5, "noise": torch.randn(2, 1, 1, chunks, generator=g).to(DEVICE)}
    if kind == "excluded":
        kwargs["exclude_window"] = 37
    ids, scores = select_chunks(q, lm, backend="triton", **kwargs)
    want_ids, want = select_chunks(q, lm, backend="reference", **kwargs)
    assert ids.dtype == torch.int32 and torch.equal(ids, want_ids)
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-5)
    cot = torch.randn(scores.shape, generator=g).to(DEVICE)
    got = torch.autograd.grad((selection_weights(scores, ids) * cot).sum(), (q, lm))
    for a, b in zip(got, torch.autograd.grad((selection_weights(want, ids) * cot).sum(), (q, lm)), strict=True):
        assert relative(a, b) <= 1e-5


@pytest.mark.parametrize(
    ("top_k", "kind"), [(5, "normal"), (5, "documents"), (64, "periodic"), (200, "normal"), (300, "all")]
)
def test_selection_with_decay_equals_the_oracle(monkeypatch, top_k, kind):
    """Scores that fall with the distance: candidates, their overflow, and plain torch by blocks; every gradient."""
    monkeypatch.setattr(register.selection, "_BLOCK_BYTES", 16 * 300 * 16 * 7)
    g = torch.Generator().manual_seed(top_k)
    length, chunks, size, offset = 30, 300, 2, 570
    q, lm = (torch.randn(2, n, 2, 16, generator=g) for n in (length, chunks))
    if kind == "periodic":  # high scores in few residue classes: the candidates overflow
        lm += 40.0 * (torch.arange(chunks) % 128 < 40).float().view(1, -1, 1, 1) * q[:, :1].sign()
        q = q[:, :1].expand(-1, length, -1, -1) + 0.0
    inputs = [x.to(DEVICE).requires_grad_() for x in (q, lm, 2 * torch.rand(2, length, 2, generator=g))]
    kwargs = {"top_k": top_k, "chunk_size": size, "query_offset": offset, "reach": 7.5}
    if kind == "documents":
        kwargs["documents"] = (torch.arange(offset + length) // 100).int().expand(2, -1).to(DEVICE)
    found = {}
    for backend in ("triton", "reference"):
        q, lm, decay = inputs
        ids, scores = select_chunks(q, lm, decay=decay, backend=backend, **kwargs)
        cot = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        found[backend] = ids, scores, torch.autograd.grad((selection_weights(scores, ids) * cot).sum(), inputs)
    (ids, scores, got), (want_ids, want, expected) = found["triton"], found["reference"]
    assert torch.equal(ids, want_ids)
    if top_k < chunks and kind != "documents":
        assert not torch.equal(ids, select_chunks(q, lm, backend="triton", **kwargs)[0])
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) <= 1e-5


def test_selection_in_passes(monkeypatch):
    monkeypatch.setattr(register.selection, "_PASS_BYTES", 0)
    monkeypatch.setattr(register.selection, "_BLOCK_BYTES", 0)
    g = torch.Generator().manual_seed(0)
    q, lm = (torch.randn(1, n, 1, 16, generator=g).to(DEVICE).requires_grad_() for n in (70, 90))
    ids, scores = select_chunks(q, lm, top_k=3, chunk_size=1, query_offset=50, backend="triton")
    want_ids, want = select_chunks(q, lm, top_k=3, chunk_size=1, query_offset=50, backend="reference")
    assert torch.equal(ids, want_ids)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, lm)) for x in (scores, want)), strict=True):
        assert relative(a, b) <= 1e-5


@pytest.mark.parametrize(
    ("heads", "select_heads", "ratio", "chunks", "top_k", "kind"),
    [
        (2, 2, 4, 300, 5, "normal"),
        (2, 1, 1, 1000, 64, "normal"),
        (1, 1, 2, 700, 16, "equal"),
        (1, 1, 16, 40, 64, "normal"),
    ],
)
def test_decode_equals_the_oracle(heads, select_heads, ratio, chunks, top_k, kind):
    g = torch.Generator().manual_seed(chunks)
    size, dim, dim_r = 16, 16, 256 if chunks == 40 else 32
    q = torch.randn(3, heads * ratio, dim, generator=g).to(DEVICE)
    k, v = (torch.randn(3, chunks * size, heads, dim, generator=g).to(DEVICE) for _ in "kv")
    q_select = torch.randn(3, select_heads, dim_r, generator=g).to(DEVICE)
    landmarks = torch.randn(3, chunks, select_heads, dim_r, generator=g).to(DEVICE)
    if kind == "equal":  # more ties than the candidate buffer holds
        landmarks[:] = 1.0
    visible = torch.tensor([chunks, 3, 0], dtype=torch.int32, device=DEVICE)
    landmarks[1, 3:], landmarks[2] = float("nan"), float("nan")  # what is not there yet is never read
    args = (q, k, v, q_select, landmarks, visible)
    got = hsa_decode(*args, top_k=top_k, chunk_size=size, softmax_scale=0.3, backend="triton")
    want = hsa_decode(*args, top_k=top_k, chunk_size=size, softmax_scale=0.3, backend="reference")
    assert got.shape == q.shape and relative(got, want) <= 1e-5 and torch.equal(got[2], torch.zeros_like(got[2]))


@pytest.mark.parametrize("chunks", [40, 700])
def test_decode_with_decay_equals_the_oracle(chunks):
    g = torch.Generator().manual_seed(chunks)
    q, landmarks = torch.randn(3, 2, 32, generator=g).to(DEVICE), torch.randn(3, chunks, 2, 32, generator=g).to(DEVICE)
    decay = torch.rand(3, 1, generator=g).to(DEVICE).expand(3, 2)
    visible = torch.tensor([chunks, 17, 0], dtype=torch.int32, device=DEVICE)
    ways = {"top_k": 8, "decay": decay, "reach": 4.0}
    ids, weights = ops.hsa_decode_select(q, landmarks, visible, backend="triton", **ways)
    want_ids, want = ops.hsa_decode_select(q, landmarks, visible, backend="reference", **ways)
    assert torch.equal(ids, want_ids) and relative(weights, want) <= 1e-5
    assert not torch.equal(ids, ops.hsa_decode_select(q, landmarks, visible, top_k=8, backend="triton")[0])


@pytest.mark.parametrize(("heads", "ratio", "size"), [(2, 3, 200), (1, 16, 64), (2, 1, 5)])
def test_window_decode_equals_the_oracle(heads, ratio, size):
    g = torch.Generator().manual_seed(size)
    q = torch.randn(3, heads * ratio, 16, generator=g).to(DEVICE)
    k, v = (torch.randn(3, heads, size, 16, generator=g).to(DEVICE) for _ in "kv")
    filled = torch.tensor([size, 1, size - 1], device=DEVICE)
    k[1, :, 1:], v[1, :, 1:] = 1e4, 1e4  # what is not there yet has no weight
    got = window_decode(q, k, v, filled, softmax_scale=0.5, backend="triton")
    want = window_decode(q, k, v, filled, softmax_scale=0.5, backend="reference")
    whole = torch.softmax(torch.einsum("hrd,hsd->hrs", q[0].view(heads, ratio, 16), k[0]) * 0.5, -1)
    assert relative(got, want) <= 1e-5
    assert relative(got[0].view(heads, ratio, 16), torch.einsum("hrs,hsd->hrd", whole, v[0])) <= 1e-5


def test_loop_order_follows_the_head_ratio_and_the_overlap(monkeypatch):
    used = []
    for name in ("forward_union", "forward_chunks"):
        real = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, _n=name, _r=real, **kw: used.append(_n) or _r(*a, **kw))
    wide, ids, _ = make(1, 4, 1, 8, 2, 16, 16, 2)
    narrow, narrow_ids, _ = make(1, 4, 1, 4, 2, 16, 16, 2)
    attention.forget_overlap()
    attention.forward(*wide, ids, 16, 1.0)
    attention.forward(*narrow, narrow_ids, 16, 1.0)
    monitor = attention._monitors[(wide[0].device, 8, 2, 4)]
    monkeypatch.setattr(monitor, "overlap", lambda tile: 3.0)
    attention.forward(*wide, ids, 16, 1.0)
    monkeypatch.setattr(monitor, "overlap", lambda tile: 1.5)
    attention.forward(*wide, ids, 16, 1.0)
    assert used == ["forward_union", "forward_chunks", "forward_chunks", "forward_union"]
    attention.forget_overlap()


def test_the_reference_does_not_run_unannounced_on_a_gpu():
    ops._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="select_chunks runs in plain torch, .* do not support the moon"):
        assert not ops._use_kernels("auto", "select_chunks", "cuda", lambda: "the moon")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ops._use_kernels("auto", "select_chunks", "cuda", lambda: "the moon")  # once is enough
        assert not ops._use_kernels("auto", "sliding_window_attention", "cuda", lambda: "the sea")
        assert ops._use_kernels("auto", "select_chunks", "cuda", lambda: None)


def test_segments_follow_the_length():
    """Bins of dk and dv hold 128 pairs; where that leaves the cache far behind there are no segments."""
    sizes = [attention._segment_without_dq(16, 128, n // 64, 64, n) for n in (16384, 131072, 262144, 1 << 20)]
    assert sizes == [4096, 4096, 8192, 1 << 20]


def test_operators_pass_torch_checks():
    """Fake kernels, aliasing and autograd registration, as torch.compile relies on them."""
    tensors, idx, _ = make(1, 6, 1, 2, 2, 16, 16, 2)
    inputs = [x.requires_grad_() for x in tensors]
    library.opcheck(register.attention_op, (*inputs, idx, 16, 0.25), test_utils=CHECKS)
    q, lm = (torch.randn(1, n, 1, 16, device=DEVICE, requires_grad=True) for n in (5, 9))
    decay = torch.rand(1, 5, 1, device=DEVICE, requires_grad=True)
    library.opcheck(register.select_op, (q, lm, None, None, None, 2, 1, 6, 0, 1.0), test_utils=CHECKS)
    library.opcheck(register.select_op, (q, lm, None, None, decay, 2, 1, 6, 0, 2.0), test_utils=CHECKS)


def test_dispatch_compiles_into_one_graph():
    """torch.compile traces the public operators, backend choice included, with gradients."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 20, h, 16, generator=g).to(DEVICE).requires_grad_() for h in (2, 1, 1))
    lm = torch.randn(1, 5, 1, 16, generator=g).to(DEVICE).requires_grad_()
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 60)) for x in (k, v))

    def layer(q, k, v, lm):
        ids, scores = select_chunks(q[:, :, :1], lm, top_k=2, chunk_size=4, backend="triton")
        return hsa_attention(q, k, v, selection_weights(scores, ids), ids, chunk_size=16, backend="triton")

    want = layer(q, k, v, lm)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v, lm)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, lm)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_unsupported_cases_say_why_and_auto_takes_the_reference():
    tensors, idx, _ = make(1, 4, 1, 3, 2, 16, 16, 2)
    with pytest.raises(ValueError, match="do not support 3 query heads"):
        hsa_attention(*tensors, idx, chunk_size=16, backend="triton")
    want = hsa_attention(*tensors, idx, chunk_size=16, backend="reference")
    torch.testing.assert_close(hsa_attention(*tensors, idx, chunk_size=16), want)
    q = torch.randn(1, 4, 1, 24, device=DEVICE)
    with pytest.raises(ValueError, match="retrieval size 24"):
        select_chunks(q, q, top_k=4, backend="triton")


WINDOWS = [  # batch, queries, keys, window, offset of the first query, query heads, kv heads, head size
    (2, 300, 300, 40, 0, 4, 2, 16),
    (1, 200, 712, 512, 512, 2, 2, 32),
    (1, 130, 400, 1, 250, 2, 1, 16),
    (1, 150, 600, 64, 400, 2, 1, 16),  # keys behind the queries
    (1, 257, 768, 512, 511, 1, 1, 64),  # a halo of window - 1
    (1, 129, 640, 130, 511, 1, 1, 128),
    (1, 300, 300, 200, 0, 2, 1, 16),
    (1, 100, 100, 1000, 0, 1, 1, 16),  # longer than everything
]


@pytest.mark.parametrize("blocks", [{}, {"M": 64, "N": 128}, {"M": 128, "N": 32}], ids=str)
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_window_without_gradients(case, blocks):
    batch, length, keys, size, offset, heads, kv_heads, dim = case
    g = torch.Generator().manual_seed(length)
    # Strided, as projections of queries, keys and values together make them.
    q = torch.randn(batch, length, heads + 1, dim, generator=g)[:, :, 1:].to(DEVICE)
    k, v = torch.randn(2, batch, kv_heads, keys, dim, generator=g).to(DEVICE).transpose(2, 3)
    # Nobody asks for fp32 on a GPU: its blocks of large heads would not fit into the shared memory.
    cases = ((torch.float32, 2e-6), (HALF, 1e-3)) if interpreter.enabled() else ((HALF, 6e-3),)
    for dtype, most in cases:
        inputs = [x.to(dtype) for x in (q, k, v)]
        got = window_forward(*inputs, size, offset, 0.3, **blocks)
        want = reference.sliding_window_attention(
            *(x.double() for x in inputs), window=size, key_offset=offset, softmax_scale=0.3
        )
        assert got.dtype == dtype and relative(got, want) < most
