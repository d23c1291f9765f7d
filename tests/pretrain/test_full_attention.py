"""The decoder without HSA: plain causal attention, trained, streamed, compared by a study, and what is refused."""

import argparse
import json
import types

import pytest
import torch

from parallel.model_config import Ablations, ModelConfig, count_parameters
from pretrain import model_io
from pretrain.context_file import load_context, save_context
from pretrain.errors import RecipeError
from pretrain.evaluation import commands
from pretrain.inference import InferenceEngine
from pretrain.memory_plan import memory_per_gpu
from pretrain.model import build_model
from pretrain.recipe import load_recipe
from pretrain.study import load_study
from tests.conftest import losses

SMALL = dict(
    vocab_size=64, hidden_size=32, ffn_hidden_size=48, lower_layers=1, upper_layers=2, hsa_layers=2, num_heads=4,
    head_dim=8, swa_kv_heads=2, hsa_kv_heads=2, retrieval_heads=2, retrieval_dim=16, chunk_size=8,
    encoder_ffn_hidden_size=32, init_std=0.2, tied_embeddings=False,
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("world_of_one")


def make(window=128, **changes):
    config = ModelConfig(**{**SMALL, **changes}, ablations=Ablations(hsa=False))
    model = build_model(config, max_length=256, seed=3, device="cpu").double()
    model.set_schedule(window=window, hsa_window=window, top_k=2)
    return model.eval()


def draw(batch, length, seed=0):
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain_forward(model, tokens):
    """Logits (1, L, V) of causal attention over everything, by the equations."""
    length = tokens.shape[1]
    half = torch.arange(length).double()[:, None] * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)

    def rotated(x):  # (L, heads, 8)
        left, right = x.split(4, -1)
        cos, sin = half.cos()[:, None], half.sin()[:, None]
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)

    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    x = model.embed(tokens)
    for layer in model.decoder.layers:
        attention = layer.self_attention
        q, k, v = (t[:, 0] for t in attention.get_query_key_value_tensors(layer.input_layernorm(x)))
        k, v = rotated(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = torch.einsum("ihd,jhd->hij", rotated(q), k) / 8**0.5
        out = torch.einsum("hij,jhd->ihd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
        x = x + attention.linear_proj(out.flatten(1)[:, None])[0]
        x = x + layer.mlp(layer.pre_mlp_layernorm(x))[0]
    return model.logits(model.decoder.final_layernorm(x)).transpose(0, 1)


@pytest.mark.parametrize("swa_in_hsa", [True, False])
def test_it_is_plain_causal_attention(swa_in_hsa):
    model = make(swa_in_hsa=swa_in_hsa)
    names = [name for name, _ in model.named_parameters()]
    assert len(model.decoder.layers) == 3 and not any("hsa" in name or "encoder" in name for name in names)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(model.model).total
    tokens = draw(1, 77)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), plain_forward(model, tokens), rtol=1e-5, atol=1e-5)  # fp32 angles


def test_what_it_keeps_of_the_method_has_the_same_weights():
    method = build_model(ModelConfig(**SMALL), max_length=256, seed=3, device="cpu").double()
    names = dict(method.named_parameters())
    assert all(torch.equal(p, names[name]) for name, p in make().named_parameters())


@pytest.mark.parametrize("experts", [0, 4])
def test_gradients_reach_every_parameter(experts):
    more = dict(num_experts=4, experts_per_token=2, expert_ffn_hidden_size=16, shared_expert_ffn_hidden_size=16)
    model = make(**(more if experts else {})).train()
    documents = torch.tensor([[0] * 30 + [1] * 35]).int().expand(2, -1)
    model(draw(2, 65), labels=draw(2, 65, seed=1), documents=documents).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # An expert that no token chose has none.
        assert "local_experts" in name or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("window", [128, 16])
def test_streaming_equals_the_full_forward(window, tmp_path):
    model = make(window)
    tokens = draw(2, 115)
    with torch.no_grad():
        full = model(tokens)
    expected = torch.nn.functional.cross_entropy(full[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    settings = dict(window=window, hsa_window=8, top_k=2)
    for segment in (7, 200):
        engine = InferenceEngine(model, segment=segment, **settings)
        assert engine.receptive_field == 1 and not engine.upper
        torch.testing.assert_close(engine.score(tokens), expected.float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(engine.score(tokens, 20), expected[:, -20:].float(), rtol=1e-4, atol=1e-4)
        logits = engine.prefill(tokens, [61, 40])
        for step in range(20):
            torch.testing.assert_close(logits[0], full[0, 60 + step].float(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logits[1], full[1, 39 + step].float(), rtol=1e-4, atol=1e-4)
            logits = engine.decode(torch.stack((tokens[0, 61 + step], tokens[1, 40 + step])))
        save_context(engine, tmp_path / f"{segment}", tokenizer_fingerprint="x", logits=logits, seen=tokens[0])
        later = InferenceEngine(model, segment=segment, **settings)
        load_context(later, tmp_path / f"{segment}", tokenizer_fingerprint="x")
        logits = later.prefill(torch.stack((tokens[0, 81:95], tokens[1, 60:74])))
        torch.testing.assert_close(logits[0], full[0, 94].float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[1], full[1, 73].float(), rtol=1e-4, atol=1e-4)


def test_the_plan_counts_no_memory():
    recipe = load_recipe("h100-16m", ["model.ablations.hsa=false", "model.ablations.bypass=true"]).recipe
    with_hsa = load_recipe("h100-16m").recipe
    bytes_ = memory_per_gpu(recipe, recipe.stages[-1], 1)
    assert bytes_["weights"] == 2 * count_parameters(recipe.model).total
    assert bytes_["memory K/V, landmarks"] == 0
    assert bytes_["activations"] < memory_per_gpu(with_hsa, with_hsa.stages[-1], 1)["activations"]


def test_the_study_compares_like_with_like():
    study = load_study("full-attention")
    method, full = (load_recipe(study.base, [*study.overrides, *v.overrides]).recipe for v in study.variants)
    sizes = [count_parameters(recipe.model).total for recipe in (method, full)]
    assert abs(sizes[1] / sizes[0] - 1) < 0.01
    assert all(stage.window == stage.context for stage in full.stages)
    for one, other in zip(method.stages, full.stages, strict=True):
        assert (one.name, one.context, one.batch, one.until, one.data) == (
            other.name, other.context, other.batch, other.until, other.data,
        )  # fmt: skip


def test_what_it_does_not_run_with():
    with pytest.raises(RecipeError, match="ablations.bypass: changes HSA, which model.ablations.hsa: false leaves out"):
        load_recipe("demo", ["model.ablations.hsa=false", "model.ablations.bypass=false"])
    for name in ("tensor", "context", "pipeline"):
        with pytest.raises(RecipeError, match="ablations.hsa: an experiment that runs with data parallelism only"):
            load_recipe("demo", ["model.ablations.hsa=false", f"parallel.{name}=2"])


@pytest.mark.parametrize(
    "words", ["niah X --haystacks 2", "ppl X --top-k 4", "ppl X --memory host", "ppl X --memory-fp8"]
)
def test_options_about_the_memory_are_refused(words, tmp_path, monkeypatch):
    recipe = load_recipe("demo", ["model.ablations.hsa=false"]).recipe
    monkeypatch.setattr(model_io, "load_for_inference", lambda *_, **__: types.SimpleNamespace(recipe=recipe))
    parser = argparse.ArgumentParser()
    commands.add_arguments(parser)
    kind, _, option, *value = words.split()
    with pytest.raises(RecipeError, match=f"{option}: .* has no context memory: leave it out"):
        commands.main(parser.parse_args([kind, str(tmp_path), option, *value]))


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_and_is_evaluated(tiny_recipe, hsa, tmp_path):
    options = ["model.ablations.hsa=false", "stages.first.window=64", "stages.second.window=128"]
    for run_dir, stops in ((tmp_path / "unbroken", [[]]), (tmp_path / "broken", [["max_steps=5"], []])):
        for stop in stops:
            done = hsa("train", tiny_recipe, *options, *stop, "--run-dir", run_dir)
            assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    for words in (["ppl", "--lengths", "1x"], ["niah", "--lengths", "1x", "--samples", "2", "--depths", "2"]):
        done = hsa("eval", words[0], tmp_path / "broken", *words[1:])
        assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "broken" / "eval" / "ppl.json").read_text())["contexts"][0]
    assert found["context"] == 128 and found["nll"] < 6.0
