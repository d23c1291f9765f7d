"""Chosen chunks that bring the chunk before them along.

The encoder sees one chunk at a time, so of a sentence across a chunk's edge the landmark of the first part cannot know
what the second part says, and no query finds it by that. It is found by the second part, which is chosen for what it
says. The same weights, asked so, answer questions about such sentences that they miss otherwise (docs/h100-16m.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def with_previous(
    ids: Tensor, weights: Tensor, best: int, before: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Chosen chunks and those before the ``best`` heaviest of them, each as heavy as the one that brings it, or as it
    was itself where that is more.

    ids (..., K) integer, -1 = none; weights (..., K) sum to 1, or to 0 where nothing is chosen; before: ids of chosen
    chunks -> ids of the chunks before them, -1 = none (None: one less). Returns both with min(best, K) more columns, -1
    and 0 where they bring nothing new, and sums as before.
    """
    heavy, place = weights.topk(min(best, weights.shape[-1]), dim=-1)
    chosen = ids.gather(-1, place)
    brought = chosen - 1 if before is None else before(chosen)
    brought = brought.masked_fill((chosen < 0) | (brought < 0), -1)
    same = (brought[..., :, None] == ids[..., None, :]) & (brought[..., :, None] >= 0)
    lifted = torch.where(same, heavy[..., None], 0.0).amax(-2)
    new = (brought >= 0) & ~same.any(-1)
    ids = torch.cat((ids, torch.where(new, brought, -1)), -1)
    weights = torch.cat((torch.maximum(weights, lifted), heavy.masked_fill(~new, 0.0)), -1)
    return ids, weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
