"""The evidence loss: at tokens whose answer is known to stand in one chunk, retrieval is told which.

A token that copies an answer out of the text needs one chunk, and the language model's loss asks for no more of that
chunk than makes the answer likely among the chunks of a training sequence. Here every retrieval head is asked for it:
the loss is -log of the chunk's share of the head's softmax. Each wrong chunk can be counted as often as it takes to
fill a far longer text, so that the chunks of a short sequence are told apart as well as those of the long one have to
be. The paper has no such loss; without a weight nothing of this runs.

Legend: B sequences, L tokens of this rank, Hr its retrieval heads, K chunks chosen per token and head.
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


def evidence_losses(scores: Tensor, indices: Tensor, wanted: Tensor, chunks: int = 0) -> tuple[Tensor, Tensor]:
    """Losses (B, L, Hr), nats, like scores, and where there is one (B, L, Hr) bool; 0 where there is none.

    scores (B, L, Hr, K), fp32 at least, of the chunks indices (B, L, Hr, K) int, -1 none. wanted (B, L) int: the chunk
    that holds the answer, -1 none. chunks: wrong chunks count as if the token chose among so many. A head that has not
    chosen the wanted chunk has no loss: there is no score to raise.
    """
    chosen = indices >= 0
    right = chosen & (indices == wanted[..., None, None])
    found = right.any(-1)
    log_right = torch.where(right, scores, 0.0).sum(-1)
    log_wrong = scores.masked_fill(right | ~chosen, _NEVER).logsumexp(-1)
    if chunks:
        often = chunks / chosen.sum(-1).clamp_min(1).to(scores.dtype)
        log_wrong = log_wrong + often.clamp_min(1.0).log()
    return torch.where(found, -nn.functional.logsigmoid(log_right - log_wrong), 0.0), found


class EvidenceSums(nn.Module):
    """Asks one layer for its losses. It keeps their sum and number since they were last taken."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float32), persistent=False)

    def forward(
        self, weights: Tensor, scores: Tensor, indices: Tensor, wanted: Tensor, asked: EvidenceLoss, ranks: int
    ) -> Tensor:
        """`weights` of the chosen chunks as they are; its backward also goes into the losses. ranks: over which the
        heads are shared out, in equal numbers. See `evidence_losses` for the other arguments.
        """
        losses, found = evidence_losses(scores, indices, wanted, asked.chunks)
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
