"""Where an answer's tokens stand in the text it was asked about.

Who makes a question knows which fact answers it. A model can be told: at every token of the answer, which token of
the fact says the same. The token behind a value counts, too: what follows the value in the fact says that it has ended.
In a chain the fact that the value leads to says whether the answer goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.tokenizer import Tokenizer

NONE = -1
"""Nothing in the text says this token."""

Told = tuple[str, np.ndarray, int]
"""A value of the answer, the tokens of the fact that says it, and the position of the first of them."""


def evidence_of(tokenizer: Tokenizer, answer: np.ndarray, told: Sequence[Told], *, chained: bool = False) -> np.ndarray:
    """int32 like ``answer``: the position of the token that says the same, NONE where there is none (words that join
    the values of a list).

    answer: token ids of an answer and its end-of-document token. told: its values in order; chained: each is found by
    the one before it. A value whose tokens are not in the fact as they are in the answer (quotation marks stood before
    it) has the tokens at the same places from the value's first one on, the fact's last one at most.
    """
    places = no_evidence(len(answer))
    start = 0
    for value, fact, first in told:
        said = tokenizer.encode_words(f" {value}")
        at = _find(answer, said, start)
        if at is None:
            continue
        behind, start = start, at + len(said)
        inside = _find(fact, said, 0)
        if inside is None:
            inside = _find(fact, tokenizer.encode_words(value), 0)
        if inside is None:
            continue
        if chained and behind:
            places[behind] = first + inside
        end = start if chained else start + 1
        places[at:end] = first + np.minimum(inside + np.arange(end - at), len(fact) - 1)
    return places


def no_evidence(length: int) -> np.ndarray:
    """int32 (length,) of NONE."""
    return np.full(length, NONE, dtype=np.int32)


def _find(tokens: np.ndarray, wanted: np.ndarray, start: int) -> int | None:
    """Where ``wanted`` stands in ``tokens``, at ``start`` or behind it."""
    if len(tokens) < start + len(wanted):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(tokens[start:], len(wanted))
    found = np.flatnonzero((windows == wanted).all(axis=1))
    return start + int(found[0]) if len(found) else None
