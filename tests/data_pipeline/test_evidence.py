"""Where answers are said: in every task, wording and kind of value, and in packed batches."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.config import TASKS
from data_pipeline.evidence import NONE, PLACES, Told, evidence_of
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
    told = [Told("905", "hill", second, 300), Told("4417", "river", first, 100)]
    places = evidence_of(tokenizer, answer, told)
    assert (places[:, 1] == places[:, 0]).all()  # the key stands before the value: what says it knows it
    places = places[:, 0]
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
    told = [Told("river", "77", facts[0], 100), Told("hill", "river", facts[1], 300)]
    places = evidence_of(tokenizer, answer, told, chained=True)[:, 0]
    names = len(encode(tokenizer, " river")), len(encode(tokenizer, " hill"))
    assert len(answer) == sum(names) + 2
    assert (places[: names[0]] < 200).all() and (places[names[0] : -1] >= 300).all() and places[-1] == NONE
    assert places[names[0]] == places[names[0] + 1] == 300 + len(encode(tokenizer, " Let"))


def test_a_value_that_nothing_says_has_none(tokenizer: Tokenizer) -> None:
    fact = encode(tokenizer, " The code of river is 4417.")
    answer = np.append(encode(tokenizer, " 905"), tokenizer.eos_id)
    assert (evidence_of(tokenizer, answer, [Told("905", "river", fact, 0)]) == NONE).all()
    assert (evidence_of(tokenizer, answer, []) == NONE).all()


def test_a_quoted_value_has_the_places_behind_the_quotation_mark(tokenizer: Tokenizer) -> None:
    fact = encode(tokenizer, ' "river": "4417"')
    answer = np.append(encode(tokenizer, " 4417"), tokenizer.eos_id)
    places = evidence_of(tokenizer, answer, [Told("4417", "river", fact, 10)])[:, 0]
    start = 10 + len(encode(tokenizer, ' "river": "'))
    assert places[0] == start and (places >= start).all() and (places < 10 + len(fact)).all()


def test_a_value_is_known_where_its_key_has_been_read(tokenizer: Tokenizer) -> None:
    """A key behind the value answers as well; one in front of it, and one in another fact, only names."""
    first, then = encode(tokenizer, " Let river = 77."), encode(tokenizer, " Let hill = river.")
    answer = np.append(encode(tokenizer, " river, hill"), tokenizer.eos_id)
    told = [Told("river", "77", first, 100), Told("hill", "river", then, 300)]
    places = evidence_of(tokenizer, answer, told, chained=True)
    river, let = len(encode(tokenizer, " river")), len(encode(tokenizer, " Let"))
    number, name = (100 + len(encode(tokenizer, f" Let river ={end}")) - 1 for end in (" 77", ""))
    assert (places[:river, 1] == number).all() and number > name and (places[:river, 2:] == NONE).all()
    last = 300 + len(encode(tokenizer, " Let hill = river")) - 1
    assert (places[river:-1, 1] == last).all()
    assert (places[river:-1, 2:] == [100 + let, NONE]).all()  # the fact before names it, too
    fact = encode(tokenizer, " The code of river is 4417.")
    answer = np.append(encode(tokenizer, " 4417"), tokenizer.eos_id)
    places = evidence_of(tokenizer, answer, [Told("4417", "river", fact, 10)])
    key = 10 + len(encode(tokenizer, " The code of"))
    assert (places[:, 0] > key).all() and (places[:, 2:] == [key, NONE]).all()


def test_the_other_values_of_a_key_are_not_wrong(tokenizer: Tokenizer) -> None:
    facts = [encode(tokenizer, f" The code of river is {value}.") for value in (4417, 905, 63)]
    answer = np.append(encode(tokenizer, " 4417, 905 and 63"), tokenizer.eos_id)
    told = [Told(v, "river", f, 100 * i) for i, (v, f) in enumerate(zip(("4417", "905", "63"), facts, strict=True))]
    places = evidence_of(tokenizer, answer, told)
    key = len(encode(tokenizer, " The code of"))
    assert places[0, 2:].tolist() == [key, 100 + key] and places[-2, 2:].tolist() == [200 + key, 100 + key]


@pytest.mark.parametrize("templates", ["train", "eval", "wide"])
@pytest.mark.parametrize("task", ASKING)
def test_answers_are_said_before_they_are_given(tokenizer: Tokenizer, task: str, templates: str) -> None:
    """Only tokens of answers have evidence, all of it in front of them, and most of it is the token itself."""
    told = same = answers = known = named = 0
    for seed in range(20):
        sample = build_sample(
            task, np.random.default_rng(seed), tokenizer, text, 1024, chunk_size=64, templates=templates
        )
        assert sample.evidence.shape == (1024, PLACES) and sample.evidence.dtype == np.int32
        at = np.flatnonzero(sample.evidence[:, 0] != NONE)
        assert (np.delete(sample.evidence, at, axis=0) == NONE).all()
        places = sample.evidence[at]
        assert sample.answer_mask[at].all() and (places < at[:, None]).all() and (places[:, :2] >= 0).all()
        assert not sample.answer_mask[places[places != NONE]].any()  # a fact says it, not an earlier answer
        assert (places[:, 1] >= places[:, 0]).all() and (places[:, 1] <= places[:, 0] + 64).all()
        answers += int(sample.answer_mask.sum())
        told += len(at)
        same += int((sample.tokens[places[:, 0]] == sample.tokens[at]).sum())
        known += int((places[:, 1] > places[:, 0]).sum())
        named += int((places[:, 2] != NONE).sum())
    assert told >= 0.75 * answers and same >= 0.6 * told
    assert (known > 0.5 * told) if task == "variable_tracking" else (named > 0.5 * told)


@pytest.mark.parametrize("task", ["copy", "frequent_words"])
def test_what_asks_for_no_fact_has_none(tokenizer: Tokenizer, task: str) -> None:
    sample = build_sample(task, np.random.default_rng(0), tokenizer, text, 1024, chunk_size=64)
    assert (sample.evidence == NONE).all() and sample.evidence.shape == (1024, PLACES)


def test_packed_batches_carry_it_by_position_in_the_sequence(data) -> None:
    """Several samples per sequence: evidence stays in its document, in front of the token that needs it."""
    options = {"rate": 0.5, "min_length": 64, "answer_weight": 10.0, "tasks": {"niah_single": 1.0, "recall": 1.0}}
    stream = open_stream(data, lanes=2, lane_ids=[0, 1], batch=4, context=512, chunk_size=16, seed=3, synthetic=options)
    seen = later = same = 0
    for _ in range(8):
        batch = stream.next_batch()
        assert batch.evidence.shape == (*batch.tokens.shape, PLACES)
        rows, at, which = (batch.evidence != NONE).nonzero(as_tuple=True)
        places = batch.evidence[rows, at, which].long()
        assert (places <= at).all() and (batch.documents[rows, places] == batch.documents[rows, at]).all()
        rows, at, places = (x[which == 0] for x in (rows, at, places))
        assert (batch.loss_weights[rows, at] == 10.0).all()
        same += int((batch.tokens[rows, places] == batch.labels[rows, at]).sum())
        seen, later = seen + len(at), later + int((batch.documents[rows, at] > 0).sum())
    assert seen > 100 and later > 50 and same > 0.6 * seen
