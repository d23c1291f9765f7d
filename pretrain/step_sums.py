"""What a step measures on its way: sums over the tokens of this rank, added on the device and reduced over all ranks in
one call.

Legend: b sequences, L positions of whole sequences, l <= L of this rank's part of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FIRST = 16  # tokens; the first bucket of positions ends here, and each next one is twice as long as all before


def document_positions(documents: Tensor) -> Tensor:
    """int64 (b, L): how many tokens of its document stand before a position in its sequence; documents (b, L)."""
    place = torch.arange(documents.shape[1], device=documents.device).expand(documents.shape)
    starts = torch.zeros_like(place)
    starts[:, 1:] = torch.where(documents[:, 1:] != documents[:, :-1], place[:, 1:], 0)
    return place - starts.cummax(dim=1).values


class StepSums:
    """Sums of one step for sequences of ``context`` tokens. ``values`` is the one tensor to reduce over the ranks.

    values: float64, first the weighted loss, the weights, the ranks that want to stop and the documents skipped; then
    nll and number of weighted tokens by domain and by position in the document, in one table: a token is added once.
    """

    def __init__(self, domains: Sequence[str], context: int, device: torch.device) -> None:
        self._domains = list(domains)
        limits = itertools.takewhile(lambda n: n < context, (_FIRST << i for i in itertools.count()))
        self._from = [0, *limits]
        self._limits = torch.tensor(self._from[1:], device=device)
        cells = len(self._domains) * len(self._from)
        self.values = torch.zeros(4 + 2 * cells, dtype=torch.float64, device=device)
        self._losses, self._counts = self.values[4 : 4 + cells], self.values[4 + cells :]

    def say(self, *, wants_stop: bool, skipped: float) -> None:
        """This rank wishes to stop after the step; its share of the documents that could not be read so far."""
        self.values[2], self.values[3] = float(wants_stop), skipped

    def add(self, weighted: Tensor, losses: Tensor, weights: Tensor, domains: Tensor, positions: Tensor) -> None:
        """Add tokens: the sum of their weighted nll; nll, loss weights, ids of domains, positions in their documents
        (each b, l). Waits for nothing."""
        self.values[0] += weighted.detach().double()
        self.values[1] += weights.double().sum()
        counted = weights > 0
        cell = domains.long() * len(self._from) + torch.bucketize(positions, self._limits, right=True)
        self._losses.index_add_(0, cell.flatten(), torch.where(counted, losses.detach(), 0.0).double().flatten())
        self._counts.index_add_(0, cell.flatten(), counted.double().flatten())

    def forget_tokens(self) -> None:
        """Leave out what another rank has added, too."""
        self.values[:2] = 0.0
        self.values[4:] = 0.0

    def read(self, values: list[float]) -> tuple[float, int, int, dict[str, float], dict[int, float]]:
        """What ``values``, reduced and copied to the host, say: (loss per weight, ranks that want to stop, documents
        skipped, mean nll by domain, mean nll by position from which on). Domains and positions without a token are left
        out."""
        weighted, weights, stop, skipped, *rest = values
        table = torch.tensor(rest, dtype=torch.float64).view(2, len(self._domains), len(self._from))
        by_domain, by_position = table.sum(2), table.sum(1)
        return (
            weighted / max(weights, 1e-9),
            round(stop),
            round(skipped),
            _means(self._domains, by_domain),
            _means(self._from, by_position),
        )


def _means(names: Sequence[Any], table: Tensor) -> dict[Any, float]:
    losses, counts = table.tolist()
    return {name: loss / count for name, loss, count in zip(names, losses, counts, strict=True) if count}
