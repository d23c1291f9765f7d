"""Shape checks shared by every backend: a ValueError names the shape that does not fit."""

from __future__ import annotations

from torch import Tensor


def check_hsa_shapes(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, indices: Tensor, chunk_size: int) -> int:
    """Number of chunks C. Raises ValueError naming the shape that does not fit."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"hsa_attention: q, k, v must be 4-D with k like v, got {q.shape}, {k.shape}, {v.shape}")
    if weights.shape != indices.shape or indices.dim() != 4 or indices.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"hsa_attention: weights and indices must be (B, L, Hkv, K), got {weights.shape} and {indices.shape}"
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or indices.shape[2] != k.shape[2]:
        raise ValueError(f"hsa_attention: q {q.shape}, k {k.shape}, indices {indices.shape} do not belong together")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"hsa_attention: {q.shape[2]} query heads are no multiple of {k.shape[2]} key/value heads")
    if chunk_size < 1 or k.shape[1] % chunk_size:
        raise ValueError(f"hsa_attention: {k.shape[1]} keys are no multiple of chunk_size {chunk_size}: pad k and v")
    return k.shape[1] // chunk_size


def check_selection_shapes(
    q: Tensor,
    landmarks: Tensor,
    documents: Tensor | None,
    top_k: int,
    chunk_size: int,
    query_offset: int,
    decay: Tensor | None = None,
    reach: float = 1.0,
) -> None:
    """Raise ValueError naming what does not fit."""
    if q.dim() != 4 or landmarks.dim() != 4 or q.shape[0] != landmarks.shape[0] or q.shape[2:] != landmarks.shape[2:]:
        raise ValueError(
            f"select_chunks: q must be (B, L, Hr, Dr) and landmarks (B, C, Hr, Dr), got {q.shape}, {landmarks.shape}"
        )
    if top_k < 1 or chunk_size < 1 or query_offset < 0:
        raise ValueError(
            f"select_chunks: top_k {top_k}, chunk_size {chunk_size} >= 1, query_offset {query_offset} >= 0"
        )
    if decay is not None and (decay.shape != q.shape[:3] or not reach > 0):
        raise ValueError(f"select_chunks: decay {tuple(decay.shape)} must be {tuple(q.shape[:3])}, reach {reach} > 0")
    if documents is not None and (documents.dim() != 2 or documents.shape[1] < query_offset + q.shape[1]):
        raise ValueError(
            f"select_chunks: documents {tuple(documents.shape)} must be (B, Lkey) and reach the last query position "
            f"{query_offset + q.shape[1]}"
        )


def check_window_shapes(
    q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None, key_offset: int
) -> None:
    """Raise ValueError naming what does not fit."""
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"sliding_window_attention: q {q.shape}, k {k.shape}, v {v.shape} do not belong together")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"sliding_window_attention: {q.shape[2]} query heads, {k.shape[2]} key/value heads")
    if window < 1:
        raise ValueError(f"sliding_window_attention: window {window} must be at least 1 (it counts the token itself)")
    if key_offset < 0 or key_offset + q.shape[1] > k.shape[1]:
        raise ValueError(
            f"sliding_window_attention: {q.shape[1]} queries at key_offset {key_offset} need as many keys, "
            f"got {k.shape[1]}"
        )
    if documents is not None and tuple(documents.shape) != (k.shape[0], k.shape[1]):
        raise ValueError(f"sliding_window_attention: documents {tuple(documents.shape)} must be (B, Lk) of the keys")
