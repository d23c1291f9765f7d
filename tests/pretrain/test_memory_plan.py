"""The plan's bytes against a built model: parameters and optimizer exactly, activations by what autograd keeps."""

import pytest
import torch

from hsa_kernels import ops
from parallel import attention, norm
from parallel.mesh import ParallelConfig
from parallel.model_config import ModelConfig
from parallel.optimizer import OptimizerSettings, build_optimizer, wrap_model
from pretrain import memory_plan
from pretrain.model import build_model
from pretrain.recipe import Recipe, load_recipe

SIZES = {
    "experts": dict(
        vocab_size=96, hidden_size=64, ffn_hidden_size=160, lower_layers=2, upper_layers=3, hsa_layers=2, num_heads=4,
        head_dim=16, swa_kv_heads=2, hsa_kv_heads=2, retrieval_heads=2, retrieval_dim=32, chunk_size=16,
        encoder_ffn_hidden_size=96, num_experts=8, experts_per_token=2, expert_ffn_hidden_size=32,
        shared_expert_ffn_hidden_size=48,
    ),
    "dense": dict(
        vocab_size=128, hidden_size=96, ffn_hidden_size=256, lower_layers=1, upper_layers=2, hsa_layers=1, num_heads=6,
        head_dim=16, swa_kv_heads=3, hsa_kv_heads=1, retrieval_heads=1, retrieval_dim=48, chunk_size=8,
        encoder_ffn_hidden_size=128, swa_in_hsa=False, tied_embeddings=False,
    ),
}  # fmt: skip


class Kernel(torch.autograd.Function):
    """An operator that keeps for its backward pass what the GPU's kernels keep: inputs and outputs."""

    @staticmethod
    def forward(ctx, function, *inputs):
        with torch.no_grad():
            outputs = function(*inputs)
        ctx.save_for_backward(*inputs, *(outputs if isinstance(outputs, tuple) else (outputs,)))
        ctx.inputs = len(inputs)
        return outputs

    @staticmethod
    def backward(ctx, *_):
        return None, *(torch.zeros_like(x) for x in ctx.saved_tensors[: ctx.inputs])


class InputOnly(Kernel):
    """Norms and rotary positions keep their input, or nothing at all."""

    @staticmethod
    def forward(ctx, function, keeps, *inputs):
        with torch.no_grad():
            outputs = function(*inputs)
        ctx.save_for_backward(*inputs[:keeps])
        ctx.shapes = [x.shape for x in inputs]
        return outputs

    @staticmethod
    def backward(ctx, gradient):
        return None, None, *(gradient.new_zeros(shape) for shape in ctx.shapes)


@pytest.fixture
def kernels(monkeypatch):
    """Attention, norms and rotary positions as autograd sees them on a GPU."""
    window, hsa, select = ops.sliding_window_attention, ops.hsa_attention, ops.select_chunks
    rms_norm, rotate = norm.rms_norm, attention.rotate
    monkeypatch.setattr(
        ops, "sliding_window_attention", lambda q, k, v, **kw: Kernel.apply(lambda *x: window(*x, **kw), q, k, v)
    )
    monkeypatch.setattr(ops, "hsa_attention", lambda *x, **kw: Kernel.apply(lambda *y: hsa(*y, **kw), *x))
    monkeypatch.setattr(ops, "select_chunks", lambda q, m, **kw: Kernel.apply(lambda *x: select(*x, **kw), q, m))
    monkeypatch.setattr(norm, "rms_norm", lambda x, w, eps: InputOnly.apply(lambda a, b: rms_norm(a, b, eps), 1, x, w))
    monkeypatch.setattr(attention, "rotate", lambda x, a: InputOnly.apply(lambda b: rotate(b, a), 0, x))


def kept_bytes(model, run):
    """Bytes of all storages that autograd keeps for the backward pass of run(), parameters and small things apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = run()
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("size", SIZES)
def test_activations_are_within_five_percent_of_what_autograd_keeps(world_of_one, kernels, size, recompute):
    config = ModelConfig(**SIZES[size])
    model = build_model(config, max_length=256, seed=1, recompute=recompute)
    model.set_schedule(window=32, hsa_window=32, top_k=4)
    tokens = torch.randint(0, config.vocab_size, (1, 256))
    measured = kept_bytes(model, lambda: model(tokens, labels=tokens).sum())
    shape = memory_plan.Shape(tokens=256, width=4, top_k=4)
    recipe = Recipe(name="x", precision="fp32", recompute=recompute, model=config)
    # Logits; the inputs of final norm and of the output layer.
    head = memory_plan.logit_bytes(recipe, shape) + 2 * 4 * 256 * config.hidden_size
    layers = list(range(config.num_layers))
    planned = (
        memory_plan.activation_bytes(config, shape, layers, recompute)
        + memory_plan.memory_bytes(config, shape, 256)
        + head
    )
    assert planned == pytest.approx(measured, rel=0.05)


def optimizer_bytes(optimizer, masters):
    """Moments, the steps' counters apart, and master copies: without, the optimizer has the model's own parameters."""
    optimizer.init_state()
    found = []
    for chained in optimizer.chained_optimizers:
        found += [p for group in chained.optimizer.param_groups for p in group["params"] if masters]
        found += [x for state in chained.optimizer.state.values() for x in state.values() if x.dim()]
    return sum(x.numel() * x.element_size() for x in found)


@pytest.mark.parametrize("optimizer", [{}, {"distributed": False}, {"name": "muon"}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES)
def test_weights_gradients_and_optimizer_are_exact(world_of_one, size, precision, optimizer):
    config, settings = ModelConfig(**SIZES[size]), OptimizerSettings(**optimizer)
    model = build_model(config, max_length=64, seed=1, bf16=precision == "bf16")
    wrapped = wrap_model([model], settings)
    built = build_optimizer(settings, wrapped)
    recipe = Recipe(name="x", precision=precision, model=config, optimizer=settings)
    planned = memory_plan.state_bytes(memory_plan.held_parameters(config, ParallelConfig(), 0), recipe, 1)
    parameters = list(model.parameters())
    assert planned["weights"] == sum(p.numel() * p.element_size() for p in parameters)
    assert planned["gradients"] == sum(p.main_grad.numel() * p.main_grad.element_size() for p in parameters)
    assert planned["optimizer"] == optimizer_bytes(built, precision == "bf16")


def test_the_plan_counts_every_part_by_layout():
    """Each form takes memory where it should, and nowhere else."""

    def planned(*overrides):
        recipe = load_recipe("8b-a1b", ["parallel.expert=1", *overrides]).recipe
        return memory_plan.memory_per_gpu(recipe, recipe.stages[1], 256)

    plain = planned()
    spread = planned("parallel.expert=8")
    assert spread["weights"] < plain["weights"] / 4 and spread["activations"] == plain["activations"]
    tensor = planned("parallel.tensor=2")
    assert 0.45 < tensor["activations"] / plain["activations"] < 0.55 and tensor["logits"] < 0.6 * plain["logits"]
    context = planned("parallel.context=2")
    assert context["activations"] == plain["activations"] / 2
    assert context["memory K/V, landmarks"] == plain["memory K/V, landmarks"] and context["buffers"] > 0
    assert planned("recompute=none")["activations"] > 5 * plain["activations"] and plain["working"] > 0
    assert planned("compute.loss=chunked")["logits"] < plain["logits"] / 4
    # A stage has a quarter of the layers, the first of four holds four micro-batches.
    kept, deep = planned("recompute=none"), planned("recompute=none", "parallel.pipeline=4")
    assert deep["weights"] < plain["weights"] / 2.5 and 0.7 < deep["activations"] / kept["activations"] < 1.5
    assert planned("optimizer.name=muon")["optimizer"] < plain["optimizer"]  # one moment fewer, shared out as well
    assert planned("optimizer.name=muon", "optimizer.distributed=false")["optimizer"] > 10 * plain["optimizer"]
