"""RULER's tasks that only evaluation knows: what is in a sample, and which answers count."""

import json
from collections import Counter

import numpy as np
import pytest

from data_pipeline.synthetic import SampleTooShort
from data_pipeline.tokenizer import Tokenizer, train_bpe
from data_pipeline.words import WORDS
from pretrain.errors import RecipeError
from pretrain.evaluation.retrieval import run_task
from pretrain.evaluation.ruler import parse_tasks
from pretrain.evaluation.ruler_tasks import TASKS, build, load_documents, normalised

TEXT = "The grass was dry and long that year. Nobody came to cut it, and the wind lay down in it. "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    file.write_text(train_bpe([TEXT], 300))
    return Tokenizer(file)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    paragraphs = [
        {
            "context": f"Number {n} is a town on a river. Its mayor is called Person{n}.",
            "qas": [
                {
                    "question": f"Who is mayor of {n}?",
                    "answers": [{"text": f"Person{n}"}, {"text": f"called Person{n}"}],
                }
            ],
        }
        for n in range(40)
    ]
    paragraphs[0]["qas"].append({"question": "Why?", "answers": [], "is_impossible": True})
    file = tmp_path_factory.mktemp("qa") / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": paragraphs[:20]}, {"paragraphs": paragraphs[20:]}]}))
    return load_documents(file)


def hay(tokenizer):
    ids = np.array(tokenizer.encode(TEXT * 400), dtype=np.int32)
    return lambda n: ids[:n]


def make(task, tokenizer, length, seed=0, documents=None, **options):
    return build(task, np.random.default_rng(seed), tokenizer, hay(tokenizer), length, documents=documents, **options)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1500, 6000])
def test_samples_have_the_length_and_end_with_the_answer(task, length, tokenizer, documents):
    if task == "common_words":
        length *= 4  # thirty times ten words of a tokenizer that knows none of them
    sample = make(task, tokenizer, length, documents=documents)
    assert len(sample.tokens) == length and sample.tokens[-1] == tokenizer.eos_id
    assert sample.answer_mask.sum() == length - sample.prompt_length and sample.accepts(sample.answer)
    assert not sample.accepts("") and not sample.accepts("something else")
    again = make(task, tokenizer, length, documents=documents)
    other = make(task, tokenizer, length, seed=1, documents=documents)
    assert (sample.tokens == again.tokens).all() and (sample.tokens != other.tokens).any()
    with pytest.raises(SampleTooShort, match=f"{task} needs at least"):
        make(task, tokenizer, 40, documents=documents)


@pytest.mark.parametrize("values", ["number", "word", "uuid"])
def test_all_values_of_a_key_are_in_the_text_and_count_in_any_order(tokenizer, values):
    sample = make("niah_multivalue", tokenizer, 2000, values=values, depth=0.3)
    text = tokenizer.decode(sample.tokens[: sample.prompt_length])
    held = sample.answer.split(" and ")
    assert len(set(held)) == 4 and all(f"is: {value}." in text for value in held)
    assert text.index(held[0]) == min(map(text.index, held))
    assert 0.2 < text.index(held[0]) / len(text) < 0.45
    assert sample.accepts(", ".join(held[::-1])) and not sample.accepts(" and ".join(held[:3]))
    assert not sample.accepts(" and ".join([*held[:3], held[0]]))


@pytest.mark.parametrize("length", [4000, 30000])
def test_ten_words_are_ten_times_as_common(tokenizer, length):
    sample = make("common_words", tokenizer, length)
    text = tokenizer.decode(sample.tokens[: sample.prompt_length])
    asked = sample.answer.split(", ")
    listed = text[: text.index(" What are the 10")]
    counts = Counter(word.strip() for word in listed.split(","))
    often = {counts[word] for word in asked}
    others = {n for word, n in counts.items() if word not in asked and word.split(" ")[-1] in WORDS and n > 1}
    assert len(asked) == 10 and len(often) <= 2 and len(others) >= 1
    assert max(often) - min(often) <= 1 and min(often) >= 8 * max(others)
    assert sample.accepts(", ".join(asked[::-1]) + ".") and not sample.accepts(", ".join(asked[:9]))


def test_one_document_answers_the_question(tokenizer, documents):
    for seed in range(5):
        sample = make("qa", tokenizer, 1200, seed=seed, documents=documents, depth=0.0)
        text = tokenizer.decode(sample.tokens[: sample.prompt_length])
        number = text[text.rindex("mayor of ") :].split("?")[0].split()[-1]
        assert f"Its mayor is called Person{number}." in text
        assert sample.accepts(f"person{number}") and sample.accepts(f"called Person{number}.")
        assert not sample.accepts(f"Person{number}0")
        assert text.count(f"Person{number}.") == 1
    assert normalised("The Grass, was  dry!") == "grass was dry"


class Parrot:
    """Says what the sample wants: the tokens after the prompt are handed over by the test."""

    def __init__(self, answers, vocabulary):
        self.answers, self.vocabulary = list(answers), vocabulary

    def reset(self):
        pass

    def prefill(self, tokens):
        import torch

        self.rows = [self.answers.pop(0) for _ in range(tokens.shape[0])]
        self.at = 0
        return self._logits(torch)

    def decode(self, tokens):
        import torch

        self.at += 1
        return self._logits(torch)

    def _logits(self, torch):
        logits = torch.zeros(len(self.rows), self.vocabulary)
        for row, answer in enumerate(self.rows):
            logits[row, answer[min(self.at, len(answer) - 1)]] = 1.0
        return logits


@pytest.mark.parametrize("task", TASKS)
def test_the_runner_counts_accepted_answers(task, tokenizer, documents):
    from pretrain.evaluation.haystack import Haystack
    from pretrain.evaluation.retrieval import _Builder

    length = 6000 if task != "common_words" else 12000
    tokens = np.array(tokenizer.encode(TEXT * 400), dtype=np.int32)
    options = {"digits": 4, "keys": 4, "queries": 2, "hops": 4, "copy_random": 0.5, "documents": documents}
    import zlib

    said = []
    for number in range(4):
        entropy = [3, length, number, *(zlib.crc32(repr(part).encode()) for part in (task, None, None))]
        sample = _Builder(task, tokenizer, Haystack(tokens), length, 1, "eval", options, entropy).at_depth(None)
        answer = sample.answer if task == "qa" else " and ".join(sample.answer.replace(" and ", ", ").split(", ")[::-1])
        wanted = tokenizer.encode(" " + answer)
        said.append([*wanted, tokenizer.eos_id] if number else [*wanted[:-3], tokenizer.eos_id])
    engine = Parrot(said, tokenizer.vocab_size)
    result = run_task(
        engine,
        tokenizer,
        tokens,
        task=task,
        lengths=[length],
        samples=4,
        seed=3,
        templates="eval",
        options=options,
        batch=1,
    )
    assert (result.cells[0].tally.n, result.cells[0].tally.correct) == (4, 3)


def test_task_names():
    assert "niah_multivalue" in parse_tasks(None) and "qa" not in parse_tasks(None)
    assert "qa" in parse_tasks(None, documents=True) and "qa" not in parse_tasks(None, shared=True)
    with pytest.raises(RecipeError, match="with --qa FILE"):
        parse_tasks("qa")
    with pytest.raises(RecipeError, match="'common_words' with --haystacks"):
        parse_tasks("common_words", shared=True)


def test_files_that_are_no_questions(tmp_path):
    for text, message in (("{", "not JSON"), ('{"data": []}', "no question"), ('{"data": [{}]}', "SQuAD's form")):
        (tmp_path / "f").write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_documents(tmp_path / "f")
    with pytest.raises(RecipeError, match="cannot read"):
        load_documents(tmp_path / "nothing")
