"""Lengths and metric names, tallies and their interval, decoding, haystacks: the small parts of the evaluation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.errors import RecipeError
from pretrain.evaluation.decoding import Sampling, StopText, TextStream, generate_tokens, pick
from pretrain.evaluation.haystack import Haystack
from pretrain.evaluation.tally import Tally, total, wilson_interval
from pretrain.evaluation.units import ProbeMetric, format_length, parse_length, parse_lengths, parse_metric


def test_lengths_are_binary_and_may_be_relative():
    assert parse_length("4k") == 4096
    assert parse_length("16M") == 16 << 20
    assert parse_length(1000) == 1000
    assert parse_length("4x", context=512) == 2048
    assert parse_length("8w", window=32) == 256
    assert parse_lengths("64k,4k, 4096", context=1024) == [4096, 65536]


@pytest.mark.parametrize("text", ["", "k", "4.5k", "-1", "0", "4kb", "4 k", "1e6"])
def test_what_is_no_length_is_refused_by_name(text):
    with pytest.raises(RecipeError, match="is not a length|no lengths"):
        parse_lengths(text)


def test_relative_length_needs_its_base():
    with pytest.raises(RecipeError, match="training context"):
        parse_length("4x")
    with pytest.raises(RecipeError, match="sliding window"):
        parse_length("8w", context=512)


@given(st.integers(1, 1 << 30))
def test_format_length_is_exact(tokens):
    assert parse_length(format_length(tokens)) == tokens


def test_metric_names():
    assert parse_metric("niah.single@16k") == ProbeMetric("niah_single", 16384)
    assert parse_metric("niah.single@1k:512") == ProbeMetric("niah_single", 1024, 512)
    assert parse_metric("niah.variable_tracking@512") == ProbeMetric("variable_tracking", 512)
    for wrong in ("niah.single", "niah.simple@4k", "loss", "niah.multikey@4k:512", "niah.single@4k:"):
        with pytest.raises(RecipeError):
            parse_metric(wrong)


def test_wilson_interval_known_values():
    # Newcombe 1998, table I: 81 of 263 and 15 of 148, score method without continuity correction
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 500), st.data())
def test_wilson_interval_holds_the_share_and_stays_inside(n, data):
    correct = data.draw(st.integers(0, n))
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    assert high - low < 1


def test_tallies_add_up():
    tally = total([Tally(2, 1, 8, 6), Tally(3, 3, 12, 12)])
    assert (tally.n, tally.correct, tally.accuracy, tally.token_accuracy) == (5, 4, 0.8, 0.9)
    assert math.isnan(Tally().accuracy)
    assert tally.to_json()["low"] < 0.8 < tally.to_json()["high"]


def test_haystack_pieces_are_contiguous_when_they_fit():
    hay = Haystack(np.arange(1000))
    piece = hay.reader(np.random.default_rng(0))(400)
    assert piece.dtype == np.int32 and np.array_equal(np.diff(piece), np.ones(399))
    assert hay.repeats(1000) == 1 and hay.repeats(1001) == 2


def test_haystack_is_tiled_with_new_offsets():
    hay = Haystack(np.arange(100))
    piece = hay.reader(np.random.default_rng(0))(1050)
    assert piece.shape == (1050,) and set(piece) == set(range(100))
    starts = piece[:1000:100]
    assert len(set(starts)) > 5
    for at in range(0, 1000, 100):
        assert np.array_equal(piece[at : at + 100], (starts[at // 100] + np.arange(100)) % 100)


def test_empty_haystack_is_refused():
    with pytest.raises(RecipeError, match="held_out"):
        Haystack(np.array([], dtype=np.int32))


@pytest.mark.parametrize("before,n", [(0, 50), (37, 90), (90, 90), (250, 400)])
def test_split_reader_ends_a_sentence_where_it_is_asked_to(before, n):
    tokens = np.tile(np.arange(7), 20)
    ends = np.arange(7) == 3
    for seed in range(5):
        piece = Haystack(tokens).split_reader(np.random.default_rng(seed), before, ends)(n)
        assert piece.shape == (n,)
        if before:
            assert piece[before - 1] == 3
        if n <= tokens.size:
            assert set(np.diff(piece)) <= {1, -6}  # contiguous


def test_greedy_and_sampled_picks():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 0.0, 0.0]])
    assert pick(logits, Sampling()).tolist() == [1, 0]
    assert pick(logits, Sampling(temperature=1.0, top_k=1), torch.Generator()).tolist() == [1, 0]
    assert pick(logits, Sampling(temperature=9.0, top_p=1e-6), torch.Generator()).tolist() == [1, 0]
    generator = torch.Generator().manual_seed(0)
    many = pick(logits[:1].expand(4000, -1), Sampling(temperature=1.0, top_k=2), generator)
    assert set(many.tolist()) == {1, 3}
    share = (many == 1).float().mean().item()
    assert share == pytest.approx(math.e / (1 + math.e), abs=0.03)
    nucleus = pick(logits[:1].expand(4000, -1), Sampling(temperature=1.0, top_p=0.7), generator)
    assert set(nucleus.tolist()) == {1, 3}  # 0.64 alone is not enough, 0.64 + 0.24 is


def test_min_p_and_the_repetition_penalty():
    logits = torch.tensor([[2.0, 1.0, -1.0, -9.0]])
    kept = pick(logits.expand(500, -1), Sampling(temperature=1.0, min_p=0.3), torch.Generator().manual_seed(0))
    assert set(kept.tolist()) == {0, 1}  # exp(-1) = 0.37 of the likeliest, the next one is at 0.05
    seen = torch.tensor([[True, False, True, False]])
    assert pick(logits, Sampling(repetition_penalty=4.0), seen=seen).tolist() == [1]  # 2 / 4 is below 1
    assert pick(-logits, Sampling(repetition_penalty=16.0), seen=~seen).tolist() == [2]
    assert pick(logits, Sampling(), seen=seen).tolist() == [0]


def test_the_penalty_counts_the_prompt_and_what_was_generated():
    class Negative(Counting):
        def _logits(self, last):
            return super()._logits(last) - 2.0

    sampling = Sampling(repetition_penalty=100.0)
    steps = generate_tokens(Negative(), np.array([[4, 3]]), max_new_tokens=3, vocab_size=10, sampling=sampling)
    # 4 is the likeliest after 3, but it occurred; the first of those that did not follows, then 1 after 0, 2 after 1.
    assert np.concatenate(list(steps)).tolist() == [0, 1, 2]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2), st.data())
def test_text_is_cut_at_the_first_stop_whatever_the_pieces(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stop = StopText(stops)
    shown = "".join(stop.push(piece) for piece in pieces) + stop.finish()
    # Pieces end at different places, so of two stops that overlap either may be met first.
    ends = {text[: text.index(s)] for s in stops if s in text}
    assert shown in ends if ends else shown == text


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": 2}, {"repetition_penalty": 0}],
)
def test_impossible_sampling_is_refused(options):
    with pytest.raises(RecipeError, match="--(t|min-p|rep)"):
        Sampling(**options)


class Counting:
    """Continues with the next integers; a padded vocabulary entry always has the largest logit."""

    def __init__(self):
        self.calls = []

    def _logits(self, last):
        logits = torch.zeros(len(last), 20)
        logits[torch.arange(len(last)), (last + 1) % 10] = 1.0
        logits[:, 15] = 9.0
        return logits

    def reset(self):
        self.calls.append("reset")

    def prefill(self, tokens):
        self.calls.append("prefill")
        return self._logits(tokens[:, -1])

    def decode(self, tokens):
        self.calls.append("decode")
        return self._logits(tokens)


def test_generation_never_leaves_the_tokenizers_vocabulary_and_decodes_no_token_too_many():
    engine = Counting()
    steps = list(generate_tokens(engine, np.array([[3], [8]]), max_new_tokens=3, vocab_size=10))
    assert np.stack(steps, axis=1).tolist() == [[4, 5, 6], [9, 0, 1]]
    assert engine.calls == ["reset", "prefill", "decode", "decode"]


class Bytes:
    """One token per byte."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(max_size=30))
def test_streamed_text_is_the_whole_text_and_never_holds_half_a_character(text):
    stream = TextStream(Bytes())
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.finish() == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_streamed_text_ends_with_a_replacement_when_a_character_stays_open():
    stream = TextStream(Bytes())
    assert stream.push("é".encode()[0]) == ""
    assert stream.finish() == "\ufffd"
