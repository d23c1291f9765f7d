"""Context parallelism made for HSA: each rank holds one contiguous slice of whole chunks of every sequence.

Two exchanges are all that layers need. Sliding windows need keys and values of the tokens just left of the slice:
`start_halo`, per window layer, from as many left neighbours as the window reaches. HSA layers need the memory of all
chunks: `start_gather`, once per micro-batch, whose backward is one reduce-scatter. A third is there for speed alone
(`parallel.selection`). Bytes are counted in `traffic`; the formulas are in docs/parallelism.md.

Every exchange is started in one place and waited for in another, and so is its backward: what autograd recorded between
the two places runs while the bytes are under way, in either direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass
class Traffic:
    """Bytes this rank has received from other context-parallel ranks since `reset`, and the pairs of query and chunk
    that it has scored (those before the query only).
    """

    halo: int = 0
    memory: int = 0
    selection: int = 0
    scored: int = 0

    def reset(self) -> None:
        self.halo = self.memory = self.selection = self.scored = 0


traffic = Traffic()


def local_slice(x: Tensor, group: ProcessGroup, dim: int = 1) -> Tensor:
    """This rank's part of a whole sequence along `dim`."""
    if group.size() == 1:
        return x
    length = x.shape[dim] // group.size()
    return x.narrow(dim, group.rank() * length, length)


def halo_shares(length: int, reach: int, ranks: int) -> list[int]:
    """Tokens wanted of the left neighbour at distance 1, 2, ..: slices of `length` tokens, `reach` tokens in all."""
    return [max(0, min(length, reach - distance * length)) for distance in range(ranks - 1)]


# What a started collective gives: the tensor that it fills, and the handle to wait for.
Started = tuple[Tensor, Any]


class Exchange:
    """A linear exchange between ranks and its transpose: start(x) in forward, start_back(gradient) in backward.

    `begin` starts it, `end` waits for it. In backward `end` starts and `begin` waits.
    """

    def __init__(self, start: Callable[[Tensor], Started], start_back: Callable[[Tensor], Started]) -> None:
        self._start, self._start_back = start, start_back
        self._handle: Any = None
        self._kept: tuple[Tensor, ...] = ()  # a collective under way must find its tensors in place

    def begin(self, x: Tensor) -> Tensor:
        """The tensor that will hold the result: for `end` only."""
        return _Begin.apply(x, self)

    def end(self, pending: Tensor) -> Tensor:
        """The result."""
        return _End.apply(pending, self)

    def run(self, start: Callable[[Tensor], Started], x: Tensor) -> Tensor:
        out, self._handle = start(x)
        self._kept = (x, out)
        return out

    def wait(self) -> Tensor:
        self._handle.wait()
        _, out = self._kept
        self._handle, self._kept = None, ()
        return out


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, exchange: Exchange) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.exchange = exchange
        return exchange.run(exchange._start, x.contiguous())

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        return ctx.exchange.wait(), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pending: Tensor, exchange: Exchange) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.exchange = exchange
        exchange.wait()
        return pending.view_as(pending)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        exchange = ctx.exchange
        exchange.run(exchange._start_back, gradient.contiguous())
        return gradient, None  # of the shape that autograd expects; `_Begin` has the one that counts


def all_to_all(x: Tensor, sent: list[int], received: list[int], group: ProcessGroup, counter: str) -> Started:
    """Start sending the rows of x, sent[r] of them to rank r; the result holds received[r] rows of rank r."""
    out = x.new_empty(sum(received), *x.shape[1:])
    handle = torch.distributed.all_to_all_single(out, x, received, sent, group=group, async_op=True)
    setattr(traffic, counter, getattr(traffic, counter) + out.numel() * out.element_size())
    return out, handle


def start_halo(k: Tensor, v: Tensor, reach: int, group: ProcessGroup) -> Callable[[], tuple[Tensor, Tensor]]:
    """Start fetching keys and values (n, B, H, D), n = min(reach, tokens left of this slice), of the tokens just left
    of this rank's k, v (L, B, H, D). Call the result to get them.
    """
    length, rank, size = k.shape[0], group.rank(), group.size()
    shares = halo_shares(length, reach, size)
    # What goes to rank + distance is the end of this slice, what comes from rank - distance the end of that one.
    sent = [shares[r - rank - 1] if r > rank else 0 for r in range(size)]
    received = [shares[rank - r - 1] if r < rank else 0 for r in range(size)]
    rows = torch.cat([torch.stack((k[length - n :], v[length - n :]), dim=1) for n in sent])
    exchange = Exchange(
        lambda x: all_to_all(x, sent, received, group, "halo"),
        lambda gradient: all_to_all(gradient, received, sent, group, "halo"),
    )
    pending = exchange.begin(rows)

    def wait() -> tuple[Tensor, Tensor]:
        halo_k, halo_v = exchange.end(pending).unbind(1)
        return halo_k, halo_v

    return wait


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        return gradient, None


def keep_in_graph(x: Tensor, other: Tensor) -> Tensor:
    """`x`, whose backward always reaches `other`.

    A rank none of whose tokens sees a chunk would otherwise leave out a collective in the backward of `other` (the
    memory, selection scores), and the others would wait for it.
    """
    return _Keep.apply(x, other)


def start_gather(packed: Tensor, group: ProcessGroup) -> Callable[[], Tensor]:
    """Start gathering the packed memory of this rank's chunks (c, B, width). Call the result, any number of times, for
    that of all chunks (c * ranks, B, width) in sequence order.
    """
    if group.size() == 1:
        return lambda: packed

    def gather(x: Tensor) -> Started:
        whole = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
        handle = torch.distributed.all_gather_into_tensor(whole, x, group=group, async_op=True)
        traffic.memory += (whole.numel() - x.numel()) * whole.element_size()
        return whole, handle

    def scatter(gradient: Tensor) -> Started:
        own = gradient.new_empty(gradient.shape[0] // group.size(), *gradient.shape[1:])
        handle = torch.distributed.reduce_scatter_tensor(own, gradient, group=group, async_op=True)
        traffic.memory += (group.size() - 1) * own.numel() * own.element_size()
        return own, handle

    exchange = Exchange(gather, scatter)
    pending = exchange.begin(packed)
    result: list[Tensor] = []

    def wait() -> Tensor:
        if not result:
            result.append(exchange.end(pending))
        return result[0]

    return wait
