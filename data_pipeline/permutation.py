"""A seeded permutation with O(1) access, so that a lane can start anywhere in an epoch of billions of documents."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_TABLE = 8  # the rounds are tabulated while a table has at most this many entries for each position asked for


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
    if size == 1 or not p.size:
        return np.zeros(p.shape, dtype=np.int64)
    epoch, x = np.divmod(p.reshape(-1), np.uint64(size))
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    with np.errstate(over="ignore"):
        return _walk(x.astype(np.int64), epoch, size, half, np.uint64(key)).reshape(p.shape)


def _walk(x: np.ndarray, epoch: np.ndarray, size: int, half: int, key: np.uint64) -> np.ndarray:
    mask, bits = np.int64((1 << half) - 1), np.int64(half)

    def keys_of(epoch: np.ndarray) -> np.ndarray:
        return _mix(key + (epoch + np.uint64(1)) * _GOLDEN)

    def noise(right: np.ndarray, keys: np.ndarray, number: int) -> np.ndarray:
        mixed = _mix(right.astype(np.uint64) + keys + np.uint64(number + 1) * np.uint64(0xD1342543DE82EF95))
        return mixed.astype(np.int64) & mask

    first = epoch.min()
    epochs = int(epoch.max() - first) + 1
    tables: list[np.ndarray] = []
    if epochs << half <= _TABLE * x.size:
        every = np.arange(1 << half, dtype=np.uint64)
        keys = keys_of(first + np.arange(epochs, dtype=np.uint64))[:, None]
        tables = [noise(every, keys, number).reshape(-1) for number in range(_ROUNDS)]
        keys = (epoch - first).astype(np.int64) << bits  # where an epoch's part of a table starts
    else:
        keys = keys_of(epoch)

    def network(x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = x >> bits, x & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (tables[number][keys + right] if tables else noise(right, keys, number))
        return (left << bits) | right

    x = network(x, keys)
    outside = np.flatnonzero(x >= size)
    while outside.size:
        x[outside] = again = network(x[outside], keys[outside])
        outside = outside[again >= size]
    return x
