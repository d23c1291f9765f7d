"""RULER's tasks (arXiv 2404.06654) that nothing here is trained on: several values of one key, the common words of a
list, questions about documents. Samples as those of `data_pipeline.synthetic`, with answers in any order or in several
forms.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.evidence import no_evidence
from data_pipeline.synthetic import SampleTooShort, SyntheticSample
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.wordings import held_out_value, random_word
from data_pipeline.words import QUALITIES, WORDS
from pretrain.errors import RecipeError

TASKS = ("niah_multivalue", "common_words", "qa")
OPTIONS = ("digits", "values", "documents")
"""What `build` takes of a task's options."""
VALUES_OF_ONE_KEY = 4
COMMON, OFTEN, SELDOM = 10, 30, 3  # common words, and how often these and the other words occur

_NEEDLE = " One of the special {noun}s for {key} is: {value}."
_ALL_VALUES = " What are all the special {noun}s for {key}? The special {noun}s for {key} are"
_COMMON = " What are the 10 most common words in the above list? The 10 most common words are"
_QA = "\n\nAnswer the question based on the given documents. Question: {question} Answer:"

Haystack = Callable[[int], np.ndarray]


@dataclass
class RulerSample(SyntheticSample):
    """A sample whose answer is right in more than one form. accepted: answers; parts: an answer is a set of parts,
    joined by commas and "and", in any order.
    """

    accepted: tuple[str, ...] = ()
    parts: bool = False

    def accepts(self, text: str) -> bool:
        """Whether the generated text is an answer: all parts and no other, or one of the answers as SQuAD compares
        them (case, punctuation and articles ignored).
        """
        if self.parts:
            return _parts(text) == _parts(self.accepted[0])
        return normalised(text) in {normalised(answer) for answer in self.accepted}


def _parts(text: str) -> list[str]:
    return sorted(part.strip(" .") for part in re.split(r",|\band\b", text) if part.strip(" ."))


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous space (the comparison of SQuAD's own script)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@dataclass(frozen=True)
class Question:
    """A question about one of a file's documents. answers: all accepted."""

    text: str
    answers: tuple[str, ...]
    document: int


@dataclass(frozen=True)
class Documents:
    """What a SQuAD-like file holds: paragraphs, and questions that one of them answers."""

    paragraphs: tuple[str, ...]
    questions: tuple[Question, ...]


def load_documents(path: str | Path) -> Documents:
    """Read a JSON file in SQuAD's form (data > paragraphs > context, qas > question, answers > text); questions marked
    as impossible are left out. RecipeError when it is none or has no question.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        paragraphs: list[str] = []
        questions: list[Question] = []
        for article in value["data"]:
            for paragraph in article["paragraphs"]:
                for item in paragraph["qas"]:
                    answers = tuple(dict.fromkeys(answer["text"] for answer in item["answers"]))
                    if answers and not item.get("is_impossible"):
                        questions.append(Question(item["question"], answers, len(paragraphs)))
                paragraphs.append(paragraph["context"])
    except OSError as error:
        raise RecipeError(f"--qa: cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"--qa: {path} is not JSON in SQuAD's form: {error!r}") from None
    if not questions:
        raise RecipeError(f"--qa: {path} holds no question that can be answered")
    return Documents(tuple(paragraphs), tuple(questions))


def build(
    task: str,
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    haystack: Haystack,
    length: int,
    *,
    depth: float | None = None,
    digits: int = 4,
    values: str = "number",
    documents: Documents | None = None,
) -> RulerSample:
    """One sample of exactly ``length`` tokens; arguments as in `data_pipeline.synthetic.build_sample`. There is one
    wording, which no training data uses.

    Raises SampleTooShort when ``length`` cannot hold the task.
    """
    if task == "niah_multivalue":
        return _multivalue(rng, tokenizer, haystack, length, depth, digits, values)
    if task == "common_words":
        return _common_words(rng, tokenizer, haystack, length)
    if documents is None:
        raise RecipeError("the task qa needs questions: give --qa FILE with JSON in SQuAD's form")
    return _qa(rng, tokenizer, haystack, length, depth, documents)


def _finish(
    task: str, tokenizer: Tokenizer, body: Sequence[np.ndarray], answer: str, accepted: tuple[str, ...], parts: bool
) -> RulerSample:
    answer_ids = np.append(tokenizer.encode_words(" " + answer), tokenizer.eos_id)
    tokens = np.concatenate([*body, answer_ids]).astype(np.int32)
    mask = np.zeros(len(tokens), dtype=bool)
    mask[len(tokens) - len(answer_ids) :] = True
    prompt = len(tokens) - len(answer_ids)
    none = no_evidence(len(tokens))  # for training only
    return RulerSample(tokens, mask, ~mask, prompt, task, tokenizer, none, accepted=accepted, parts=parts)


def _room(task: str, length: int, used: int) -> int:
    if used > length:
        raise SampleTooShort(f"{task} needs at least {used} tokens and the sample has {length}; use a longer context")
    return length - used


def _multivalue(
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    haystack: Haystack,
    length: int,
    depth: float | None,
    digits: int,
    values: str,
) -> RulerSample:
    """One key with several values at several places, all asked for (RULER's MV-NIAH). depth: of the first."""
    (key,) = random_word(rng)
    held: dict[str, None] = {}
    while len(held) < VALUES_OF_ONE_KEY:
        held[held_out_value(rng, values, digits)] = None
    pieces = [tokenizer.encode_words(_NEEDLE.format(noun=values, key=key, value=value)) for value in held]
    asking = tokenizer.encode_words(_ALL_VALUES.format(noun=values, key=key))
    answer = " and ".join(held)
    used = sum(map(len, pieces)) + len(asking) + len(tokenizer.encode_words(" " + answer)) + 1
    text = np.asarray(haystack(_room("niah_multivalue", length, used)), dtype=np.int32)
    places = rng.random(len(pieces))
    if depth is not None:
        places = depth + (1.0 - depth) * places
        places[0] = depth
    body, position = [], 0
    for cut, piece in zip(np.rint(np.sort(places) * len(text)).astype(int), pieces, strict=True):
        body += [text[position:cut], piece]
        position = cut
    return _finish("niah_multivalue", tokenizer, [*body, text[position:], asking], answer, (answer,), parts=True)


def _common_words(rng: np.random.Generator, tokenizer: Tokenizer, haystack: Haystack, length: int) -> RulerSample:
    """A list of words in random order: ten of them ten times as often as any other, and asked for (RULER's CWE). Text
    fills what the list leaves of ``length``, at the start.
    """
    most = len(WORDS) * len(QUALITIES) // 2 - COMMON
    asking = tokenizer.encode_words(_COMMON)

    def make(others: int, times: int) -> tuple[list[np.ndarray], np.ndarray, str]:
        words = random_word(np.random.default_rng(seed), COMMON + others)
        counts = np.array([OFTEN * times] * COMMON + [SELDOM * times] * others)
        return [tokenizer.encode_words(f" {word},") for word in words], counts, ", ".join(words[:COMMON])

    def size(made: tuple[list[np.ndarray], np.ndarray, str]) -> int:
        answer = len(tokenizer.encode_words(" " + made[2])) + 1
        return int(sum(len(piece) * n for piece, n in zip(made[0], made[1], strict=True))) + len(asking) + answer

    seed = int(rng.integers(1 << 62))
    others = COMMON
    made = make(others, 1)
    _room("common_words", length, size(made))
    # As many other words as fit; where there are not so many, all of them more often.
    each = SELDOM * float(np.mean([len(piece) for piece in made[0]]))
    others = max(COMMON, min(most, COMMON + int((length - size(made)) / each)))
    while others > COMMON and size(make(others, 1)) > length:
        others = max(COMMON, int(others * 0.9))
    times = max(1, length // size(make(others, 1)))
    made = make(others, times)
    while size(made) > length:
        times -= 1
        made = make(others, times)
    order = rng.permutation(np.repeat(np.arange(len(made[0])), made[1]))
    listed = np.concatenate([made[0][i] for i in order])
    text = np.asarray(haystack(length - size(made)), dtype=np.int32)
    return _finish("common_words", tokenizer, [text, listed, asking], made[2], (made[2],), parts=True)


def _qa(
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    haystack: Haystack,
    length: int,
    depth: float | None,
    documents: Documents,
) -> RulerSample:
    """A question after many paragraphs, one of which answers it. depth: of that one. Text fills the start where the
    file has too few paragraphs.
    """
    question = documents.questions[int(rng.integers(len(documents.questions)))]
    asking = tokenizer.encode(_QA.format(question=question.text))
    longest = max(question.answers, key=lambda answer: len(tokenizer.encode(" " + answer)))

    def paragraph(number: int) -> np.ndarray:
        return np.asarray(tokenizer.encode(f"\n\n{documents.paragraphs[number]}"), dtype=np.int32)

    right = paragraph(question.document)
    used = len(asking) + len(tokenizer.encode_words(" " + longest)) + 1 + len(right)
    room = _room("qa", length, used)
    others: list[np.ndarray] = []
    for number in rng.permutation(len(documents.paragraphs)).tolist():
        # A paragraph that holds an answer as well would not be a distractor.
        if number == question.document or any(a in documents.paragraphs[number] for a in question.answers):
            continue
        piece = paragraph(number)
        if len(piece) > room:
            break
        others.append(piece)
        room -= len(piece)
    place = rng.random() if depth is None else depth
    others.insert(round(place * len(others)), right)
    text = np.asarray(haystack(room), dtype=np.int32)
    return _finish("qa", tokenizer, [text, *others, np.asarray(asking)], longest, question.answers, parts=False)
