"""The equations of hierarchical sparse attention in plain torch: the oracle of every kernel.

Any float dtype, any size, CPU or GPU, differentiable by autograd. Half precision inputs are computed in fp32.
Nothing here keeps an L x L or L x C tensor for long sequences: work goes in blocks of queries, and blocks whose
intermediates would fill the memory are recomputed in backward.

Shape letters: B batch, L queries, Lk keys, H heads (Hq query, Hkv key/value, Hr retrieval), R = Hq / Hkv,
D head size, Dr retrieval size, C chunks, S tokens per chunk, K selected chunks.

Equations: arXiv 2511.23319, section on HSA; the visibility rule is the strict one (completed chunks only).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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

# One block's scores stay below this many bytes: small enough for the caches and for a machine of a few GB.
_BLOCK_BYTES = 32 << 20
# What autograd may keep of one call before blocks are recomputed in backward instead.
_KEPT_BYTES = 768 << 20
# Dense over chunks wins while the chunks in reach are at most this many times the selected ones (measured on CPU).
_DENSE_REACH = 16
# Width of the dense form's panels, in chunks (8 to 32 measure alike; a softmax of 16 lanes fills the vector units).
_PANEL_CHUNKS = 16


def hsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    indices: Tensor,
    *,
    chunk_size: int = 64,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attend inside each selected chunk with its own softmax and sum the results by weight.

    q (B, L, Hq, D); k, v (B, Lk, Hkv, D) with Lk = C * chunk_size; weights (B, L, Hkv, K) float;
    indices (B, L, Hkv, K) integer, -1 = none. Returns o (B, L, Hq, D) in q's dtype:

        o[t] = sum_j weights[t, j] * softmax(softmax_scale * q[t] k[chunk(indices[t, j])]^T) v[chunk(indices[t, j])]

    A token without any chunk gives 0. A chunk listed twice counts twice. Columns of -1 are ignored whatever their
    weight is, and get no gradient. softmax_scale defaults to D ** -0.5. Causality is the selection's business.
    """
    chunks = check_hsa_shapes(q, k, v, weights, indices, chunk_size)
    batch, length, heads_q, dim = q.shape
    heads_kv, top_k = indices.shape[2], indices.shape[3]
    scale = dim**-0.5 if softmax_scale is None else float(softmax_scale)
    if length == 0 or top_k == 0 or chunks == 0:
        return (q * 0.0).contiguous()
    out_dtype, dtype = q.dtype, _compute_dtype(q)
    idx = indices.long()
    dense = chunks <= _DENSE_REACH * top_k
    if not dense and chunks > idx.numel() and not torch.is_grad_enabled():
        # A few tokens of a long memory: what they chose is taken out first, not all of it converted and copied.
        k, v, idx = _chosen_only(k, v, idx, chunk_size)
        chunks = k.shape[1] // chunk_size
    qs, ks, vs, ws = (x.to(dtype) for x in (q, k, v, weights))
    ratio = heads_q // heads_kv
    qs = qs.reshape(batch, length, heads_kv, ratio, dim)
    used = idx >= 0
    ws = torch.where(used, ws, torch.zeros((), dtype=dtype, device=ws.device))

    # Weights of 0 do not protect against NaN in chunks that nobody chose, so the dense form needs finite inputs.
    dense = dense and bool(torch.isfinite(ks).all()) and bool(torch.isfinite(vs).all())
    row_bytes = batch * heads_q * chunks * chunk_size * qs.element_size()
    if not dense:
        row_bytes = batch * heads_kv * top_k * chunk_size * (2 * dim + 2 * ratio) * qs.element_size()
    block = max(1, min(length, _BLOCK_BYTES // max(1, row_bytes), 128 if dense else length))
    recompute = 3 * row_bytes * length > _KEPT_BYTES
    parts = []
    if dense:
        # Panels of a fixed grid of chunks, skipped where no token of the block chose any: the bits of a token's output
        # do not depend on what other tokens choose, so causality holds to the last bit.
        panel = _PANEL_CHUNKS
        kh, vh = ks.transpose(1, 2), vs.transpose(1, 2)  # (B, Hkv, Lk, D)
        for start in range(0, length, block):
            stop = min(start + block, length)
            qb, wide = qs[:, start:stop], _scatter_weights(ws[:, start:stop], idx[:, start:stop], chunks)
            total = torch.zeros((), dtype=dtype, device=q.device)
            for first in _used_panels(idx[:, start:stop], chunks, panel):
                keys = slice(first * chunk_size, (first + panel) * chunk_size)
                args = (qb, kh[:, :, keys], vh[:, :, keys], wide[..., first : first + panel], chunk_size, scale)
                total = total + _run(recompute, _dense_block, *args)
            parts.append(total if total.dim() else (qb * 0.0).reshape(batch, stop - start, heads_q, dim))
    else:
        # Rows of one table, one per (batch, head, chunk), with a zero row for -1; F.embedding has a deterministic
        # backward on CPU at any number of threads, which index_put does not.
        rows = torch.arange(batch, device=q.device).view(-1, 1, 1, 1) * heads_kv
        rows = (rows + torch.arange(heads_kv, device=q.device).view(1, 1, -1, 1)) * chunks
        rows = torch.where(used, idx + rows, batch * heads_kv * chunks)
        k_table, v_table = _chunk_table(ks, chunk_size), _chunk_table(vs, chunk_size)
        for start in range(0, length, block):
            stop = min(start + block, length)
            parts.append(
                _run(
                    recompute,
                    _gather_block,
                    qs[:, start:stop],
                    k_table,
                    v_table,
                    ws[:, start:stop],
                    rows[:, start:stop],
                    chunk_size,
                    scale,
                )
            )
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(out_dtype)


def _run(recompute: bool, fn: Callable[..., Tensor], *args: object) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)
    return fn(*args)


def _scatter_weights(w: Tensor, idx: Tensor, chunks: int) -> Tensor:
    """(B, T, Hkv, C): every chunk's weight, 0 where it was not chosen; repeated ids add up."""
    wide = w.new_zeros(*w.shape[:3], chunks + 1)  # -1 goes to one extra column that is cut off
    return wide.scatter_add(-1, torch.where(idx < 0, chunks, idx), w)[..., :chunks]


def _used_panels(idx: Tensor, chunks: int, panel: int) -> list[int]:
    """First chunks of the panels that hold at least one chosen chunk, ascending."""
    hit = torch.zeros(chunks // panel + 2, dtype=torch.bool, device=idx.device)
    hit[torch.where(idx < 0, hit.numel() - 1, idx // panel).flatten()] = True
    return [i * panel for i, used in enumerate(hit[:-1].tolist()) if used]


def _dense_block(q: Tensor, k: Tensor, v: Tensor, w: Tensor, chunk_size: int, scale: float) -> Tensor:
    """q (B, T, Hkv, R, D) against all of k, v (B, Hkv, c*S, D), each chunk counted by w (B, T, Hkv, c)."""
    batch, tokens, heads_kv, ratio, dim = q.shape
    chunks = w.shape[-1]
    rows = ratio * tokens
    qh = q.permute(0, 2, 3, 1, 4).reshape(batch, heads_kv, rows, dim)
    # Keys go as (S, c), not (c, S): a softmax over an outer dimension is vectorised, one over 8 or 16 columns is not.
    k = k.reshape(batch, heads_kv, chunks, chunk_size, dim).transpose(2, 3).reshape(batch, heads_kv, -1, dim)
    v = v.reshape(batch, heads_kv, chunks, chunk_size, dim).transpose(2, 3).reshape(batch, heads_kv, -1, dim)
    scores = torch.matmul(qh * scale, k.transpose(-1, -2)).view(batch, heads_kv, ratio, tokens, chunk_size, chunks)
    p = torch.softmax(scores, -2) * w.permute(0, 2, 1, 3)[:, :, None, :, None, :]
    out = torch.matmul(p.view(batch, heads_kv, rows, chunk_size * chunks), v)
    out = out.view(batch, heads_kv, ratio, tokens, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, tokens, heads_kv * ratio, dim)


def _chosen_only(k: Tensor, v: Tensor, idx: Tensor, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The chunks that any token chose, of all sequences alike, and the indices among them."""
    found, places = idx.clamp(min=0).unique(return_inverse=True)
    k, v = (x.unflatten(1, (-1, chunk_size))[:, found].flatten(1, 2) for x in (k, v))
    return k, v, torch.where(idx < 0, -1, places)


def _chunk_table(x: Tensor, chunk_size: int) -> Tensor:
    """(B, C*S, H, D) -> (B*H*C + 1, S*D), the last row 0."""
    batch, length, heads, dim = x.shape
    table = x.transpose(1, 2).reshape(batch * heads * (length // chunk_size), chunk_size * dim)
    return torch.cat([table, table.new_zeros(1, chunk_size * dim)])


def _gather_block(
    q: Tensor, k_table: Tensor, v_table: Tensor, w: Tensor, rows: Tensor, chunk_size: int, scale: float
) -> Tensor:
    """q (B, T, Hkv, R, D) against its own K chunks, gathered from the tables by rows (B, T, Hkv, K)."""
    batch, tokens, heads_kv, ratio, dim = q.shape
    top_k = rows.shape[-1]
    pad = k_table.shape[0] - 1
    keys = F.embedding(rows, k_table, padding_idx=pad).view(batch, tokens, heads_kv, top_k * chunk_size, dim)
    values = F.embedding(rows, v_table, padding_idx=pad).view(batch, tokens, heads_kv, top_k * chunk_size, dim)
    scores = torch.matmul(q * scale, keys.transpose(-1, -2))
    p = torch.softmax(scores.view(batch, tokens, heads_kv, ratio, top_k, chunk_size), -1)
    p = p * w[:, :, :, None, :, None]
    out = torch.matmul(p.reshape(batch, tokens, heads_kv, ratio, top_k * chunk_size), values)
    return out.reshape(batch, tokens, heads_kv * ratio, dim)


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
) -> tuple[Tensor, Tensor]:
    """Choose the top_k best chunks of every token.

    q (B, L, Hr, Dr); landmarks (B, C, Hr, Dr). Query t sits at position p = query_offset + t. Chunk i is visible when
    it is complete, i < floor(p / chunk_size), and, given documents (B, Lkey) of ids per key position, when it belongs
    to the document of p (documents start on chunk boundaries, so a chunk's document is that of its first token).
    exclude_window in tokens: chunks whose every token lies inside the last exclude_window tokens of the query, the
    window counting the token itself, are not visible either: i is excluded when i * chunk_size > p - exclude_window.

    Score = q . landmark / sqrt(Dr), in fp32 (fp64 for fp64 inputs). decay (B, L, Hr), 0 or more, takes decay *
    ln(n / reach) off the score of a chunk that lies n > reach chunks back. noise, broadcastable to (B, L, Hr, C), is
    added for the choice only. Of equal scores the lower chunk id wins.

    Returns indices (B, L, Hr, top_k) int32, ascending, -1 last where fewer are visible (also when top_k > C), and
    scores (B, L, Hr, top_k) without the noise, differentiable in q, landmarks and decay. Where the index is -1 the
    score is the lowest finite number, without gradient: `selection_weights` turns it into 0.
    """
    check_selection_shapes(q, landmarks, documents, top_k, chunk_size, query_offset, decay, reach)
    batch, length, heads, dim = q.shape
    chunks = landmarks.shape[1]
    dtype = _compute_dtype(q)
    scale = 1.0 / math.sqrt(dim)
    lm = landmarks.to(dtype).permute(0, 2, 3, 1)  # (B, Hr, Dr, C)
    chunk_docs = chunk_documents(documents, chunks, chunk_size)
    wide_noise = None if noise is None else noise.detach().expand(batch, length, heads, chunks)
    block = max(1, min(length, _BLOCK_BYTES // max(1, batch * heads * max(chunks, 1) * q.element_size())))
    ids_parts, score_parts = [], []
    for start in range(0, max(length, 1), block):
        stop = min(start + block, length)
        # Scaling q, not the scores, keeps L x C work to one matmul and one gather.
        qh = (q[:, start:stop].to(dtype) * scale).transpose(1, 2)  # (B, Hr, T, Dr)
        scores = torch.matmul(qh, lm).transpose(1, 2)  # (B, T, Hr, C)
        if decay is not None:
            position = torch.arange(start, stop, device=q.device) + query_offset
            far = log_distance(position[:, None], torch.arange(chunks, device=q.device), chunk_size, reach)
            scores = scores - decay[:, start:stop, :, None].to(dtype) * far[:, None].to(dtype)
        with torch.no_grad():
            seen = visible_chunks(
                start, stop, chunks, chunk_size, query_offset, documents, chunk_docs, exclude_window, q
            )
            key = scores.detach()
            if wide_noise is not None:
                key = key + wide_noise[:, start:stop].to(dtype)
            ids = _top_ids(key, seen[:, :, None, :], top_k)
        picked = _gather_scores(scores, ids, top_k)
        ids_parts.append(torch.where(ids < chunks, ids, -1).to(torch.int32))
        score_parts.append(picked)
    return torch.cat(ids_parts, 1), torch.cat(score_parts, 1)


def log_distance(position: Tensor, chunk: Tensor, chunk_size: int, reach: float) -> Tensor:
    """ln(n / reach) of chunks n chunks before positions, 0 up to reach; fp32, of the shape the two broadcast to."""
    return ((position // chunk_size - chunk).float() / reach).clamp(min=1.0).log()


def _gather_scores(scores: Tensor, ids: Tensor, top_k: int) -> Tensor:
    lowest = torch.finfo(scores.dtype).min
    chunks = scores.shape[-1]
    if chunks == 0:
        return scores.sum(-1, keepdim=True).expand(*scores.shape[:-1], top_k) + lowest
    got = torch.gather(scores, -1, ids.clamp(max=chunks - 1))
    return got.masked_fill(ids >= chunks, lowest)


def chunk_documents(documents: Tensor | None, chunks: int, chunk_size: int) -> Tensor | None:
    """Document of every chunk's first token, (B, C); chunks past the key side get -1 (no query can see them)."""
    if documents is None:
        return None
    first = documents[:, ::chunk_size][:, :chunks]
    return F.pad(first, (0, chunks - first.shape[1]), value=-1)


def visible_chunks(
    start: int,
    stop: int,
    chunks: int,
    chunk_size: int,
    query_offset: int,
    documents: Tensor | None,
    chunk_docs: Tensor | None,
    exclude_window: int,
    q: Tensor,
) -> Tensor:
    """(B or 1, T, C) bool: which chunks queries start..stop may choose."""
    position = torch.arange(start, stop, device=q.device)[:, None] + query_offset
    chunk = torch.arange(chunks, device=q.device)
    seen = (chunk < position // chunk_size)[None]
    if exclude_window > 0:
        seen = seen & (chunk * chunk_size <= position - exclude_window)
    if documents is not None and chunk_docs is not None:
        own = documents[:, query_offset + start : query_offset + stop]
        seen = seen & (own[:, :, None] == chunk_docs[:, None, :])
    return seen


def _top_ids(key: Tensor, seen: Tensor, top_k: int) -> Tensor:
    """Ascending int64 ids (..., top_k) of the largest visible keys; C stands for none. Lower ids win ties."""
    chunks = key.shape[-1]
    ids = torch.arange(chunks, device=key.device)
    if top_k >= chunks:
        best = torch.where(seen, ids, chunks).expand(key.shape)
    elif key.dtype == torch.float32:
        # Order-preserving integers (adding 0.0 folds -0 into 0) with the id below them: one exact top-k, ties included.
        bits = (key + 0.0).contiguous().view(torch.int32).long()
        bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        packed = torch.where(seen, bits * (1 << 31) + (chunks - 1 - ids), torch.iinfo(torch.int64).min)
        top = torch.topk(packed, top_k, dim=-1, sorted=False)[0]
        best = torch.where(top == torch.iinfo(torch.int64).min, chunks, chunks - 1 - (top & 0x7FFFFFFF))
    else:
        masked = key.masked_fill(~seen, -math.inf)
        order = torch.sort(masked, dim=-1, descending=True, stable=True)[1][..., :top_k]
        best = torch.where(torch.gather(seen.expand(key.shape), -1, order), order, chunks)
    best = torch.sort(best, -1)[0]
    return best if top_k <= chunks else F.pad(best, (0, top_k - chunks), value=chunks)


def selection_weights(scores: Tensor, indices: Tensor) -> Tensor:
    """Softmax of the selected scores over the last dimension, 0 where the index is -1.

    scores, indices (..., K) -> weights (..., K) in the scores' dtype. A row without any chunk is all 0 and passes
    back a gradient of 0, never NaN.
    """
    masked = scores.masked_fill(indices < 0, -math.inf)
    if scores.shape[-1] == 0:
        return masked
    top = masked.detach().amax(-1, keepdim=True)
    e = torch.exp(masked - torch.where(torch.isfinite(top), top, torch.zeros_like(top)))
    total = e.sum(-1, keepdim=True)
    return e / torch.where(total > 0, total, torch.ones_like(total))


def hsa_decode_select(
    q_select: Tensor,
    landmarks: Tensor,
    visible: Tensor,
    *,
    top_k: int,
    decay: Tensor | None = None,
    reach: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Chosen ids and their weights (B, Hr, top_k); shapes in `ops.hsa_decode_select`."""
    dtype = _compute_dtype(q_select)
    scale = 1.0 / math.sqrt(q_select.shape[-1])
    scores = torch.matmul(landmarks.to(dtype).transpose(1, 2), (q_select.to(dtype) * scale)[..., None])[..., 0]
    chunks = landmarks.shape[1]
    column = torch.arange(chunks, device=q_select.device)
    seen = column < visible[:, None]
    if decay is not None:
        far = log_distance(visible[:, None], column, 1, reach)
        scores = scores - decay[..., None].to(dtype) * far[:, None].to(dtype)
    ids = _top_ids(scores, seen[:, None], top_k)
    picked = _gather_scores(scores, ids, top_k)
    ids = torch.where(ids < chunks, ids, -1).to(torch.int32)
    return ids, selection_weights(picked, ids)


def hsa_decode_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    indices: Tensor,
    *,
    chunk_size: int = 64,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention to the chosen chunks, gathered first; shapes in `ops.hsa_decode_attend`."""
    batch, heads_q, dim = q.shape
    heads = k.shape[2]
    dtype = _compute_dtype(q)
    scale = dim**-0.5 if softmax_scale is None else float(softmax_scale)
    ids = indices.long().expand(batch, heads, -1)
    weights = torch.where(ids >= 0, weights.to(dtype).expand(batch, heads, -1), 0.0)
    rows = torch.arange(batch, device=q.device)[:, None, None], ids.clamp(min=0)
    head = torch.arange(heads, device=q.device)[None, :, None]

    def chosen(x: Tensor) -> Tensor:  # (B, Hkv, K, S, D)
        return x.unflatten(1, (-1, chunk_size))[rows[0], rows[1], :, head].to(dtype)

    qh = (q.to(dtype) * scale).view(batch, heads, 1, heads_q // heads, dim)
    p = torch.softmax(torch.matmul(qh, chosen(k).transpose(-1, -2)), -1)
    out = torch.matmul(p * weights[..., None, None], chosen(v)).sum(2)
    return out.reshape(batch, heads_q, dim).to(q.dtype)


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
) -> Tensor:
    """Selection and attention of one new token per sequence; shapes in `ops.hsa_decode`."""
    ids, weights = hsa_decode_select(q_select, landmarks, visible, top_k=top_k)
    return hsa_decode_attend(q, k, v, weights, ids, chunk_size=chunk_size, softmax_scale=softmax_scale)


def window_decode(q: Tensor, k: Tensor, v: Tensor, filled: Tensor, *, softmax_scale: float | None = None) -> Tensor:
    """Attention of one new token to a ring buffer; shapes in `ops.window_decode`."""
    batch, heads_q, dim = q.shape
    heads, size = k.shape[1], k.shape[2]
    dtype = _compute_dtype(q)
    scale = dim**-0.5 if softmax_scale is None else float(softmax_scale)
    scores = torch.matmul((q.to(dtype) * scale).view(batch, heads, -1, dim), k.to(dtype).transpose(-1, -2))
    empty = torch.arange(size, device=q.device) >= filled[:, None]
    p = torch.softmax(scores.masked_fill(empty[:, None, None], -math.inf), -1)
    return torch.matmul(p, v.to(dtype)).reshape(batch, heads_q, dim).to(q.dtype)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    documents: Tensor | None = None,
    key_offset: int = 0,
    softmax_scale: float | None = None,
) -> Tensor:
    """Causal attention to the last `window` tokens, the token itself included.

    q (B, L, Hq, D); k, v (B, Lk, Hkv, D). Query i sits at key position p = key_offset + i (key_offset = Lk - L for a
    left halo) and sees the keys p - window + 1 .. p, of its own document only when documents (B, Lk), ids per key
    position, are given. Returns (B, L, Hq, D) in q's dtype. softmax_scale defaults to D ** -0.5.
    """
    check_window_shapes(q, k, v, window, documents, key_offset)
    batch, length, heads_q, dim = q.shape
    heads_kv = k.shape[2]
    ratio = heads_q // heads_kv
    scale = dim**-0.5 if softmax_scale is None else float(softmax_scale)
    if length == 0:
        return q.contiguous()
    out_dtype, dtype = q.dtype, _compute_dtype(q)
    # Bands: a tile of queries against the keys from window - 1 before it. A tile as long as the window computes twice
    # what is seen; 128 rows are enough for a fast product (measured on CPU, windows of 128 to 4096).
    tile = min(length, max(16, min(window, 128)))
    back = min(window - 1, key_offset + length - 1)
    tiles = -(-length // tile)
    pad_q = tiles * tile - length
    left, right = max(0, back - key_offset), pad_q
    keys = slice(max(0, key_offset - back), key_offset + length)
    qp = F.pad(q.to(dtype) * scale, (0, 0, 0, 0, 0, pad_q)).view(batch, tiles, tile, heads_kv, ratio, dim)
    kp = F.pad(k[:, keys].to(dtype), (0, 0, 0, 0, left, right))
    vp = F.pad(v[:, keys].to(dtype), (0, 0, 0, 0, left, right))
    band = tile + back
    docs_q = docs_k = None
    if documents is not None:
        docs_k = F.pad(documents[:, keys], (left, right), value=-1)
        docs_q = F.pad(documents[:, key_offset : key_offset + length], (0, pad_q), value=-1).view(batch, tiles, tile)
    tile_bytes = batch * heads_q * tile * band * qp.element_size()
    group = max(1, min(tiles, _BLOCK_BYTES // tile_bytes))
    recompute = 3 * tile_bytes * tiles > _KEPT_BYTES
    first_key = key_offset - back  # key position of the band's first column for tile 0; negative means padding
    parts = []
    for start in range(0, tiles, group):
        stop = min(start + group, tiles)
        span = slice(start * tile, (stop - 1) * tile + band)
        kb = kp[:, span].unfold(1, band, tile)  # (B, tiles, Hkv, D, band)
        vb = vp[:, span].unfold(1, band, tile)
        column = torch.arange(band, device=q.device)
        row = torch.arange(tile, device=q.device)[:, None]
        # Tile row r sits at band column r + back.
        mask = (column <= row + back) & (column >= row + back - window + 1)
        origin = first_key + torch.arange(start, stop, device=q.device) * tile
        mask = (mask[None] & (origin[:, None, None] + column >= 0))[None]
        if docs_q is not None and docs_k is not None:
            docs_band = docs_k[:, span].unfold(1, band, tile)
            mask = mask & (docs_q[:, start:stop, :, None] == docs_band[:, :, None, :])
        parts.append(_run(recompute, _band, qp[:, start:stop], kb, vb, mask))
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out.reshape(batch, tiles * tile, heads_q, dim)[:, :length].to(out_dtype)


def _band(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (B, n, T, Hkv, R, D) against k, v (B, n, Hkv, D, band) under mask (B or 1, n, T, band)."""
    batch, tiles, tile, heads_kv, ratio, dim = q.shape
    qh = q.permute(0, 1, 3, 4, 2, 5).reshape(batch, tiles, heads_kv, ratio * tile, dim)
    scores = torch.matmul(qh, k).view(batch, tiles, heads_kv, ratio, tile, -1)
    # Padded query rows may see nothing at all: a finite floor keeps them free of NaN.
    scores = scores.masked_fill(~mask[:, :, None, None], torch.finfo(scores.dtype).min)
    p = torch.softmax(scores, -1).view(batch, tiles, heads_kv, ratio * tile, -1)
    out = torch.matmul(p, v.transpose(-1, -2)).view(batch, tiles, heads_kv, ratio, tile, dim)
    return out.permute(0, 1, 4, 2, 3, 5).reshape(batch, tiles * tile, heads_kv * ratio, dim)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
