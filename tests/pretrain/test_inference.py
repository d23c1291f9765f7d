"""Generation state: batches of different lengths, memory on the host and in FP8, going on after generation."""

import pytest
import torch

from parallel import mesh
from parallel.model_config import Ablations, ModelConfig
from pretrain.context_store import Placement
from pretrain.decode_step import DecodeStep
from pretrain.inference import InferenceEngine
from pretrain.model import build_model

SMALL = dict(
    vocab_size=64, hidden_size=32, ffn_hidden_size=48, lower_layers=1, upper_layers=2, hsa_layers=2, num_heads=4,
    head_dim=8, swa_kv_heads=2, hsa_kv_heads=2, retrieval_heads=2, retrieval_dim=16, chunk_size=8,
    encoder_ffn_hidden_size=32, num_experts=4, experts_per_token=2, expert_ffn_hidden_size=16,
    shared_expert_ffn_hidden_size=16, init_std=0.2,
)  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    mesh.initialize(device=DEVICE, seed=1)
    yield
    mesh.shutdown()


def make(window=16, hsa_window=8, top_k=3, dtype=torch.float64, **changes):
    model = build_model(ModelConfig(**{**SMALL, **changes}), max_length=256, seed=0, device=DEVICE).to(dtype)
    model.set_schedule(window=window, hsa_window=hsa_window, top_k=top_k)
    return model.eval()


def engine_of(model, segment=32, **changes):
    schedule = model.schedule
    settings = {"window": schedule.window, "hsa_window": schedule.hsa_window, "top_k": schedule.top_k}
    return InferenceEngine(model, **{**settings, "segment": segment, **changes})


def draw(batch, length, seed=0):
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def stream(engine, tokens, prompt, lengths=None):
    """Logits (B, n, V) after the prompt and after every further token."""
    out = [engine.prefill(tokens[:, :prompt], lengths)]
    return torch.stack([*out, *(engine.decode(tokens[:, i]) for i in range(prompt, tokens.shape[1]))], 1)


@pytest.mark.parametrize(
    ("changes", "batch"),
    [
        ({}, 1),  # few tokens gather their experts' weights
        ({}, 5),  # many use all experts
        (dict(num_experts=0, hsa_kv_heads=1, retrieval_heads=1, swa_in_hsa=False), 2),
        (dict(retrieval_heads=1), 2),
    ],
    ids=["experts", "experts, many tokens", "dense", "shared retrieval"],
)
@pytest.mark.parametrize(
    ("window", "hsa_window", "top_k", "reading"),
    [
        (16, 8, 3, {}),
        (9, 21, None, {}),
        (16, 8, 3, {"neighbours": 2}),
        (16, 8, 2, {"neighbours": 7}),
        (9, 21, None, {"retrieval_temperature": 0.25}),
        (16, 8, 3, {"distance_decay": 1.5, "decay_from": 20, "retrieval_temperature": 0.5}),
        (9, 21, None, {"distance_decay": 1.5, "decay_from": 8, "neighbours": 2}),
    ],
)
def test_the_fixed_size_step_equals_the_full_forward(changes, batch, window, hsa_window, top_k, reading):
    model = make(window, hsa_window, top_k, **changes)
    tokens = draw(batch, 75)
    model.set_schedule(window=window, hsa_window=hsa_window, top_k=top_k, **reading)
    with torch.no_grad():
        full = model(torch.nn.functional.pad(tokens, (0, 5)))[:, :75].float()
    engine = engine_of(model, frozen=True, **reading)
    for prompt in (1, 45):
        engine.reset()
        torch.testing.assert_close(stream(engine, tokens, prompt), full[:, prompt - 1 :], rtol=1e-4, atol=1e-4)


def test_the_lower_the_temperature_the_more_the_best_chunk_weighs():
    tokens = draw(2, 75)

    def read(top_k, temperature):
        engine = engine_of(make(top_k=top_k), frozen=True, retrieval_temperature=temperature)
        return stream(engine, tokens, 45)

    best = read(1, 1.0)
    torch.testing.assert_close(read(3, 1e-6), best, rtol=1e-9, atol=1e-9)
    assert (read(3, 1.0) - best).abs().max() > 1e-4
    torch.testing.assert_close(read(1, 0.5), best, rtol=1e-9, atol=1e-9)  # what is chosen stays


def test_with_a_large_decay_only_what_is_near_is_read():
    tokens, near = draw(1, 120), 24
    changed = tokens.clone()
    changed[:, :40] = draw(1, 40, seed=9)  # further back than the memory's reach and than all windows together

    def read(text, **decay):
        return stream(engine_of(make(top_k=3), frozen=True, **decay), text, 118)[:, -1]

    far = {"distance_decay": 1e4, "decay_from": near}
    assert torch.equal(read(tokens, **far), read(changed, **far))
    assert not torch.equal(read(tokens), read(changed))
    assert torch.equal(read(tokens, distance_decay=1e4, decay_from=200), read(tokens))  # nothing lies that far back


def test_stacking_the_experts_changes_no_weight():
    model = make(dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = DecodeStep(model, engine_of(model).store, 1, window=16, hsa_window=8, top_k=3, static_experts=True)
    assert step.experts
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    again = DecodeStep(model, step.store, 1, window=16, hsa_window=8, top_k=3, static_experts=True)
    for number, (w1, w2) in step.experts.items():
        assert (
            w1.data_ptr() == again.experts[number][0].data_ptr()
            and w2.data_ptr() == again.experts[number][1].data_ptr()
        )


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("placement", "neighbours"), [(Placement(), 0), (Placement(host=True), 0), (Placement(host=True), 2)], ids=str
)
def test_requests_of_different_lengths_are_each_as_if_alone(left, placement, neighbours):
    model = make()
    lengths = [37, 5, 64, 37, 90]
    prompts = [draw(1, n, seed=n + i)[0] for i, n in enumerate(lengths)]
    more = draw(5, 30, seed=99)
    padded = torch.full((5, 90), 63)
    for row, prompt in enumerate(prompts):
        padded[row, 90 - len(prompt) if left else 0 :][: len(prompt)] = prompt
    engine = engine_of(model, frozen=True, memory=placement, neighbours=neighbours)
    together = [engine.prefill(padded, lengths, padded_left=left), *(engine.decode(t) for t in more.T)]
    assert engine.positions == [n + 30 for n in lengths]
    for row, prompt in enumerate(prompts):
        alone = engine_of(model, neighbours=neighbours)
        expected = [alone.prefill(prompt[None]), *(alone.decode(t) for t in more[row : row + 1].T)]
        for got, want in zip(together, expected, strict=True):
            torch.testing.assert_close(got[row], want[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top_k", [3, None])
def test_memory_on_the_host_gives_the_same_bits(top_k):
    model = make(top_k=top_k, dtype=torch.float32)
    tokens = draw(2, 150)
    on_device = stream(engine_of(model, frozen=True), tokens, 101)
    on_host = engine_of(model, frozen=True, memory=Placement(host=True))
    streamed = stream(on_host, tokens, 101)
    # Generation has the same bits. The prompt's last stretch attends to the chosen chunks gathered together, in place
    # of all of them, so sums have another order there.
    torch.testing.assert_close(streamed, on_device, rtol=1e-5, atol=1e-5)
    same_state = engine_of(model, frozen=True)
    same_state.prefill(tokens[:, :101])
    on_host.reset()
    on_host.prefill(tokens[:, :101])
    on_host.rewind(same_state.readings())
    for i in range(101, 150):
        assert torch.equal(on_host.decode(tokens[:, i]), same_state.decode(tokens[:, i]))


@pytest.mark.parametrize("host", [False, True])
def test_memory_in_fp8_is_close(host):
    model = make(dtype=torch.float32)
    tokens = draw(2, 150)
    exact = stream(engine_of(model), tokens, 101)
    rough = stream(engine_of(model, memory=Placement(host=host, fp8=True)), tokens, 101)
    error = ((rough - exact).norm() / exact.norm()).item()
    assert 1e-4 < error < 0.03, error  # e4m3 has 3 bits of mantissa: 2 % per number, less once summed


def test_a_prompt_goes_on_after_generation():
    model = make()
    tokens = draw(2, 160)
    with torch.no_grad():
        full = model(tokens).float()
    for frozen in (False, True):
        engine = engine_of(model, frozen=frozen)
        engine.prefill(tokens[:, :50])
        for i in range(50, 75):
            engine.decode(tokens[:, i])
        torch.testing.assert_close(engine.prefill(tokens[:, 75:78]), full[:, 77], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(engine.prefill(tokens[:, 78:150]), full[:, 149], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(engine.decode(tokens[:, 150]), full[:, 150], rtol=1e-4, atol=1e-4)


def test_many_questions_share_one_reading():
    model = make()
    text = draw(1, 101)
    engine = engine_of(model, frozen=True)
    engine.prefill(text)
    state = engine.readings()
    for seed in (1, 2, 1):
        question = draw(1, 13, seed=seed)
        engine.rewind(state)
        got = [engine.prefill(question), *(engine.decode(draw(1, 1, seed=7)[0]) for _ in range(12))]
        alone = engine_of(model)
        want = [
            alone.prefill(torch.cat((text, question), 1)),
            *(alone.decode(draw(1, 1, seed=7)[0]) for _ in range(12)),
        ]
        torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-5, atol=1e-6)


def test_misuse_is_named():
    engine = engine_of(make())
    with pytest.raises(ValueError, match="prefill comes before decode"):
        engine.decode(draw(1, 1)[0])
    with pytest.raises(ValueError, match="empty prompt"):
        engine.prefill(draw(2, 4), [4, 0])
    engine.prefill(draw(2, 4))
    with pytest.raises(ValueError, match="reset first"):
        engine.prefill(draw(1, 4))


@pytest.mark.parametrize("changes", [{}, dict(bypass=False), dict(hsa_rope=True)], ids=str)
def test_segments_in_fixed_buffers_equal_segments_one_by_one(changes):
    model = make(num_experts=0, lower_layers=2, ablations=Ablations(**changes))
    tokens = draw(2, 700)
    plain, fixed = engine_of(model), engine_of(model, frozen=True)
    fixed.graphs_segments = True  # on a CPU: the same buffers without a graph
    calls = []
    alike = fixed._read_alike
    fixed._read_alike = lambda reading, parts: calls.append(len(parts)) or alike(reading, parts)
    at, kept = 0, []
    for length in (32 * 6, 32 * 4 + 3, 5, 32 * 5, 40):  # where a token waits for its chunk no segment is alike
        want, got = (engine.prefill(tokens[:, at : at + length]) for engine in (plain, fixed))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        at += length
        kept.append((at, fixed.readings()))
    assert calls == [5, 4, 5]
    last = tokens[:, at]
    torch.testing.assert_close(fixed.decode(last), plain.decode(last), rtol=1e-10, atol=1e-10)
    at, reading = kept[1]
    fixed.rewind(reading)  # later segments have changed nothing of it
    plain.reset()
    plain.prefill(tokens[:, :at])
    further = tokens[:, at : at + 9]
    torch.testing.assert_close(fixed.prefill(further), plain.prefill(further), rtol=1e-10, atol=1e-10)
