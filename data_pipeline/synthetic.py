"""Synthetic long-context samples: needles in a haystack (RULER's S-NIAH, MK-NIAH, MQ-NIAH), variable tracking,
self-copy, frequent words.

Every sample is ``[haystack with needles][question][answer][eos]``, exactly ``length`` tokens, and the answer comes
last, so that training weighs it and evaluation generates it from ``tokens[:prompt_length]``. Training and evaluation
word the needles differently by default; numbers are ``digits`` single-digit tokens. ``copy`` follows S' = x1..xn
x1..xn (2511.23319) with an end-of-document token between the halves as the cue to begin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.config import TASKS
from data_pipeline.errors import DataError
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.words import QUALITIES, WORDS

_LAST = 0.1  # share of free samples whose needle stands directly before the question: text hardly ever asks there
_SNAP = 48  # a needle moves by at most this many tokens to follow the end of a sentence


class SampleTooShort(DataError):
    """The sample's length cannot hold the task."""


@dataclass(frozen=True)
class _Wording:
    """One wording: the needle, its question for one key and the question for several."""

    needle: str
    question: str
    questions: str


_NUMBERS = {
    "train": (
        _Wording(
            " The magic number for {key} is {value}.",
            " The magic number for {key} is",
            " The magic numbers for {keys} are",
        ),
        _Wording(
            " Remember that the code of {key} is {value}.",
            " What is the code of {key}? The code of {key} is",
            " What are the codes of {keys}? The codes of {keys} are",
        ),
        _Wording(
            " Note: {key} has the number {value}.",
            " Which number has {key}? {key} has the number",
            " Which numbers have {keys}? {keys} have the numbers",
        ),
    ),
    "eval": (
        _Wording(
            " One of the special numbers for {key} is: {value}.",
            " What is the special number for {key}? The special number for {key} is",
            " What are the special numbers for {keys}? The special numbers for {keys} are",
        ),
    ),
}
_VARIABLES = {  # first assignment, assignment of another variable, question
    "train": ((" Let {name} = {value}.", " Let {name} = {other}.", " The names equal to {value} are"),),
    "eval": (
        (
            " VAR {name} = {value}.",
            " VAR {name} = VAR {other}.",
            " Find all variables that are assigned the value {value}. They are",
        ),
    ),
}
_FREQUENT = {
    "train": " The three most frequent words are",
    "eval": " What are the three most frequently appeared words in the above text? The three words are:",
}
_FREQUENT["plain"] = _FREQUENT["train"]
_NUMBERS["plain"] = _NUMBERS["train"][:1]
_VARIABLES["plain"] = _VARIABLES["train"][:1]


@dataclass
class SyntheticSample:
    """One sample of ``length`` tokens.

    tokens int32 (length,). answer_mask bool (length,): True at the answer's tokens, the closing eos included (the loss
    weight of an answer token belongs to the position before it). text_mask bool (length,): True at predictable prompt
    text (everything but the answer; False in the random half of a copy). prompt_length: tokens before the answer.
    kind: the task.
    """

    tokens: np.ndarray
    answer_mask: np.ndarray
    text_mask: np.ndarray
    prompt_length: int
    kind: str
    tokenizer: Tokenizer = field(repr=False, compare=False)

    @property
    def answer(self) -> str:
        """Text of the answer, without outer white space."""
        return self.tokenizer.decode(self.answer_ids()).strip()

    def answer_ids(self) -> np.ndarray:
        """Token ids of the answer, without the closing eos."""
        return self.tokens[self.prompt_length : -1]


def random_word(rng: np.random.Generator, count: int = 1) -> list[str]:
    """``count`` different keys: common nouns, or quality and noun where there are not enough nouns."""
    if count <= len(WORDS) // 2:
        return [WORDS[i] for i in _distinct(rng, len(WORDS), count)]
    pairs = len(WORDS) * len(QUALITIES)
    if count > pairs // 2:
        raise DataError(f"at most {pairs // 2} keys per sample, not {count}; lower the number of keys")
    picked = _distinct(rng, pairs, count)
    return [f"{QUALITIES[i % len(QUALITIES)]} {WORDS[i // len(QUALITIES)]}" for i in picked]


def random_number(rng: np.random.Generator, digits: int) -> str:
    """A number of exactly ``digits`` digits, the first not 0."""
    return str(int(rng.integers(10 ** (digits - 1), 10**digits)))


def _distinct(rng: np.random.Generator, size: int, count: int) -> list[int]:
    """``count`` different numbers below ``size`` in random order; count is at most half of size."""
    picked: dict[int, None] = {}
    while len(picked) < count:
        picked.update(dict.fromkeys(rng.integers(0, size, count - len(picked)).tolist()))
    return list(picked)


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
) -> SyntheticSample:
    """Make one sample of exactly ``length`` tokens.

    task: one of :data:`data_pipeline.config.TASKS`. rng: the only source of chance. haystack: ``n -> n`` tokens of
    text; called exactly once (not at all for a copy of random tokens), so a stream behind it loses nothing. depth: 0
    (start) to 1 (directly before the question) places the asked needle; None draws it, in one sample of ten directly
    before the question; further needles and distractors are drawn anywhere, the assignments of ``variable_tracking``
    are spread evenly from ``depth`` (None: anywhere in order, in one sample of ten the last one directly before the
    question); ``frequent_words`` has no depth. chunk_size: ``length`` must be a multiple
    of it. templates: "train" or "eval". keys, queries, hops, copy_random: see
    :class:`~data_pipeline.config.SyntheticConfig`.

    Raises DataError for an unknown task or wording, and its subclass SampleTooShort, before the haystack is asked for
    anything, for a ``length`` too short to hold the task.
    """
    if task not in TASKS:
        raise DataError(f"unknown synthetic task {task!r}; choose from {', '.join(TASKS)}")
    if templates not in _NUMBERS:
        raise DataError(f"unknown templates {templates!r}; choose from {', '.join(_NUMBERS)}")
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
    if task == "variable_tracking":
        needles, question, answer = _variables(rng, templates, digits, hops)
    else:
        asked = queries if task == "niah_multiquery" else 1
        count = 1 if task == "niah_single" else max(keys, asked)
        needles, question, answer = _numbers(rng, templates, digits, count, asked)
    question_ids, answer_ids = tokenizer.encode_words(question), tokenizer.encode_words(answer)
    pieces = [tokenizer.encode_words(needle) for needle in needles]
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
    if task == "variable_tracking":
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
    tokens = np.concatenate([*_spread(text, pieces, depths, tokenizer.sentence_ends), tail])
    mask = np.zeros(length, dtype=bool)
    mask[length - answer_length :] = True
    return SyntheticSample(tokens, mask, ~mask, length - answer_length, task, tokenizer)


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


def _numbers(
    rng: np.random.Generator, templates: str, digits: int, count: int, asked: int
) -> tuple[list[str], str, str]:
    """Needles (the asked ones first), question and answer of the three NIAH tasks."""
    wording = _NUMBERS[templates][int(rng.integers(len(_NUMBERS[templates])))]
    names = random_word(rng, count)
    values = [random_number(rng, digits) for _ in names]
    needles = [wording.needle.format(key=k, value=v) for k, v in zip(names, values, strict=True)]
    if asked == 1:
        return needles, wording.question.format(key=names[0]), " " + values[0]
    question = wording.questions.format(keys=" and ".join(names[:asked]))
    return needles, question, " " + " and ".join(values[:asked])


def _variables(rng: np.random.Generator, templates: str, digits: int, hops: int) -> tuple[list[str], str, str]:
    """A chain of ``hops`` + 1 assignments in order; the answer lists every name in it (RULER's variable tracking)."""
    first, then, question = _VARIABLES[templates][int(rng.integers(len(_VARIABLES[templates])))]
    names = random_word(rng, hops + 1)
    value = random_number(rng, digits)
    needles = [first.format(name=names[0], value=value)]
    needles += [then.format(name=b, other=a) for a, b in zip(names[:-1], names[1:], strict=True)]
    return needles, question.format(value=value), " " + ", ".join(names)


def _spread(text: np.ndarray, pieces: list[np.ndarray], depths: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Cut ``text`` at the depths (moved to the nearest sentence end when there is one close by) and insert the
    pieces."""
    cuts = np.rint(depths * len(text)).astype(np.int64)
    for i, cut in enumerate(cuts):
        if 0 < cut < len(text):
            low = max(0, cut - _SNAP)
            near = np.flatnonzero(ends[text[low : cut + _SNAP]]) + low + 1
            if len(near):
                cuts[i] = near[np.argmin(np.abs(near - cut))]
    parts: list[np.ndarray] = []
    position = 0
    for i in np.lexsort((depths >= 1.0, cuts)):  # stable; a needle at the end is behind what only moved there
        parts += [text[position : cuts[i]], pieces[i]]
        position = int(cuts[i])
    return [*parts, text[position:]]


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
    return SyntheticSample(tokens, mask, text, n + len(cue), "copy", tokenizer)


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
    tail = np.concatenate([tokenizer.encode_words(_FREQUENT[templates]), answer_ids, [tokenizer.eos_id]])
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
    return SyntheticSample(tokens, mask, predictable, prompt, "frequent_words", tokenizer)
