"""The shim changes the device that Megatron sees and nothing else."""

import logging
import sys
import textwrap

import pytest
import torch

from parallel import compat, optional

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for machines without CUDA")


@cpu_only
def test_megatron_sees_cpu_where_it_says_cuda():
    megatron_torch = sys.modules["megatron.core.optimizer.clip_grads"].torch
    assert megatron_torch.zeros(2, device="cuda").device.type == "cpu"
    assert megatron_torch.empty(1, device=megatron_torch.cuda.current_device()).device.type == "cpu"
    assert megatron_torch.arange(3, device=0, pin_memory=True).tolist() == [0, 1, 2]
    assert not megatron_torch.cuda.is_available()
    assert megatron_torch.Tensor is torch.Tensor


@cpu_only
def test_everyone_else_sees_plain_torch():
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with torch.device("meta"):
        assert torch.zeros(1).is_meta


@cpu_only
def test_layers_can_be_built_on_meta(world_of_one):
    config = compat.TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    with torch.device("meta"):
        layer = compat.ColumnParallelLinear(8, 16, config=config, init_method=torch.nn.init.zeros_, bias=False)
    assert layer.weight.is_meta and layer.weight.shape == (16, 8)


@cpu_only
def test_random_tracker_forks_and_returns(world_of_one, caplog):
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING), compat.get_cuda_rng_tracker().fork():
        first = torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())
    with compat.get_cuda_rng_tracker().fork():
        second = torch.rand(3)
    assert not torch.equal(first, second)
    assert not caplog.records


@cpu_only
def test_recomputation_repeats_dropout(world_of_one):
    dropout = torch.nn.Dropout(0.5)
    x = torch.ones(64, requires_grad=True)
    y = compat.checkpoint(lambda t: dropout(t), False, x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_router_gating_repair():
    from megatron.core.transformer.moe import moe_utils

    assert hasattr(moe_utils, "te_general_gemm")


def test_many_tensors_are_scaled_and_measured_together():
    clip, optimizer = (sys.modules[f"megatron.core.optimizer.{name}"] for name in ("clip_grads", "optimizer"))
    tensors = [torch.randn(3, 5), torch.randn(7)]
    expected = [2.5 * tensor for tensor in tensors]
    norm, _ = clip.l2_norm_impl(1, None, [tensors], False)
    torch.testing.assert_close(norm, torch.cat([tensor.flatten() for tensor in tensors]).norm().reshape(1))
    copies = [torch.zeros_like(tensor, dtype=torch.bfloat16) for tensor in tensors]
    optimizer.multi_tensor_scale_impl(1, None, [tensors, copies], 1.0)
    assert all(torch.equal(copy, tensor.bfloat16()) for copy, tensor in zip(copies, tensors, strict=True))
    clip.multi_tensor_scale_impl(1, None, [tensors, tensors], 2.5)
    assert all(torch.equal(tensor, value) for tensor, value in zip(tensors, expected, strict=True))
    optimizer.multi_tensor_scale_impl(1, None, [[], []], 2.5)


def test_foreign_apex_is_told_from_nvidias(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert optional.find_apex().state == "foreign"
    assert any("not NVIDIA's apex" in line for line in optional.describe())
    for name in ("optimizers/fused_adam.py", "normalization/fused_layer_norm.py", "multi_tensor_apply/__init__.py"):
        file = tmp_path / "apex" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(textwrap.dedent("raise SystemExit('must not be imported')"))
    assert optional.find_apex().usable


def test_absent_packages_are_described(monkeypatch):
    monkeypatch.setattr(optional, "_find", lambda name: None)
    lines = optional.describe()
    assert lines[0] == "apex: not installed: torch AdamW is used" and len(lines) == 3
