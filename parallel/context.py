"""Context parallelism made for HSA: each rank holds one contiguous slice of whole chunks of every sequence.

Two exchanges are all there is. Sliding windows need keys and values of the tokens just left of the slice: `left_halo`,
per window layer, from as many left neighbours as the window reaches. HSA layers need the memory of all chunks:
`gather_memory`, once per micro-batch, whose backward is one reduce-scatter. Bytes are counted in `traffic`; the
formulas are in docs/parallelism.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass
class Traffic:
    """Bytes this rank has received from other context-parallel ranks since `reset`."""

    halo: int = 0
    memory: int = 0

    def reset(self) -> None:
        self.halo = self.memory = 0


traffic = Traffic()


def local_slice(x: Tensor, group: ProcessGroup, dim: int = 1) -> Tensor:
    """This rank's part of a whole sequence along `dim`."""
    if group.size() == 1:
        return x
    length = x.shape[dim] // group.size()
    return x.narrow(dim, group.rank() * length, length)


def key_documents(documents: Tensor | None, keys: int, group: ProcessGroup) -> Tensor | None:
    """Document ids (B, keys) of a window's keys, out of those of the whole sequence: the last ones up to the end of
    this rank's slice.
    """
    if documents is None or group.size() == 1:
        return documents
    end = documents.shape[1] // group.size() * (group.rank() + 1)
    return documents[:, end - keys : end].contiguous()


def halo_shares(length: int, reach: int, ranks: int) -> list[int]:
    """Tokens wanted of the left neighbour at distance 1, 2, ..: slices of `length` tokens, `reach` tokens in all."""
    return [max(0, min(length, reach - distance * length)) for distance in range(ranks - 1)]


class _LeftHalo(torch.autograd.Function):
    """Every rank's rightmost tokens to the ranks on its right; gradients the other way."""

    @staticmethod
    def forward(ctx, x: Tensor, reach: int, group: ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        """x (L, ...) -> (n, ...), n = min(reach, tokens to the left of this slice)."""
        length, rank, size = x.shape[0], group.rank(), group.size()
        shares = halo_shares(length, reach, size)
        # What goes to rank + distance is the end of this slice, what comes from rank - distance the end of that one.
        sent = [shares[r - rank - 1] if r > rank else 0 for r in range(size)]
        received = [shares[rank - r - 1] if r < rank else 0 for r in range(size)]
        ctx.group, ctx.sent, ctx.received, ctx.length = group, sent, received, length
        out = torch.cat([x[length - n :] for n in sent])
        halo = x.new_empty(sum(received), *x.shape[1:])
        torch.distributed.all_to_all_single(halo, out, received, sent, group=group)
        traffic.halo += halo.numel() * halo.element_size()
        return halo

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        parts = gradient.new_empty(sum(ctx.sent), *gradient.shape[1:])
        torch.distributed.all_to_all_single(parts, gradient.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        traffic.halo += parts.numel() * parts.element_size()
        total = gradient.new_zeros(ctx.length, *gradient.shape[1:])
        for part in parts.split(ctx.sent):
            total[ctx.length - part.shape[0] :] += part
        return total, None, None


def left_halo(k: Tensor, v: Tensor, reach: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values (n + L, B, H, D) of a window layer with the `reach` tokens left of this rank's slice in front (as
    many as there are), exchanged together.
    """
    if group.size() == 1 or reach == 0:
        return k, v
    halo_k, halo_v = _LeftHalo.apply(torch.stack((k, v), dim=1), reach, group).unbind(1)
    return torch.cat((halo_k, k)), torch.cat((halo_v, v))


class _GatherMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        whole = packed.new_empty(packed.shape[0] * group.size(), *packed.shape[1:])
        torch.distributed.all_gather_into_tensor(whole, packed.contiguous(), group=group)
        traffic.memory += (whole.numel() - packed.numel()) * whole.element_size()
        return whole

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        size = ctx.group.size()
        own = gradient.new_empty(gradient.shape[0] // size, *gradient.shape[1:])
        torch.distributed.reduce_scatter_tensor(own, gradient.contiguous(), group=ctx.group)
        traffic.memory += (size - 1) * own.numel() * own.element_size()
        return own, None


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        return gradient, None


def keep_in_graph(x: Tensor, memory: Tensor) -> Tensor:
    """`x`, whose backward always reaches `memory`.

    A rank none of whose tokens sees a chunk would otherwise leave the memory's reduce-scatter out, and the others would
    wait for it.
    """
    return _Keep.apply(x, memory)


def gather_memory(packed: Tensor, group: ProcessGroup) -> Tensor:
    """Packed memory of this rank's chunks (c, B, width) -> of all chunks (c * ranks, B, width), in sequence order."""
    return packed if group.size() == 1 else _GatherMemory.apply(packed, group)
