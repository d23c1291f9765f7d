"""Where answers are said: in every task, wording and kind of value, and in packed batches."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.config import TASKS
from data_pipeline.evidence import NONE, evidence_of
from data_pipeline.lanes import open_stream
from data_pipeline.synthetic import build_sample
from data_pipeline.tokenizer import Tokenizer

ASKING = [task for task in TASKS if task not in ("copy", "frequent_words")]


def text(n: int) -> np.ndarray:
    """A haystack without digits or names."""
    return np.resize(np.array([40, 41, 42, 43, 44], dtype=np.int32), n)


def encode(tokenizer: Tokenizer, words: str) -> np.ndarray:
    return np.asarray(tokenizer.encode(words), dtype=np.int32)


def test_every_value_of_a_list_and_its_end(tokenizer: Tokenizer) -> None:
    """Values are said by their own facts, in the answer's order; what follows a value by what follows it there."""
    first, second = encode(tokenizer, " The code of river is 4417."), encode(tokenizer, " The code of hill is 905.")
    answer = np.append(encode(tokenizer, " 905 and 4417"), tokenizer.eos_id)
    places = evidence_of(tokenizer, answer, [("905", second, 300), ("4417", first, 100)])
    said = {100 + i: token for i, token in enumerate(first)} | {300 + i: token for i, token in enumerate(second)}
    values, ends = [], []
    for token, place in zip(answer.tolist(), places.tolist(), strict=True):
        if place != NONE:  # the joint of the list has more tokens than the one that ends a value
            (values if said[place] == token else ends).append(place)
    assert len(values) == len(encode(tokenizer, " 905")) + len(encode(tokenizer, " 4417"))
    dot = encode(tokenizer, ".")[-1]
    assert [said[place] for place in ends] == [dot, dot]
    assert (places[: len(encode(tokenizer, " 905"))] >= 300).all() and (places[-5:] < 300).all()


def test_a_link_of_a_chain_is_said_by_what_it_leads_to(tokenizer: Tokenizer) -> None:
    """Between two names the second one's fact says that there is one; behind the last nothing does."""
    facts = [encode(tokenizer, " Let river = 77."), encode(tokenizer, " Let hill = river.")]
    answer = np.append(encode(tokenizer, " river, hill"), tokenizer.eos_id)
    told = [("river", facts[0], 100), ("hill", facts[1], 300)]
    places = evidence_of(tokenizer, answer, told, chained=True)
    names = len(encode(tokenizer, " river")), len(encode(tokenizer, " hill"))
    assert len(answer) == sum(names) + 2
    assert (places[: names[0]] < 200).all() and (places[names[0] : -1] >= 300).all() and places[-1] == NONE
    assert places[names[0]] == places[names[0] + 1] == 300 + len(encode(tokenizer, " Let"))


def test_a_value_that_nothing_says_has_none(tokenizer: Tokenizer) -> None:
    fact = encode(tokenizer, " The code of river is 4417.")
    answer = np.append(encode(tokenizer, " 905"), tokenizer.eos_id)
    assert (evidence_of(tokenizer, answer, [("905", fact, 0)]) == NONE).all()
    assert (evidence_of(tokenizer, answer, []) == NONE).all()


def test_a_quoted_value_has_the_places_behind_the_quotation_mark(tokenizer: Tokenizer) -> None:
    fact = encode(tokenizer, ' "river": "4417"')
    answer = np.append(encode(tokenizer, " 4417"), tokenizer.eos_id)
    places = evidence_of(tokenizer, answer, [("4417", fact, 10)])
    start = 10 + len(encode(tokenizer, ' "river": "'))
    assert places[0] == start and (places >= start).all() and (places < 10 + len(fact)).all()


@pytest.mark.parametrize("templates", ["train", "eval", "wide"])
@pytest.mark.parametrize("task", ASKING)
def test_answers_are_said_before_they_are_given(tokenizer: Tokenizer, task: str, templates: str) -> None:
    """Only tokens of answers have evidence, all of it in front of them, and most of it is the token itself."""
    told = same = answers = 0
    for seed in range(20):
        sample = build_sample(
            task, np.random.default_rng(seed), tokenizer, text, 1024, chunk_size=64, templates=templates
        )
        assert sample.evidence.shape == (1024,) and sample.evidence.dtype == np.int32
        at = np.flatnonzero(sample.evidence != NONE)
        assert sample.answer_mask[at].all() and (sample.evidence[at] < at).all() and (sample.evidence[at] >= 0).all()
        assert not sample.answer_mask[sample.evidence[at]].any()  # a fact says it, not an earlier answer
        answers += int(sample.answer_mask.sum())
        told += len(at)
        same += int((sample.tokens[sample.evidence[at]] == sample.tokens[at]).sum())
    assert told >= 0.75 * answers and same >= 0.6 * told


@pytest.mark.parametrize("task", ["copy", "frequent_words"])
def test_what_asks_for_no_fact_has_none(tokenizer: Tokenizer, task: str) -> None:
    sample = build_sample(task, np.random.default_rng(0), tokenizer, text, 1024, chunk_size=64)
    assert (sample.evidence == NONE).all() and sample.evidence.shape == (1024,)


def test_packed_batches_carry_it_by_position_in_the_sequence(data) -> None:
    """Several samples per sequence: evidence stays in its document, in front of the token that needs it."""
    options = {"rate": 0.5, "min_length": 64, "answer_weight": 10.0, "tasks": {"niah_single": 1.0, "recall": 1.0}}
    stream = open_stream(data, lanes=2, lane_ids=[0, 1], batch=4, context=512, chunk_size=16, seed=3, synthetic=options)
    seen = later = same = 0
    for _ in range(8):
        batch = stream.next_batch()
        rows, at = (batch.evidence != NONE).nonzero(as_tuple=True)
        places = batch.evidence[rows, at].long()
        assert batch.evidence.shape == batch.tokens.shape and (places <= at).all()
        assert (batch.documents[rows, places] == batch.documents[rows, at]).all()
        assert (batch.loss_weights[rows, at] == 10.0).all()
        same += int((batch.tokens[rows, places] == batch.labels[rows, at]).sum())
        seen, later = seen + len(at), later + int((batch.documents[rows, at] > 0).sum())
    assert seen > 100 and later > 50 and same > 0.6 * seen
