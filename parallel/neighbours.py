"""Chosen chunks that bring the chunks beside them along.

The encoder sees one chunk at a time, so of a sentence across a chunk's edge the landmark of one part cannot know what
the other says, and no query finds it by that. It is found by the part that says what is looked for. The same weights,
asked so, find more of two facts at 16M tokens; chains of facts suffer (docs/h100-16m.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_Beside = Callable[[Tensor, int], Tensor]


def with_neighbours(ids: Tensor, weights: Tensor, best: int, beside: _Beside) -> tuple[Tensor, Tensor]:
    """Chosen chunks and those before and after the ``best`` heaviest of them, each as heavy as the heaviest that brings
    it, or as it was itself where that is more.

    ids (..., K) integer, -1 = none; weights (..., K) sum to 1, or to 0 where nothing is chosen; beside: ids of chosen
    chunks and -1 or 1 -> ids of the chunks before or after them, negative = none or not to be read (`in_text`). Returns
    both with 2 min(best, K) more columns, -1 and 0 where they bring nothing new, and sums as before.
    """
    heavy, place = weights.topk(min(best, weights.shape[-1]), dim=-1)
    chosen = ids.gather(-1, place)
    for step in (-1, 1):
        brought = beside(chosen, step)
        same = (brought[..., :, None] == ids[..., None, :]) & (brought[..., :, None] >= 0)
        lifted = torch.where(same, heavy[..., None], 0.0).amax(-2)
        new = (brought >= 0) & ~same.any(-1)
        ids = torch.cat((ids, torch.where(new, brought, -1)), -1)
        weights = torch.cat((torch.maximum(weights, lifted), heavy.masked_fill(~new, 0.0)), -1)
    return ids, weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def in_text(end: Tensor) -> _Beside:
    """``beside`` for ids that are places in a text; end (..., 1): the first chunk that may not be read."""

    def beside(ids: Tensor, step: int) -> Tensor:
        return (ids + step).masked_fill((ids < 0) | (ids + step >= end), -1)

    return beside
