"""FP8: where it is refused, and that the decoder alone multiplies by Transformer Engine, inside Megatron's FP8 context.

Transformer Engine itself needs a GPU; here its layers have stand-ins that multiply in fp32 and notice where they run.
"""

import contextlib
import sys

import pytest
import torch
from torch import nn

from parallel import compat, experts, layers, precision
from parallel.errors import OptionalPartError, TopologyError
from parallel.experts import StackedExperts
from parallel.mesh import ParallelConfig
from parallel.model_config import ModelConfig
from parallel.optional import ComputeConfig, Package
from parallel.precision import check_fp8, check_fp8_sizes
from pretrain.cli import main
from pretrain.errors import RecipeError
from pretrain.model import build_chunks
from pretrain.recipe import load_recipe

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, ffn_hidden_size=48, lower_layers=2, upper_layers=2, hsa_layers=1, num_heads=4,
    head_dim=8, swa_kv_heads=2, hsa_kv_heads=2, retrieval_heads=2, retrieval_dim=16, chunk_size=16,
    encoder_ffn_hidden_size=40, num_experts=4, experts_per_token=2, dense_layers=1, expert_ffn_hidden_size=16,
    shared_expert_ffn_hidden_size=16,
)  # fmt: skip


class Context:
    """Megatron's FP8 context: whether it is entered now."""

    entered = False

    @classmethod
    @contextlib.contextmanager
    def of(cls, config, layer_no=-1, is_init=False):
        if is_init:
            assert not config.fp8_param
            yield
            return
        assert (config.fp8, config.fp8_recipe) == ("hybrid", "tensorwise")
        cls.entered = True
        yield
        cls.entered = False


class Linear(nn.Module):
    """A linear layer with the arguments of Transformer Engine's, as Megatron wraps it."""

    def __init__(self, inputs, outputs, *, config, bias, **_):
        super().__init__()
        assert not bias
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        self.calls = []

    def forward(self, x):
        self.calls.append(Context.entered)
        return nn.functional.linear(x, self.weight), None


class ColumnLinear(Linear):
    parallel_mode = "column"


class RowLinear(Linear):
    parallel_mode = "row"


class GroupedExperts(StackedExperts):
    def forward(self, *args):
        assert Context.entered == bool(self.config.fp8)
        return super().forward(*args)


@pytest.fixture
def engine(monkeypatch):
    """Transformer Engine, as far as building and running a model asks for it."""
    spec = compat.ModuleSpec(module=GroupedExperts, params={"grouped": False})
    monkeypatch.setattr(layers, "transformer_engine_linears", lambda: (ColumnLinear, RowLinear))
    monkeypatch.setattr(experts, "transformer_engine_experts", lambda: spec)
    monkeypatch.setattr(experts, "HAVE_TRANSFORMER_ENGINE", True)
    monkeypatch.setattr(experts, "CPU_SHIM", False)
    core = "megatron.core.transformer"
    monkeypatch.setattr(sys.modules[f"{core}.transformer_block"], "get_fp8_context", Context.of)
    for module in ("transformer_config", "moe.shared_experts"):
        # Of no version, so that Megatron sets nothing on layers that are not Transformer Engine's own.
        at_least = module == "transformer_config"
        monkeypatch.setattr(sys.modules[f"{core}.{module}"], "is_te_min_version", lambda *_, yes=at_least: yes)


def build(**kwargs):
    (model,) = build_chunks(MODEL, max_length=64, seed=1, parallel=ParallelConfig(), bf16=True, **kwargs)
    model.set_schedule(window=16, hsa_window=16, top_k=2)
    return model


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_the_decoder_alone_multiplies_in_fp8(world_of_one, engine, recompute):
    model, plain = build(fp8=True, recompute=recompute), build(recompute=recompute)
    tokens = torch.randint(0, 64, (2, 64), generator=torch.Generator().manual_seed(0))
    loss = model(tokens, labels=tokens)
    loss.sum().backward()
    ours = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    decoder = [f"decoder.layers.{i}." for i in range(MODEL.num_layers)]
    attention = {f"{layer}self_attention.{part}" for layer in decoder for part in ("linear_qkv", "linear_proj")}
    dense = {f"{decoder[0]}mlp.{part}" for part in ("linear_fc1", "linear_fc2")}
    shared = {f"{layer}mlp.shared_experts.{part}" for layer in decoder[1:] for part in ("linear_fc1", "linear_fc2")}
    assert ours == attention | dense | shared
    assert sum(isinstance(module, GroupedExperts) for module in model.modules()) == MODEL.num_layers - 1
    assert all(module.calls == [True] for module in model.modules() if isinstance(module, Linear))
    assert all(parameter.grad is not None for parameter in model.parameters())
    # The same parameters under the same names: the checkpoint of one is that of the other.
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]) and parameter.dtype == expected[name].dtype, name
        assert getattr(parameter, "partition_dim", None) == getattr(expected[name], "partition_dim", None), name
    torch.testing.assert_close(loss, plain(tokens, labels=tokens), rtol=2e-2, atol=2e-2)


def test_delayed_scaling_has_a_history():
    settings = precision.fp8_settings(ComputeConfig(fp8_scaling="delayed", fp8_format="e4m3"))
    assert (settings["fp8"], settings["fp8_recipe"], settings["fp8_amax_history_len"]) == ("e4m3", "delayed", 1024)


@pytest.mark.parametrize(
    ("version", "capability", "words"),
    [
        (None, (9, 0), "needs Transformer Engine, which is not installed"),
        ("2.8.0", None, "this is the CPU"),
        ("2.8.0", (8, 0), "a Hopper GPU or a newer one, this is a GPU"),
        ("2.1.0", (9, 0), "needs Transformer Engine 2.2, found 2.1.0"),
        ("2.8.0", (9, 0), None),
        ("2.10", (10, 0), None),
    ],
)
def test_machines_without_fp8_are_refused(monkeypatch, version, capability, words):
    found = Package("transformer_engine", "installed" if version else "absent", version=version or "")
    monkeypatch.setattr(precision, "find_transformer_engine", lambda: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    device = torch.device("cuda" if capability else "cpu")
    if words is None:
        check_fp8(ComputeConfig(), device)
    else:
        with pytest.raises(OptionalPartError, match=words):
            check_fp8(ComputeConfig(), device)


@pytest.mark.parametrize(
    ("changes", "parallel", "tokens", "words"),
    [
        ({}, {}, (1, 64), []),
        ({}, {"context": 2}, (1, 64), []),
        ({"ffn_hidden_size": 40}, {}, (1, 64), ["model.ffn_hidden_size = 40"]),
        ({}, {"tensor": 2}, (2, 64), ["model.ffn_hidden_size / tensor 2 = 24", "shared_expert_ffn_hidden_size / t"]),
        ({"chunk_size": 8}, {"context": 2}, (1, 48), ["model.chunk_size = 8", "micro-batch 1 x 48 / context 2) = 24"]),
        ({"expert_ffn_hidden_size": 24, "num_experts": 0}, {}, (1, 64), []),
    ],
)  # fmt: skip
def test_sizes_that_fp8_cannot_multiply_are_named(changes, parallel, tokens, words):
    model = ModelConfig(**{**vars(MODEL), **changes})
    micro_batch, context = tokens
    with pytest.raises(TopologyError) if words else contextlib.nullcontext() as caught:
        check_fp8_sizes(model, ParallelConfig(**parallel), context=context, micro_batch=micro_batch)
    for word in words:
        assert word in str(caught.value)


def test_recipes_in_fp8(tmp_path, capsys):
    """Accepted by the recipe, counted like bf16, refused by `hsa train` on a machine without Transformer Engine."""
    assert load_recipe("demo", ["precision=fp8"]).recipe.stored_precision == "bf16"
    for override in ("compute.tiled_mlp=2", "compute.cuda_graph=true", "compute.fp8_scaling=blockwise"):
        with pytest.raises(RecipeError, match=override.split("=")[0]):
            load_recipe("demo", ["precision=fp8", override])
    assert main(["train", "demo", "precision=fp8", "--run-dir", str(tmp_path / "run")]) == 2
    assert "precision: fp8 needs Transformer Engine" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["plan", "demo", "precision=fp8"]) == 2
    assert "model.chunk_size = 8" in capsys.readouterr().err
