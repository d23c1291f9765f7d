"""Public attention operators: one signature, a plain torch reference and Triton kernels behind it.

backend = "reference": `hsa_kernels.reference`, any size and dtype. "triton": the kernels, or a ValueError that says
what they do not support. "auto": the kernels on CUDA where they support the case, the reference otherwise.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from hsa_kernels import reference
from hsa_kernels.reference import selection_weights
from hsa_kernels.shapes import check_hsa_shapes, check_selection_shapes, check_window_shapes

__all__ = [
    "hsa_attention",
    "hsa_decode",
    "hsa_decode_attend",
    "hsa_decode_select",
    "select_chunks",
    "selection_weights",
    "sliding_window_attention",
    "window_decode",
]

BACKENDS = ("auto", "reference", "triton")
# Operators whose reference does more work than the kernels; on CUDA it does not run unannounced.
SLOW_REFERENCE = ("hsa_attention", "select_chunks")


# Looked up once: torch.compile traces through the dispatch.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _use_kernels(backend: str, name: str, device_type: str, reason: Callable[[], str | None]) -> bool:
    """Whether the kernels run this call. reason() tells why they can't take it, None if they can."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    if backend == "reference" or (backend == "auto" and (device_type != "cuda" or not _HAS_TRITON)):
        return False
    if not _HAS_TRITON:
        raise ValueError(f"{name}: backend 'triton' needs the triton package")
    from hsa_kernels.triton import interpreter

    if device_type != "cuda" and not interpreter.enabled():
        raise ValueError(f"{name}: backend 'triton' needs CUDA tensors, got {device_type} (or TRITON_INTERPRET=1)")
    why = reason()
    if why is not None and backend == "triton":
        raise ValueError(f"{name}: the kernels do not support {why}; use backend 'auto' or 'reference'")
    # Empty: a context-parallel rank that is handed no queries.
    if why not in (None, "empty input") and name in SLOW_REFERENCE and not torch.compiler.is_compiling():
        _warn_once(f"{name} runs in plain torch, slowly for long inputs: the kernels do not support {why}")
    return why is None


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)


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
    """Hierarchical sparse attention; shapes and equations in `reference.hsa_attention`.

    The kernels ignore ids outside 0..C-1. Under torch.use_deterministic_algorithms(True) they give equal bits in every
    run, at some cost; otherwise gradients (and outputs at head ratios below 8) are summed in no fixed order.
    """

    def reason() -> str | None:
        from hsa_kernels.triton import attention

        if softmax_scale is not None and softmax_scale < 0:
            return f"softmax_scale {softmax_scale} (0 or more)"
        return attention.supports(q, k, v, weights, indices, chunk_size)

    if _use_kernels(backend, "hsa_attention", q.device.type, reason):
        from hsa_kernels.triton import register

        check_hsa_shapes(q, k, v, weights, indices, chunk_size)
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
        return register.attention_op(q, k, v, weights, indices.int(), chunk_size, scale)[0]
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
    decay: Tensor | None = None,
    reach: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Top-k chunks per token and their differentiable scores; rules in `reference.select_chunks`."""

    def reason() -> str | None:
        from hsa_kernels import select

        return select.supports(q, landmarks)

    if _use_kernels(backend, "select_chunks", q.device.type, reason):
        from hsa_kernels.triton import register

        check_selection_shapes(q, landmarks, documents, top_k, chunk_size, query_offset, decay, reach)
        return register.select_op(
            q, landmarks, documents, noise, decay, top_k, chunk_size, query_offset, exclude_window, reach
        )
    return reference.select_chunks(
        q,
        landmarks,
        top_k=top_k,
        chunk_size=chunk_size,
        query_offset=query_offset,
        documents=documents,
        exclude_window=exclude_window,
        noise=noise,
        decay=decay,
        reach=reach,
    )


def hsa_decode_select(
    q_select: Tensor,
    landmarks: Tensor,
    visible: Tensor,
    *,
    top_k: int,
    decay: Tensor | None = None,
    reach: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The chunks one new token per sequence reads: ids (B, Hr, K) int32, ascending, and weights (B, Hr, K), their
    softmaxed scores, without gradients.

    q_select (B, Hr, Dr); landmarks (B, C, Hr, Dr), a cache of any capacity C; visible (B,) int32 on the device: chunks
    0..visible-1 may be chosen. decay (B, Hr) takes decay * ln(n / reach) off the score of a chunk n > reach chunks
    back, the last visible one being one chunk back. K is top_k or more (the kernels' next power of two); -1 and weight
    0 fill it up. Only shapes decide what is launched: a CUDA graph of the call serves a context that grows up to C.
    """

    def reason() -> str | None:
        from hsa_kernels import decode

        return decode.supports_select(q_select, landmarks, top_k)

    if _use_kernels(backend, "hsa_decode_select", q_select.device.type, reason):
        from hsa_kernels import decode

        return decode.select(q_select, landmarks, visible, top_k=top_k, decay=decay, reach=reach)
    return reference.hsa_decode_select(q_select, landmarks, visible, top_k=top_k, decay=decay, reach=reach)


def hsa_decode_attend(
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
    """Attention of one new token per sequence to its chosen chunks, without gradients.

    q (B, Hq, D); k, v (B, C * chunk_size, Hkv, D); weights, indices (B, Hr, K), Hr = Hkv or 1, -1 = none. Returns
    (B, Hq, D). The bits depend on the chunks' contents and their order, not on where in k and v they lie.
    """

    def reason() -> str | None:
        from hsa_kernels import decode

        if softmax_scale is not None and softmax_scale < 0:
            return f"softmax_scale {softmax_scale} (0 or more)"
        return decode.supports_attend(q, k, v, indices.shape[2], chunk_size)

    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if _use_kernels(backend, "hsa_decode_attend", q.device.type, reason):
        from hsa_kernels import decode

        return decode.attend(q, k, v, weights, indices, chunk_size=chunk_size, scale=scale)
    return reference.hsa_decode_attend(q, k, v, weights, indices, chunk_size=chunk_size, softmax_scale=scale)


def hsa_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_select: Tensor,
    landmarks: Tensor,
    visible: Tensor,
    *,
    top_k: int,
    chunk_size: int = 64,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Selection and attention of one new token per sequence, without gradients: `hsa_decode_select`, then
    `hsa_decode_attend`. Returns (B, Hq, D).
    """
    ids, weights = hsa_decode_select(q_select, landmarks, visible, top_k=top_k, backend=backend)
    return hsa_decode_attend(q, k, v, weights, ids, chunk_size=chunk_size, softmax_scale=softmax_scale, backend=backend)


def window_decode(
    q: Tensor, k: Tensor, v: Tensor, filled: Tensor, *, softmax_scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Attention of one new token per sequence to a ring buffer of its window, without gradients.

    q (B, Hq, D); k, v (B, Hkv, W, D), in any order, the token itself included; filled (B,) integer on the device:
    slots 0..filled-1 hold something. Returns (B, Hq, D) in q's dtype.
    """

    def reason() -> str | None:
        from hsa_kernels import window_ring

        return window_ring.supports(q, k, v)

    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if _use_kernels(backend, "window_decode", q.device.type, reason):
        from hsa_kernels import window_ring

        return window_ring.window_decode(q, k, v, filled, scale)
    return reference.window_decode(q, k, v, filled, softmax_scale=scale)


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
    """Causal attention to the last `window` tokens; rules in `reference.sliding_window_attention`.

    On CUDA this is a kernel of torch's, without gradients also one of ours, see `hsa_kernels.window` (backend "triton"
    asks for them, "auto" takes them).
    """

    def reason() -> str | None:
        from hsa_kernels import window as window_attention

        return window_attention.supports(q, k, v)

    if _use_kernels(backend, "sliding_window_attention", q.device.type, reason):
        from hsa_kernels import window as window_attention

        check_window_shapes(q, k, v, window, documents, key_offset)
        return window_attention.window_attention(q, k, v, window, documents, key_offset, softmax_scale)
    return reference.sliding_window_attention(
        q, k, v, window=window, documents=documents, key_offset=key_offset, softmax_scale=softmax_scale
    )
