"""Chunk selection shared out evenly over context-parallel ranks.

A query scores the landmarks before it, so with contiguous slices rank r of N scores 2 r + 1 parts where the mean is N:
the last rank works almost twice as long as the mean. Here rank N - 1 - r hands its last queries to rank r, just so many
that both score the same number of pairs, and gets chunk ids and scores back. All ranks have all landmarks already, so
only queries, ids, scores and their gradients travel.
"""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from hsa_kernels import ops
from parallel.context import Exchange, all_to_all, traffic

# Time of one product of a scored pair, forward and backward: 3.33 ms for the 2^27 pairs of 128K queries of 128 numbers
# on an H100 (docs/benchmarks.md).
_SECONDS_PER_PRODUCT = 3.33e-3 / 2**27 / 128
# What a GPU receives from another node: half of 400 Gb/s.
_BYTES_PER_SECOND = 25e9


def scored_pairs(start: int, stop: int, chunk_size: int) -> int:
    """Pairs of a query at positions start .. stop - 1 and a chunk completed before it."""

    def before(position: int) -> int:
        chunks, rest = divmod(position, chunk_size)
        return chunk_size * chunks * (chunks - 1) // 2 + chunks * rest

    return before(stop) - before(start)


@functools.lru_cache
def handed_over(length: int, chunk_size: int, ranks: int) -> tuple[int, ...]:
    """Number of queries that rank ranks - 1 - r hands to rank r, for r in the lower half; slices of `length` tokens."""
    counts = []
    for low in range(ranks // 2):
        high = ranks - 1 - low
        end = (high + 1) * length
        surplus = scored_pairs(high * length, end, chunk_size) - scored_pairs(
            low * length, (low + 1) * length, chunk_size
        )

        def moved(count: int, end: int = end) -> int:
            return scored_pairs(end - count, end, chunk_size)

        above = bisect.bisect_left(range(length), surplus, key=lambda count: 2 * moved(count))
        counts.append(min((above, max(above - 1, 0)), key=lambda count: abs(surplus - 2 * moved(count))))
    return tuple(counts)


def balancing_pays(*, length: int, ranks: int, chunk_size: int, top_k: int, retrieval_size: int) -> bool:
    """True when the last rank saves more time, by estimate, than the exchange takes it. Batch and heads cancel out."""
    if ranks == 1:
        return False
    count = handed_over(length, chunk_size, ranks)[0]
    end = ranks * length
    saved = scored_pairs(end - count, end, chunk_size) * retrieval_size * _SECONDS_PER_PRODUCT
    # The last rank gets ids and scores, then the gradients of its queries.
    return saved > count * (8 * top_k + 4 * retrieval_size) / _BYTES_PER_SECOND


@dataclass(frozen=True)
class Decay:
    """Scores of chunks n > reach chunks back fall by amount * ln(n / reach)."""

    amount: float
    reach: float

    def arguments(self, queries: Tensor) -> dict[str, Any]:
        """Of the selection operators, for retrieval queries (..., Hr, Dr)."""
        decay = torch.full((), self.amount, dtype=torch.float32, device=queries.device)
        return {"decay": decay.expand(queries.shape[:-1]), "reach": self.reach}


def select_chunks(
    queries: Tensor,
    landmarks: Tensor,
    *,
    group: ProcessGroup,
    balance: bool | None,
    top_k: int,
    chunk_size: int,
    query_offset: int,
    documents: Tensor | None,
    noise: Tensor | None = None,
    decay: Decay | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.select_chunks` for this rank's queries (L, B, Hr, Dr), with `balance` shared out over the ranks of `group`
    (None: where it pays). landmarks (B, C, Hr, Dr) and documents (B, keys) are those of the whole sequence. noise: for
    the choice, on one rank only. Returns indices (B, L, Hr, top_k) int32 and scores.
    """

    def choose(x: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        traffic.scored += scored_pairs(offset, offset + x.shape[0], chunk_size)
        return ops.select_chunks(
            x.transpose(0, 1),
            landmarks,
            top_k=top_k,
            chunk_size=chunk_size,
            query_offset=offset,
            documents=documents,
            noise=noise,
            **({} if decay is None else decay.arguments(x.transpose(0, 1))),
        )

    length = queries.shape[0]
    if balance is None:
        balance = balancing_pays(
            length=length,
            ranks=group.size(),
            chunk_size=chunk_size,
            top_k=top_k,
            retrieval_size=queries.shape[3],
        )
    if group.size() == 1 or not balance:
        return choose(queries, query_offset)

    rank, size = group.rank(), group.size()
    partner = size - 1 - rank
    shares = handed_over(length, chunk_size, size)
    gives, takes = shares[partner] if rank > partner else 0, shares[rank] if rank < partner else 0
    sent = [gives if r == partner else 0 for r in range(size)]
    received = [takes if r == partner else 0 for r in range(size)]
    out = Exchange(
        lambda x: all_to_all(x, sent, received, group, "selection"),
        lambda gradient: all_to_all(gradient, received, sent, group, "selection"),
    )
    back = Exchange(
        lambda x: all_to_all(x, received, sent, group, "selection"),
        lambda gradient: all_to_all(gradient, sent, received, group, "selection"),
    )
    # Own queries in two parts, so that queries travel during the first and results during the second; their gradients
    # likewise. Every rank records the same exchanges, empty ones included: backward must meet them in the same order.
    kept = length - gives
    middle = kept // 2
    asked = out.begin(queries[kept:])
    first_ids, first_scores = choose(queries[:middle], query_offset)
    helped_ids, helped_scores = choose(out.end(asked), (partner + 1) * length - takes if takes else 0)
    answer = back.begin(helped_scores.transpose(0, 1))
    answer_ids, handle = all_to_all(helped_ids.transpose(0, 1).contiguous(), received, sent, group, "selection")
    second_ids, second_scores = choose(queries[middle:kept], query_offset + middle)
    handle.wait()
    scores = torch.cat((first_scores, second_scores, back.end(answer).transpose(0, 1)), dim=1)
    return torch.cat((first_ids, second_ids, answer_ids.transpose(0, 1)), dim=1), scores
