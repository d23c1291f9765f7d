"""The grammar of training and what evaluation asks have no frame, noun or kind of value in common; recall samples."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from data_pipeline import grammar, recall, wordings
from data_pipeline.errors import DataError
from data_pipeline.grammar import HELD_OUT_DIGITS, RARE, Frequent, wide_keys, wide_values, wide_variables, wide_wording
from data_pipeline.recall import _MENTIONS, _values, recall_events
from data_pipeline.synthetic import SampleTooShort, build_sample, needle_haystack
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.wordings import Facts, held_out_value, near_keys, variable_facts


def frame(text: str) -> str:
    """A wording without its noun, punctuation of the ends and case: what two wordings may not share."""
    text = re.sub(r"\{noun\}s?|special \{noun\}s?", "N", text.replace("special ", ""))
    return re.sub(r"\{(key|keys|name|other|value)\}", lambda m: m[0], text).strip(" .:\n").lower()


def test_evaluation_shares_no_wording_with_training() -> None:
    held_out = wordings._NUMBERS["eval"][0]
    trained = {
        "needle": {frame(t) for t in grammar.WIDE_NEEDLES},
        "question": {frame(t) for t in grammar.WIDE_QUESTIONS},
        "questions": {frame(t) for t in grammar.WIDE_SEVERAL},
    }
    for wording in (*wordings._NUMBERS["train"],):
        assert wording.needle != held_out.needle
    for part, frames in trained.items():
        assert frame(getattr(held_out, part)) not in frames, part
    assert not any("special" in noun for noun in grammar.WIDE_NOUNS)
    first, then, question = wordings._VARIABLES["eval"][0]
    for a, b in grammar.WIDE_VARIABLES:
        assert frame(a) != frame(first) and frame(b) != frame(then)
        assert "VAR" not in a + b
    assert frame(question) not in {frame(t) for t in grammar.WIDE_CHAINS}


def test_no_wording_that_can_be_drawn_is_one_of_evaluation() -> None:
    held_out = wordings._NUMBERS["eval"][0]
    first, then, question = wordings._VARIABLES["eval"][0]
    held_out_frames = {
        frame(t) for t in (held_out.needle, held_out.question, held_out.questions, first, then, question)
    }
    held_out_words = re.compile(r"\bspecial\b|\bVAR\b|\bvariables\b|\bassigned\b|\bOne of\b|\bFind all\b")
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(4000):
        for text in (*grammar.wide_wording(rng), *grammar.wide_variables(rng)):
            assert not held_out_words.search(text), text
            assert frame(text) not in held_out_frames, text
            seen.add(text)
    assert len(seen) > 10000  # most draws are new


def test_kinds_of_values_that_evaluation_asks_for_are_never_trained() -> None:
    rng = np.random.default_rng(0)
    number = re.compile(rf"\d{{{HELD_OUT_DIGITS}}}")
    uuid = re.compile("-".join(f"[0-9a-f]{{{n}}}" for n in grammar.UUID))
    hyphened = re.compile(r"[a-z]+-[a-z]+")
    for value in [v for _ in range(4000) for v in wide_values(rng, 2)]:
        assert not number.fullmatch(value) and not uuid.fullmatch(value)
        assert not hyphened.fullmatch(value) or set(value) <= set("0123456789abcdef-")
    for kind, pattern in (("number", number), ("word", hyphened), ("uuid", uuid)):
        assert pattern.fullmatch(held_out_value(rng, kind, HELD_OUT_DIGITS))


def test_half_of_the_trained_values_are_words() -> None:
    rng = np.random.default_rng(1)
    values = [wide_values(rng, 1)[0] for _ in range(4000)]
    words = [value for value in values if not any(character.isdigit() for character in value)]
    assert 0.45 < len(words) / len(values) < 0.65


def test_numbers_count_through_a_quarter_of_the_recall_samples(tokenizer: Tokenizer) -> None:
    """Running numbers are pieces of their own in the text; they ask nothing and leave the last question last."""
    counting = 0
    for seed in range(200):
        events = recall_events(np.random.default_rng(seed), tokenizer, 2048)
        assert sum(len(event.tokens) for event in events) <= 2048 and events[-1].answer
        said = [tokenizer.decode(event.tokens) for event in events if not event.answer]
        counts = [re.findall(r"\d+", text) for text in said if re.fullmatch(r"\s(p\. )?[\[(]?\d[\d:.,-]*[\]).]?", text)]
        if len(counts) > 8:
            counting += 1
            last = [int(numbers[-1]) for numbers in counts]
            assert all(after in (before + 1, 1) for before, after in zip(last, last[1:], strict=False))
            assert sum(event.text for event in events) >= len(counts)
    assert 30 < counting < 70


def test_running_numbers_are_learnt_as_text_and_facts_are_not(tokenizer: Tokenizer) -> None:
    """Left out of the loss they would teach that no number ever follows a sentence."""
    some = 0
    for seed in range(30):
        numbers = sum(len(e.tokens) for e in recall_events(np.random.default_rng(seed), tokenizer, 2048) if e.text)
        sample = build_sample("recall", np.random.default_rng(seed), tokenizer, text, 2048)
        assert sample.text_mask.sum() == (sample.tokens == 1).sum() + numbers
        some += numbers > 0
    assert some > 5


_SENTENCE = "|".join(re.escape(frame).replace(re.escape("{word}"), "(.+)") for frame in _MENTIONS)


def test_keys_are_mentioned_without_being_told_of(tokenizer: Tokenizer) -> None:
    """Mentions are text, name a key that is asked for or a name of a chain, and stay rarer than facts."""
    mentioned = facts = 0
    for seed in range(100):
        events = recall_events(np.random.default_rng(seed), tokenizer, 4096)
        said = [tokenizer.decode(e.tokens) for e in events if e.text]
        mentions = [s for s in said if re.search("[a-z]{2}", s) and not re.match(r"\sp\. \d", s)]
        whole = "".join(tokenizer.decode(e.tokens) for e in events if not e.text)
        found = [re.fullmatch(_SENTENCE, mention) for mention in mentions]
        assert all(found), mentions
        words = [match[match.lastindex] for match in found if match and match.lastindex]
        assert all(word in whole for word in words), (mentions, words)
        mentioned, facts = mentioned + len(mentions), facts + sum(not e.answer and not e.text for e in events)
    assert 0.05 < mentioned / facts < 0.6


def test_one_recall_sample_in_ten_repeats_a_passage(tokenizer: Tokenizer) -> None:
    asked: list[int] = []

    def some(n: int) -> np.ndarray:
        asked.append(n)
        return np.arange(n, dtype=np.int32) % 7 + 1

    samples = [build_sample("recall", np.random.default_rng(s), tokenizer, some, 2048) for s in range(200)]
    assert all(len(sample.tokens) == 2048 for sample in samples) and len(asked) == 200
    assert 8 < sum(n < 257 for n in asked) < 40


_BEHIND = (
    " above",
    " earlier",
    " before",
    " further up",
    " what you read",
    *(f" {a} {b} " for a in ("in", "on", "by") for b in ("the", "this", "that")),
)


def test_a_third_of_the_questions_say_where_the_fact_stood_in_hundreds_of_ways() -> None:
    rng = np.random.default_rng(2)
    questions = [wide_wording(rng)[1] for _ in range(1000)] + [wide_variables(rng)[2] for _ in range(1000)]
    said = sum(any(place in question for place in _BEHIND) for question in questions) / 2000
    assert 0.2 < said < 0.5
    behind_keys = {q.partition("{key}")[2] for q in (wide_wording(rng)[1] for _ in range(4000)) if " mentioned" in q}
    assert len(behind_keys) > 30 and not any("provided" in words for words in behind_keys)  # the harness' own word


def test_no_two_chains_of_a_sample_share_a_name(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    chains: list[list[str]] = []

    def kept(*arguments: Any, **options: Any) -> Facts:
        facts = variable_facts(*arguments, **options)
        chains.append(facts.answer.strip().split(", "))
        return facts

    monkeypatch.setattr(recall, "variable_facts", kept)
    several = 0
    for seed in range(60):
        chains.clear()
        frequent = Frequent(tokenizer.frequent_words, 0.5 * (seed % 3))
        recall.recall_events(np.random.default_rng(seed), tokenizer, 16384, frequent)
        names = [name for chain in chains for name in chain]
        assert len(names) == len(set(names))
        several += len(chains) > 1
    assert several > 10


def test_one_recall_sample_in_seven_opens_with_a_fact(tokenizer: Tokenizer) -> None:
    """A needle with nothing in front of it looks unlike all others; random places hardly ever give one."""
    opening = 0
    for seed in range(200):
        first = recall_events(np.random.default_rng(seed), tokenizer, 2048)[0]
        if first.time == 0.0:
            opening += 1
            sample = build_sample("recall", np.random.default_rng(seed), tokenizer, text, 2048)
            assert np.array_equal(sample.tokens[: len(first.tokens)], first.tokens) and not first.answer + first.text
    assert 15 < opening < 50


def test_several_values_are_asked_for_at_once(tokenizer: Tokenizer) -> None:
    """Up to four, of different keys in the order of the question, of one key in the order of the text."""
    sizes: list[int] = []
    for seed in range(200):
        said = ""
        for event in recall_events(np.random.default_rng(seed), tokenizer, 2048):
            words = tokenizer.decode(event.tokens)
            if event.answer:
                answer = tokenizer.decode(event.tokens[-event.answer : -1]).strip()
                values = re.split(", and | and |, ", answer)
                sizes.append(len(values))
                assert all(value in said for value in values)
            said += words
    assert {1, 2, 3, 4} <= set(sizes) and 0.05 < sum(n in (3, 4) for n in sizes) / len(sizes) < 0.4
    rng, in_order = np.random.default_rng(5), 0
    for _ in range(20):
        *needles, question = _values(rng, tokenizer, RARE)
        texts = [tokenizer.decode(needle.tokens) for needle in sorted(needles, key=lambda event: event.time)]
        values = re.split(", and | and |, ", tokenizer.decode(question.tokens[-question.answer : -1]).strip())
        assert len(values) == len(texts) and question.time >= max(needle.time for needle in needles)
        assert all(value in needle for value, needle in zip(values, texts, strict=True))
        in_order += len(values)
    assert in_order > 40


def text(n: int) -> np.ndarray:
    return np.ones(n, dtype=np.int32)


@pytest.mark.parametrize("length", [256, 1024, 2048])
def test_recall_asks_after_the_fact_and_answers_right(tokenizer: Tokenizer, length: int) -> None:
    """Every answer is said before its question, ends with eos, and only answers carry the answer's weight."""
    answered = 0
    for seed in range(40):
        try:
            sample = build_sample("recall", np.random.default_rng(seed), tokenizer, text, length, chunk_size=64)
        except SampleTooShort:
            assert length == 256
            continue
        assert sample.tokens.shape == (length,) and sample.tokens[-1] == tokenizer.eos_id
        assert not (sample.answer_mask & sample.text_mask).any()
        assert sample.text_mask[sample.tokens == 1].all()
        edges = np.flatnonzero(np.diff(np.r_[0, sample.answer_mask.astype(int), 0]))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            assert sample.tokens[end - 1] == tokenizer.eos_id
            before = tokenizer.decode(sample.tokens[:start])
            for word in re.split(", and | and |, ", tokenizer.decode(sample.tokens[start : end - 1]).strip()):
                assert word in before
            answered += 1
    assert answered > 40
    again = build_sample("recall", np.random.default_rng(7), tokenizer, text, 1024)
    other = build_sample("recall", np.random.default_rng(7), tokenizer, text, 1024, templates="wide")
    assert np.array_equal(again.tokens, other.tokens)


@pytest.mark.parametrize("count", [1, 9, 160, 800])
def test_near_keys_differ_but_share_words(count: int) -> None:
    keys = near_keys(np.random.default_rng(count), count)
    assert len(set(keys)) == count and all(len(key.split()) == 3 for key in keys)
    words = [set(part) for part in zip(*(key.split() for key in keys), strict=True)]
    assert all(len(part) ** 3 <= 4 * count + 8 for part in words)  # so few words that keys are told apart by all three
    with pytest.raises(DataError, match="near each other"):
        near_keys(np.random.default_rng(0), 10**6)


@pytest.mark.parametrize("values", wordings.VALUES)
def test_a_haystack_of_needles_is_full_and_its_keys_differ(tokenizer: Tokenizer, values: str) -> None:
    facts = needle_haystack(np.random.default_rng(1), tokenizer, 20000, templates="eval", digits=7, values=values)
    used = sum(len(tokenizer.encode_words(needle)) for needle in facts.needles)
    assert 20000 - 0.1 * 20000 < used <= 20000
    assert len(set(facts.keys)) == len(facts.keys)
    for i in (0, 7, len(facts.keys) - 1):
        assert f" {facts.keys[i]} is: {facts.values[i]}." in facts.needles[i] and facts.keys[i] in facts.question(i)


def test_several_chains_are_mixed_and_one_is_asked_for() -> None:
    mixed = 0
    for seed in range(60):
        facts = variable_facts(np.random.default_rng(seed), "wide", 0, 2, chains=3)
        names = facts.answer.strip().split(", ")
        assert len(facts.needles) == 9 and len(names) == 3
        at = [[i for i, needle in enumerate(facts.needles) if re.search(rf"\b{re.escape(n)}\b", needle)] for n in names]
        first = [places[0] for places in at]
        assert first == sorted(first)  # declared in order
        mixed += first != list(range(first[0], first[0] + 3))
    assert mixed > 30


def test_frequent_names_are_words_of_the_text(tokenizer: Tokenizer) -> None:
    """At a share of 1 all keys and names are; without a share samples are what they were."""
    words = set(tokenizer.frequent_words)
    assert len(words) > 64 and all(len(tokenizer.encode(f" {word}")) == 1 for word in words)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        all_frequent = Frequent(tokenizer.frequent_words, 1.0)
        keys = wide_keys(rng, 6, all_frequent)
        names = wordings.variable_names(rng, 6, {keys[0]}, all_frequent)
        assert len(set(keys)) == len(set(names)) == 6 and keys[0] not in names
        assert {part for key in (*keys, *names) for part in key.split()} <= words

    def text(n: int) -> np.ndarray:
        return np.full(n, tokenizer.encode(" a")[0], dtype=np.int32)

    def sample(task: str, seed: int, **options: float) -> Any:
        return build_sample(
            task, np.random.default_rng(seed), tokenizer, text, 1024, templates="wide", chunk_size=64, **options
        )

    changed = 0
    for seed in range(20):
        names = sample("variable_tracking", seed, frequent_names=1.0).answer.split(", ")
        assert {part for name in names for part in name.split()} <= words
        for task in ("recall", "niah_multiquery", "variable_tracking"):
            plain = sample(task, seed).tokens
            assert np.array_equal(plain, sample(task, seed, frequent_names=0.0).tokens)
            changed += not np.array_equal(plain, sample(task, seed, frequent_names=1.0).tokens)
    assert changed > 50  # of 60; lists of recall have near keys


def test_the_share_of_frequent_names() -> None:
    rng = np.random.default_rng(0)
    words = tuple(f"w{i}" for i in range(100))
    drawn = sum(wide_keys(rng, 1, Frequent(words, 0.3))[0].startswith("w") for _ in range(2000))
    assert drawn / 2000 == pytest.approx(0.3, abs=0.05)
