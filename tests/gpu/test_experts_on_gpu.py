"""Experts in one grouped product on a GPU, in bf16, against one after the other."""

import pytest
import torch

from parallel import compat
from parallel.experts import StackedExperts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("counts", [[512, 512, 512, 512], [3, 0, 1001, 20], [0, 0, 0, 7]], ids=str)
def test_grouped_equals_one_after_the_other(world_of_one, counts):
    config = compat.TransformerConfig(
        num_layers=1, hidden_size=256, ffn_hidden_size=512, num_attention_heads=2, num_moe_experts=4,
        moe_ffn_hidden_size=96, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False, add_bias_linear=False, params_dtype=torch.bfloat16, bf16=True,
    )  # fmt: skip
    groups = compat.ProcessGroupCollection.use_mpu_process_groups()
    torch.manual_seed(0)
    experts = StackedExperts(4, config, grouped=True, pg_collection=groups).cuda()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    number, sizes = sum(counts), torch.tensor(counts, device="cuda")
    tokens = torch.randn(number, 256, device="cuda", dtype=torch.bfloat16)
    probs, upstream = torch.rand(number, device="cuda"), torch.randn_like(tokens)
    results = []
    for grouped in (True, False):
        experts.grouped = grouped
        experts.zero_grad()
        x = tokens.clone().requires_grad_()
        out, _ = experts(x, sizes, probs)
        out.backward(upstream)
        results.append([out, x.grad, *(parameter.grad.clone() for parameter in experts.parameters())])
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).float().norm() <= 1e-2 * expected.float().norm()
