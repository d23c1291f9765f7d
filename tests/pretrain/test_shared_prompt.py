"""Answers about edited copies of a shared text are those of each copy read by itself."""

import numpy as np
import pytest
import torch

from parallel.model_config import ModelConfig
from pretrain import shared_prompt
from pretrain.evaluation.decoding import greedy_answers
from pretrain.inference import InferenceEngine
from pretrain.model import build_model
from pretrain.shared_prompt import SharedPrompt

pytestmark = pytest.mark.usefixtures("world_on_cpu")

SMALL = dict(
    vocab_size=64, hidden_size=32, ffn_hidden_size=48, lower_layers=2, upper_layers=3, hsa_layers=2, num_heads=4,
    head_dim=8, swa_kv_heads=2, hsa_kv_heads=2, retrieval_heads=2, retrieval_dim=16, chunk_size=8,
    encoder_ffn_hidden_size=32, init_std=0.2, tied_embeddings=False,
)  # fmt: skip


def draw_edits(rng, length, count):
    """Up to ``count`` edits of 1 to 12 tokens that do not overlap, one of them at the very end."""
    edits, taken = [], np.zeros(length, dtype=bool)
    for place in [length, *rng.integers(0, length, count).tolist()]:
        size = min(length, int(rng.integers(1, 13)))
        start = min(place, length - size)
        if not taken[start : start + size].any():
            taken[start : start + size] = True
            edits.append((start, rng.integers(0, 64, size)))
    return edits


@pytest.mark.parametrize("length", [5, 303])
@pytest.mark.parametrize(
    "settings",
    [
        dict(window=16, hsa_window=8, top_k=3),
        dict(window=8, hsa_window=16, top_k=None),
        dict(window=4, hsa_window=4, top_k=1),
        dict(window=16, hsa_window=8, top_k=3, neighbours=2),
        dict(window=8, hsa_window=16, top_k=4, retrieval_temperature=0.02),
        dict(window=16, hsa_window=8, top_k=3, distance_decay=3.0, decay_from=24, retrieval_temperature=0.1),
        dict(window=8, hsa_window=16, top_k=None, distance_decay=3.0, decay_from=24, neighbours=2),
    ],
)
@pytest.mark.parametrize(("changes", "grain"), [({}, 128), ({}, 8), (dict(retrieval_heads=1, swa_in_hsa=False), 24)])
def test_equal_to_reading_every_copy(length, settings, changes, grain, monkeypatch):
    monkeypatch.setattr(shared_prompt, "_GRAIN", grain)  # small ones let tails have a beginning in common
    model = build_model(ModelConfig(**{**SMALL, **changes}), max_length=64, seed=3, device="cpu").eval()
    engine = InferenceEngine(model, segment=64, **settings)
    rng = np.random.default_rng(length)
    text = rng.integers(0, 64, 400)
    shared = SharedPrompt(engine)
    shared.read(text)
    for count in (0, 1, 4):  # the same text serves call after call
        edits = [draw_edits(rng, length, count) for _ in range(5)]
        copies = np.stack([text[:length]] * 5)
        for row, list_ in zip(copies, edits, strict=True):
            for start, tokens in list_:
                row[start : start + len(tokens)] = tokens
        wanted = greedy_answers(engine, copies, max_new_tokens=20, vocab_size=60)
        found = shared.answers(edits, length, 20, 60)
        assert np.array_equal(found, wanted)


def test_replaced_chunks_are_hidden_and_only_from_the_prompt_that_replaced_them():
    """The needle of one prompt must neither be seen by the next nor be shadowed by the text it lies on."""
    model = build_model(ModelConfig(**SMALL), max_length=64, seed=5, device="cpu").eval()
    engine = InferenceEngine(model, window=8, hsa_window=8, top_k=2, segment=64)
    rng = np.random.default_rng(0)
    text = rng.integers(0, 64, 320)
    shared = SharedPrompt(engine)
    shared.read(text)
    shared.answers([[(40, rng.integers(0, 64, 8))], []], 320, 1, 64)
    memory = shared.memory
    assert memory.replaced[0].nonzero().flatten().tolist() == [5, 6, 7]  # the edit and 14 tokens after it
    assert not memory.replaced[1].any()
    kept, room = memory.k[:, :320].clone(), memory.k.shape[1]
    shared.answers([[]] * 60, 320, 1, 64)
    assert memory.k.shape[1] > room and torch.equal(memory.k[:, :320], kept)  # more prompts: the overlays grow
    with pytest.raises(ValueError, match="tokens of the text"):
        shared.answers([[]], 321, 1, 64)
    assert torch.isfinite(memory.k).all()
