"""How synthetic facts and questions are worded: few wordings by hand, a grammar of many for training, and the ones
that evaluation asks in and training never uses.

``train``: a few fixed wordings. ``plain``: the first of them. ``wide``: frames, nouns, kinds of keys and of values
drawn independently, needle and question apart, so that only the key ties a question to its fact. ``eval``: held out;
no frame of it, no noun, and none of its kinds of values (numbers of 7 digits, hyphenated words, UUIDs) occurs in
``wide``, which ``tests/data_pipeline/test_wordings.py`` asserts.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.grammar import (
    RARE,
    UUID,
    Frequent,
    choice,
    distinct,
    hexadecimal,
    random_number,
    variable_names,
    variable_values,
    wide_keys,
    wide_values,
    wide_variables,
    wide_wording,
)
from data_pipeline.words import QUALITIES, WORDS

TEMPLATES = ("train", "plain", "eval", "wide")
VALUES = ("number", "word", "uuid")
"""Kinds of values that evaluation asks for."""


@dataclass(frozen=True)
class Wording:
    """One wording: the needle, its question for one key and the question for several."""

    needle: str
    question: str
    questions: str


_NUMBERS = {
    "train": (
        Wording(
            " The magic number for {key} is {value}.",
            " The magic number for {key} is",
            " The magic numbers for {keys} are",
        ),
        Wording(
            " Remember that the code of {key} is {value}.",
            " What is the code of {key}? The code of {key} is",
            " What are the codes of {keys}? The codes of {keys} are",
        ),
        Wording(
            " Note: {key} has the number {value}.",
            " Which number has {key}? {key} has the number",
            " Which numbers have {keys}? {keys} have the numbers",
        ),
    ),
    "eval": (
        Wording(
            " One of the special {noun}s for {key} is: {value}.",
            " What is the special {noun} for {key}? The special {noun} for {key} is",
            " What are the special {noun}s for {keys}? The special {noun}s for {keys} are",
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
FREQUENT = {
    "train": " The three most frequent words are",
    "eval": " What are the three most frequently appeared words in the above text? The three words are:",
}
FREQUENT["plain"] = FREQUENT["wide"] = FREQUENT["train"]
_NUMBERS["plain"] = _NUMBERS["train"][:1]
_VARIABLES["plain"] = _VARIABLES["train"][:1]


def random_word(rng: np.random.Generator, count: int = 1) -> list[str]:
    """``count`` different keys: common nouns, or quality and noun where there are not enough nouns."""
    if count <= len(WORDS) // 2:
        return [WORDS[i] for i in distinct(rng, len(WORDS), count)]
    pairs = len(WORDS) * len(QUALITIES)
    if count > pairs // 2:
        raise DataError(f"at most {pairs // 2} keys per sample, not {count}; lower the number of keys")
    picked = distinct(rng, pairs, count)
    return [f"{QUALITIES[i % len(QUALITIES)]} {WORDS[i // len(QUALITIES)]}" for i in picked]


def long_keys(rng: np.random.Generator, count: int) -> list[str]:
    """``count`` different keys of three words, for haystacks made of needles (at most 1.1 million)."""
    size = len(WORDS) * len(QUALITIES) ** 2
    if count > size // 2:
        raise DataError(f"at most {size // 2} keys of three words, not {count}; shorten the sample")
    return _three_words(rng, QUALITIES, QUALITIES, WORDS, count)


def near_keys(rng: np.random.Generator, count: int) -> list[str]:
    """``count`` different keys of three words out of so few words that most keys share two of them with others."""
    side = 2
    while side**3 < 2 * count:
        side += 1
    most = (len(QUALITIES) // 2) ** 3 // 2
    if count > most:
        raise DataError(f"at most {most} keys that are near each other, not {count}; shorten the sample")
    first, second, nouns = (
        [words[i] for i in distinct(rng, len(words), side)] for words in (QUALITIES, QUALITIES, WORDS)
    )
    return _three_words(rng, first, second, nouns, count)


def _three_words(
    rng: np.random.Generator, first: Sequence[str], second: Sequence[str], nouns: Sequence[str], count: int
) -> list[str]:
    """``count`` different keys of a word of each kind."""
    keys = []
    for i in distinct(rng, len(first) * len(second) * len(nouns), count):
        i, a = divmod(i, len(first))
        c, b = divmod(i, len(second))
        keys.append(f"{first[a]} {second[b]} {nouns[c]}")
    return keys


def held_out_value(rng: np.random.Generator, kind: str, digits: int) -> str:
    """A value as evaluation asks for it. kind: one of VALUES; ``digits``: of a number."""
    if kind == "number":
        return random_number(rng, digits)
    if kind == "word":
        return f"{choice(rng, QUALITIES)}-{choice(rng, WORDS)}"
    if kind == "uuid":
        return hexadecimal(rng, UUID)
    raise DataError(f"unknown kind of values {kind!r}; choose from {', '.join(VALUES)}")


@dataclass(frozen=True)
class Facts:
    """Facts and one question about them: needles in the order they must appear if ``ordered``, the asked ones first.

    told: for every value of the answer, in its order, the value, its key and the number of the needle that says both.
    """

    needles: list[str]
    question: str
    answer: str
    ordered: bool = False
    told: tuple[tuple[str, str, int], ...] = ()


def number_facts(
    rng: np.random.Generator,
    templates: str,
    digits: int,
    count: int,
    asked: int,
    values: str = "number",
    frequent: Frequent = RARE,
) -> Facts:
    """The facts of the NIAH tasks: ``count`` keys with values, ``asked`` of them asked for."""
    if templates == "wide":
        needle, one, several = wide_wording(rng)
        names, held = wide_keys(rng, count, frequent), wide_values(rng, count)
    else:
        wording = _NUMBERS[templates][int(rng.integers(len(_NUMBERS[templates])))]
        needle, one, several = (
            text.replace("{noun}", values) for text in (wording.needle, wording.question, wording.questions)
        )
        names = random_word(rng, count)
        held = [held_out_value(rng, values, digits) for _ in names]
    needles = [needle.format(key=k, value=v) for k, v in zip(names, held, strict=True)]
    told = tuple(zip(held[:asked], names[:asked], range(asked), strict=True))
    if asked == 1:
        return Facts(needles, one.format(key=names[0]), " " + held[0], told=told)
    question, answer = several.format(keys=" and ".join(names[:asked])), " " + " and ".join(held[:asked])
    return Facts(needles, question, answer, told=told)


@dataclass(frozen=True)
class ManyFacts:
    """Needles with keys of three words, and how to ask for any of them."""

    needles: list[str]
    keys: list[str]
    values: list[str]
    asking: str

    def first(self, count: int) -> ManyFacts:
        """The first ``count`` of them."""
        return ManyFacts(self.needles[:count], self.keys[:count], self.values[:count], self.asking)

    def question(self, index: int) -> str:
        """The question for needle ``index``."""
        return self.asking.format(key=self.keys[index])


def many_facts(rng: np.random.Generator, templates: str, digits: int, count: int, values: str = "number") -> ManyFacts:
    """``count`` facts worded alike, for haystacks made of needles."""
    if templates == "wide":
        needle, one, _ = wide_wording(rng)
        held = wide_values(rng, count)
    else:
        wording = _NUMBERS[templates][int(rng.integers(len(_NUMBERS[templates])))]
        needle, one = (text.replace("{noun}", values) for text in (wording.needle, wording.question))
        held = [held_out_value(rng, values, digits) for _ in range(count)]
    names = long_keys(rng, count)
    needles = [needle.format(key=k, value=v) for k, v in zip(names, held, strict=True)]
    return ManyFacts(needles, names, held, one)


def variable_facts(
    rng: np.random.Generator,
    templates: str,
    digits: int,
    hops: int,
    taken: Container[str] = (),
    chains: int = 1,
    frequent: Frequent = RARE,
) -> Facts:
    """A chain of ``hops`` + 1 assignments; the answer lists every name in it (RULER's variable tracking). ``taken``:
    names that ``wide`` must not use, as other chains of the same text do. ``chains``: of ``wide``, worded alike and
    mixed, each in its order; the first is asked for.
    """
    if templates == "wide":
        first, then, question = wide_variables(rng)
        names, values = variable_names(rng, chains * (hops + 1), taken, frequent), variable_values(rng, chains)
    else:
        first, then, question = _VARIABLES[templates][int(rng.integers(len(_VARIABLES[templates])))]
        names, values = random_word(rng, hops + 1), [random_number(rng, digits)]
    assigned = []
    for chain, value in enumerate(values):
        mine = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        others = [then.format(name=b, other=a) for a, b in zip(mine[:-1], mine[1:], strict=True)]
        assigned.append([first.format(name=mine[0], value=value), *others])
    needles = assigned[0] if len(assigned) == 1 else _mixed(rng, assigned)
    asked = names[: hops + 1]
    keys = [values[0], *asked[:-1]]
    told = tuple((name, key, needles.index(said)) for name, key, said in zip(asked, keys, assigned[0], strict=True))
    return Facts(needles, question.format(value=values[0]), " " + ", ".join(asked), ordered=True, told=told)


def _mixed(rng: np.random.Generator, lists: list[list[str]]) -> list[str]:
    """All of the lists in one, each in its order."""
    times = np.concatenate([np.sort(rng.random(len(items))) for items in lists])
    joined = [item for items in lists for item in items]
    return [joined[i] for i in np.argsort(times).tolist()]
