"""Where an answer's tokens stand in the text it was asked about.

Who makes a question knows which fact answers it. A model can be told: at every token of the answer, which token of
the fact says the same. The token behind a value counts, too: what follows the value in the fact says that it has ended.
In a chain the fact that the value leads to says whether the answer goes on.

A fact may lie across an edge of chunks. What stands behind the edge can know of what stands before it, not the other
way round: where the value comes first, its chunk need not say whose value it is, and the one with the key may give the
answer as well. Where the key comes first, its chunk is found by the key and has no answer. So does another fact of the
same answer that names the key, as each fact of a chain does with the next one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.tokenizer import Tokenizer

NONE = -1
"""Nothing in the text says this token."""
PLACES = 4
"""Two positions in chunks that answer, then as many in chunks that name what is asked for and do not answer."""


class Told(NamedTuple):
    """A value of the answer, what it is asked for by, the tokens of the fact that says both, and the position of the
    first of them."""

    value: str
    key: str
    fact: np.ndarray
    first: int


def evidence_of(tokenizer: Tokenizer, answer: np.ndarray, told: Sequence[Told], *, chained: bool = False) -> np.ndarray:
    """int32 (answer tokens, PLACES): positions of the token that says the same; of the last token of the key, if that
    comes later, else the former again; of up to two tokens that name the key only. NONE where there is none, all of
    them at words that join the values of a list.

    answer: token ids of an answer and its end-of-document token. told: its values in order; chained: each is found by
    the one before it. A value whose tokens are not in the fact as they are in the answer (quotation marks stood before
    it) has the tokens at the same places from the value's first one on, the fact's last one at most.
    """
    places = no_evidence(len(answer))
    start = 0
    for i, (value, key, fact, first) in enumerate(told):
        said = tokenizer.encode_words(f" {value}")
        at = _find(answer, said, start)
        if at is None:
            continue
        behind, start = start, at + len(said)
        inside = _find_words(tokenizer, fact, value)
        if inside is None:
            continue
        end = start if chained else start + 1
        says = first + np.minimum(inside[0] + np.arange(end - at), len(fact) - 1)
        own = _find_words(tokenizer, fact, key)
        naming = [first + own[0]] if own and own[0] < inside[0] else []
        naming += _named_elsewhere(tokenizer, told, i)
        naming = naming[: PLACES // 2]
        places[at:end, 0] = says
        places[at:end, 1] = np.maximum(says, first + own[1] if own else NONE)
        places[at:end, PLACES // 2 : PLACES // 2 + len(naming)] = naming
        if chained and behind:
            places[behind] = places[at]
    return places


def no_evidence(length: int) -> np.ndarray:
    """int32 (length, PLACES) of NONE."""
    return np.full((length, PLACES), NONE, dtype=np.int32)


def _named_elsewhere(tokenizer: Tokenizer, told: Sequence[Told], index: int) -> list[int]:
    """Where the facts of other values name the key of value ``index``, those beside it first."""
    others = sorted((i for i in range(len(told)) if i != index), key=lambda i: abs(i - index))
    found = [(told[i].first, _find_words(tokenizer, told[i].fact, told[index].key)) for i in others]
    return [first + at[0] for first, at in found if at]


def _find_words(tokenizer: Tokenizer, tokens: np.ndarray, words: str) -> tuple[int, int] | None:
    """Where the first and last token of ``words`` stand in ``tokens``, written as within a sentence or as at its
    start."""
    for form in (f" {words}", words):
        said = tokenizer.encode_words(form)
        at = _find(tokens, said, 0)
        if at is not None:
            return at, at + len(said) - 1
    return None


def _find(tokens: np.ndarray, wanted: np.ndarray, start: int) -> int | None:
    """Where ``wanted`` stands in ``tokens``, at ``start`` or behind it."""
    said = wanted.tolist()
    for at in np.flatnonzero(tokens[start : len(tokens) - len(said) + 1] == said[0]).tolist():
        if tokens[start + at : start + at + len(said)].tolist() == said:
            return start + at
    return None
