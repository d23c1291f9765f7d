"""Held-out text as the hay around needles."""

from collections.abc import Callable

import numpy as np

from pretrain.errors import RecipeError


class Haystack:
    """Pieces of any length out of one held-out token sequence.

    A piece starts at a random position. Asked for more tokens than the text has, it is tiled: every repetition starts
    at a new random offset and wraps around, so that no two copies line up. Repeated text is an easier haystack than
    fresh text, which is why results carry `repeats`.
    """

    def __init__(self, tokens: np.ndarray) -> None:
        """``tokens``: 1-D integer array, not empty (RecipeError)."""
        self.tokens = np.asarray(tokens).astype(np.int32, copy=False)
        if self.tokens.ndim != 1 or self.tokens.size == 0:
            raise RecipeError(
                f"the held-out text has no tokens (array of shape {self.tokens.shape}): check data.held_out"
            )

    def __len__(self) -> int:
        return int(self.tokens.size)

    def repeats(self, length: int) -> int:
        """How many passes over the text ``length`` tokens need; 1 = no token is used twice."""
        return -(-length // len(self))

    def reader(self, rng: np.random.Generator) -> Callable[[int], np.ndarray]:
        """A function n -> int32 (n,) tokens that draws its offsets from ``rng``."""

        def read(n: int) -> np.ndarray:
            size = len(self)
            if n <= size:
                start = int(rng.integers(size - n + 1))
                return self.tokens[start : start + n]
            piece = np.empty(n, dtype=np.int32)
            for at in range(0, n, size):
                part = min(size, n - at)
                offset = int(rng.integers(size))
                head = min(part, size - offset)
                piece[at : at + head] = self.tokens[offset : offset + head]
                piece[at + head : at + part] = self.tokens[: part - head]
            return piece

        return read

    def split_reader(
        self, rng: np.random.Generator, before: int, sentence_ends: np.ndarray
    ) -> Callable[[int], np.ndarray]:
        """A reader whose text has the end of a sentence exactly after its first ``before`` tokens.

        ``sentence_ends``: bool (vocabulary,), True for tokens that end a sentence. A text without any is cut
        anywhere. Where the piece runs over an end of the held-out tokens it goes on at the other end.
        """

        def read(n: int) -> np.ndarray:
            size = len(self)
            ends = np.flatnonzero(sentence_ends[self.tokens]) + 1  # positions that follow a sentence
            whole = ends[(ends >= before) & (ends + n - before <= size)]  # here the piece fits without wrapping
            choices = whole if whole.size else ends if ends.size else np.arange(size)
            start = int(rng.choice(choices)) - before
            return self.tokens[np.arange(start, start + n) % size]

        return read
