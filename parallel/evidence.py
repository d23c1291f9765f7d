"""The evidence loss: at tokens whose answer is known to stand in one chunk, retrieval is told which.

A token that copies an answer out of the text needs one chunk, and the language model's loss asks for no more of that
chunk than makes the answer likely among the chunks of a training sequence. Here every retrieval head is asked for it:
the loss is -log of the chunk's share of the head's softmax. Each wrong chunk can be counted as often as it takes to
fill a far longer text, so that the chunks of a short sequence are told apart as well as those of the long one have to
be. Two chunks may be right, where an edge cuts the sentence that answers, and some are neither right nor wrong
(`data_pipeline.evidence`). The paper has no such loss; without a weight nothing of this runs.

Legend: B sequences, L tokens of this rank, Hr its retrieval heads, K chunks chosen per token and head, P places told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.router import attach_loss

_NEVER = -1e30  # finite: a softmax of nothing else must not become NaN


@dataclass(frozen=True)
class EvidenceLoss:
    """What a stage asks for. weight: of a token's loss, the mean over all heads, beside the loss weights of tokens.
    chunks: of so many a token is taken to choose; 0: of those it does."""

    weight: float = 0.0
    chunks: int = 0


def evidence_losses(scores: Tensor, indices: Tensor, places: Tensor, chunks: int = 0) -> tuple[Tensor, Tensor]:
    """Losses (B, L, Hr), nats, like scores, and where there is one (B, L, Hr) bool; 0 where there is none.

    scores (B, L, Hr, K), fp32 at least, of the chunks indices (B, L, Hr, K) int, -1 none. places (B, L, P) int: the
    first half are chunks that hold the answer, the others count for nothing unless they are right; -1 none. chunks:
    wrong chunks count as if the token chose among so many. A head that has chosen no right chunk has no loss: there is
    no score to raise.
    """
    chosen = indices >= 0
    answering, naming = places.chunk(2, dim=-1)
    right = chosen & _among(indices, answering)
    wrong = chosen & ~right & ~_among(indices, naming)
    found = right.any(-1)
    log_right = scores.masked_fill(~right, _NEVER).logsumexp(-1)
    log_wrong = scores.masked_fill(~wrong, _NEVER).logsumexp(-1)
    if chunks:
        often = chunks / chosen.sum(-1).clamp_min(1).to(scores.dtype)
        log_wrong = log_wrong + often.clamp_min(1.0).log()
    return torch.where(found, -nn.functional.logsigmoid(log_right - log_wrong), 0.0), found


def _among(indices: Tensor, places: Tensor) -> Tensor:
    """bool like indices: whether a chunk is one of its token's places."""
    # One at a time: all at once would be a tensor of places times all that is chosen.
    among = torch.zeros_like(indices, dtype=torch.bool)
    for place in places.unbind(-1):
        among |= indices == place[..., None, None]
    return among


class EvidenceSums(nn.Module):
    """Asks one layer for its losses. It keeps their sum and number since they were last taken."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float32), persistent=False)

    def forward(
        self, weights: Tensor, scores: Tensor, indices: Tensor, places: Tensor, asked: EvidenceLoss, ranks: int
    ) -> Tensor:
        """`weights` of the chosen chunks as they are; its backward also goes into the losses. ranks: over which the
        heads are shared out, in equal numbers. See `evidence_losses` for the other arguments.
        """
        losses, found = evidence_losses(scores, indices, places, asked.chunks)
        total = losses.sum()
        self.sums += torch.stack((total.detach(), found.sum())).to(self.sums.dtype)
        return attach_loss(weights, asked.weight / (ranks * losses.shape[-1]) * total)


def take_sums(chunks: Sequence[nn.Module], device: torch.device) -> Tensor:
    """float64 (2,): sum and number of the losses of this rank's heads in all layers since the last time, then 0."""
    taken = torch.zeros(2, dtype=torch.float64, device=device)
    for module in (module for chunk in chunks for module in chunk.modules() if isinstance(module, EvidenceSums)):
        taken += module.sums
        module.sums.zero_()
    return taken
