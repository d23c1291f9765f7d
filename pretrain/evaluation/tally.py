"""Counts of right answers with an honest interval."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

_Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson score interval (95 %) of a proportion; (0, 1) when nothing was counted.

    Unlike the normal approximation it stays inside [0, 1] and does not collapse to a point at 0 or n right answers.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"need 0 <= correct <= n, got {correct} of {n}")
    if n == 0:
        return 0.0, 1.0
    share, z2 = correct / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == n else min(1.0, centre + half)
    return low, high


@dataclass(frozen=True)
class Tally:
    """``correct`` of ``n`` samples answered exactly; ``token_accuracy`` is the share of right answer tokens (softer,
    0 to 1).
    """

    n: int = 0
    correct: int = 0
    tokens: int = 0
    tokens_right: int = 0

    @property
    def accuracy(self) -> float:
        """Share of exact answers, 0 to 1; NaN when nothing was counted."""
        return self.correct / self.n if self.n else math.nan

    @property
    def token_accuracy(self) -> float:
        """Share of right answer tokens, 0 to 1; NaN when nothing was counted."""
        return self.tokens_right / self.tokens if self.tokens else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the accuracy."""
        return wilson_interval(self.correct, self.n)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.n + other.n,
            self.correct + other.correct,
            self.tokens + other.tokens,
            self.tokens_right + other.tokens_right,
        )

    def to_json(self) -> dict:
        """n, correct, accuracy, low, high, token_accuracy."""
        low, high = self.interval
        return {
            "n": self.n,
            "correct": self.correct,
            "accuracy": self.accuracy,
            "low": low,
            "high": high,
            "token_accuracy": self.token_accuracy,
        }


def total(tallies: Iterable[Tally]) -> Tally:
    """Sum of tallies."""
    result = Tally()
    for tally in tallies:
        result = result + tally
    return result
