"""Synthetic long-context samples: needles in a haystack (RULER's S-NIAH, MK-NIAH, MQ-NIAH), variable tracking,
self-copy, frequent words.

Every sample is ``[haystack with needles][question][answer][eos]``, exactly ``length`` tokens, and the answer comes
last, so that training weighs it and evaluation generates it from ``tokens[:prompt_length]``. Training and evaluation
word the needles differently, see ``wordings``; numbers are ``digits`` single-digit tokens. ``copy`` follows S' = x1..xn
x1..xn (2511.23319) with an end-of-document token between the halves as the cue to begin. ``recall`` (training only) has
many facts and questions, see ``recall``; ``niah_needles`` is a haystack made of nothing but needles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.config import TASKS
from data_pipeline.errors import DataError
from data_pipeline.evidence import Told, evidence_of, no_evidence
from data_pipeline.grammar import RARE, Frequent
from data_pipeline.recall import recall_events, text_length
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.wordings import (
    FREQUENT,
    TEMPLATES,
    VALUES,
    Facts,
    ManyFacts,
    many_facts,
    number_facts,
    random_word,
    variable_facts,
)

_LAST = 0.1  # share of free samples whose needle stands directly before the question: text hardly ever asks there
_SNAP = 48  # a needle moves by at most this many tokens to follow the end of a sentence
_CUT = 0.6  # share of the needles of "wide" that are moved onto a chunk's edge where there is room: who chooses chunks
# finds them hardest, and by chance only one in five needles of a dozen tokens lies across an edge of 64
_CUT_TRIES = 4
_MOST_CHAINS = 6  # of variables in one sample of "wide", worded alike: which of them is meant has to be told
_CHAIN_ROOM = 512  # tokens of a sample for each of them


class SampleTooShort(DataError):
    """The sample's length cannot hold the task."""


@dataclass
class SyntheticSample:
    """One sample of ``length`` tokens.

    tokens int32 (length,). answer_mask bool (length,): True at the answer's tokens, the closing eos included (the loss
    weight of an answer token belongs to the position before it). text_mask bool (length,): True at predictable prompt
    text (everything but the answer; False in the random half of a copy). prompt_length: tokens before the answer.
    kind: the task. evidence int32 (length, PLACES): at tokens of answers where a fact says the same, see
    `data_pipeline.evidence`; -1 elsewhere, and everywhere in tasks that do not ask about facts.
    """

    tokens: np.ndarray
    answer_mask: np.ndarray
    text_mask: np.ndarray
    prompt_length: int
    kind: str
    tokenizer: Tokenizer = field(repr=False, compare=False)
    evidence: np.ndarray

    @property
    def answer(self) -> str:
        """Text of the answer, without outer white space."""
        return self.tokenizer.decode(self.answer_ids()).strip()

    def answer_ids(self) -> np.ndarray:
        """Token ids of the answer, without the closing eos."""
        return self.tokens[self.prompt_length : -1]


def build_sample(
    task: str,
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    haystack: Callable[[int], np.ndarray],
    length: int,
    *,
    depth: float | None = None,
    chunk_size: int = 1,
    templates: str = "train",
    digits: int = 4,
    keys: int = 4,
    queries: int = 2,
    hops: int = 4,
    copy_random: float = 0.5,
    frequent_names: float = 0.0,
    values: str = "number",
) -> SyntheticSample:
    """Make one sample of exactly ``length`` tokens.

    task: one of :data:`data_pipeline.config.TASKS`. rng: the only source of chance. haystack: ``n -> n`` tokens of
    text; called exactly once (not at all for a copy of random tokens), so a stream behind it loses nothing. depth: 0
    (start) to 1 (directly before the question) places the asked needle; None draws it, in one sample of ten directly
    before the question; further needles and distractors are drawn anywhere, the assignments of ``variable_tracking``
    are spread evenly from ``depth`` (None: anywhere in order, in one sample of ten the last one directly before the
    question); ``frequent_words`` has no depth. chunk_size: ``length`` must be a multiple of it; most needles of "wide"
    are moved so that they lie across an edge of chunks, unless depth says where. templates: one of
    :data:`data_pipeline.wordings.TEMPLATES`; values: what keys have in all but "wide", one of
    :data:`data_pipeline.wordings.VALUES`. keys, queries, hops, copy_random, frequent_names:
    see :class:`~data_pipeline.config.SyntheticConfig`.

    Raises DataError for an unknown task or wording, and its subclass SampleTooShort, before the haystack is asked for
    anything, for a ``length`` too short to hold the task.
    """
    if task not in TASKS:
        raise DataError(f"unknown synthetic task {task!r}; choose from {', '.join(TASKS)}")
    if templates not in TEMPLATES:
        raise DataError(f"unknown templates {templates!r}; choose from {', '.join(TEMPLATES)}")
    if values not in VALUES:
        raise DataError(f"unknown kind of values {values!r}; choose from {', '.join(VALUES)}")
    if length % chunk_size or length < 8:
        raise DataError(
            f"a synthetic sample of {length} tokens is not at least 8 and a multiple of the chunk size {chunk_size}"
        )
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise DataError(f"depth must be between 0 and 1, not {depth}")
    if task == "copy":
        return _copy(rng, tokenizer, haystack, length, copy_random)
    if task == "frequent_words":
        return _frequent(rng, tokenizer, haystack, length, templates)
    frequent = Frequent(tokenizer.frequent_words, frequent_names)
    if task == "recall":
        return _recall(rng, tokenizer, haystack, length, chunk_size, frequent)
    if task == "niah_needles":
        facts = _fill_with_needles(rng, tokenizer, length, templates, digits, values, depth)
    else:
        facts = make_facts(
            task,
            rng,
            templates=templates,
            digits=digits,
            keys=keys,
            queries=queries,
            hops=hops,
            values=values,
            chains=_chains(rng, length) if templates == "wide" else 1,
            frequent=frequent,
        )
    question_ids, answer_ids = tokenizer.encode_words(facts.question), tokenizer.encode_words(facts.answer)
    pieces = [tokenizer.encode_words(needle) for needle in facts.needles]
    tail = np.concatenate([question_ids, answer_ids, [tokenizer.eos_id]]).astype(np.int32)
    answer_length = len(answer_ids) + 1
    room = length - len(tail) - sum(map(len, pieces))
    if room < 0:
        raise SampleTooShort(
            f"{task} needs at least {length - room} tokens and the sample has {length}; use a longer context, fewer "
            "keys or hops, or leave the task out"
        )
    text = np.asarray(haystack(room), dtype=np.int32)
    if text.shape != (room,):
        raise ValueError(f"haystack({room}) returned shape {text.shape}")
    if task == "niah_needles":  # what text is left stands in front of the needles
        depths = np.ones(len(pieces))
    elif facts.ordered:
        if depth is None:
            depths = np.sort(rng.random(len(pieces)))
            if rng.random() < _LAST:
                depths[-1] = 1.0
        else:
            depths = depth + (1.0 - depth) * np.arange(len(pieces)) / len(pieces)
    else:
        depths = rng.random(len(pieces))
        if depth is not None:
            depths[0] = depth
        elif rng.random() < _LAST:
            depths[0] = 1.0
    cuts = _cuts(depths, text, tokenizer.sentence_ends)
    order = _in_order(cuts, depths)
    if templates == "wide" and depth is None:
        _move_onto_edges(rng, cuts, order, pieces, [True] * len(pieces), len(text), chunk_size)
    tokens = np.concatenate([*_spread(text, pieces, cuts, order), tail])
    mask = np.zeros(length, dtype=bool)
    mask[length - answer_length :] = True
    starts = _starts(pieces, cuts, order)
    told = [Told(value, key, pieces[i], starts[i]) for value, key, i in facts.told]
    evidence = no_evidence(length)
    evidence[mask] = evidence_of(tokenizer, tokens[mask], told, chained=facts.ordered)
    return SyntheticSample(tokens, mask, ~mask, length - answer_length, task, tokenizer, evidence)


def make_facts(
    task: str,
    rng: np.random.Generator,
    *,
    templates: str,
    digits: int = 4,
    keys: int = 4,
    queries: int = 2,
    hops: int = 4,
    values: str = "number",
    chains: int = 1,
    frequent: Frequent = RARE,
) -> Facts:
    """Needles, question and answer of a NIAH task or of variable tracking, as `build_sample` words them."""
    if task == "variable_tracking":
        return variable_facts(rng, templates, digits, hops, chains=chains, frequent=frequent)
    asked = queries if task == "niah_multiquery" else 1
    count = 1 if task == "niah_single" else max(keys, asked)
    return number_facts(rng, templates, digits, count, asked, values, frequent)


def _chains(rng: np.random.Generator, length: int) -> int:
    """How many chains of variables a sample has; log-uniform."""
    most = min(_MOST_CHAINS, max(1, length // _CHAIN_ROOM))
    return math.floor(math.exp(rng.uniform(0.0, math.log(most + 1))))


def needle_haystack(
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    length: int,
    *,
    templates: str,
    digits: int = 4,
    values: str = "number",
) -> ManyFacts:
    """Needles with different keys, as many as fit into ``length`` tokens."""
    state = rng.bit_generator.state
    tried = many_facts(rng, templates, digits, min(256, max(1, length // 8)), values)
    sizes = [len(tokenizer.encode_words(needle)) for needle in tried.needles]
    if sum(sizes) < length:  # the same wording again, with as many keys as its size asks for
        rng.bit_generator.state = state
        tried = many_facts(rng, templates, digits, int(1.05 * length * len(sizes) / sum(sizes)) + 1, values)
        sizes = [len(tokenizer.encode_words(needle)) for needle in tried.needles]
    return tried.first(max(1, int(np.searchsorted(np.cumsum(sizes), length, side="right"))))


def _fill_with_needles(
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    length: int,
    templates: str,
    digits: int,
    values: str,
    depth: float | None,
) -> Facts:
    """A haystack of needles with the asked one at ``depth`` (None: anywhere)."""
    facts = needle_haystack(rng, tokenizer, length - 96, templates=templates, digits=digits, values=values)
    place = rng.random() if depth is None else depth
    asked = min(len(facts.needles) - 1, int(place * len(facts.needles)))
    value = facts.values[asked]
    return Facts(facts.needles, facts.question(asked), f" {value}", told=((value, facts.keys[asked], asked),))


def _recall(
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    haystack: Callable[[int], np.ndarray],
    length: int,
    chunk_size: int,
    frequent: Frequent,
) -> SyntheticSample:
    """Events of `recall_events` in text; needles and questions are no text worth learning to predict."""
    events = recall_events(rng, tokenizer, length, frequent)
    if not events:
        raise SampleTooShort(f"recall found no fact that fits into {length} tokens; use a longer context")
    pieces = [event.tokens for event in events]
    room = length - sum(map(len, pieces))
    text = np.resize(np.asarray(haystack(text_length(rng, room)), dtype=np.int32), room)
    times = np.array([event.time for event in events])
    cuts = _cuts(times, text, tokenizer.sentence_ends)
    order = _in_order(cuts, times)
    _move_onto_edges(rng, cuts, order, pieces, [event.fact for event in events], room, chunk_size)
    tokens = np.concatenate(_spread(text, pieces, cuts, order)).astype(np.int32)
    answer, predictable = np.zeros(length, dtype=bool), np.ones(length, dtype=bool)
    evidence = no_evidence(length)
    places = dict(zip(events, _starts(pieces, cuts, order), strict=True))
    for event, start in places.items():
        end = start + len(event.tokens)
        predictable[start:end] = event.text
        if event.answer:
            answer[end - event.answer : end] = True
            told = [Told(value, key, fact.tokens, places[fact]) for value, key, fact in event.told]
            answered = tokens[end - event.answer : end]
            evidence[end - event.answer : end] = evidence_of(tokenizer, answered, told, chained=event.chained)
    return SyntheticSample(tokens, answer, predictable, length - events[-1].answer, "recall", tokenizer, evidence)


def answer_text(tokenizer: Tokenizer, generated_ids: Iterable[int]) -> str:
    """Text of what a model generated, up to the first end-of-document token."""
    ids: list[int] = []
    for token in generated_ids:
        if int(token) == tokenizer.eos_id:
            break
        ids.append(int(token))
    return tokenizer.decode(ids).strip()


def score(sample: SyntheticSample, tokenizer: Tokenizer, generated_ids: Iterable[int]) -> bool:
    """Exact match: the generated text up to the end-of-document token is the answer (outer white space ignored).

    A copy is compared token by token over the copied half, because random tokens do not survive decoding.
    """
    generated = [int(t) for t in generated_ids]
    if sample.kind == "copy":
        wanted = sample.answer_ids()
        return generated[: len(wanted)] == wanted.tolist()
    return answer_text(tokenizer, generated) == sample.answer


def _cuts(depths: np.ndarray, text: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Where pieces go: positions in ``text`` at the depths, moved to the nearest sentence end when one is close by."""
    cuts = np.rint(depths * len(text)).astype(np.int64)
    for i, cut in enumerate(cuts):
        if 0 < cut < len(text):
            low = max(0, cut - _SNAP)
            near = np.flatnonzero(ends[text[low : cut + _SNAP]]) + low + 1
            if len(near):
                cuts[i] = near[np.argmin(np.abs(near - cut))]
    return cuts


def _in_order(cuts: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """Indices of the pieces as they stand in the sample; stable, and one at the end is behind what only moved there."""
    return np.lexsort((depths >= 1.0, cuts))


def _move_onto_edges(
    rng: np.random.Generator,
    cuts: np.ndarray,
    order: np.ndarray,
    pieces: list[np.ndarray],
    movable: list[bool],
    room: int,
    chunk_size: int,
) -> None:
    """Move some of the ``movable`` pieces' cuts forward so that a chunk ends inside the piece, at any of its tokens.

    No piece passes the next one; what stands at the start or the end of the ``room`` tokens of text stays there.
    """
    before = 0  # tokens of pieces in front
    following = np.append(cuts[order[1:]], room)
    for i, limit in zip(order.tolist(), following.tolist(), strict=True):
        size = len(pieces[i])
        if movable[i] and 0 < cuts[i] < room and min(size, chunk_size) > 1 and rng.random() < _CUT:
            for first in rng.integers(1, min(size, chunk_size), _CUT_TRIES).tolist():  # tokens in front of the edge
                moved = int(cuts[i]) + (-first - int(cuts[i]) - before) % chunk_size
                if moved < limit:
                    cuts[i] = moved
                    break
        before += size


def _spread(text: np.ndarray, pieces: list[np.ndarray], cuts: np.ndarray, order: np.ndarray) -> list[np.ndarray]:
    """Insert the pieces into ``text`` at their cuts: text and pieces in turn, text last."""
    parts: list[np.ndarray] = []
    position = 0
    for i in order.tolist():
        parts += [text[position : cuts[i]], pieces[i]]
        position = int(cuts[i])
    return [*parts, text[position:]]


def _starts(pieces: list[np.ndarray], cuts: np.ndarray, order: np.ndarray) -> list[int]:
    """Where each of the pieces begins once `_spread` has inserted them."""
    sizes = np.array([len(piece) for piece in pieces])
    starts = cuts.copy()
    starts[order] += np.cumsum(sizes[order]) - sizes[order]
    return starts.tolist()


def _copy(
    rng: np.random.Generator, tokenizer: Tokenizer, haystack: Callable[[int], np.ndarray], length: int, share: float
) -> SyntheticSample:
    n = (length - 2) // 2
    random = bool(rng.random() < share)
    if random:
        half = rng.integers(0, tokenizer.vocab_size, n)
        special = (half == tokenizer.eos_id) | (half == tokenizer.pad_id)
        half[special] = (half[special] + max(tokenizer.eos_id, tokenizer.pad_id) + 1) % tokenizer.vocab_size
    else:
        half = np.asarray(haystack(n))
    cue = np.full(length - 1 - 2 * n, tokenizer.eos_id)  # one token, two when the length is odd
    tokens = np.concatenate([half, cue, half, [tokenizer.eos_id]]).astype(np.int32)
    mask = np.zeros(length, dtype=bool)
    mask[n + len(cue) :] = True
    text = np.zeros(length, dtype=bool)
    text[:n] = not random
    return SyntheticSample(tokens, mask, text, n + len(cue), "copy", tokenizer, no_evidence(length))


def _frequent(
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    haystack: Callable[[int], np.ndarray],
    length: int,
    templates: str,
) -> SyntheticSample:
    """A list of words in random order (RULER's frequent words): 24, 16 and 10 % of it are the three words asked for,
    every other word is rarer. Text fills what the list leaves of ``length``, at the start."""
    words = random_word(rng, 3 + 40)
    answer_ids = tokenizer.encode_words(" " + ", ".join(words[:3]))
    tail = np.concatenate([tokenizer.encode_words(FREQUENT[templates]), answer_ids, [tokenizer.eos_id]])
    pieces = [tokenizer.encode_words(" " + word) for word in words]
    sizes = np.array([len(piece) for piece in pieces])
    room = length - len(tail)

    def counts(n: int) -> np.ndarray:
        often = np.array([round(0.24 * n), round(0.16 * n), round(0.10 * n)])
        rest, others = n - int(often.sum()), len(words) - 3
        return np.concatenate([often, rest // others + (np.arange(others) < rest % others)])

    n = max(0, int(room / sizes.min()))
    while n > 0 and int(counts(n) @ sizes) > room:
        n -= max(1, (int(counts(n) @ sizes) - room) // int(sizes.max()))
    if n < 20:  # fewer words do not have three different frequencies above all others
        needed = len(tail) + int(counts(20) @ sizes)
        raise SampleTooShort(
            f"frequent_words needs at least {needed} tokens and the sample has {length}; use a longer context or leave "
            "the task out"
        )
    order = rng.permutation(np.repeat(np.arange(len(words)), counts(n)))
    listed = np.concatenate([pieces[i] for i in order])
    text = np.asarray(haystack(room - len(listed)), dtype=np.int32)
    tokens = np.concatenate([text, listed, tail]).astype(np.int32)
    prompt = length - len(answer_ids) - 1
    mask = np.zeros(length, dtype=bool)
    mask[prompt:] = True
    predictable = np.zeros(length, dtype=bool)
    predictable[: len(text)] = True
    return SyntheticSample(tokens, mask, predictable, prompt, "frequent_words", tokenizer, no_evidence(length))
