"""One context memory for many prompts that are equal but for a few places: chunks that differ are kept beside it.

HSA knows no positions: a token reads the set of chunks that it chose, wherever they are stored. So prompts that share a
long text share its chunks, and each prompt has an overlay, the chunks that an edit of its own has changed, which hide
the shared ones of the same number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hsa_kernels import ops
from hsa_kernels.reference import log_distance
from parallel.memory import ContextMemory
from parallel.neighbours import with_neighbours
from parallel.selection import Decay

_MOST_CANDIDATES = 128  # what the selection kernel can list
_FEW_ROWS = 256  # up to so many queries plain matrix products are faster than the kernel
_SCORE_BYTES = 1 << 31  # scores of the plain form held at a time


class SharedMemory:
    """Keys, values and landmarks of a shared text, with room for overlays that grows when they need more.

    ``capacity`` chunks can be appended with `append`, the first ``shared`` of which every prompt of `overlay` may read
    unless it has replaced them.
    """

    def __init__(self, like: ContextMemory, capacity: int, room: int) -> None:
        """Allocate ``capacity`` shared chunks and ``room`` overlay chunks of the sizes and dtype of ``like``."""
        self.chunk_size = like.k.shape[1] // like.chunks
        self.capacity = capacity
        tokens = (capacity + room) * self.chunk_size
        self.k = like.k.new_zeros(1, tokens, *like.k.shape[2:])
        self.v = like.v.new_zeros(1, tokens, *like.v.shape[2:])
        # Scores are computed in fp32 at least; converted once here, not at every read.
        wide = torch.promote_types(like.landmarks.dtype, torch.float32)
        self.landmarks = like.landmarks.new_zeros(1, capacity, *like.landmarks.shape[2:], dtype=wide)
        self.chunks = 0
        self.overlay(1, 0, 0)

    def append(self, new: ContextMemory) -> None:
        """Add chunks (batch 1) of the shared text."""
        start, end = self.chunks, self.chunks + new.chunks
        part = slice(start * self.chunk_size, end * self.chunk_size)
        self.k[:, part], self.v[:, part] = new.k, new.v
        self.landmarks[:, start:end] = new.landmarks
        self.chunks = end

    def overlay(self, prompts: int, shared: int, size: int) -> None:
        """Begin with ``prompts`` prompts that share the first ``shared`` chunks and have up to ``size`` more each."""
        self.shared = shared
        self.replaced = torch.zeros(prompts, shared, dtype=torch.bool, device=self.k.device)
        self.numbers = torch.full((prompts, size), -1, dtype=torch.int64, device=self.k.device)
        self.own = self.landmarks.new_zeros(prompts, size, *self.landmarks.shape[2:])
        if self.capacity + prompts * size > self.k.shape[1] // self.chunk_size:
            self.k = self._grown(self.k, prompts * size)  # one after the other: the old of one is gone before the next
            self.v = self._grown(self.v, prompts * size)

    def _grown(self, x: Tensor, room: int) -> Tensor:
        """The shared chunks of ``x``, with ``room`` empty chunks behind them."""
        shared = x[:, : self.capacity * self.chunk_size]
        return torch.cat((shared, x.new_zeros(1, room * self.chunk_size, *x.shape[2:])), 1)

    def put(self, prompt: Tensor, slot: Tensor, number: Tensor, new: ContextMemory) -> None:
        """Give prompts chunks of their own. prompt, slot, number int64 (n,): whose, which place in its overlay, which
        chunk of the text. new: (1, n) or (n, 1) chunks."""
        size, heads = self.chunk_size, self.k.shape[2:]
        place = self.capacity + prompt * self.numbers.shape[1] + slot
        self.k.view(-1, size, *heads)[place] = new.k.reshape(-1, size, *heads)
        self.v.view(-1, size, *heads)[place] = new.v.reshape(-1, size, *heads)
        self.own[prompt, slot] = new.landmarks.reshape(-1, *self.own.shape[2:]).to(self.own.dtype)
        self.numbers[prompt, slot] = number
        hides = number < self.shared
        self.replaced[prompt[hides], number[hides]] = True

    def read(
        self,
        q: Tensor,
        retrieval: Tensor,
        *,
        top_k: int | None,
        neighbours: int = 0,
        query_offset: int,
        decay: Decay | None = None,
        weigh: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """HSA of all prompts: q (B, L, Hq, D), retrieval (B, L, Hr, Dr) fp32 of tokens query_offset .. -> like q.

        neighbours: so many of the best chunks bring the chunks beside them (`with_neighbours`). decay: of scores with
        the distance in the text. weigh: weights of chosen chunks from their scores and ids, both in the order of the
        text; None: softmax.
        """
        batch, length = q.shape[:2]
        ids, scores = self._candidates(retrieval, top_k, query_offset, decay)
        size = self.numbers.shape[1]
        now = (torch.arange(length, device=q.device) + query_offset) // self.chunk_size
        if size:
            own = torch.einsum("blhd,bchd->blhc", retrieval, self.own) / math.sqrt(retrieval.shape[-1])
            visible = (self.numbers >= 0)[:, None] & (self.numbers[:, None] < now[None, :, None])
            if decay is not None:
                far = log_distance(now[None, :, None], self.numbers[:, None], 1, decay.reach)
                own = own - decay.amount * far[:, :, None]
            own = own.masked_fill(~visible[:, :, None], -math.inf)
            first = self.capacity + torch.arange(batch * size, device=q.device).view(batch, 1, 1, size)
            ids = torch.cat((ids, first.expand(-1, length, ids.shape[2], -1)), dim=-1)
            scores = torch.cat((scores, own), dim=-1)
        keep = min(top_k or scores.shape[-1], scores.shape[-1])
        scores, order = scores.topk(keep, dim=-1)
        ids = ids.gather(-1, order).masked_fill(scores == -math.inf, -1)
        if weigh is not None:
            order = self._places(ids).argsort(-1)
            ids, scores = ids.gather(-1, order), scores.gather(-1, order)
        ids = ids.int().flatten(0, 1)[None]
        scores = scores.masked_fill(scores == -math.inf, 0.0).flatten(0, 1)[None]
        weights = (weigh or ops.selection_weights)(scores, ids)
        if neighbours:
            end = now.repeat(batch)[:, None, None]
            ids, weights = with_neighbours(ids, weights, neighbours, partial(self._beside, batch, end))
        heads = self.k.shape[2]
        if ids.shape[2] < heads:
            ids, weights = (x.expand(-1, -1, heads, -1) for x in (ids, weights))
        flat = q.flatten(0, 1)[None]
        out = ops.hsa_attention(flat, self.k, self.v, weights, ids, chunk_size=self.chunk_size)
        return out.view(q.shape)

    def _places(self, ids: Tensor) -> Tensor:
        """Numbers in the text of chunks by their ids; those that are none come last."""
        last = torch.iinfo(torch.int64).max
        own = self.numbers.flatten()[(ids - self.capacity).clamp(min=0)] if self.numbers.numel() else ids
        return torch.where(ids < self.capacity, ids, own).masked_fill(ids < 0, last)

    def _beside(self, batch: int, end: Tensor, ids: Tensor, step: int) -> Tensor:
        """Ids (1, B * L, Hr, n) of chosen chunks -> ids of those ``step`` chunks later in the text of the same prompt,
        -1 where that is none or not before ``end`` (B * L, 1, 1).
        """
        wanted = self._places(ids.long()) + step
        wanted = wanted.masked_fill((ids < 0) | (wanted >= end), -1).view(batch, -1)
        found = torch.where(wanted < self.shared, wanted, -1)
        if self.numbers.numel():
            in_order, slots = self.numbers.sort(1)
            at = torch.searchsorted(in_order, wanted).clamp(max=in_order.shape[1] - 1)
            own = (in_order.gather(1, at) == wanted) & (wanted >= 0)
            first = self.capacity + torch.arange(batch, device=ids.device)[:, None] * self.numbers.shape[1]
            found = torch.where(own, first + slots.gather(1, at), found)
        return found.view(ids.shape)

    def _candidates(
        self, retrieval: Tensor, top_k: int | None, query_offset: int, decay: Decay | None
    ) -> tuple[Tensor, Tensor]:
        """Ids int64 and scores (B, L, Hr, n) of shared chunks that hold the best ones, -inf where replaced."""
        batch, length, heads, _ = retrieval.shape
        wanted = min(top_k or self.shared, self.shared)
        hidden = int(self.replaced.sum(1).max()) if self.replaced.numel() else 0
        listed = min(wanted + hidden, _MOST_CANDIDATES)
        if batch * length <= _FEW_ROWS or listed >= self.shared or not retrieval.is_cuda:
            return self._plain(retrieval, wanted, query_offset, decay)
        landmarks, options = self.landmarks[:, : self.shared], {"top_k": listed, "chunk_size": self.chunk_size}
        if decay is None:  # all prompts are one: all chunks lie in the past, no matter how far
            past = self.shared * self.chunk_size
            ids, scores = ops.select_chunks(retrieval.flatten(0, 1)[None], landmarks, query_offset=past, **options)
        else:
            landmarks = landmarks.expand(batch, -1, -1, -1)
            options |= decay.arguments(retrieval)
            ids, scores = ops.select_chunks(retrieval, landmarks, query_offset=query_offset, **options)
        ids = ids.view(batch, length, heads, listed).long()
        prompt = torch.arange(batch, device=ids.device)[:, None, None, None]
        gone = self.replaced[prompt, ids]
        scores = scores.view(ids.shape).masked_fill(gone, -math.inf)
        if wanted + hidden > listed and bool(((~gone).sum(-1) < wanted).any()):
            # More of the best were replaced than could be listed.
            return self._plain(retrieval, wanted, query_offset, decay)
        return ids, scores

    def _plain(self, retrieval: Tensor, wanted: int, query_offset: int, decay: Decay | None) -> tuple[Tensor, Tensor]:
        """`_candidates` by whole score matrices, some tokens at a time."""
        batch, length, heads, dim = retrieval.shape
        if not wanted:
            shape = (batch, length, heads, 0)
            return torch.zeros(shape, dtype=torch.int64, device=retrieval.device), retrieval.new_zeros(shape)
        landmarks = self.landmarks[0, : self.shared].permute(1, 2, 0)  # (Hr, Dr, C)
        step = max(1, _SCORE_BYTES // (4 * batch * heads * self.shared))
        parts, number = [], torch.arange(self.shared, device=retrieval.device)
        for start, part in zip(range(0, length, step), retrieval.split(step, dim=1), strict=True):
            # One product per head: a batch of products would copy the landmarks for every prompt.
            rows = part.permute(2, 0, 1, 3).flatten(1, 2)
            scores = torch.matmul(rows, landmarks).unflatten(1, part.shape[:2]).permute(1, 2, 0, 3)
            scores = scores / math.sqrt(dim)
            if decay is not None:
                position = torch.arange(start, start + part.shape[1], device=retrieval.device) + query_offset
                far = log_distance(position[:, None], number, self.chunk_size, decay.reach)
                scores = scores - decay.amount * far[:, None]
            scores = scores.masked_fill_(self.replaced[:, None, None], -math.inf)
            parts.append(scores.topk(wanted, dim=-1))
        return torch.cat([p.indices for p in parts], 1), torch.cat([p.values for p in parts], 1)
