"""How synthetic facts and questions are worded: few wordings by hand, a grammar of many for training, and the ones
that evaluation asks in and training never uses.

``train``: a few fixed wordings. ``plain``: the first of them. ``wide``: frames, nouns, kinds of keys and of values
drawn independently, needle and question apart, so that only the key ties a question to its fact. ``eval``: held out;
no frame of it, no noun, and none of its kinds of values (numbers of 7 digits, hyphenated words, UUIDs) occurs in
``wide``, which ``tests/data_pipeline/test_wordings.py`` asserts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.words import QUALITIES, WORDS

TEMPLATES = ("train", "plain", "eval", "wide")
VALUES = ("number", "word", "uuid")
"""Kinds of values that evaluation asks for."""

UUID = (8, 4, 4, 4, 12)
HELD_OUT_DIGITS = 7


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

# --- the grammar of "wide" ---------------------------------------------------------------------------------------

WIDE_NOUNS: tuple[str, ...] = tuple(
    "magic number,code,secret,secret code,password,passphrase,serial number,label,tag,token,identifier,reference,"
    "locker,ticket,badge,account,room,signal,call sign,registration,order,address,PIN,score,result,answer,index,mark,"
    "flag,handle,value,entry,route,port,version,checksum,access code,phone number,lucky number,price,size,seat,"
    "license,hash,alias,title,motto,watchword,record,target,total,channel,parcel,invoice,shelf mark,map square".split(
        ","
    )
)
WIDE_NEEDLES: tuple[str, ...] = (
    " The {noun} for {key} is {value}.",
    " The {noun} of {key} is {value}.",
    " {key}'s {noun} is {value}.",
    " Remember that the {noun} of {key} is {value}.",
    " Note: {key} has the {noun} {value}.",
    " For {key}, use the {noun} {value}.",
    " They gave {key} the {noun} {value}.",
    " {value} is the {noun} of {key}.",
    " The {noun} {value} belongs to {key}.",
    " {key}: {noun} = {value}.",
    " [{noun}] {key} -> {value}\n",
    " {key} = {value}\n",
    " # {noun} {key} {value}\n",
    ' "{key}": "{value}",\n',
    " Everyone knows {key} by the {noun} {value}.",
    " It was written there that the {noun} for {key} was {value}.",
    " Do not forget this {noun}: {value} ({key}).",
    " In the register, under {key}, stood {value}.",
    " If anybody asks about {key}, answer {value}.",
    " Our records list {value} as the {noun} of {key}.",
    " A {noun} was chosen for {key}: {value}.",
    " Among the {noun}s for {key} there is: {value}.",
    " <{key}>{value}</{key}>",
    " At last {key} received its {noun}, namely {value}.",
    " {key} ({noun} {value}) was mentioned.",
    " Some {noun}s of {key} are: {value}.",
    " {noun} {key}: {value};",
    " We set the {noun} of {key} to {value} today.",
    " You can reach {key} with {value}.",
    " | {key} | {value} |\n",
)
WIDE_QUESTIONS: tuple[str, ...] = (
    " The {noun} for {key} is",
    " What is the {noun} of {key}? The {noun} of {key} is",
    " Which {noun} belongs to {key}? It is",
    " Q: {noun} of {key}? A:",
    " Question: what is the {noun} for {key}?\nAnswer:",
    " {key}:",
    " Recall the {noun} that was given for {key}:",
    " Now say what {key}'s {noun} was:",
    " Tell me the {noun} of {key}. It is",
    " {key} ->",
    " As mentioned above, the {noun} for {key} is",
    " Look up {key} in the text. Its {noun} is",
    " I need the {noun} for {key}. The {noun} is",
    " {noun} of {key} =",
    " Do you remember {key}? The {noun} was",
    "\nWhat was said about {key}? Its {noun} is",
    " So, what was it for {key}? The {noun} for {key}:",
    " {key} has the {noun}",
    " Find {key} above and repeat its {noun}:",
    " Somebody wants to know the {noun} for {key}, which is",
)
WIDE_SEVERAL: tuple[str, ...] = (  # for several keys
    " The {noun}s for {keys} are",
    " What are the {noun}s of {keys}? The {noun}s of {keys} are",
    " Which {noun}s belong to {keys}? They are",
    " Q: {noun}s of {keys}? A:",
    " {keys}:",
    " Recall the {noun}s that were given for {keys}:",
    " Look up {keys} in the text. The {noun}s are",
    " {keys} have the {noun}s",
    " Tell me about {keys}. In this order, the {noun}s are",
)
WIDE_VARIABLES: tuple[tuple[str, str], ...] = (  # first assignment, assignment of another variable
    (" Let {name} = {value}.", " Let {name} = {other}."),
    (" Set {name} to {value}.", " Set {name} to {other}."),
    (" {name} := {value};", " {name} := {other};"),
    (" {name} equals {value}.", " {name} equals {other}."),
    (" {name} is {value}.", " {name} is the same as {other}."),
    (" {name} takes the value {value}.", " {name} takes the value of {other}."),
    (" Put {value} into {name}.", " Copy {other} into {name}."),
    (" {name} <- {value}\n", " {name} <- {other}\n"),
    (" int {name} = {value};", " int {name} = {other};"),
    (" DEF {name} {value}\n", " DEF {name} {other}\n"),
    (" cell {name} = {value};", " cell {name} = cell {other};"),
    (" We know that {name} has {value}.", " We know that {name} has what {other} has."),
    (" mov {name}, {value}\n", " mov {name}, {other}\n"),
)
WIDE_CHAINS: tuple[str, ...] = (  # question for a chain of variables
    " The names equal to {value} are",
    " Which names have the value {value}? They are",
    " Names that hold {value}:",
    " List everything that equals {value}:",
    " {value} is the value of",
    " Q: what is equal to {value}? A:",
    " Name every variable with the value {value}. These are",
    " Trace {value} through the text:",
)


def choice(rng: np.random.Generator, items: tuple) -> object:
    """One of ``items``."""
    return items[int(rng.integers(len(items)))]


def random_number(rng: np.random.Generator, digits: int) -> str:
    """A number of exactly ``digits`` digits, the first not 0."""
    return str(int(rng.integers(10 ** (digits - 1), 10**digits)))


def distinct(rng: np.random.Generator, size: int, count: int) -> list[int]:
    """``count`` different numbers below ``size`` in random order; count is at most half of size."""
    picked: dict[int, None] = {}
    while len(picked) < count:
        picked.update(dict.fromkeys(rng.integers(0, size, count - len(picked)).tolist()))
    return list(picked)


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
    keys = []
    for i in distinct(rng, size, count):
        i, first = divmod(i, len(QUALITIES))
        noun, second = divmod(i, len(QUALITIES))
        keys.append(f"{QUALITIES[first]} {QUALITIES[second]} {WORDS[noun]}")
    return keys


def hexadecimal(rng: np.random.Generator, groups: tuple[int, ...], joint: str = "-") -> str:
    """Random hexadecimal digits in groups."""
    digits = rng.integers(0, 16, sum(groups))
    text = "".join("0123456789abcdef"[d] for d in digits.tolist())
    ends = np.cumsum(groups).tolist()
    return joint.join(text[end - n : end] for n, end in zip(groups, ends, strict=True))


def held_out_value(rng: np.random.Generator, kind: str, digits: int) -> str:
    """A value as evaluation asks for it. kind: one of VALUES; ``digits``: of a number."""
    if kind == "number":
        return random_number(rng, digits)
    if kind == "word":
        return f"{choice(rng, QUALITIES)}-{choice(rng, WORDS)}"
    if kind == "uuid":
        return hexadecimal(rng, UUID)
    raise DataError(f"unknown kind of values {kind!r}; choose from {', '.join(VALUES)}")


# --- keys and values of "wide"


_ONSETS = ("b", "br", "d", "f", "g", "gr", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "z", "sh", "h")
_CORES = ("a", "e", "i", "o", "u", "ai", "ea", "or", "an", "el", "in", "ar")


def _name(rng: np.random.Generator) -> str:
    """A word that no language has: 2 or 3 syllables, sometimes with a capital."""
    picks = rng.integers(0, 1 << 16, 6).tolist()
    parts = [_ONSETS[a % len(_ONSETS)] + _CORES[b % len(_CORES)] for a, b in zip(picks[::2], picks[1::2], strict=True)]
    word = "".join(parts[: 2 + picks[0] % 2])
    return word.capitalize() if picks[5] % 3 == 0 else word


def _noun(rng: np.random.Generator) -> str:
    return WORDS[int(rng.integers(len(WORDS)))]


def _digits(rng: np.random.Generator) -> str:
    count = int(rng.integers(1, 13))
    return random_number(rng, count + (count >= HELD_OUT_DIGITS))  # every length up to 13 but the held-out one


def _code(rng: np.random.Generator) -> str:
    letters = "".join(chr(65 + i) for i in rng.integers(0, 26, int(rng.integers(1, 4))).tolist())
    return f"{letters}{choice(rng, ('', '-', ' '))}{random_number(rng, int(rng.integers(2, 6)))}"


def _hex(rng: np.random.Generator) -> str:
    count = int(rng.integers(1, 6))
    groups = tuple(rng.integers(2, 11, count).tolist())
    if groups == UUID:
        groups = UUID[::-1]
    text = hexadecimal(rng, groups, str(choice(rng, ("-", "-", ":", ""))))
    return f"{text[:-1]}c" if text.isdigit() else text


def _pair(rng: np.random.Generator) -> str:
    return f"{choice(rng, QUALITIES)} {_noun(rng)}"


def _triple(rng: np.random.Generator) -> str:
    return f"{choice(rng, QUALITIES)} {_pair(rng)}"


def _capitals(rng: np.random.Generator) -> str:
    return "".join(chr(65 + i) for i in rng.integers(0, 26, 5).tolist())


def _numbered(rng: np.random.Generator) -> str:
    return f"{_noun(rng)} {int(rng.integers(1, 1000))}"


def _letters(rng: np.random.Generator) -> str:
    return (
        "".join(_ALPHANUMERIC[i] for i in rng.integers(0, len(_ALPHANUMERIC), int(rng.integers(4, 17))).tolist()) + "z"
    )


def _compound(rng: np.random.Generator) -> str:
    """Two to four words, names, numbers or hexadecimal groups joined by one sign; words alone not by a hyphen, because
    evaluation asks for those."""
    count = int(rng.integers(2, 5))
    makers = [choice(rng, _PARTS) for _ in range(count)]
    joint = str(choice(rng, ("-", "-", "_", ".", "/", ":", "+", "")))
    parts = [make(rng) for make in makers]  # type: ignore[operator]
    if all(part.isdigit() for part in parts):
        parts[-1] = _noun(rng)
    if joint == "-" and not any(character.isdigit() for part in parts for character in part):
        joint = "_"
    return joint.join(parts)


def _quality(rng: np.random.Generator) -> str:
    return str(choice(rng, QUALITIES))


def _hex_group(rng: np.random.Generator) -> str:
    return hexadecimal(rng, (int(rng.integers(1, 7)),))


_Maker = Callable[[np.random.Generator], str]
_ALPHANUMERIC = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_PARTS: tuple[_Maker, ...] = (_noun, _quality, _name, _digits, _hex_group)
_KEYS: tuple[_Maker, ...] = (_noun, _noun, _noun, _pair, _pair, _triple, _name, _name, _numbered, _code, _hex, _digits)
_WIDE_VALUES: tuple[_Maker, ...] = (
    *(_digits, _digits, _digits, _digits, _noun, _pair, _name, _code),
    *(_hex, _hex, _hex, _compound, _compound, _compound, _letters),
)
_VARIABLE_NAMES: tuple[_Maker, ...] = (_noun, _noun, _name, _capitals, _code)


def _different(rng: np.random.Generator, make: _Maker, count: int) -> list[str]:
    """``count`` different words of one maker; a maker of few words is helped out by numbers."""
    found: dict[str, None] = {}
    tries = 0
    while len(found) < count:
        word = make(rng)
        tries += 1
        found[word if tries < 4 * count else f"{word} {tries}"] = None
    return list(found)


def wide_keys(rng: np.random.Generator, count: int) -> list[str]:
    """Different keys of one kind."""
    return _different(rng, choice(rng, _KEYS), count)  # type: ignore[arg-type]


def wide_values(rng: np.random.Generator, count: int) -> list[str]:
    """Values of one kind."""
    make: _Maker = choice(rng, _WIDE_VALUES)  # type: ignore[assignment]
    return [make(rng) for _ in range(count)]


@dataclass(frozen=True)
class Facts:
    """Facts and one question about them: needles in the order they must appear if ``ordered``, the asked ones first."""

    needles: list[str]
    question: str
    answer: str
    ordered: bool = False


def wide_wording(rng: np.random.Generator) -> tuple[str, str, str]:
    """Needle, question and question for several keys, with the noun filled in; {key}, {keys}, {value} are left."""
    noun = str(choice(rng, WIDE_NOUNS))
    asked = noun if rng.random() < 0.8 else str(choice(rng, ("value", "answer", "entry")))
    needle, one, several = choice(rng, WIDE_NEEDLES), choice(rng, WIDE_QUESTIONS), choice(rng, WIDE_SEVERAL)
    return (
        str(needle).replace("{noun}", noun),
        str(one).replace("{noun}", asked),
        str(several).replace("{noun}", asked),
    )


def number_facts(
    rng: np.random.Generator, templates: str, digits: int, count: int, asked: int, values: str = "number"
) -> Facts:
    """The facts of the NIAH tasks: ``count`` keys with values, ``asked`` of them asked for."""
    if templates == "wide":
        needle, one, several = wide_wording(rng)
        names, held = wide_keys(rng, count), wide_values(rng, count)
    else:
        wording = _NUMBERS[templates][int(rng.integers(len(_NUMBERS[templates])))]
        needle, one, several = (
            text.replace("{noun}", values) for text in (wording.needle, wording.question, wording.questions)
        )
        names = random_word(rng, count)
        held = [held_out_value(rng, values, digits) for _ in names]
    needles = [needle.format(key=k, value=v) for k, v in zip(names, held, strict=True)]
    if asked == 1:
        return Facts(needles, one.format(key=names[0]), " " + held[0])
    return Facts(needles, several.format(keys=" and ".join(names[:asked])), " " + " and ".join(held[:asked]))


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


def variable_facts(rng: np.random.Generator, templates: str, digits: int, hops: int) -> Facts:
    """A chain of ``hops`` + 1 assignments; the answer lists every name in it (RULER's variable tracking)."""
    if templates == "wide":
        first, then = choice(rng, WIDE_VARIABLES)  # type: ignore[misc]
        question = str(choice(rng, WIDE_CHAINS))
        names = _different(rng, choice(rng, _VARIABLE_NAMES), hops + 1)  # type: ignore[arg-type]
        value = _digits(rng)
    else:
        first, then, question = _VARIABLES[templates][int(rng.integers(len(_VARIABLES[templates])))]
        names = random_word(rng, hops + 1)
        value = random_number(rng, digits)
    needles = [first.format(name=names[0], value=value)]
    needles += [then.format(name=b, other=a) for a, b in zip(names[:-1], names[1:], strict=True)]
    return Facts(needles, question.format(value=value), " " + ", ".join(names), ordered=True)
