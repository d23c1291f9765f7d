"""Training samples with many facts and many questions: dense supervision of retrieval.

One question per sample teaches with a dozen tokens out of thousands. Here facts in the wordings of ``wide`` lie in
text, single, in groups worded alike, as chains of variables or, in three samples of ten, as a long list, often with
keys that differ in one word of three; questions about them come at any place behind their fact, each closed by its
answer and an end-of-document token, and the text goes on after that. The last question ends the sample, so that it
looks like every other task's. The text is made harder to tell from facts: running numbers go through it, sentences
name keys and say nothing of them, one passage fills it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.grammar import RARE, Frequent, choice, wide_keys, wide_values, wide_wording
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.wordings import near_keys, variable_facts

_FACT_TOKENS = 96  # at most one fact per so many tokens
_LIST_TOKENS = 40  # and this in a list
_LISTS = 0.3  # share of samples that are mostly one list
_NEAR = 0.6  # share of lists whose keys are hard to tell apart
_LIST_ASKED = 220  # one question per so many tokens of a list, 12 at least
_CHAINS = 0.4  # share of groups that are chains of variables
_ASKED = 0.8  # share of facts that are asked for
_TOGETHER = 0.3  # share of questions that ask for several keys at once
_SEVERAL = (2, 2, 2, 3, 4)  # for so many
_VALUES = 0.1  # share of groups that are several values of one key, all asked for
_AT_ONCE = 0.15  # share of questions that follow their fact directly
_FIRST = 0.15  # share of samples that open with a fact: nothing stands before it, which random places hardly ever give
_FILL, _FILL_LIST = 0.6, 0.9  # largest share of the sample that facts and questions take
_LINKS = (" and ", ", and ", ", ")  # before the last of three and more
_MENTIONED = 0.4  # share of groups outside lists whose keys and names stand in other sentences, too
_MOST_MENTIONS = 12  # sentences of a group, as many as a far longer text would have
_MENTIONS = (
    " The {word} was there again.",
    " Nobody spoke of {word} that day.",
    " We saw {word} and went on.",
    " Then came {word}, and all was quiet.",
    " It is not about {word}.",
    " {word} stands among other words.",
    " {word}\n",
    " Some say {word}, some do not.",
    " See also {word}.",
    ' "{word}" is mentioned in passing.',
    " as {word} does;",
)
_REPEATED = 0.1  # share of samples whose text is one passage over and over
_PASSAGE = (16, 257)  # of so many tokens
_COUNTED = 0.25  # share of samples whose text carries running numbers, as verses, paragraphs and pages do
_COUNTS = ("{a}:{b}", "{a}:{b}", "{a}.{b}", "{b}.", "{b}", "[{b}]", "({b})", "{a}-{b}", "p. {b}", "{a},{b}")


@dataclass(eq=False)  # a key of dictionaries
class Event:
    """A piece of a sample. time: 0 (start) to 1 (end). tokens int32; answer: how many at its end are answer and eos;
    text: whether it is learnt as the text around it is; told: the answer's values, each with its key and the fact that
    says both; chained: each value is found by the one before it.
    """

    time: float
    tokens: np.ndarray
    answer: int = 0
    text: bool = False
    told: Sequence[tuple[str, str, Event]] = ()
    chained: bool = False

    @property
    def fact(self) -> bool:
        """True for what can be asked for."""
        return not self.answer and not self.text


def recall_events(
    rng: np.random.Generator, tokenizer: Tokenizer, length: int, frequent: Frequent = RARE
) -> list[Event]:
    """Facts and questions for a sample of ``length`` tokens in order of time, the last a question at time 1; empty
    when not even one fact fits."""
    as_list = length >= 512 and rng.random() < _LISTS
    most = max(1, length // (_LIST_TOKENS if as_list else _FACT_TOKENS))
    count = most if as_list else math.floor(math.exp(rng.uniform(0.0, math.log(most + 1))))
    limit = (_FILL_LIST if as_list else _FILL) * length
    events: list[Event] = []
    used = facts = 0
    refused = 0
    taken: set[str] = set()  # a name in two chains would make both questions doubtful
    while facts < count and refused < 6:
        group = _group(rng, tokenizer, count - facts, as_list, taken, frequent)
        size = sum(len(event.tokens) for event in group)
        if used + size > limit:
            if events:
                break
            count, refused = max(1, int(0.9 * count * limit / size)), refused + 1
            continue
        events += group
        used += size
        facts += sum(event.fact for event in group)
        if as_list:
            break
    questions = [event for event in events if event.answer]
    if not questions:
        return []
    max(questions, key=lambda event: event.time).time = 1.0
    if rng.random() < _FIRST:
        min((event for event in events if event.fact), key=lambda event: event.time).time = 0.0
    if rng.random() < _COUNTED:
        events += _running_numbers(rng, tokenizer, int(0.95 * length) - used)
    events.sort(key=lambda event: event.time)
    last = max(i for i, event in enumerate(events) if event.answer)
    return events[: last + 1]


def text_length(rng: np.random.Generator, room: int) -> int:
    """How many tokens of text a sample needs for ``room``: all, or a passage that fills it over and over."""
    return min(room, int(rng.integers(*_PASSAGE))) if rng.random() < _REPEATED else room


def _group(
    rng: np.random.Generator, tokenizer: Tokenizer, left: int, as_list: bool, taken: set[str], frequent: Frequent
) -> list[Event]:
    """Facts worded alike with their questions; every question stands behind its facts in the list and in time. Names of
    chains are none of those ``taken``, and are added to them."""
    if not as_list and rng.random() < _CHAINS:
        return _chain(rng, tokenizer, taken, frequent)
    if not as_list and rng.random() < _VALUES:
        return _values(rng, tokenizer, frequent)
    needle, one, several = wide_wording(rng)
    count = left if as_list else 1 if rng.random() < 0.4 else min(left, int(rng.integers(2, 9)))
    near = as_list and rng.random() < _NEAR
    keys = near_keys(rng, count) if near else wide_keys(rng, count, frequent)
    values = wide_values(rng, count)
    times = rng.random(count) * (0.9 if as_list else 1.0)
    share = min(_ASKED, max(12, count * _LIST_TOKENS // _LIST_ASKED) / count) if as_list else _ASKED
    asked = rng.random(count) < share
    asked[int(rng.integers(count))] = True
    events: list[Event] = []
    told: list[tuple[str, str, Event]] = []
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        events.append(Event(times[i], tokenizer.encode_words(needle.format(key=key, value=value))))
        told.append((value, key, events[-1]))
        if not asked[i]:
            continue
        group = [i]
        if i and rng.random() < _TOGETHER:
            group += rng.permutation(i)[: _several(rng) - 1].tolist()
        if len(group) == 1:
            question, answer = one.format(key=key), f" {value}"
        else:
            rng.shuffle(group)
            link = str(choice(rng, _LINKS))
            question = several.format(keys=_joined([keys[j] for j in group], link))
            answer = f" {_joined([values[j] for j in group], link)}"
        after = max(times[j] for j in group)
        events.append(_question(rng, tokenizer, question, answer, after, [told[j] for j in group]))
    return events if as_list else events + _mentions(rng, tokenizer, keys)


def _several(rng: np.random.Generator) -> int:
    return _SEVERAL[int(rng.integers(len(_SEVERAL)))]


def _joined(words: list[str], link: str) -> str:
    """A list in words: "a and b", "a, b{link}c"."""
    return " and ".join(words) if len(words) == 2 else f"{', '.join(words[:-1])}{link}{words[-1]}"


def _values(rng: np.random.Generator, tokenizer: Tokenizer, frequent: Frequent) -> list[Event]:
    """Several values of one key, and a question for all of them behind the last, answered in the order of the text."""
    needle, _, several = wide_wording(rng)
    (key,), values = wide_keys(rng, 1, frequent), wide_values(rng, _several(rng))
    events = _in_order(rng, tokenizer, [needle.format(key=key, value=value) for value in values])
    answer = f" {_joined(values, str(choice(rng, _LINKS)))}"
    told = [(value, key, event) for value, event in zip(values, events, strict=True)]
    return [*events, _question(rng, tokenizer, several.format(keys=key), answer, events[-1].time, told)]


def _chain(rng: np.random.Generator, tokenizer: Tokenizer, taken: set[str], frequent: Frequent) -> list[Event]:
    facts = variable_facts(rng, "wide", 0, int(rng.integers(1, 5)), taken, frequent=frequent)
    events = _in_order(rng, tokenizer, facts.needles)
    told = [(name, key, events[i]) for name, key, i in facts.told]
    names = [name for name, _, _ in told]
    taken.update(names)
    asked = _question(rng, tokenizer, facts.question, facts.answer, events[-1].time, told, chained=True)
    return [*events, asked, *_mentions(rng, tokenizer, names)]


def _in_order(rng: np.random.Generator, tokenizer: Tokenizer, needles: list[str]) -> list[Event]:
    """Facts at any time, one after the other."""
    times = np.sort(rng.random(len(needles))).tolist()
    return [Event(time, tokenizer.encode_words(needle)) for time, needle in zip(times, needles, strict=True)]


def _mentions(rng: np.random.Generator, tokenizer: Tokenizer, words: list[str]) -> list[Event]:
    """Sentences that name a key and tell nothing about it: in a long text a fact is found by more than its word."""
    if rng.random() >= _MENTIONED:
        return []
    count = math.floor(math.exp(rng.uniform(0.0, math.log(_MOST_MENTIONS + 1))))
    sentences = [str(choice(rng, _MENTIONS)).format(word=choice(rng, tuple(words))) for _ in range(count)]
    return [Event(float(rng.random()), tokenizer.encode_words(sentence), text=True) for sentence in sentences]


def _running_numbers(rng: np.random.Generator, tokenizer: Tokenizer, room: int) -> list[Event]:
    """Numbers that count on through the text, in one style, and are no answer to anything; at most ``room`` tokens.

    They are text to be learnt: were they left out of the loss, text would be all that ever follows a sentence, and a
    model would no longer expect the verse numbers of a Bible.
    """
    style, line = str(choice(rng, _COUNTS)), str(choice(rng, ("\n", " ")))
    a, b, last = (int(n) for n in rng.integers(1, (60, 30, 60)))
    pieces: list[np.ndarray] = []
    wanted = room // int(rng.integers(5, 40))
    for _ in range(wanted):
        piece = tokenizer.encode_words(f"{line}{style.format(a=a, b=b)}")
        room -= len(piece)
        if room < 0:
            break
        pieces.append(piece)
        a, b = (a, b + 1) if b < last else (a + 1, 1)
    steps = (np.arange(len(pieces)) + rng.random(len(pieces))) / max(1, len(pieces))
    return [Event(time, piece, text=True) for time, piece in zip(steps.tolist(), pieces, strict=True)]


def _question(
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    question: str,
    answer: str,
    after: float,
    told: list[tuple[str, str, Event]],
    chained: bool = False,
) -> Event:
    answered = np.append(tokenizer.encode_words(answer), tokenizer.eos_id).astype(np.int32)
    tokens = np.concatenate([tokenizer.encode_words(question), answered])
    time = after if rng.random() < _AT_ONCE else after + (1.0 - after) * float(rng.random())
    return Event(time, tokens, len(answered), told=told, chained=chained)
