"""What the recipe's `compute:` asks for: found or refused by name, and exact in each form."""

import sys

import pytest
import torch

from parallel import compat, optional
from parallel.errors import OptionalPartError
from parallel.losses import chunked_cross_entropy, linear_cross_entropy, token_losses
from parallel.optional import ComputeConfig, check_compute, describe_use, use_fused_gradients, use_fused_optimizer
from parallel.tiling import TiledMLP


@pytest.fixture
def foreign_apex(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    return tmp_path / "apex"


@pytest.mark.parametrize("use", [use_fused_gradients, use_fused_optimizer])
def test_the_wrong_apex_is_refused_by_name_or_ignored(foreign_apex, use):
    assert not use("auto", on_gpu=True) and not use("off", on_gpu=True)
    with pytest.raises(OptionalPartError, match="is not NVIDIA's apex but PyPI's unrelated project") as caught:
        use("require", on_gpu=True)
    assert str(foreign_apex) in str(caught.value)


def test_nvidias_apex_is_used_where_its_parts_are_built(foreign_apex, monkeypatch):
    for file in ("optimizers/fused_adam.py", "normalization/fused_layer_norm.py", "multi_tensor_apply/__init__.py"):
        (foreign_apex / file).parent.mkdir(exist_ok=True)
        (foreign_apex / file).write_text("")
    (foreign_apex.parent / "amp_C.py").write_text("")
    assert use_fused_optimizer("auto", on_gpu=True) and not use_fused_optimizer("auto", on_gpu=False)
    assert not use_fused_optimizer("off", on_gpu=True)
    with pytest.raises(OptionalPartError, match="built without fused_weight_gradient_mlp_cuda"):
        use_fused_gradients("require", on_gpu=True)
    (foreign_apex.parent / "fused_weight_gradient_mlp_cuda.py").write_text("")
    assert use_fused_gradients("require", on_gpu=True)
    with pytest.raises(OptionalPartError, match="needs a GPU"):
        use_fused_gradients("require", on_gpu=False)


@pytest.mark.parametrize("settings", [{"loss": "deepspeed"}, {"tiled_mlp": 4}])
def test_deepspeeds_parts_need_deepspeed(monkeypatch, settings):
    check_compute(ComputeConfig(**settings), on_gpu=False)
    monkeypatch.setattr(optional, "_find", lambda name: None)
    with pytest.raises(OptionalPartError, match=next(iter(settings))):
        check_compute(ComputeConfig(**settings), on_gpu=False)


def test_problems_and_yamls_off():
    assert not ComputeConfig().problems() and ComputeConfig(grouped_experts="False").grouped_experts == "off"
    words = ComputeConfig(grouped_experts="on", loss="half", loss_chunk=0, tiled_mlp=0).problems()
    assert [text.split(":")[0] for text in words] == [
        "compute.grouped_experts", "compute.loss", "compute.loss_chunk", "compute.tiled_mlp"
    ]  # fmt: skip


def test_what_is_in_use_is_said():
    line = describe_use(ComputeConfig(loss="chunked", tiled_mlp=2), on_gpu=False, experts="one after the other")
    assert line.startswith("in use: experts one after the other, gradient accumulation torch, AdamW torch, ")
    assert "loss chunked" in line and "2 tiles" in line


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_without_all_logits_are_exact(world_of_one, dtype, rows):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 2, 16, generator=generator).to(dtype)
    weight = torch.randn(50, 16, generator=generator).to(dtype)
    labels = torch.randint(0, 50, (20, 2), generator=generator)
    upstream = torch.rand(20, 2, generator=generator)
    group = compat.parallel_state.get_tensor_model_parallel_group()

    def full(h, w):
        logits = torch.nn.functional.linear(h, w).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(20, 2)

    forms = [
        full,
        lambda h, w: token_losses(torch.nn.functional.linear(h, w), labels, group),
        lambda h, w: chunked_cross_entropy(h, w, labels, rows),
        lambda h, w: linear_cross_entropy(h, w, labels, group),
    ]
    results = []
    for form in forms:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        losses = form(h, w)
        losses.backward(upstream)
        results.append((losses, h.grad, w.grad))
    tolerance = dict(rtol=1e-5, atol=5e-6) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    for found in results[1:]:
        for ours, expected in zip(found, results[0], strict=True):
            torch.testing.assert_close(ours, expected, **tolerance)


@pytest.mark.parametrize("tiles", [2, 3, 1000])
def test_tiled_mlp_is_exact(world_of_one, tiles):
    config = compat.TransformerConfig(
        num_layers=1, hidden_size=16, ffn_hidden_size=24, num_attention_heads=1, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, bias_activation_fusion=False, add_bias_linear=False,
        use_cpu_initialization=True,
    )  # fmt: skip
    linears = compat.MLPSubmodules(linear_fc1=compat.ColumnParallelLinear, linear_fc2=compat.RowParallelLinear)
    group = compat.parallel_state.get_tensor_model_parallel_group()
    plain = compat.MLP(config, linears, tp_group=group)
    tiled = TiledMLP(config, linears, tiles=tiles, tp_group=group)
    tiled.load_state_dict(plain.state_dict())
    inputs, upstream = torch.randn(11, 3, 16), torch.randn(11, 3, 16)
    results = []
    for module in (plain, tiled):
        x = inputs.clone().requires_grad_()
        out, _ = module(x)
        out.backward(upstream)
        results.append((out, x.grad, module.linear_fc1.weight.grad, module.linear_fc2.weight.grad))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(tiled.eval()(inputs)[0], plain.eval()(inputs)[0])
