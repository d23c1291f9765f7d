"""Tasks asked of shared texts, with a reader in the model's place that knows the eval wording."""

import re

import numpy as np
import pytest

from data_pipeline.tokenizer import Tokenizer, train_bpe
from pretrain.errors import RecipeError
from pretrain.evaluation.shared import Ask, run_shared, together

HAY = "The grass was dry and long that year. Nobody came to cut it, and the wind lay down in it at night. "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_bpe([HAY, " One of the special numbers for apple is: 1234."], 300))
    return Tokenizer(path)


class Reader:
    """Reads every edited copy as text; with ``blind`` it sees the last so many tokens only."""

    def __init__(self, tokenizer, blind=None):
        self.tokenizer, self.blind = tokenizer, blind
        self.texts, self.prompts = [], []

    def read(self, tokens):
        self.texts.append(np.array(tokens))

    def answers(self, edits, length, max_new_tokens, vocab_size):
        assert vocab_size == self.tokenizer.vocab_size
        out = np.full((len(edits), max_new_tokens), self.tokenizer.eos_id)
        for row, list_ in enumerate(edits):
            text = self.texts[-1][:length].copy()
            for start, tokens in list_:
                text[start : start + len(tokens)] = tokens
            self.prompts.append(self.tokenizer.decode(text))
            ids = self.tokenizer.encode(" " + self.say(self.tokenizer.decode(text[-(self.blind or length) :])))[
                :max_new_tokens
            ]
            out[row, : len(ids)] = ids
        return out

    @staticmethod
    def say(prompt):
        asked = re.findall(r"special \w+ for ([a-z ]+) (?:is|are)$", prompt)
        if "Find all variables" in prompt:
            value = re.search(r"value (\d+)\. They are$", prompt)[1]
            names = re.findall(rf"VAR (\S+) = {value}\.", prompt)
            while names and (then := re.findall(rf"VAR (\S+) = VAR {names[-1]}\.", prompt)):
                names += then
            return ", ".join(names)
        held = dict(re.findall(r"special \w+ for ([a-z ]+) is: ([\w-]+)\.", prompt))
        return " and ".join(held.get(key, "nothing") for key in asked[-1].split(" and "))


ASKS = [
    Ask("number", "niah_single", 6, (0.0, 0.5, 1.0), {"digits": 7}),
    Ask("uuid", "niah_single", 4, (None,), {"values": "uuid"}),
    Ask("niah_multiquery", "niah_multiquery", 5, options={"keys": 6, "queries": 2}),
    Ask("variable_tracking", "variable_tracking", 5, options={"hops": 2}),
    Ask("niah_needles", "niah_needles", 7, options={"digits": 7, "values": "word"}),
]


def test_a_reader_finds_everything_in_texts_that_questions_share(tokenizer):
    reader = Reader(tokenizer)
    hay = np.array(tokenizer.encode(HAY * 80), dtype=np.int32)
    results = run_shared(reader, tokenizer, hay, ASKS, lengths=[1024, 2048], haystacks=2, batch=4)
    for ask in ASKS:
        result = results[ask.label]
        assert result.lengths == [1024, 2048] and result.to_json()["haystacks_per_length"] == 2
        assert [cell.tally.n for cell in result.cells] == [ask.samples] * len(ask.depths) * 2, ask.label
        assert all(cell.tally.correct == cell.tally.n for cell in result.cells), ask.label
    assert len(reader.texts) == 8  # two texts a length, and as many made of needles
    assert len(set(reader.prompts)) == len(reader.prompts)
    both = together([results["number"], results["number"]], "both")
    assert [cell.tally.n for cell in both.cells] == [12] * 6 and both.samples == 12


def test_a_blind_reader_finds_what_stands_before_the_question(tokenizer):
    hay = np.array(tokenizer.encode(HAY * 80), dtype=np.int32)
    result = run_shared(Reader(tokenizer, blind=200), tokenizer, hay, ASKS[:1], lengths=[2048], haystacks=3)["number"]
    assert [cell.tally.correct for cell in result.cells] == [0, 0, 6]
    assert sorted(m.depth for m in result.mistakes) == [0.0] * 5 + [0.5] * 5  # five of each cell's six
    assert all(m.answered == "nothing" and len(m.wanted) == 7 for m in result.mistakes)


def test_several_settings_are_asked_the_same_of_texts_read_once(tokenizer):
    """A reader that finds needles with one setting only."""
    hay = np.array(tokenizer.encode(HAY * 80), dtype=np.int32)
    reader = Reader(tokenizer)
    reader.choose = lambda **way: setattr(reader, "blind", None if way == FINDS else 40)
    FINDS = {"top_k": None, "retrieval_temperature": 0.5}
    ways = [{"top_k": k, "retrieval_temperature": 0.5} for k in (4, None)]
    results = run_shared(reader, tokenizer, hay, ASKS[:1], lengths=[2048], haystacks=2, ways=ways)
    assert [label for label in results] == ["number top-k 4", "number top-k full"] and len(reader.texts) == 2
    few, all_ = results.values()
    assert [cell.tally.correct for cell in few.cells] == [0, 0, 0] and all_.by_length()[2048].accuracy == 1
    assert len(reader.prompts) == 36 and len(set(reader.prompts)) == 18
    ways.append({"top_k": None, "retrieval_temperature": 1.0})
    results = run_shared(reader, tokenizer, hay, ASKS[:1], lengths=[2048], haystacks=2, ways=ways)
    assert {label: result.by_length()[2048].accuracy for label, result in results.items()} == {
        "number top-k 4 temperature 0.5": 0,
        "number top-k full temperature 0.5": 1,
        "number top-k full temperature 1": 0,
    }


def test_what_cannot_share_a_text_is_refused(tokenizer):
    with pytest.raises(RecipeError, match="copy cannot share"):
        run_shared(Reader(tokenizer), tokenizer, np.arange(9), [Ask("copy", "copy", 1)], lengths=[1024], haystacks=1)
    with pytest.raises(RecipeError, match="too short"):
        run_shared(Reader(tokenizer), tokenizer, np.arange(9), ASKS[:1], lengths=[256], haystacks=1)
