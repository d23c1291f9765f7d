"""How much neighbouring tokens' selections overlap, measured on the device and read by the host one call late.

Reading the value of the running step would wait for the device. The number of the last finished measurement is
already in pinned memory, and selections change slowly over a training run.
"""

from __future__ import annotations

import torch
from torch import Tensor


class OverlapMonitor:
    """Share of a token's chunks that its left neighbour did not choose, for one shape of problem.

    From the unions of tiles of T tokens: (entries / K - 1) / (T - 1), 0 when neighbours agree, 1 when all differ.
    """

    def __init__(self) -> None:
        self.fresh: float | None = None  # last known
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None
        self._since = 0

    def wants_measurement(self, every: int) -> bool:
        """True once in `every` calls, for callers that do not build unions anyway."""
        self._since += 1
        return self._since >= every

    def record(self, count: Tensor, top_k: int, tile: int) -> None:
        """Start copying the share, from the entries (tiles,) of unions, to the host; no wait. Ignored in a capture."""
        if count.device.type != "cuda" or torch.cuda.is_current_stream_capturing() or self._event is not None:
            return
        self._since = 0
        if self._host is None:
            self._host = torch.empty((), pin_memory=True)
        self._host.copy_((count.float().mean() / top_k - 1) / max(1, tile - 1), non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> float | None:
        """The newest value that has arrived, None before the first."""
        if self._event is not None and not torch.cuda.is_current_stream_capturing() and self._event.query():
            assert self._host is not None
            self.fresh = float(self._host)
            self._event = None
        return self.fresh

    def overlap(self, tile: int) -> float | None:
        """Entries in the union of `tile` tokens over K, from the newest share that has arrived."""
        fresh = self.read()
        return None if fresh is None else 1 + (tile - 1) * fresh
