"""Optimizers through Megatron against plain torch on the same gradients."""

import math

import pytest
import torch

from parallel import compat
from parallel.muon import Muon
from parallel.optimizer import OptimizerSettings, build_optimizer, decays, is_muon_parameter, wrap_model


class TwoLayers(compat.MegatronModule):
    """A tower small enough to follow with plain torch: in -> matrix -> tanh -> gain -> matrix."""

    def __init__(self, dtype):
        config = compat.TransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=1, calculate_per_token_loss=True,
            bf16=dtype == torch.bfloat16, params_dtype=dtype,
        )  # fmt: skip
        super().__init__(config)
        generator = torch.Generator().manual_seed(0)
        self.first = torch.nn.Parameter(torch.randn(8, 8, generator=generator).to(dtype))
        self.gain = torch.nn.Parameter(torch.ones(8, dtype=dtype))
        self.second = torch.nn.Parameter(torch.randn(4, 8, generator=generator).to(dtype))

    def forward(self, x):
        return (torch.tanh(x @ self.first.T) * self.gain) @ self.second.T


def run_ours(settings, dtype, steps=20):
    model = wrap_model([TwoLayers(dtype).to("cuda" if torch.cuda.is_available() else "cpu")], settings)
    optimizer = build_optimizer(settings, model)
    norms = []
    for step in range(steps):
        model[0].zero_grad_buffer()
        optimizer.zero_grad()
        loss(model[0], step, dtype).backward()
        model[0].finish_grad_sync()
        updated, norm, _ = optimizer.step()
        assert updated
        norms.append(norm)
    return model[0].module, norms


def loss(model, step, dtype):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(100 + step)).to(dtype)
    x = x.to(next(model.parameters()).device)
    return (model(x).float() - x[:, :4].float()).square().sum()


def run_torch(settings, dtype, steps=20):
    """The same training with torch alone: fp32 masters by hand, clip_grad_norm_, AdamW and Muon."""
    model = TwoLayers(dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    masters = [torch.nn.Parameter(parameter.detach().float().clone()) for parameter in model.parameters()]
    first, gain, second = masters
    adam = [{"params": [gain], "weight_decay": 0.0}]
    optimizers = []
    if settings.name == "muon":
        optimizers.append(
            Muon([first, second], settings.muon_lr, settings.muon_momentum, weight_decay=settings.weight_decay)
        )
    else:
        adam.append({"params": [first, second], "weight_decay": settings.weight_decay})
    optimizers.append(torch.optim.AdamW(adam, settings.lr, tuple(settings.betas), settings.eps))
    norms = []
    for step in range(steps):
        model.zero_grad()
        loss(model, step, dtype).backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = parameter.grad.float()
        norms.append(torch.nn.utils.clip_grad_norm_(masters, settings.clip).item())
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
    return model, norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "distributed"), [("adamw", True), ("adamw", False), ("muon", True)])
def test_twenty_steps_equal_plain_torch(world_of_one, name, distributed, dtype):
    settings = OptimizerSettings(name=name, lr=1e-2, weight_decay=0.1, clip=1.0, distributed=distributed)
    ours, our_norms = run_ours(settings, dtype)
    plain, plain_norms = run_torch(settings, dtype)
    # Where roundings of the clip factor differ in the last bit, a bf16 weight may land on the neighbouring value.
    tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(our_norms, plain_norms, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=0)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_changes_nothing(world_of_one, toy, name):
    trained = toy.Toy(toy.settings(name))
    trained.step()
    before = trained.weights()
    trained.chunks[0].zero_grad_buffer()
    next(trained.chunks[0].parameters()).main_grad.fill_(math.inf)
    updated, norm, _ = trained.optimizer.step()
    assert not updated and not math.isfinite(norm)
    after = trained.weights()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("experts", [0, 4])
def test_who_gets_muon_and_who_decays(world_of_one, toy, experts):
    trained = toy.Toy(toy.settings("muon"), experts=experts)
    names = {id(parameter): name for name, parameter in trained.chunks[0].module.named_parameters()}
    by_muon, decayed, seen = set(), set(), 0
    for chained in trained.optimizer.chained_optimizers:
        for group in chained.param_groups:
            seen += len(group["params"])
            chosen = {names[id(parameter)] for parameter in group["params"]}
            by_muon |= chosen if isinstance(chained.optimizer, Muon) else set()
            decayed |= chosen if group["weight_decay"] else set()
            assert group["max_lr"] == (0.01 if isinstance(chained.optimizer, Muon) else 1e-2)
    assert seen == len(names)
    for name in names.values():
        matrix = name.endswith(("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight"))
        assert (name in by_muon) == matrix, name
        assert (name in decayed) == ("norm" not in name), name
    assert any("experts" in name for name in by_muon) == bool(experts)


def test_muon_and_decay_rules():
    assert not is_muon_parameter("x.router.weight", torch.nn.Parameter(torch.ones(4, 8)))
    assert not is_muon_parameter("x.cls", torch.nn.Parameter(torch.ones(1, 8)))
    assert is_muon_parameter("x.linear.weight", torch.nn.Parameter(torch.ones(2, 8)))
    assert not decays("x.bias", torch.nn.Parameter(torch.ones(2, 2)))


def test_ddp_is_refused_before_losses_are_per_token(world_of_one):
    model = TwoLayers(torch.float32)
    model.config.calculate_per_token_loss = False
    with pytest.raises(AssertionError, match="calculate_per_token_loss"):
        wrap_model([model], OptimizerSettings())


def test_other_dtypes_are_refused(world_of_one):
    model = wrap_model(
        [TwoLayers(torch.float64).to("cuda" if torch.cuda.is_available() else "cpu")], OptimizerSettings()
    )
    with pytest.raises(ValueError, match="float64"):
        build_optimizer(OptimizerSettings(), model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(name="lion"), "optimizer.name: 'lion'"),
        (dict(lr=0.0), "optimizer.lr: must be positive"),
        (dict(betas=[0.9]), "optimizer.betas"),
        (dict(clip=-1.0), "optimizer.clip"),
        (dict(muon_momentum=1.0), "optimizer.muon_momentum"),
        (dict(muon_ns_steps=0), "optimizer.muon_ns_steps"),
    ],
)
def test_impossible_settings_are_named(change, words):
    assert [text for text in OptimizerSettings(**change).problems() if words in text]
    assert not OptimizerSettings().problems()
