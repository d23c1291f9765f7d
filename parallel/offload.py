"""Optimizer state in host memory between updates: fp32 master copies and moments.

They come to the device for the update, when activations are gone, and leave it before the next forward pass: the same
kernels on the same numbers, so results are equal to the last bit. While away, a tensor keeps its shape and one number
of memory, and whatever reads it by mistake reads nonsense. On a CPU the host copies are ordinary copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class HostState:
    """The state of Megatron's optimizers `chained`, either on the device (`is_here`) or in pinned host memory."""

    def __init__(self, chained: Sequence[Any]) -> None:
        self.chained = chained
        self.is_here = True
        self._hosts: dict[int, Tensor] = {}
        self._away: list[tuple[Tensor, Tensor]] = []  # (tensor, its host copy)

    def _tensors(self) -> Iterator[Tensor]:
        for optimizer in self.chained:
            # fp32 parameters have no master copies: the optimizer moves the model's own, or views of them.
            own = {id(p) for p in getattr(optimizer, "model_params", ())}
            own |= {id(p) for group in getattr(optimizer, "shard_fp32_groups", ()) for p in group}
            for group in optimizer.optimizer.param_groups:
                yield from (p for p in group["params"] if id(p) not in own)
            for state in optimizer.optimizer.state.values():
                yield from (value for value in state.values() if torch.is_tensor(value) and value.dim())

    def leave(self) -> None:
        """Move the state to the host; nothing to do when it is there."""
        if not self.is_here:
            return
        self._away = []
        for tensor in self._tensors():
            host = self._hosts.get(id(tensor))
            if host is None or host.shape != tensor.shape:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._hosts[id(tensor)] = host
            host.copy_(tensor.detach(), non_blocking=True)
            self._away.append((tensor, host))
        if any(tensor.is_cuda for tensor, _ in self._away):
            torch.cuda.synchronize()
        for tensor, _ in self._away:
            tensor.data = tensor.data.new_empty(1).expand(tensor.shape)
        known = {id(tensor) for tensor, _ in self._away}
        self._hosts = {key: host for key, host in self._hosts.items() if key in known}
        self.is_here = False

    def come(self) -> None:
        """Bring the state back to the device; nothing to do when it is there."""
        if self.is_here:
            return
        for tensor, host in self._away:
            tensor.data = torch.empty_like(host, device=tensor.device).copy_(host, non_blocking=True)
        self.is_here = True
