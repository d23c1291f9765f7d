"""The assembled model: counts, causality, packing, the memory's only road into the output, streaming."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from parallel import mesh
from parallel.memory import ContextMemory
from parallel.model_config import ModelConfig, count_parameters
from pretrain.inference import InferenceEngine
from pretrain.model import build_model
from recipes import PRESETS_DIR

SMALL = dict(
    vocab_size=64, hidden_size=32, ffn_hidden_size=48, lower_layers=2, upper_layers=3, hsa_layers=2, num_heads=4,
    head_dim=8, swa_kv_heads=2, hsa_kv_heads=2, retrieval_heads=2, retrieval_dim=16, chunk_size=8,
    encoder_ffn_hidden_size=32, num_experts=4, experts_per_token=2, expert_ffn_hidden_size=16,
    shared_expert_ffn_hidden_size=16, init_std=0.2,
)  # fmt: skip
VARIANTS = {
    "experts": {},
    "dense, shared retrieval": dict(num_experts=0, retrieval_heads=1, tied_embeddings=False),
    "hsa layers of their own": dict(swa_in_hsa=False, hsa_kv_heads=1, retrieval_heads=1),
    "four query heads for one": dict(hsa_kv_heads=1, retrieval_heads=1, swa_kv_heads=1),
}


@pytest.fixture(autouse=True)
def world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    mesh.initialize(device="cpu" if not torch.cuda.is_available() else "cuda", seed=1)
    yield
    mesh.shutdown()


def make(seed=0, window=16, hsa_window=8, top_k=None, **changes):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(ModelConfig(**{**SMALL, **changes}), max_length=256, seed=seed, device=device)
    model.set_schedule(window=window, hsa_window=hsa_window, top_k=top_k)
    return model.eval()


def draw(model, batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.model.vocab_size, (batch, length), generator=generator)
    return tokens.to(next(model.parameters()).device)


@pytest.mark.parametrize("preset", ["demo", "345m", "0.5b", "8b-a1b"])
def test_counted_parameters_are_those_of_the_model(preset):
    config = ModelConfig(**OmegaConf.load(PRESETS_DIR / f"{preset}.yaml"))
    model = build_model(config, max_length=64, seed=0, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config).total


def test_published_sizes():
    def count(name):
        return count_parameters(ModelConfig(**OmegaConf.load(PRESETS_DIR / f"{name}.yaml")))

    assert count("0.5b").total == pytest.approx(537.7e6, rel=0.01)
    assert 7.8e9 <= count("8b-a1b").total <= 8.2e9
    assert 0.9e9 <= count("8b-a1b").active_without_embedding <= 1.1e9
    # 391.6M by the source's arithmetic; ours, norms included, is 0.1 % lower.
    assert count("345m").total == pytest.approx(391.6e6, rel=0.0015)


def test_plan_prints_the_same_count(hsa):
    planned = json.loads(hsa("plan", "demo", "model.preset=0.5b", "--json").stdout)
    config = ModelConfig(**OmegaConf.load(PRESETS_DIR / "0.5b.yaml"))
    assert next(iter(planned)) == "parameters"
    assert planned["parameters"] == {"total": count_parameters(config).total, "active": count_parameters(config).active}


def test_initial_weights_follow_the_seed_alone():
    same, again, other = make(seed=3), make(seed=3), make(seed=4)
    for a, b, c in zip(same.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() == 1 or not torch.equal(a, c)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("top_k", [None, 2])
def test_causal_and_reaching_far(variant, top_k):
    """A changed token moves nothing before it, and with every chunk in view, something far behind all windows."""
    model = make(top_k=top_k, **VARIANTS[variant])
    tokens = draw(model, 1, 128)
    changed = tokens.clone()
    position = 37
    changed[0, position] = (changed[0, position] + 1) % model.model.vocab_size
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert torch.equal(difference[:position], torch.zeros_like(difference[:position]))
    assert (difference[position : position + 8] > 0).all()
    if top_k is None:
        assert (difference[100:] > 0).all(), "the context memory must carry the change past every window"


def test_windows_alone_do_not_reach_that_far(monkeypatch):
    """The failing case of the test above: without HSA, nothing arrives behind the sum of the windows."""
    model = make(window=8, hsa_window=8)
    monkeypatch.setattr(
        type(model.decoder.layers[2].hsa_attention), "forward", lambda self, x, *args, **kwargs: torch.zeros_like(x)
    )
    tokens = draw(model, 1, 128)
    changed = tokens.clone()
    changed[0, 37] = (changed[0, 37] + 1) % 64
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert (difference[37 + 5 * 7 + 1 :] == 0).all() and (difference[37:45] > 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_document_is_the_same_alone_and_packed(variant):
    model = make(top_k=3, **VARIANTS[variant])
    lengths = [24, 64, 8, 32]  # whole chunks
    documents = [draw(model, 1, length, seed=n) for n, length in enumerate(lengths)]
    packed = torch.cat(documents, dim=1)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None].int().to(packed.device)
    with torch.no_grad():
        together = model(packed, documents=ids).split(lengths, dim=1)
        without_ids = model(packed).split(lengths, dim=1)
        alone = [model(document) for document in documents]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (without_ids[1] - alone[1]).abs().max() > 1e-3, "the ids must be what keeps documents apart"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("window", "hsa_window", "top_k"), [(16, 8, None), (24, 16, 3)])
def test_streaming_equals_the_full_forward(variant, window, hsa_window, top_k):
    # In fp64: rounding must not decide a near tie between two chunks or two experts.
    model = make(window=window, hsa_window=hsa_window, top_k=top_k, **VARIANTS[variant]).double()
    tokens = draw(model, 2, 160)
    with torch.no_grad():
        full = model(tokens)
    nll = torch.nn.functional.cross_entropy(full[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    for segment, full_prefill, prompt in ((7, False, 101), (64, False, 130), (64, True, 130), (300, False, 3)):
        engine = InferenceEngine(
            model, window=window, hsa_window=hsa_window, top_k=top_k, segment=segment, full_prefill=full_prefill
        )
        streamed = [engine.prefill(tokens[:, :prompt])]
        stop = min(prompt + 45, 160)  # a window's ring is filled anew, and several chunks end
        streamed += [engine.decode(tokens[:, i]) for i in range(prompt, stop)]
        torch.testing.assert_close(torch.stack(streamed, 1), full[:, prompt - 1 : stop].float(), rtol=1e-4, atol=1e-4)
        expected = nll.view(2, -1).float()
        torch.testing.assert_close(engine.score(tokens), expected, rtol=1e-4, atol=1e-4)
        for last in (1, 29, 100, 159):  # only their part of the upper decoder is computed
            torch.testing.assert_close(engine.score(tokens, last), expected[:, -last:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="the last 1 to 159 can be scored, not 160"):
        engine.score(tokens, 160)


def test_linear_prefill_skips_the_upper_decoder(monkeypatch):
    model = make()
    engine = InferenceEngine(model, window=16, hsa_window=8, top_k=None, segment=32)
    seen = []
    layer = type(model.decoder.layers[-1])
    original = layer.mix

    def counting(self, hidden_states, *args, **kwargs):
        if self is model.decoder.layers[-1]:
            seen.append(hidden_states.shape[0])
        return original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(layer, "mix", counting)
    engine.prefill(draw(model, 1, 250))
    assert engine.receptive_field == 1 + 7 + 15 + 7 and sum(seen) == engine.receptive_field


def test_the_engine_leaves_training_settings_alone():
    model = make(window=16, top_k=5).train()
    InferenceEngine(model, window=8, hsa_window=8, top_k=1).prefill(draw(model, 1, 40))
    assert model.training and (model.schedule.window, model.schedule.top_k) == (16, 5)


def test_memory_survives_packing():
    config = ModelConfig(**SMALL)
    memory = ContextMemory(
        k=torch.randn(3, 5 * 8, 2, 8), v=torch.randn(3, 5 * 8, 2, 8), landmarks=torch.randn(3, 5, 2, 8)
    )
    again = ContextMemory.unpack(memory.pack(), config)
    for name in ("k", "v", "landmarks"):
        assert torch.equal(getattr(memory, name), getattr(again, name))


def test_the_hsa_layer_is_the_equation():
    """What the layer computes, written out again from its parts with the reference operators."""
    model = make(top_k=2)
    layer = model.decoder.layers[2]
    hsa = layer.hsa_attention
    hidden = torch.randn(64, 1, 32, device=next(model.parameters()).device)
    with torch.no_grad():
        memory = layer.encoder(hidden)
        out = hsa(hidden, memory)
        q = torch.nn.functional.rms_norm(hsa.linear_q(hidden)[0].view(64, 1, 4, 8), (8,), eps=1e-6)
        r = torch.nn.functional.rms_norm(hsa.linear_retrieval(hidden)[0].view(64, 1, 2, 8), (8,), eps=1e-6)
        expected = torch.zeros(64, 4, 8, device=hidden.device)
        for t in range(64):
            visible = t // 8
            for head in range(4):
                group = head // 2
                if not visible:
                    continue
                scores = memory.landmarks[0, :visible, group] @ r[t, 0, group] / 8**0.5
                best = scores.topk(min(2, visible))
                for weight, chunk in zip(best.values.softmax(0), best.indices.tolist(), strict=True):
                    span = slice(chunk * 8, chunk * 8 + 8)
                    p = (memory.k[0, span, group] @ q[t, 0, head] / 8**0.5).softmax(0)
                    expected[t, head] += weight * (p @ memory.v[0, span, group])
        expected = hsa.linear_proj(expected.view(64, 1, 32))[0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
