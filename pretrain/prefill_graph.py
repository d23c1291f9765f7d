"""Whole segments of a prompt through the lower decoder as one CUDA graph.

All segments of a long prompt but the first are alike: as many tokens, halos as long as the windows reach, no token
waiting for the rest of its chunk. A small model's kernels take less time than Python takes to launch them, so such a
segment is recorded once and replayed for every further one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from parallel.layers import KeysAndValues
from parallel.memory import ContextMemory
from pretrain.cuda_graph import recorded

Halos = Mapping[int, KeysAndValues]
Work = Callable[[Tensor, Tensor, Halos], tuple[Tensor, ContextMemory, Halos]]
"""Tokens (B, L) int64, chunk numbers (1, L / S) int64 and halos by layer -> lower output (L, B, hidden), the chunks'
memory and the halos after it."""

WORTH = 4
"""Segments from which recording pays: it runs one of them three times."""


class SegmentGraph:
    """`work` in buffers of fixed places. On a CPU it is called as it is.

    tokens, numbers, halos: of one segment, to take shapes from.
    """

    def __init__(self, work: Work, tokens: Tensor, numbers: Tensor, halos: Halos) -> None:
        self._work = work
        self._tokens, self._numbers = torch.empty_like(tokens), torch.empty_like(numbers)
        self._halos = {number: (k.clone(), v.clone()) for number, (k, v) in halos.items()}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._made: tuple[Tensor, ContextMemory] | None = None

    def fits(self, tokens: Tensor) -> bool:
        """Whether a segment has the shape of this one."""
        return tokens.shape == self._tokens.shape

    def load(self, halos: Halos) -> None:
        """Put the halos of the first segment into their places."""
        for number, pair in halos.items():
            for mine, given in zip(self._halos[number], pair, strict=True):
                mine.copy_(given)

    def halos(self) -> dict[int, KeysAndValues]:
        """Copies of the halos after the last segment."""
        return {number: (k.clone(), v.clone()) for number, (k, v) in self._halos.items()}

    def run(self, tokens: Tensor, numbers: Tensor) -> tuple[Tensor, ContextMemory]:
        """One segment: lower output (L, B, hidden) and memory, both overwritten by the next one."""
        self._tokens.copy_(tokens)
        self._numbers.copy_(numbers)
        if tokens.device.type != "cuda":
            return self._step()
        if self._graph is None:
            before = self.halos()
            self._graph, self._made = recorded(self._step, lambda: self.load(before))
        assert self._graph is not None and self._made is not None
        self._graph.replay()
        return self._made

    def _step(self) -> tuple[Tensor, ContextMemory]:
        hidden, memory, halos = self._work(self._tokens, self._numbers, self._halos)
        self.load(halos)
        return hidden, memory
