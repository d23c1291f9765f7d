"""Synthetic samples: exact length, the answer where the mask says, the needle where the depth says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import TASKS, TRAINING_ONLY
from data_pipeline.errors import DataError
from data_pipeline.synthetic import SampleTooShort, answer_text, build_sample, score
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, train_bpe
from data_pipeline.wordings import random_number, random_word
from data_pipeline.words import QUALITIES, WORDS

LENGTH = 512


class Text:
    """A haystack of one repeated sentence that counts what it gave."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ids = np.array(tokenizer.encode(" The old river runs to the sea."), dtype=np.int32)
        self.calls: list[int] = []

    def __call__(self, n: int) -> np.ndarray:
        self.calls.append(n)
        return np.resize(self.ids, n)


@pytest.mark.parametrize("templates", ["train", "plain", "eval", "wide"])
@pytest.mark.parametrize("task", [task for task in TASKS if task not in TRAINING_ONLY])
def test_sample_is_prompt_answer_eos(tokenizer: Tokenizer, task: str, templates: str) -> None:
    for seed in range(15):
        text = Text(tokenizer)
        sample = build_sample(
            task, np.random.default_rng(seed), tokenizer, text, LENGTH, chunk_size=64, templates=templates
        )
        assert sample.kind == task and sample.tokens.shape == (LENGTH,) and sample.tokens.dtype == np.int32
        assert sample.tokens[-1] == tokenizer.eos_id
        assert np.array_equal(np.flatnonzero(sample.answer_mask), np.arange(sample.prompt_length, LENGTH))
        generated = sample.tokens[sample.prompt_length :].tolist()
        assert score(sample, tokenizer, generated)
        assert score(sample, tokenizer, [*generated, 77, 78])  # what follows the end does not count
        wrong = [*generated[:-2], generated[-2] + 1, generated[-1]]
        assert not score(sample, tokenizer, wrong) and not score(sample, tokenizer, [])
        assert len(text.calls) == (0 if task == "copy" and not sample.text_mask.any() else 1)
        again = build_sample(
            task, np.random.default_rng(seed), tokenizer, Text(tokenizer), LENGTH, chunk_size=64, templates=templates
        )
        assert np.array_equal(sample.tokens, again.tokens)


@pytest.mark.parametrize("templates", ["train", "eval"])
def test_the_answer_is_in_the_needles(tokenizer: Tokenizer, templates: str) -> None:
    """The asked key stands before its number, once; its number is asked for; distractors have other keys."""
    for seed in range(30):
        sample = build_sample(
            "niah_multikey",
            np.random.default_rng(seed),
            tokenizer,
            Text(tokenizer),
            LENGTH,
            keys=4,
            templates=templates,
            digits=6,
        )
        prompt = tokenizer.decode(sample.tokens[: sample.prompt_length])
        assert len(sample.answer) == 6 and prompt.count(sample.answer) == 1
        key = next(w for w in prompt[: prompt.index(sample.answer)].replace(":", " ").split()[::-1] if w in WORDS)
        question = prompt.rsplit(".", 1)[1]
        assert key in question.split() + question.replace("?", "").split()
        digits = sample.tokens[sample.prompt_length : -1][-6:]
        assert [tokenizer.decode([d]) for d in digits] == list(sample.answer)


def test_several_answers(tokenizer: Tokenizer) -> None:
    sample = build_sample(
        "niah_multiquery", np.random.default_rng(1), tokenizer, Text(tokenizer), LENGTH, keys=5, queries=3
    )
    prompt = tokenizer.decode(sample.tokens[: sample.prompt_length])
    numbers = sample.answer.split(" and ")
    assert len(numbers) == 3 and all(prompt.count(n) == 1 for n in numbers)
    sample = build_sample("variable_tracking", np.random.default_rng(1), tokenizer, Text(tokenizer), LENGTH, hops=3)
    names = sample.answer.split(", ")
    prompt = tokenizer.decode(sample.tokens[: sample.prompt_length])
    assert len(names) == 4
    places = [prompt.index(f"Let {name} =") for name in names]
    assert places == sorted(places)
    assert all(f"Let {b} = {a}." in prompt for a, b in zip(names[:-1], names[1:], strict=True))


def test_depth_places_the_needle(tokenizer: Tokenizer) -> None:
    def place(task: str, depth: float, length: int = 2048) -> float:
        sample = build_sample(
            task, np.random.default_rng(4), tokenizer, Text(tokenizer), length, depth=depth, templates="plain"
        )
        prompt = tokenizer.decode(sample.tokens[: sample.prompt_length])
        if task == "variable_tracking":
            return prompt.index("Let ") / len(prompt)
        return prompt.index(sample.answer) / len(prompt)

    for task in ("niah_single", "niah_multikey", "variable_tracking"):
        found = [place(task, depth) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
        assert found == sorted(found)
        assert found[0] < 0.03 and abs(found[2] - 0.5) < 0.08 and found[4] > 0.85


@pytest.mark.parametrize("task", ["niah_single", "niah_multikey", "variable_tracking"])
def test_one_free_sample_of_ten_asks_for_what_was_said_last(tokenizer: Tokenizer, task: str) -> None:
    """Random depths alone would put a needle directly before the question about once in ``length`` samples."""
    samples, last = 300, 0
    for seed in range(samples):
        rng = np.random.default_rng(seed)
        sample = build_sample(task, rng, tokenizer, Text(tokenizer), LENGTH, templates="plain")
        prompt = tokenizer.decode(sample.tokens[: sample.prompt_length])
        said = sample.answer.split(", ")[-1] if task == "variable_tracking" else sample.answer
        before = prompt[: prompt.rindex(" The ")].rstrip()  # up to the question
        last += before.endswith(f"is {said}.") or (f" Let {said} = " in before[-40:] and before.endswith("."))
    assert 0.05 * samples < last < 0.2 * samples
    sample = build_sample(
        "niah_multikey", np.random.default_rng(1), tokenizer, Text(tokenizer), 120, depth=1.0, templates="plain"
    )
    prompt = tokenizer.decode(sample.tokens[: sample.prompt_length])
    assert prompt[: prompt.rindex(" The ")].endswith(f" is {sample.answer}.")  # also where other needles are crowded


def test_frequent_words(tokenizer: Tokenizer) -> None:
    """The answer lists the three most frequent words in order; the list fills the sample but for a few tokens."""
    for seed in range(20):
        sample = build_sample(
            "frequent_words", np.random.default_rng(seed), tokenizer, Text(tokenizer), LENGTH, templates="plain"
        )
        prompt = tokenizer.decode(sample.tokens[: sample.prompt_length])
        counted = Counter(word for word in prompt.rpartition(" The three")[0].split() if word in WORDS)
        del counted["river"], counted["sea"]  # the haystack's own
        (a, n), (b, m), (c, k), (_, others) = counted.most_common(4)
        assert [a, b, c] == [word for word in sample.answer.split(", ")] and n > m > k > others
        assert sample.text_mask.sum() < 40
    with pytest.raises(SampleTooShort, match="frequent_words needs at least"):
        build_sample("frequent_words", np.random.default_rng(0), tokenizer, Text(tokenizer), 48)


def test_small_samples_of_a_small_vocabulary(corpus: Path) -> None:
    """A 1,024-entry BPE and 64 tokens hold every wording of one needle, and a copy: the demo's warm-up needs it."""
    words = " ".join(WORDS) + 30 * " magic number Remember that the code of Note Which What is the special numbers for "
    small = corpus.parent / "bpe1024.json"
    small.write_text(train_bpe([(corpus / "news.txt").read_text(), words], 1024), encoding="utf-8")
    tokenizer = load_tokenizer(small)
    assert tokenizer.vocab_size == 1024
    for task in ("niah_single", "copy"):
        for templates in ("train", "plain", "eval"):
            for seed in range(50):
                rng = np.random.default_rng(seed)
                build_sample(task, rng, tokenizer, Text(tokenizer), 64, chunk_size=8, templates=templates)


def test_needles_follow_sentences(tokenizer: Tokenizer) -> None:
    for seed in range(10):
        sample = build_sample(
            "niah_single", np.random.default_rng(seed), tokenizer, Text(tokenizer), LENGTH, templates="plain"
        )
        before, needle, _ = tokenizer.decode(sample.tokens).split(" The magic number")
        asked_at_once = " The" not in needle  # then it stands where the text ends, wherever that is
        assert before == "" or before.endswith(".") or "sea" not in before or asked_at_once


def test_copy(tokenizer: Tokenizer) -> None:
    """x1..xn, a cue, x1..xn, eos; random halves have no text loss and no special tokens."""
    for length in (64, 65):
        for share in (0.0, 1.0):
            sample = build_sample(
                "copy", np.random.default_rng(2), tokenizer, Text(tokenizer), length, copy_random=share
            )
            n = (length - 2) // 2
            assert np.array_equal(sample.tokens[:n], sample.answer_ids()) and len(sample.answer_ids()) == n
            assert sample.text_mask.sum() == (0 if share else n)
            if share:
                assert not set(sample.tokens[:n].tolist()) & {tokenizer.eos_id, tokenizer.pad_id}
                assert sample.tokens[:n].max() < tokenizer.vocab_size


def test_words_and_numbers() -> None:
    rng = np.random.default_rng(0)
    assert len(set(WORDS)) == len(WORDS) > 250 and len(set(QUALITIES)) == len(QUALITIES)
    for count in (1, 50, 169, 170, 5000):
        assert len(set(random_word(rng, count))) == count
    with pytest.raises(DataError, match="keys per sample"):
        random_word(rng, 10**6)
    numbers = [random_number(rng, 7) for _ in range(200)]
    assert all(len(n) == 7 and n[0] != "0" for n in numbers) and len(set(numbers)) > 190


def test_answer_text_stops_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" 4821")
    assert answer_text(tokenizer, [*ids, tokenizer.eos_id, *ids]) == "4821"
    assert answer_text(tokenizer, np.array(ids)) == "4821"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "niah"}, "unknown synthetic task 'niah'; choose from niah_single"),
        ({"templates": "test"}, "unknown templates 'test'"),
        ({"chunk_size": 100}, "multiple of the chunk size 100"),
        ({"depth": 1.5}, "depth must be between 0 and 1"),
        ({"length": 8}, "use a longer context"),
        ({"task": "niah_multikey", "keys": 200}, "needs at least .* the sample has 512"),
    ],
)
def test_mistakes(tokenizer: Tokenizer, change: dict, message: str) -> None:
    arguments = {"task": "niah_single", "length": LENGTH, **change}
    task, length = arguments.pop("task"), arguments.pop("length")
    text = Text(tokenizer)
    with pytest.raises(DataError, match=message) as caught:
        build_sample(task, np.random.default_rng(0), tokenizer, text, length, **arguments)
    assert not text.calls and caught.value.exit_status == 2
    assert isinstance(caught.value, SampleTooShort) == ("needs at least" in str(caught.value))


def _over_an_edge(tokenizer: Tokenizer, task: str, chunk_size: int, **options: float) -> float:
    """Share of the needles in samples of 4096 tokens that have tokens on both sides of a multiple of 64."""
    over = []
    for seed in range(40):
        sample = build_sample(
            task,
            np.random.default_rng(seed),
            tokenizer,
            lambda n: np.full(n, tokenizer.eos_id, dtype=np.int32),
            4096,
            chunk_size=chunk_size,
            templates="wide",
            **options,  # type: ignore[arg-type]
        )
        edges = np.flatnonzero(np.diff(np.r_[0, (sample.tokens != tokenizer.eos_id).astype(int)]))
        starts, ends = edges[::2], edges[1::2]
        over += [start // 64 != (end - 1) // 64 for start, end in zip(starts, ends, strict=False) if end - start < 64]
    return float(np.mean(over))


@pytest.mark.parametrize("task", ["variable_tracking", "niah_multikey", "recall"])
def test_needles_lie_across_the_edges_of_chunks(tokenizer: Tokenizer, task: str) -> None:
    """More of them than chance brings about; not where the caller says where they are."""
    by_chance = _over_an_edge(tokenizer, task, 1)
    assert _over_an_edge(tokenizer, task, 64) > by_chance + (0.05 if task == "recall" else 0.2)
    if task != "recall":
        assert _over_an_edge(tokenizer, task, 64, depth=0.3) == _over_an_edge(tokenizer, task, 1, depth=0.3)
