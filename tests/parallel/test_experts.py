"""Stacked experts against Megatron's one module per expert: outputs, gradients, checkpoints."""

import pytest
import torch

from parallel import compat
from parallel.errors import OptionalPartError
from parallel.experts import StackedExperts, expert_parts, experts_spec, fits_grouped_product
from parallel.model_config import ModelConfig

HIDDEN, FFN = 24, 16
COUNTS = {
    "even": [8, 8, 8, 8],
    "uneven": [1, 20, 5, 6],
    "empty experts": [0, 17, 0, 15],
    "all in the last": [0, 0, 0, 9],
    "no token": [0, 0, 0, 0],
}


def config(dtype=torch.float32):
    return compat.TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=40, num_attention_heads=1, num_moe_experts=4,
        moe_ffn_hidden_size=FFN, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False, add_bias_linear=False, use_cpu_initialization=True, params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )  # fmt: skip


def pair(dtype=torch.float32, *, grouped=True):
    """Megatron's experts and ours with the same weights."""
    groups = compat.ProcessGroupCollection.use_mpu_process_groups()
    linears = compat.MLPSubmodules(linear_fc1=compat.ColumnParallelLinear, linear_fc2=compat.RowParallelLinear)
    theirs = compat.SequentialMLP(4, config(dtype), linears, pg_collection=groups)
    ours = StackedExperts(4, config(dtype), grouped=grouped, pg_collection=groups)
    with torch.no_grad():
        for name in ("linear_fc1", "linear_fc2"):
            for number, expert in enumerate(theirs.local_experts):
                getattr(ours, name).weight[number] = getattr(expert, name).weight
    return theirs, ours


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("case", COUNTS)
def test_outputs_and_gradients_equal_megatrons(world_of_one, case, grouped):
    theirs, ours = pair(grouped=grouped)
    counts = torch.tensor(COUNTS[case])
    generator = torch.Generator().manual_seed(0)
    n = int(counts.sum())
    tokens = torch.randn(n, HIDDEN, generator=generator)
    probs, gradient = torch.rand(n, generator=generator), torch.randn(n, HIDDEN, generator=generator)
    results = []
    for module in (theirs, ours):
        x, p = tokens.clone().requires_grad_(), probs.clone().requires_grad_()
        out, bias = module(x, counts, p)
        assert bias is None
        out.backward(gradient)
        weights = {
            part: values
            for name, parameter in module.named_parameters()
            for part, values in expert_parts(f"mlp.experts.{name}", parameter.grad)
        }
        results.append((out, x.grad, p.grad, weights))
    for a, b in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    assert results[0][3].keys() == results[1][3].keys()
    for name, expected in results[0][3].items():
        torch.testing.assert_close(results[1][3][name], expected, rtol=1e-5, atol=1e-5, msg=name)


def test_bfloat16_is_as_exact_as_one_by_one(world_of_one):
    theirs, ours = pair(torch.bfloat16)
    counts = torch.tensor([3, 0, 20, 9])
    tokens, probs = torch.randn(32, HIDDEN), torch.rand(32)
    out, expected = (m(tokens.bfloat16(), counts, probs)[0] for m in (ours, theirs))
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=1e-3)


def test_checkpoints_go_both_ways(world_of_one, tmp_path):
    theirs, ours = pair()
    for source, target in ((theirs, ours), (ours, theirs)):
        folder = tmp_path / type(source).__name__
        folder.mkdir()
        metadata = {"dp_cp_group": compat.parallel_state.get_data_parallel_group(with_context_parallel=True)}
        state = source.sharded_state_dict("mlp.experts.", metadata=metadata)
        compat.dist_checkpointing.save(state, str(folder))
        with torch.no_grad():
            expected = {n: p.clone() for n, p in parts(source)}
            for parameter in target.parameters():
                parameter.zero_()
            wanted = target.sharded_state_dict("mlp.experts.", metadata=metadata)
            wanted = {name: value for name, value in wanted.items() if not name.endswith("_extra_state")}
            loaded = compat.dist_checkpointing.load(wanted, str(folder))
        target.load_state_dict(
            {name.removeprefix("mlp.experts."): value for name, value in loaded.items()}, strict=False
        )
        assert all(torch.equal(value, expected[name]) for name, value in parts(target))


def parts(module):
    return [pair for name, p in module.named_parameters() for pair in expert_parts(f"mlp.experts.{name}", p.detach())]


def test_sizes_that_the_grouped_product_takes():
    assert fits_grouped_product(2048, 640, 2) and fits_grouped_product(96, 128, 4)
    assert not fits_grouped_product(2048, 644, 2) and not fits_grouped_product(6, 8, 4)


def test_the_recipe_chooses():
    odd = ModelConfig(hidden_size=30, expert_ffn_hidden_size=16)
    assert experts_spec(ModelConfig(hidden_size=32, expert_ffn_hidden_size=16), torch.float32, "auto").params["grouped"]
    assert not experts_spec(odd, torch.float32, "auto").params["grouped"]
    assert not experts_spec(ModelConfig(hidden_size=32, expert_ffn_hidden_size=16), torch.float32, "off").params[
        "grouped"
    ]
    with pytest.raises(OptionalPartError, match="multiples of 8 in bfloat16"):
        experts_spec(odd, torch.bfloat16, "require")


def test_names_of_transformer_engines_weights():
    ((name, _),) = expert_parts("decoder.layers.3.mlp.experts.linear_fc2.weight5", torch.zeros(2, 2))
    assert name == "decoder.layers.3.mlp.experts.local_experts.5.linear_fc2.weight"
    ((name, _),) = expert_parts("decoder.layers.3.mlp.shared_experts.linear_fc2.weight", torch.zeros(2, 2))
    assert name == "decoder.layers.3.mlp.shared_experts.linear_fc2.weight"
