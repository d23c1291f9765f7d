"""Inputs, selections, baselines and the correctness gate of the kernel benchmark."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hsa_kernels import reference
from hsa_kernels import window as window_attention

# Largest relative error (norm of the difference over norm) of a result whose time is shown, bfloat16.
TOLERANCE = 3e-3
_SAMPLES = 192


@dataclass
class Case:
    """One HSA problem: q, cotangent (1, L, Hq, D); k, v (1, L, Hkv, D); weights, indices (1, L, Hkv, K)."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    indices: Tensor
    cotangent: Tensor
    chunk_size: int

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def inputs(self) -> list[Tensor]:
        """Leaf copies (views of the same memory) that take gradients."""
        return [x.detach().requires_grad_() for x in (self.q, self.k, self.v, self.weights)]

    def flops(self, matmuls: int) -> float:
        """Useful floating-point operations: forward is 2 products per pair of chunk and query head, backward 5."""
        pairs = int((self.indices >= 0).sum())
        ratio = self.q.shape[2] // self.k.shape[2]
        return 2.0 * matmuls * pairs * ratio * self.chunk_size * self.q.shape[3]


def choose_ids(length: int, heads: int, top_k: int, chunk_size: int, kind: str, device: torch.device) -> Tensor:
    """Causal chunk ids (1, L, heads, K), -1 where a token sees no chunk.

    overlap: every column keeps its chunk from one token to the next with probability 0.8; random: fresh ids for every
    token; clustered: runs of neighbouring chunks; hot: all tokens choose chunk 0, padded with fresh ids from there on;
    all: every visible chunk.
    """
    g = torch.Generator(device=device).manual_seed(0)
    t = torch.arange(length, device=device, dtype=torch.int32).view(1, length, 1, 1)
    if kind == "all":
        column = torch.arange(top_k, device=device, dtype=torch.int32)
        return torch.where(column < t // chunk_size, column, -1).expand(1, length, heads, top_k).contiguous()
    u = torch.rand(1, length, heads, top_k, device=device, generator=g)
    source = t.expand(1, length, heads, top_k)
    if kind == "overlap":
        fresh = torch.rand(1, length, heads, top_k, device=device, generator=g) > 0.8
        fresh |= (t % chunk_size == 0) & (t // chunk_size <= top_k)
        fresh[:, 0] = True
        source = torch.where(fresh, source, 0).cummax(1)[0]
    u = torch.gather(u, 1, source.long())
    visible = source // chunk_size
    if kind == "clustered":
        first = torch.gather(u, 3, torch.arange(top_k, device=device).view(1, 1, 1, -1).expand_as(u) // 8 * 8)
        ids = (first * (visible - 7).clamp(min=1)).int() + torch.arange(top_k, device=device, dtype=torch.int32) % 8
        ids = torch.minimum(ids, visible - 1)
    else:
        ids = (u * visible).int()
    if kind == "hot":
        ids[..., : top_k // 2] = 0
    return torch.where(visible > 0, ids, -1).int().contiguous()


def make_case(
    length: int, heads_q: int, heads_kv: int, *, kind: str, top_k: int = 64, dim: int = 128, chunk_size: int = 64
) -> Case:
    """Random bfloat16 inputs on the GPU, weights a softmax over the chosen columns."""
    device = torch.device("cuda")
    g = torch.Generator(device=device).manual_seed(1)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, length, heads, dim, device=device, generator=g, dtype=torch.bfloat16)

    indices = choose_ids(length, heads_kv, top_k, chunk_size, kind, device)
    weights = torch.randn(1, length, heads_kv, top_k, device=device, generator=g).softmax(-1)
    weights = weights.masked_fill_(indices < 0, 0.0)
    return Case(normal(heads_q), normal(heads_kv), normal(heads_kv), weights, indices, normal(heads_q), chunk_size)


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm; infinite when anything is not finite."""
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


def attention_error(case: Case, run: Callable[..., Tensor], *, backward: bool) -> float:
    """Worst relative error of o, dq, dk, dv, dw against the fp64 oracle on sampled tokens.

    The cotangent is zero outside the sample, so the oracle's dk and dv need the sampled tokens only.
    """
    length = case.q.shape[1]
    g = torch.Generator().manual_seed(2)
    rows = torch.randint(length, (_SAMPLES,), generator=g).unique().to(case.q.device)
    inputs = case.inputs()
    sampled = (case.q[:, rows], case.k, case.v, case.weights[:, rows])
    q, k, v, w = exact = tuple(x.double().requires_grad_(backward) for x in sampled)
    with torch.set_grad_enabled(backward):
        want = reference.hsa_attention(q, k, v, w, case.indices[:, rows], chunk_size=case.chunk_size)
        got = run(*inputs)
    worst = relative(got[:, rows], want)
    if backward:
        cotangent = torch.zeros_like(case.q)
        cotangent[:, rows] = case.cotangent[:, rows]
        grads = torch.autograd.grad(got, inputs, cotangent)
        exact_grads = torch.autograd.grad(want, exact, case.cotangent[:, rows].double())
        for name, a, b in zip("qkvw", grads, exact_grads, strict=True):
            worst = max(worst, relative(a[:, rows] if name in "qw" else a, b))
    return worst


def measure(run: Callable[[], object], repeats: int = 7) -> float:
    """Median milliseconds of one call, by device events, after two warm-up calls."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def peak_gigabytes(run: Callable[[], object]) -> float:
    """Memory allocated by one call above what was held before, at its highest, in 2**30 bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def dense_attention(case: Case) -> tuple[Callable[[], Tensor], Callable[[], object]]:
    """cuDNN's causal attention over all tokens, forward and forward + backward; keys repeated to every head."""
    ratio = case.q.shape[2] // case.k.shape[2]
    q, cotangent = (x.transpose(1, 2).contiguous() for x in (case.q, case.cotangent))
    k, v = (x.repeat_interleave(ratio, 2).transpose(1, 2).contiguous() for x in (case.k, case.v))
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def both() -> object:
        return torch.autograd.grad(forward(), (q, k, v), cotangent)

    return forward, both


def window_methods(window: int) -> dict[str, Callable[..., Tensor]]:
    """What `sliding_window_attention` may choose from: q, k, v -> output, causal, the last `window` tokens."""
    methods: dict[str, Callable[..., Tensor]] = {
        "torch flash": lambda q, k, v: window_attention.flash_window(q, k, v, window, 0, None),
        "flex": lambda q, k, v: window_attention.flex_window(q, k, v, window, None, 0, None),
    }
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_func

        methods["flash-attn package"] = lambda q, k, v: flash_attn_func(
            q, k, v, causal=True, window_size=(window - 1, 0)
        )
    return methods


def window_error(run: Callable[..., Tensor], inputs: list[Tensor], window: int) -> float:
    """Relative error of the last 128 tokens' output against the fp64 oracle."""
    rows, keys = slice(-128, None), slice(-128 - window, None)
    q, k, v = (x.detach() for x in inputs)
    with torch.no_grad():
        sampled = (q[:, rows].double(), k[:, keys].double(), v[:, keys].double())
        offset = min(window, q.shape[1] - 128)
        want = reference.sliding_window_attention(*sampled, window=window, key_offset=offset)
        return relative(run(q, k, v)[:, rows], want)


def load_authors(path: str) -> Callable[..., Tensor]:
    """The authors' kernel from a checkout of their public repository: ops/hsa_triton.py, function HSA."""
    file = Path(path) / "ops" / "hsa_triton.py"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: --authors-path wants a checkout of the authors' repository")
    spec = importlib.util.spec_from_file_location("authors_hsa_triton", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["authors_hsa_triton"] = module
    spec.loader.exec_module(module)
    return module.HSA
