"""A seeded permutation with O(1) access, so that a lane can start anywhere in an epoch of billions of documents."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def seed_key(*parts: object) -> int:
    """A 64-bit key from anything with a stable text form."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Element ``p`` of the endless row "permutation of epoch 0, permutation of epoch 1, ..." of ``range(size)``.

    positions: any shape of non-negative integers p; p // size is the epoch. Returns int64 of the same shape, in
    [0, size). A Feistel network over the next power of four, walked until it lands inside, is a permutation.
    """
    p = np.asarray(positions, dtype=np.uint64)
    epoch, x = np.divmod(p, np.uint64(size))
    if size == 1:
        return np.zeros(p.shape, dtype=np.int64)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = _mix(np.uint64(key) + (epoch + np.uint64(1)) * _GOLDEN)

    def network(x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for number in range(_ROUNDS):
            noise = _mix(right + keys + np.uint64(number + 1) * np.uint64(0xD1342543DE82EF95))
            left, right = right, left ^ (noise & mask)
        return (left << half) | right

    with np.errstate(over="ignore"):
        x = network(x, keys)
        outside = np.atleast_1d(x >= size)
        x, keys = np.atleast_1d(x), np.atleast_1d(keys)
        while outside.any():
            x[outside] = network(x[outside], keys[outside])
            outside = x >= size
    return x.reshape(p.shape).astype(np.int64)
