"""Exact top-k chunk selection by kernels, and the gradient of the selected scores by blocks of matrix products."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from hsa_kernels import reference
from hsa_kernels.triton import interpreter, select_kernels
from hsa_kernels.triton.attention import precision

# Candidates (id and score) that one pass over the queries may hold, in bytes.
_PASS_BYTES = 1 << 29
# One block of the scattered score gradient, in bytes.
_BLOCK_BYTES = 1 << 28
# Queries of such a block at least, so that its products fill the device.
_LEAST_BLOCK = 2048


# The scanning kernels keep the maxima of this many classes per chunk asked for in registers.
_SCAN_TOP_K = 128


def supports(q: Tensor, landmarks: Tensor) -> str | None:
    """None when this module takes the case, else the reason why not."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or landmarks.dtype != q.dtype:
        return f"dtype {q.dtype} with landmarks {landmarks.dtype} (bfloat16, float16 or float32, both the same)"
    if q.dtype == torch.bfloat16 and interpreter.enabled():
        return "bfloat16 under Triton's interpreter"
    if q.shape[-1] < 16 or (q.shape[-1] & (q.shape[-1] - 1)):
        return f"retrieval size {q.shape[-1]} (a power of two from 16 on)"
    if q.numel() == 0 or landmarks.numel() == 0:
        return "empty input"
    return None


def select(
    q: Tensor,
    landmarks: Tensor,
    documents: Tensor | None,
    noise: Tensor | None,
    decay: Tensor | None,
    *,
    top_k: int,
    chunk_size: int,
    query_offset: int,
    exclude_window: int,
    reach: float,
) -> tuple[Tensor, Tensor]:
    """Indices (B, L, Hr, top_k) int32 and scores float32; rules in `reference.select_chunks`."""
    where = dict[str, Any](chunk_size=chunk_size, query_offset=query_offset, exclude_window=exclude_window, reach=reach)
    if noise is not None or top_k > _SCAN_TOP_K or top_k >= landmarks.shape[1]:
        return select_blocks(q, landmarks, documents, noise, decay, top_k=top_k, **where)
    return select_scan(q, landmarks, documents, decay, top_k=top_k, **where)


def select_blocks(
    q: Tensor,
    landmarks: Tensor,
    documents: Tensor | None,
    noise: Tensor | None,
    decay: Tensor | None,
    *,
    top_k: int,
    chunk_size: int,
    query_offset: int,
    exclude_window: int,
    reach: float,
) -> tuple[Tensor, Tensor]:
    """Selection of many chunks, of all visible ones, or with noise: plain torch, a block of queries at a time."""
    batch, length, heads, dim = q.shape
    chunks = landmarks.shape[1]
    ids = torch.empty(batch, length, heads, top_k, dtype=torch.int32, device=q.device)
    scores = torch.empty(batch, length, heads, top_k, dtype=torch.float32, device=q.device)
    lowest = torch.finfo(torch.float32).min
    lm = landmarks.float().permute(0, 2, 3, 1)  # (B, Hr, Dr, C)
    column = torch.arange(chunks, device=q.device)
    docs = reference.chunk_documents(documents, chunks, chunk_size)
    width = min(top_k, chunks)
    block = max(1, _BLOCK_BYTES // (batch * heads * chunks * 16))
    for begin in range(0, length, block):
        end = min(begin + block, length)
        seen = reference.visible_chunks(
            begin, end, chunks, chunk_size, query_offset, documents, docs, exclude_window, q
        )[:, :, None]
        part = torch.matmul((q[:, begin:end].float() * (1.0 / math.sqrt(dim))).transpose(1, 2), lm).transpose(1, 2)
        if decay is not None:
            position = torch.arange(begin, end, device=q.device)[:, None] + query_offset
            far = reference.log_distance(position, column, chunk_size, reach)
            part = part - decay[:, begin:end, :, None].float() * far[:, None]
        if top_k >= chunks and documents is None and exclude_window == 0:  # a prefix: nothing moves
            ids[:, begin:end, :, :chunks] = torch.where(seen, column.int(), -1)
            scores[:, begin:end, :, :chunks] = part.masked_fill_(~seen, lowest)
            ids[:, begin:end, :, chunks:] = -1
            scores[:, begin:end, :, chunks:] = lowest
            continue
        take = seen.expand(part.shape)
        if top_k < chunks:
            key = part if noise is None else part + noise.expand(batch, length, heads, chunks)[:, begin:end]
            key = key.masked_fill(~seen, -math.inf)
            bar = torch.topk(key, top_k, sorted=False)[0].amin(-1, keepdim=True)
            above, tie = key > bar, (key == bar) & seen
            room = top_k - above.sum(-1, keepdim=True)
            take = above | (tie & (tie.cumsum(-1, dtype=torch.int32) <= room))
        # The chosen ones move to the front, in ascending id; the others to a column that is cut off.
        place = torch.where(take, take.cumsum(-1, dtype=torch.int32) - 1, width).long()
        front = torch.full((*part.shape[:3], width + 1), -1, dtype=torch.int32, device=q.device)
        front.scatter_(-1, place, column.int().expand(part.shape))
        ids[:, begin:end, :, :width], ids[:, begin:end, :, width:] = front[..., :width], -1
        picked = torch.full((*part.shape[:3], width + 1), lowest, dtype=torch.float32, device=q.device)
        picked.scatter_(-1, place, part)
        scores[:, begin:end, :, :width], scores[:, begin:end, :, width:] = picked[..., :width], lowest
    return ids, scores


def select_scan(
    q: Tensor,
    landmarks: Tensor,
    documents: Tensor | None,
    decay: Tensor | None,
    *,
    top_k: int,
    chunk_size: int,
    query_offset: int,
    exclude_window: int,
    reach: float,
) -> tuple[Tensor, Tensor]:
    """Selection by kernels that store candidates only."""
    batch, length, heads, dim = q.shape
    chunks = landmarks.shape[1]
    device = q.device
    classes = max(128, triton.next_power_of_2(2 * top_k))
    capacity = 2 * classes
    rows = 64 if classes == 128 and q.dtype != torch.float32 else 32
    block_d = min(dim, 128 if q.dtype != torch.float32 else 64)
    ids = torch.empty(batch, length, heads, top_k, dtype=torch.int32, device=device)
    scores = torch.empty(batch, length, heads, top_k, dtype=torch.float32, device=device)
    chunk_docs = docs = q
    keys = 0
    if documents is not None:
        docs = documents.contiguous()
        keys = docs.shape[1]
        first = docs[:, ::chunk_size][:, :chunks]
        chunk_docs = torch.nn.functional.pad(first, (0, chunks - first.shape[1]), value=-1).contiguous()
    step = max(rows, _PASS_BYTES // (batch * heads * capacity * 8) // rows * rows)
    for begin in range(0, length, step):
        part = q[:, begin : begin + step]
        n = part.shape[1]
        cand_id = torch.empty(batch * heads, n, capacity, dtype=torch.int32, device=device)
        cand_score = torch.empty(batch * heads, n, capacity, dtype=torch.float32, device=device)
        count = torch.empty(batch * heads, n, dtype=torch.int32, device=device)
        falls = part if decay is None else decay[:, begin : begin + n]
        select_kernels.candidates_kernel[(triton.cdiv(n, rows), batch * heads)](
            part, landmarks, falls, docs, chunk_docs, cand_id, cand_score, count,
            1.0 / math.sqrt(dim), 1.0 / reach, n, chunks, query_offset + begin, exclude_window, keys,
            *part.stride(), *landmarks.stride(), *falls.stride()[:3],
            HEADS=heads, S=chunk_size, DR=dim, BD=block_d, BM=rows, BN=classes, TOPK=top_k, CAP=capacity,
            DECAY=decay is not None, DOCUMENTS=documents is not None, PRECISION=precision(q.dtype),
            num_warps=8, num_stages=2,
        )  # fmt: skip
        whole = n == length
        out_ids = ids if whole else torch.empty(batch, n, heads, top_k, dtype=torch.int32, device=device)
        out_scores = scores if whole else torch.empty(batch, n, heads, top_k, dtype=torch.float32, device=device)
        select_kernels.choose_kernel[(triton.cdiv(n, 8), batch * heads)](
            cand_id, cand_score, count, out_ids, out_scores, torch.finfo(torch.float32).min, n,
            HEADS=heads, BM=8, TOPK=top_k, KP=triton.next_power_of_2(top_k), CAP=capacity, num_warps=4,
        )  # fmt: skip
        if not whole:
            ids[:, begin : begin + n] = out_ids
            scores[:, begin : begin + n] = out_scores
    return ids, scores


def select_backward(
    q: Tensor, landmarks: Tensor, indices: Tensor, grad: Tensor, *, chunk_size: int, query_offset: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the selected scores: a block of queries at a time, scattered to (block, chunks before its end) and
    multiplied.
    """
    batch, length, heads, dim = q.shape
    chunks = landmarks.shape[1]
    scale = 1.0 / math.sqrt(dim)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dlm = torch.zeros(batch, heads, chunks, dim, dtype=torch.float32, device=q.device)
    lm = landmarks.transpose(1, 2)
    block = max(1, _BLOCK_BYTES // (batch * heads * (chunks + 1) * 4))
    # Some blocks at least, so that most of the products skip the chunks behind their queries.
    block = min(block, max(_LEAST_BLOCK, -(-length // 16)))
    for begin in range(0, length, block):
        part = slice(begin, min(begin + block, length))
        seen = min(chunks, (query_offset + part.stop - 1) // chunk_size)
        ids = indices[:, part].transpose(1, 2).long()
        g = (grad[:, part].transpose(1, 2) * scale).to(q.dtype)
        wide = torch.zeros(*ids.shape[:3], seen + 1, dtype=q.dtype, device=q.device)
        # -1 goes to the column that is cut off. No id is listed twice, so a plain scatter is exact.
        wide.scatter_(-1, torch.where(ids < 0, seen, ids), g)
        wide = wide[..., :seen]
        dq[:, part] = torch.matmul(wide, lm[:, :, :seen]).transpose(1, 2)
        dlm[:, :, :seen] += _product(wide.transpose(-1, -2), q[:, part].transpose(1, 2))
    return dq, dlm.transpose(1, 2).to(landmarks.dtype).contiguous()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b (B, heads, m, n) in float32, also of half precision: parts of a sum should not be rounded one by one."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    return torch.matmul(a, b).float()
