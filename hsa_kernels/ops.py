"""Public attention operators: one signature, a plain torch reference and Triton kernels behind it.

backend = "reference": `hsa_kernels.reference`, any size and dtype. "triton": the kernels, or an error that says what
they do not support. "auto": the kernels on CUDA where they support the case, the reference otherwise.
"""

from __future__ import annotations

from torch import Tensor

from hsa_kernels import reference
from hsa_kernels.reference import selection_weights

__all__ = ["hsa_attention", "select_chunks", "selection_weights", "sliding_window_attention"]

BACKENDS = ("auto", "reference", "triton")


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")


def hsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    indices: Tensor,
    *,
    chunk_size: int = 64,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Hierarchical sparse attention; shapes and equations in `reference.hsa_attention`."""
    _check_backend(backend)
    return reference.hsa_attention(q, k, v, weights, indices, chunk_size=chunk_size, softmax_scale=softmax_scale)


def select_chunks(
    q: Tensor,
    landmarks: Tensor,
    *,
    top_k: int,
    chunk_size: int = 64,
    query_offset: int = 0,
    documents: Tensor | None = None,
    exclude_window: int = 0,
    noise: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Top-k chunks per token and their differentiable scores; rules in `reference.select_chunks`."""
    _check_backend(backend)
    return reference.select_chunks(
        q,
        landmarks,
        top_k=top_k,
        chunk_size=chunk_size,
        query_offset=query_offset,
        documents=documents,
        exclude_window=exclude_window,
        noise=noise,
    )


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    documents: Tensor | None = None,
    key_offset: int = 0,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention to the last `window` tokens; rules in `reference.sliding_window_attention`."""
    _check_backend(backend)
    return reference.sliding_window_attention(
        q, k, v, window=window, documents=documents, key_offset=key_offset, softmax_scale=softmax_scale
    )
