"""The grammar of the ``wide`` wordings of training: frames and parts of frames, nouns, kinds of keys and of values, all
drawn independently, so that only the key ties a question to its fact.

Nothing that evaluation asks can be drawn here: no frame of it, no noun, none of its kinds of values (numbers of 7
digits, hyphenated words, UUIDs); see ``wordings``.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

import numpy as np

from data_pipeline.words import QUALITIES, WORDS

UUID = (8, 4, 4, 4, 12)
HELD_OUT_DIGITS = 7

WIDE_NOUNS: tuple[str, ...] = tuple(
    "magic number,code,secret,secret code,password,passphrase,serial number,label,tag,token,identifier,reference,"
    "locker,ticket,badge,account,room,signal,call sign,registration,order,address,PIN,score,result,answer,index,mark,"
    "flag,handle,value,entry,route,port,version,checksum,access code,phone number,lucky number,price,size,seat,"
    "license,hash,alias,title,motto,watchword,record,target,total,channel,parcel,invoice,shelf mark,map square,name,"
    "nickname,term,phrase,expression,spelling,slogan,heading,topic,color,animal,tool,place,sign".split(",")
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


def hexadecimal(rng: np.random.Generator, groups: tuple[int, ...], joint: str = "-") -> str:
    """Random hexadecimal digits in groups."""
    digits = rng.integers(0, 16, sum(groups))
    text = "".join("0123456789abcdef"[d] for d in digits.tolist())
    ends = np.cumsum(groups).tolist()
    return joint.join(text[end - n : end] for n, end in zip(groups, ends, strict=True))


# --- keys and values

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
    evaluation asks for those; never by a full stop, which would make it doubtful where a sentence's value ends.
    """
    count = int(rng.integers(2, 5))
    makers = [choice(rng, _PARTS) for _ in range(count)]
    joint = str(choice(rng, ("-", "-", "_", "/", ":", "+", "")))
    parts = [make(rng) for make in makers]  # type: ignore[operator]
    if all(part.isdigit() for part in parts):
        parts[-1] = _noun(rng)
    if joint == "-" and not any(character.isdigit() for part in parts for character in part):
        joint = "_"
    return joint.join(parts)


def _words(rng: np.random.Generator) -> str:
    """Two to four words or names joined by one sign, which is not the hyphen of evaluation's values."""
    joint = str(choice(rng, (" ", " ", "_", "_", "/", ":", "+", "~", "")))
    return joint.join(choice(rng, _WORDS)(rng) for _ in range(int(rng.integers(2, 5))))  # type: ignore[operator]


def _quality(rng: np.random.Generator) -> str:
    return str(choice(rng, QUALITIES))


def _hex_group(rng: np.random.Generator) -> str:
    return hexadecimal(rng, (int(rng.integers(1, 7)),))


_Maker = Callable[[np.random.Generator], str]
_ALPHANUMERIC = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_WORDS: tuple[_Maker, ...] = (_noun, _noun, _quality, _quality, _name)
_PARTS: tuple[_Maker, ...] = (_noun, _quality, _name, _digits, _hex_group)
_KEYS: tuple[_Maker, ...] = (_noun, _noun, _noun, _pair, _pair, _triple, _name, _name, _numbered, _code, _hex, _digits)
_WIDE_VALUES: tuple[_Maker, ...] = (  # half of them words, which are harder to tell from the text around than numbers
    *(_digits, _digits, _digits, _digits, _code, _hex, _hex, _hex, _compound, _compound, _letters),
    *(_noun, _noun, _pair, _pair, _pair, _triple, _name, _name, _words, _words, _words, _words),
)
_VARIABLE_NAMES: tuple[_Maker, ...] = (_noun, _noun, _name, _capitals, _code)


def _different(rng: np.random.Generator, make: _Maker, count: int, taken: Container[str] = ()) -> list[str]:
    """``count`` different words of one maker, none of them ``taken``; a maker of few words is helped out by numbers."""
    found: dict[str, None] = {}
    tries = 0
    while len(found) < count:
        word = make(rng)
        tries += 1
        word = word if tries < 4 * count else f"{word} {tries}"
        if word not in taken:
            found[word] = None
    return list(found)


@dataclass(frozen=True)
class Frequent:
    """Words that the text around is full of, and the share of keys and names that are made of them.

    In a text of millions of tokens any word of a key stands in hundreds of places that tell nothing of it. In a short
    one only the most frequent words do.
    """

    words: tuple[str, ...] = ()
    share: float = 0.0

    def maker(self, rng: np.random.Generator) -> _Maker | None:
        """What makes such words, in as many cases as the share says; else None."""
        if not self.share or rng.random() >= self.share:
            return None
        count = 1 + (rng.random() < 0.3)
        return lambda rng: " ".join(str(choice(rng, self.words)) for _ in range(count))


RARE = Frequent()


def wide_keys(rng: np.random.Generator, count: int, frequent: Frequent = RARE) -> list[str]:
    """Different keys of one kind."""
    return _different(rng, frequent.maker(rng) or choice(rng, _KEYS), count)  # type: ignore[arg-type]


def wide_values(rng: np.random.Generator, count: int) -> list[str]:
    """Values of one kind."""
    make: _Maker = choice(rng, _WIDE_VALUES)  # type: ignore[assignment]
    return [make(rng) for _ in range(count)]


# --- wordings put together from parts

_OPENINGS = (
    *("", "", ""),
    *(" Note that", " Remember:", " By the way,", " It is known that", " Attention:", " As agreed,", " Listen:"),
    *(" Do not forget:", " For the record,", " I was told that", " The letter says:", " Once more:", " So it was that"),
)
_STATEMENTS = (
    "the {noun} for {key} is {value}",
    "the {noun} of {key} is {value}",
    "{key}'s {noun} is {value}",
    "{key} has the {noun} {value}",
    "the {noun} belonging to {key} is {value}",
    "{value} is the {noun} for {key}",
    "a {noun} for {key} is {value}",
    "{key} got {value} as its {noun}",
    "under {key} the {noun} {value} is listed",
    "the {noun} which {key} uses is {value}",
    "one {noun} of {key} was {value}",
    "the {noun}s of {key} include {value}",
)
_ENDS = (".", ".", ".", "!", ";", "\n", " .", "")
_MARKED = (*(": V",) * 4, ' "V"', " 'V'", " (V)", " [V]", " = V", " -> V", " #V", " <V>", " *V*", " - V", ":\nV")
_ASKS = (
    *("", "", ""),
    " What is the {noun} of {key}?",
    " Do you remember the {noun} for {key}?",
    " Can you tell me the {noun} of {key}?",
    " Which {noun} has {key}?",
    " Name the {noun} of {key}.",
    " Find the {noun} for {key} in the text above.",
    " I forgot the {noun} for {key}.",
    " Somebody asks for the {noun} of {key}.",
    " Answer with the {noun} of {key}.",
    " Look for {key} above: what is its {noun}?",
    " Please repeat the {noun} that was said about {key}.",
    " According to the text, what {noun} does {key} have?",
    "\nQuestion: the {noun} of {key}?",
)
_CUES = (
    " The {noun} for {key} is",
    " The {noun} of {key} is",
    " The {noun} for {key} was",
    " {key}'s {noun} is",
    " The {noun} is",
    " The answer is",
    *(" It is", " That is", " They say it is", " Answer:", "\nAnswer:", " A:", " =", " {key}:", " {noun}:"),
)
_ASKS_MANY = (
    *("", ""),
    " What are the {noun}s of {keys}?",
    " Do you remember the {noun}s for {keys}?",
    " Name the {noun}s of {keys}.",
    " Find {keys} in the text above.",
    " Somebody asks for the {noun}s of {keys}.",
    " Which {noun}s have {keys}?",
    " I forgot the {noun}s for {keys}.",
    "\nQuestion: the {noun}s of {keys}?",
)
_CUES_MANY = (
    " The {noun}s for {keys} are",
    " The {noun}s of {keys} are",
    " The {noun}s are",
    " The answers are",
    *(" They are", " These are", " Answer:", "\nAnswer:", " A:", " {keys}:"),
)
# Behind a key in a question, put together from parts; a model that saw few such words takes questions with others for
# text, and goes on with it.
_STOOD = (
    *("", "", "", " mentioned", " given", " stated", " noted", " found", " written", " named"),
    *(" described", " recorded", " that was noted", " that was said", " which stands", " as told", " as you read it"),
)
_PLACES = (
    *(" above", " earlier", " before", " further up", " somewhere above", " according to what you read"),
    *(" in {the} {long}{text}", " in {the} {long}{text}", " in {the} {long}{text} above", " on {the} {long}page"),
    *(" from the pages before this", " by {the} {long}{text}"),
)
_LONG = ("", "", "", "", "long ", "whole ", "given ", "previous ", "preceding ")
_TEXTS = ("text", "text", "document", "passage", "story", "book", "file", "notes", "conversation")
_WHERE_SHARE = 0.35  # of the questions
_THINGS = tuple(
    "names,symbols,registers,cells,labels,letters,items,entries,constants,fields,parameters,places,slots,pointers".split(
        ","
    )
)
_HOLDING = (
    *("equal {value}", "hold {value}", "have the value {value}", "are set to {value}", "contain {value}"),
    *("carry {value}", "are worth {value}", "point to {value}", "stand for {value}", "share the value {value}"),
)
_LISTING = (
    *("", ""),
    " List all {things} that {holding}.",
    " Which {things} {holding}?",
    " Name the {things} that {holding}.",
    " What {things} {holding} in the text?",
    " Go through the text: which {things} {holding}?",
    " Look for {things} that {holding}.",
    " Show every one of the {things} that {holding}.",
    "\nQuestion: {things} that {holding}?",
)
_LISTED = (
    " The {things} that {holding} are",
    " The {things} are",
    *(" They are", " These are", " Answer:", " A:", " In order:", " Here they are:"),
)
_DECLARED = (
    *("", "", "let ", "Let ", "set ", "SET ", "int ", "def ", "DEF ", "cell ", "reg ", "REG ", "const "),
    *("put ", "my ", "LET ", "item ", "name ", "NUM ", "X. "),
)
_EQUAL = (" = ", " = ", " := ", " is ", " equals ", " <- ", ": ", " -> ", " == ")


def wide_wording(rng: np.random.Generator) -> tuple[str, str, str]:
    """Needle, question and question for several keys, with the noun filled in; {key}, {keys}, {value} are left."""
    noun = _wide_noun(rng)
    asked = noun if rng.random() < 0.8 else str(choice(rng, ("value", "answer", "entry")))
    if rng.random() < 0.5:
        needle, one, several = choice(rng, WIDE_NEEDLES), choice(rng, WIDE_QUESTIONS), choice(rng, WIDE_SEVERAL)
    else:
        needle = _statement(rng)
        one, several = _asked(rng, _ASKS, _CUES, "{key}"), _asked(rng, _ASKS_MANY, _CUES_MANY, "{keys}")
    if rng.random() < 0.5:  # the answer is what is marked, without the marks
        needle = str(needle).replace(" {value}", str(choice(rng, _MARKED)).replace("V", "{value}"))
    where = _where(rng)
    one, several = (
        str(text).replace("{key}", f"{{key}}{where}").replace("{keys}", f"{{keys}}{where}") for text in (one, several)
    )
    return (
        str(needle).replace("{noun}", noun),
        str(one).replace("{noun}", asked),
        str(several).replace("{noun}", asked),
    )


def wide_variables(rng: np.random.Generator) -> tuple[str, str, str]:
    """First assignment, assignment of another variable, question for a chain; {name}, {other}, {value} are left."""
    if rng.random() < 0.4:
        first, then = choice(rng, WIDE_VARIABLES)  # type: ignore[misc]
    else:
        declared, (equal, end) = _declarator(rng), (str(choice(rng, part)) for part in (_EQUAL, _ENDS))
        again = declared if rng.random() < 0.5 else ""
        first, then = f" {declared}{{name}}{equal}{{value}}{end}", f" {declared}{{name}}{equal}{again}{{other}}{end}"
    if rng.random() < 0.4:
        return first, then, str(choice(rng, WIDE_CHAINS))
    holding = f"{choice(rng, _HOLDING)}{_where(rng)}"
    question = _asked(rng, _LISTING, _LISTED, "{holding}").replace("{holding}", holding)
    return first, then, question.replace("{things}", str(choice(rng, _THINGS)))


def _where(rng: np.random.Generator) -> str:
    """Where a question says that the fact stood; mostly nothing."""
    if rng.random() >= _WHERE_SHARE:
        return ""
    words = {"the": choice(rng, ("the", "the", "this", "that")), "long": choice(rng, _LONG)}
    return f"{choice(rng, _STOOD)}{choice(rng, _PLACES)}".format(**words, text=choice(rng, _TEXTS))


def _declarator(rng: np.random.Generator) -> str:
    """What stands before a variable where it is assigned; often no known word, so that no list of words can tell it
    from the name."""
    if rng.random() < 0.5:
        return str(choice(rng, _DECLARED))
    make: _Maker = choice(rng, (_noun, _name, _capitals))  # type: ignore[assignment]
    word = make(rng)[: int(rng.integers(2, 7))]
    word = word.upper() if rng.random() < 0.5 else word
    return "" if word.upper() == "VAR" else f"{word} "


def variable_names(
    rng: np.random.Generator, count: int, taken: Container[str] = (), frequent: Frequent = RARE
) -> list[str]:
    """Different names of one kind, none of them ``taken``."""
    return _different(rng, frequent.maker(rng) or choice(rng, _VARIABLE_NAMES), count, taken)  # type: ignore[arg-type]


def variable_values(rng: np.random.Generator, count: int) -> list[str]:
    """What chains of variables hold: different numbers of any length but the held-out one."""
    return _different(rng, _digits, count)


def _wide_noun(rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        return str(choice(rng, WIDE_NOUNS))
    return _pair(rng) if rng.random() < 0.3 else _noun(rng)


def _statement(rng: np.random.Generator) -> str:
    opening, statement, end = (str(choice(rng, part)) for part in (_OPENINGS, _STATEMENTS, _ENDS))
    if not opening:
        statement = statement[0].upper() + statement[1:]
    return f"{opening} {statement}{end}"


def _asked(rng: np.random.Generator, asks: tuple[str, ...], cues: tuple[str, ...], needed: str) -> str:
    """A question, perhaps none, and the words in front of the answer; one of them has what is needed."""
    while True:
        question = f"{choice(rng, asks)}{choice(rng, cues)}"
        if needed in question:
            return question
