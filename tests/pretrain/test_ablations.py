"""The options for experiments: the equations with each of them, streaming, shared prompts, and what is refused."""

import numpy as np
import pytest
import torch

from hsa_kernels import reference
from parallel.model_config import Ablations, ModelConfig, count_parameters
from pretrain.errors import RecipeError, RunDirError
from pretrain.evaluation.decoding import greedy_answers
from pretrain.inference import InferenceEngine
from pretrain.model import build_model
from pretrain.recipe import load_recipe
from pretrain.shared_prompt import SharedPrompt
from tests.conftest import losses

SMALL = dict(
    vocab_size=64, hidden_size=32, ffn_hidden_size=48, lower_layers=2, upper_layers=3, hsa_layers=2, num_heads=4,
    head_dim=8, swa_kv_heads=2, hsa_kv_heads=2, retrieval_heads=2, retrieval_dim=16, chunk_size=8,
    encoder_ffn_hidden_size=32, init_std=0.2, tied_embeddings=False,
)  # fmt: skip
OPTIONS = [dict(bypass=False), dict(hsa_rope=True), dict(recency_decay=True)]
ALL = {key: value for option in OPTIONS for key, value in option.items()}
SHAPES = [dict(window=16, hsa_window=8, top_k=3), dict(window=9, hsa_window=21, top_k=None)]


pytestmark = pytest.mark.usefixtures("world_of_one")


def make(options, seed=0, window=16, hsa_window=8, top_k=3, **changes):
    config = ModelConfig(**{**SMALL, **changes}, ablations=Ablations(**options))
    model = build_model(config, max_length=256, seed=seed, device="cpu").double()
    for name, parameter in model.named_parameters():
        if name.endswith("recency"):
            parameter.data.fill_(4.5)  # a decay of about 1 per place, which nothing can overlook
    model.set_schedule(window=window, hsa_window=hsa_window, top_k=top_k)
    return model.eval()


def draw(batch, length, seed=0):
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", OPTIONS)
def test_each_option_changes_the_output_and_no_other_weight(options):
    plain, model = make({}), make(options)
    names = dict(plain.named_parameters())
    extra = [name for name, _ in model.named_parameters() if name not in names]
    assert len(extra) == (2 if options.get("recency_decay") else 0)
    assert all(torch.equal(p, names[name]) for name, p in model.named_parameters() if name in names)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(model.model).total
    tokens = draw(1, 64)
    with torch.no_grad():
        difference = (plain(tokens) - model(tokens)).abs().amax(-1)[0]
    # No chunk is complete before token 8, and with one of them there is nothing to weigh.
    first = 16 if options.get("recency_decay") else 8
    assert (difference[:first] < 1e-9).all() and (difference[first + 8 :] > 1e-6).all()


def test_the_layer_is_the_equation_with_every_option():
    model = make(ALL, top_k=2)
    layer = model.decoder.layers[2]
    hsa = layer.hsa_attention
    hidden = torch.randn(69, 1, 32, dtype=torch.float64)

    def rotated(x, position):
        half = position * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        left, right = x[:4], x[4:]
        return torch.cat((left * half.cos() - right * half.sin(), right * half.cos() + left * half.sin()))

    def normed(x, heads):
        return torch.nn.functional.rms_norm(x.view(-1, heads, 8), (8,), eps=1e-6)

    with torch.no_grad():
        memory = layer.encoder(hidden[:64])
        plain = make({}).decoder.layers[2].encoder(hidden[:64])  # the same weights, keys not rotated
        q, r = normed(hsa.linear_q(hidden)[0], 4), normed(hsa.linear_retrieval(hidden)[0], 2)
        expected = torch.zeros(69, 4, 8, dtype=torch.float64)
        for t in range(8, 69):
            for head in range(4):
                group = head // 2
                scores = plain.landmarks[0, : t // 8, group] @ r[t, group] / 8**0.5
                best = sorted(scores.topk(min(2, t // 8)).indices.tolist(), reverse=True)
                decay = torch.log1p(torch.tensor(0.5).double().exp())
                weights = torch.stack([scores[i] - decay * place for place, i in enumerate(best)]).softmax(0)
                for weight, chunk in zip(weights, best, strict=True):
                    keys = torch.stack([rotated(plain.k[0, s, group], s) for s in range(chunk * 8, chunk * 8 + 8)])
                    p = (keys @ rotated(q[t, head], t) / 8**0.5).softmax(0)
                    expected[t, head] += weight * (p @ plain.v[0, chunk * 8 : chunk * 8 + 8, group])
        out = hsa(hidden, memory)
        torch.testing.assert_close(out, hsa.linear_proj(expected.view(69, 1, 32))[0], rtol=1e-9, atol=1e-9)
        mixed, _ = layer.mix(hidden, model.rotary_pos_emb(69), memory=memory)
        attended, _ = layer.self_attention(layer.input_layernorm(hidden), model.rotary_pos_emb(69), window=8)
        x = hidden + attended
        x = x + hsa(layer.hsa_layernorm(x), memory)
        torch.testing.assert_close(mixed, x + layer.mlp(layer.pre_mlp_layernorm(x))[0])


@pytest.mark.parametrize("options", [*OPTIONS, ALL])
@pytest.mark.parametrize("shape", SHAPES)
def test_streaming_equals_the_full_forward(options, shape):
    model = make(options, **shape)
    tokens = draw(2, 115)
    with torch.no_grad():
        full = model(torch.nn.functional.pad(tokens, (0, 5)))[:, :115]
    for segment, prompt in ((7, 61), (64, 3)):
        engine = InferenceEngine(model, segment=segment, **shape)
        streamed = [engine.prefill(tokens[:, :prompt])]
        streamed += [engine.decode(tokens[:, i]) for i in range(prompt, 115)]
        torch.testing.assert_close(torch.stack(streamed, 1), full[:, prompt - 1 :].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [*OPTIONS, ALL])
@pytest.mark.parametrize("shape", SHAPES)
def test_edited_copies_of_a_shared_text(options, shape):
    model = make(options, seed=3, **shape)
    engine = InferenceEngine(model, segment=64, **shape)
    rng = np.random.default_rng(1)
    text = rng.integers(0, 64, 303)
    edits = [[(place, rng.integers(0, 64, 7)), (296, rng.integers(0, 64, 7))] for place in (0, 101, 150, 280)]
    copies = np.stack([text] * 4)
    for row, list_ in zip(copies, edits, strict=True):
        for start, tokens in list_:
            row[start : start + 7] = tokens
    shared = SharedPrompt(engine)
    shared.read(text)
    found = shared.answers(edits, 303, 20, 60)
    assert np.array_equal(found, greedy_answers(engine, copies, max_new_tokens=20, vocab_size=60))


def test_a_document_is_the_same_alone_and_packed():
    model = make(ALL)
    documents = [draw(1, length, seed=length) for length in (24, 64, 32)]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([24, 64, 32]))[None].int()
    with torch.no_grad():
        together = model(torch.cat(documents, dim=1), documents=ids).split([24, 64, 32], dim=1)
        for packed, document in zip(together, documents, strict=True):
            torch.testing.assert_close(packed, model(document), rtol=1e-4, atol=1e-4)  # fp32 angles


def test_noise_chooses_in_training_only_and_repeats_with_the_generator():
    model = make(dict(selection_noise=3.0))
    tokens = draw(1, 128)
    with torch.no_grad():
        assert torch.equal(model(tokens), make({})(tokens))
        model.train()
        torch.manual_seed(7)
        first, second = model(tokens), model(tokens)
        torch.manual_seed(7)
        assert torch.equal(first, model(tokens)) and not torch.equal(first, second)
        model.set_schedule(window=16, hsa_window=8, top_k=None)  # nothing to choose, nothing drawn
        assert torch.equal(model(tokens), model(tokens))


def test_noise_is_gumbel_and_reaches_no_score(monkeypatch):
    model = make(dict(selection_noise=2.0)).train()
    drawn = []
    original = reference.select_chunks

    def watching(q, landmarks, *, noise, **rules):
        drawn.append(noise)
        ids, scores = original(q, landmarks, noise=noise, **rules)
        exact = torch.einsum("blhd,bchd->blhc", q, landmarks) / q.shape[-1] ** 0.5
        picked = exact.gather(-1, ids.clamp(min=0).long())
        torch.testing.assert_close(scores[ids >= 0], picked[ids >= 0])
        return ids, scores

    monkeypatch.setattr(reference, "select_chunks", watching)
    model(draw(4, 256))
    noise = torch.cat([part.flatten() for part in drawn]) / 2.0  # 131,072 draws
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.std() - np.pi / 6**0.5) < 0.02


@pytest.mark.slow
def test_a_resumed_experiment_changes_no_bit(tiny_recipe, hsa, tmp_path):
    options = ["model.ablations.selection_noise=1.0", "model.ablations.recency_decay=true", "stages.first.top_k=2"]
    for run_dir, stops in ((tmp_path / "unbroken", [[]]), (tmp_path / "broken", [["max_steps=5"], []])):
        for stop in stops:  # the noise of a step is drawn from where the last one stopped
            done = hsa("train", tiny_recipe, *options, *stop, "--run-dir", run_dir)
            assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")


def test_what_experiments_do_not_run_with():
    with pytest.raises(RecipeError, match="selection_noise: must not be negative"):
        load_recipe("demo", ["model.ablations.selection_noise=-1"])
    with pytest.raises(RecipeError, match="ablations.hsa_rope: an experiment that runs with data parallelism only"):
        load_recipe("demo", ["model.ablations.hsa_rope=true", "parallel.context=2"])
    with pytest.raises(RecipeError, match="unknown key 'model.ablations.rope'"):
        load_recipe("demo", ["model.ablations.rope=true"])
    load_recipe("demo", ["model.ablations.bypass=false", "parallel.context=2"])


@pytest.mark.parametrize("option", ["recency_decay=true", "hsa=false"])
def test_an_experiment_is_not_exported(option, monkeypatch, tmp_path):
    import argparse
    import types

    from pretrain import model_io
    from pretrain.huggingface import export

    recipe = load_recipe("demo", [f"model.ablations.{option}"]).recipe
    monkeypatch.setattr(model_io, "load_for_inference", lambda *_, **__: types.SimpleNamespace(recipe=recipe))
    with pytest.raises(RunDirError, match=f"{option.partition('=')[0]} is an experiment, which no exported"):
        export.main(argparse.Namespace(checkpoint=tmp_path, out=tmp_path / "out"))
